"""RecTok's trainings: several teachers, statistics of latents, stored moments, and batches that are cut for the GPU."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.images import to_model_range
from core.rng import Draws
from core.schema import SampleConfig
from core.train.parallel import accumulation
from core.weights.encoding import encoding_fingerprint
from generator.adapters import ADAPTERS as GENERATOR_ADAPTERS
from tests.conftest import TOY_GENERATOR, TOY_TOKENIZER
from tokenizer.continuous.stats import load_stats, read_stats, save_stats

# -- teachers ---------------------------------------------------------------------------------------------------------
TEACHERS = [
    "teachers.dinov3={pretrained: false, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2, teacher_train_mode: true}",
    "teachers.dinov2={pretrained: false, model: vit_tiny_patch16_224}",
    "tokenizer.semantic={size: {width: 16, layers: 1, heads: 2}}",
    "objective.weights.semantic=1.0",
]


def test_two_teachers_train_two_semantic_decoders(build_trainer):
    """One of them in the official train mode, whose positions are drawn at random in every step."""
    trainer = build_trainer(TOY_TOKENIZER, *TEACHERS)
    assert trainer.networks["tokenizer"].semantic.teachers == {"dinov3": 16, "dinov2": 192}
    batch = next(trainer.batches(0))
    tokenizer = trainer.networks["tokenizer"]
    before = {n: p.clone() for n, p in tokenizer.named_parameters() if n.startswith("sem_decoders")}
    for _ in range(2):  # the learning rate of the first step is 0
        trainer.train_step(batch)
    moved = [n for n, p in tokenizer.named_parameters() if n in before and not torch.equal(p, before[n])]
    assert {n.split(".")[1] for n in moved} == {"dinov3", "dinov2"}
    assert not any(m.training for m in trainer.task.teachers["dinov3"].modules())
    with pytest.raises(UserError, match="cache_features=false"):
        build_trainer(TOY_TOKENIZER, *TEACHERS, "data.cache_features=true")


# -- latent statistics ------------------------------------------------------------------------------------------------
def official_statistics(path: Path, channels: int = 8, keys: tuple[str, ...] = ("rectok",)) -> dict:
    """A stats.pkl as the official code writes it."""
    entry = {
        "single": (torch.tensor(0.25), torch.tensor(2.0)),
        "channel": (torch.arange(2.0 * channels), torch.arange(2.0 * channels) + 1),
    }
    path.write_bytes(pickle.dumps(dict.fromkeys(keys, entry)))
    return entry


def test_official_statistics_are_read_without_running_code(tmp_path):
    path = tmp_path / "stats.pkl"
    entry = official_statistics(path)
    stats = read_stats(str(path), "any tokenizer")
    assert torch.equal(stats.mean, entry["channel"][0][:8]) and torch.equal(stats.std, entry["channel"][1][:8])
    assert stats.single_mean == 0.25 and stats.single_std == 2.0

    official_statistics(path, keys=("rectok_BB", "other"))
    with pytest.raises(UserError, match="choose one with .*#KEY. Known: other, rectok_BB"):
        read_stats(str(path))
    with pytest.raises(UserError, match='Did you mean "rectok_BB"'):
        read_stats(f"{path}#rectok_B")
    assert torch.equal(read_stats(f"{path}#rectok_BB").mean, entry["channel"][0][:8])
    (tmp_path / "#1").mkdir()
    other = path.rename(tmp_path / "#1" / path.name)  # a folder may be called so
    assert torch.equal(read_stats(f"{other}#rectok_BB").mean, entry["channel"][0][:8])
    save_stats(tmp_path / "#1" / "ours.safetensors", read_stats(f"{other}#rectok_BB"), "")
    assert read_stats(str(tmp_path / "#1" / "ours.safetensors")).images == 0

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path.write_bytes(pickle.dumps({"rectok": Evil()}))
    with pytest.raises(UserError, match=f"{path}: not a file of latent statistics"):
        read_stats(str(path))
    # code inside the bytes of a storage, which torch's own pickle support would load freely
    inner = io.BytesIO()
    torch.save(Evil(), inner)
    storage = (torch.storage._load_from_bytes, (inner.getvalue(),))
    path.write_bytes(pickle.dumps({"rectok": type("Storage", (), {"__reduce__": lambda self: storage})()}))
    with pytest.raises(UserError, match="not a file of latent statistics"):
        read_stats(str(path))
    path.write_bytes(b"\x80garbage")
    with pytest.raises(UserError, match="not a whole PyTorch file"):
        read_stats(str(path))
    assert not (tmp_path / "ran").exists()


def test_statistics_are_found_beside_the_weights_and_checked(released_tokenizer, tmp_path):
    from run.load import read_tokenizer

    place = tmp_path / "toy.latent_stats.safetensors"
    tokenizer = read_tokenizer(released_tokenizer)
    assert not tokenizer.module.latent_stats_known
    official_statistics(tmp_path / "stats.pkl")
    save_stats(place, read_stats(str(tmp_path / "stats.pkl")), tokenizer.fingerprint)
    tokenizer = read_tokenizer(released_tokenizer).module
    assert tokenizer.latent_stats_known and tokenizer.latent_std.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not read_tokenizer({**released_tokenizer, "latent_stats": "none"}).module.latent_stats_known
    encoding = encoding_fingerprint(tokenizer)
    save_stats(place, read_stats(str(tmp_path / "stats.pkl")), "of-another-decoder", encoding)
    assert read_tokenizer(released_tokenizer).module.latent_stats_known
    save_stats(place, read_stats(str(tmp_path / "stats.pkl")), "of-something-else", "of-something-else")
    with pytest.raises(UserError, match="computed with tokenizer weights of-something-else"):
        read_tokenizer(released_tokenizer)
    place.unlink()
    official_statistics(tmp_path / "stats.pkl", channels=4)
    with pytest.raises(UserError, match="4 values for 8 channels"):
        read_tokenizer({**released_tokenizer, "latent_stats": str(tmp_path / "stats.pkl")})


def test_statistics_program(tokenizer_run, tmp_path):
    """Measured on a subset of held-out pictures, and converted from the official file."""
    from scripts import latent_stats

    out, data = tmp_path / "s.safetensors", "synthetic://?size=32&classes=4&count=20"
    assert latent_stats.main([str(tokenizer_run), data, "--num", "6", "--split", "val", "--out", str(out)]) == 0
    assert load_stats(out).images == 6
    official_statistics(tmp_path / "stats.pkl")
    assert latent_stats.main([str(tokenizer_run), "--from", str(tmp_path / "stats.pkl"), "--out", str(out)]) == 0
    assert load_stats(out).channel_mean.tolist() == list(range(16))
    with pytest.raises(UserError, match="give --out FILE"):
        latent_stats.main([str(tokenizer_run), data])


def test_training_uses_the_statistics_that_are_named(build_trainer, tokenizer_run, tmp_path):
    official_statistics(tmp_path / "stats.pkl")
    toy = [TOY_GENERATOR, f"tokenizer.weights={tokenizer_run}"]
    named = build_trainer(*toy, f"tokenizer.latent_stats={tmp_path}/stats.pkl")
    assert named.task.tokenizer.latent_std.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not list((tmp_path / "cache").glob("latent_stats_*"))
    few = build_trainer(
        *toy, "data.stats_images=3", "data.stats_split=val", "data.val_url=synthetic://?size=32&classes=4"
    )
    assert load_stats(*(tmp_path / "cache").glob("latent_stats_*")).images == 3
    assert torch.equal(few.task.constants()["std"], few.task.tokenizer.latent_std)


def test_a_generator_refuses_another_tokenizer_and_missing_statistics(
    generator_run, tokenizer_run, released_tokenizer, tmp_path
):
    from run.load import Pair, read_generator, read_tokenizer

    tokenizer = read_tokenizer({"weights": str(tokenizer_run)})
    generator = read_generator(str(generator_run), tokenizer).module
    assert tokenizer.module.latent_stats_known
    raw = read_tokenizer({"weights": str(tokenizer_run), "use_ema": False})
    with pytest.raises(UserError, match=f"belong to another tokenizer. Use {tokenizer_run}"):
        read_generator(str(generator_run), raw)

    path = tmp_path / "dit.pth"
    torch.save({"model": GENERATOR_ADAPTERS["dit_dh"].restore(generator)}, path)
    fresh = read_tokenizer(released_tokenizer)
    pair = Pair(fresh, read_generator(str(path), fresh))
    with pytest.raises(UserError, match="without the statistics.*scripts.latent_stats TOKENIZER"):
        pair.task(4, SampleConfig())
    fresh.module.set_latent_stats(0.5, 2.0)
    assert pair.task(4, SampleConfig()).generator is pair.generator.module


# -- official pre-tokenised moments -----------------------------------------------------------------------------------
@pytest.fixture
def moment_folder(tokenizer_run, tmp_path):
    """Eight pictures in a list, and the moments of each and of its mirror image as the official loader wants them."""
    from data.transforms import Transform
    from run.load import read_tokenizer

    tokenizer = read_tokenizer({"weights": str(tokenizer_run)}).module
    plain = Transform(image_size=32)
    lines = []
    for number in range(8):
        key = f"n{number % 2}/{number}.JPEG"
        picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        for folder in ("pictures", "cached"):
            (tmp_path / folder / key).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "pictures" / key, quality=95)
        image = plain.apply_view(Image.open(tmp_path / "pictures" / key).convert("RGB"), 0)
        both = torch.stack((image, image.flip(-1)))
        with torch.no_grad():
            moments = tokenizer.precompute(to_model_range(both)).numpy()
        np.savez(tmp_path / "cached" / f"{key}.npz", moments=moments[0], moments_flip=moments[1])
        lines.append(f"{key} {number % 2}")
    (tmp_path / "train.txt").write_text("\n".join(lines))
    return tmp_path / "cached"


def test_official_moments_train_like_the_pictures(build_trainer, moment_folder, tokenizer_run, tmp_path):
    toy = [
        TOY_GENERATOR,
        f"tokenizer.weights={tokenizer_run}",
        f"data.url=list://{tmp_path}/train.txt?root={tmp_path}/pictures",
    ]
    online, stored = (build_trainer(*toy, *more) for more in ([], [f"data.moments={moment_folder}"]))
    batches = [next(trainer.batches(0)) for trainer in (online, stored)]
    assert batches[1].images is None and batches[1].stored.shape == (8, 4, 16)
    assert torch.equal(batches[0].labels, batches[1].labels)
    losses = []
    for trainer, batch in zip((online, stored), batches):
        phase = next(trainer.task.phases(trainer.networks, batch, Draws(0, batch.positions), None))
        losses.append(phase.loss.total.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    np.savez(moment_folder / "n0" / "0.JPEG.npz", moments=np.zeros((4, 8)), moments_flip=np.zeros((4, 8)))
    with pytest.raises(UserError, match=r"0.JPEG.npz: moments is float64 \[4, 8\].*\[4, 16\]"):
        build_trainer(*toy, f"data.moments={moment_folder}")
    (moment_folder / "n0" / "0.JPEG.npz").unlink()
    with pytest.raises(UserError, match="0.JPEG.npz: no such file"):
        build_trainer(*toy, f"data.moments={moment_folder}")


# -- the batch and the GPUs -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "per_rank, largest, parts",
    [(1024, 64, 16), (128, 64, 2), (64, 64, 1), (32, 64, 1), (96, 64, 2), (8, 0, 1), (7, 3, 7), (8, 5, 2)],
)
def test_a_rank_cuts_its_share_evenly(per_rank, largest, parts):
    assert accumulation(per_rank, largest) == parts
    assert per_rank % parts == 0 and (not largest or per_rank // parts <= largest)


def test_out_of_memory_names_the_setting_that_helps(train_main, tmp_path, monkeypatch):
    from core.train.trainer import Trainer

    def full(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB.")

    monkeypatch.setattr(Trainer, "train_step", full)
    code, _, err = train_main(TOY_TOKENIZER, "train.device=cpu", f"work_dir={tmp_path}", "train.micro_batch=5")
    assert (
        code == 2
        and "does not hold 4 picture(s) at once. Set train.micro_batch=2" in err
        and len(err.splitlines()) == 1
    )
