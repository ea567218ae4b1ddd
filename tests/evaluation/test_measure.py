"""Measuring on one rank and on two, interrupted, in other batches; while training."""

from __future__ import annotations

import contextlib
import json
import os
import random
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as multiprocessing

from core import dist
from core.dist import World
from core.errors import UserError
from core.images import through_model_range
from data.sources import SyntheticSource
from evaluation import measure, protocols, references
from evaluation.chunks import Work
from evaluation.images import Perturbation, picture_metrics
from evaluation.measure import ByTokenizer, Evaluation
from evaluation.pictures import ArrayPictures, SourcePictures
from run.load import load_config
from run.train import train
from tests.conftest import TOY_GENERATOR, TOY_TOKENIZER
from tests.evaluation.conftest import CPU, ONE, OneCode, SmallInception, real, sample


def generated(world: World, folder=None, batch: int = 8, interrupt=lambda: None, count: int = 70):
    """(result, pictures seen by this rank)"""
    net, protocol, seen = SmallInception(), protocols.get("adm"), {}
    produce = measure.producer(sample, torch.arange(count) % 10, 3, batch, CPU, protocol.rounding)

    class Keep:
        def write(self, start, images):
            interrupt()
            seen.update({start + i: image for i, image in enumerate(images)})

        def flush(self):
            pass

    work = Work(count, world, folder, {"seed": 3})
    real_side = net(measure.producer(sample, torch.arange(30) % 10, 7, 8, CPU)(range(30)))
    how = Evaluation(protocol, net, world, batch, reference=real(), real=real_side)
    result = how.of_samples(produce, work, (Keep(),))
    return result, seen


def rebuilt(world: World, batch: int = 8):
    pictures = SourcePictures(SyntheticSource(size=40, count=50), 32)
    protocol = replace(
        protocols.get("adm", "reconstruction"),
        reconstruction=("fid", "psnr", "ssim", "codebook"),
        ssim=("ssim", "ssim_gauss"),
    )
    return reconstruct(pictures, protocol, world, batch)


def reconstruct(pictures, protocol, world: World, batch: int, perturb: Perturbation | None = None):
    how = Evaluation(protocol, SmallInception(), world, batch, metrics=picture_metrics(protocol, CPU)[0])
    rebuild = ByTokenizer(OneCode(), pictures, protocol, batch, CPU, perturb=perturb)
    with Work(len(pictures), world) as work:
        return how.of_reconstructions(rebuild, work)


def summed(world: World):
    pictures = SourcePictures(SyntheticSource(size=32, count=90), 32)
    return references.make_statistics(pictures, SmallInception(), world, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------------
def _rank(rank: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(20_000 + int(folder.encode().hex(), 16) % 20_000),
    )
    torch.set_num_threads(1)
    with dist.start("cpu") as world:
        result, seen = generated(world)
        torch.save(seen, f"{folder}/seen_{rank}.pt")
        on_disk, _ = generated(world, f"{folder}/work")
        recon, stats = rebuilt(world), summed(world)

        def one_fails() -> None:
            if rank == 1:
                raise UserError("rank 1 has no luck")

        with pytest.raises(UserError, match="no luck" if rank == 1 else "rank 1 failed"):
            world.together(one_fails)
        if rank == 0:
            values = {
                "generation": result.values(),
                "on disk": on_disk.values(),
                "reconstruction": recon.values(),
                "moments": {tap: float(c.sum()) for tap, (_, c) in stats.moments.items()},
            }
            with open(f"{folder}/values.json", "w") as file:
                json.dump(values, file)


def test_two_ranks_see_and_measure_what_one_does(tmp_path):
    multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    values = json.loads((tmp_path / "values.json").read_text())
    result, seen = generated(ONE)
    parts = [torch.load(tmp_path / f"seen_{rank}.pt") for rank in (0, 1)]
    assert all(parts) and sorted(i for part in parts for i in part) == list(range(70))
    assert all(torch.equal(seen[i], image) for part in parts for i, image in part.items())
    assert set(result.values()) == {"fid_70", "sfid_70", "is_70", "precision_70", "recall_70"}
    for name, found in (
        ("generation", result.values()),
        ("on disk", result.values()),
        ("reconstruction", rebuilt(ONE).values()),
        ("moments", {tap: float(c.sum()) for tap, (_, c) in summed(ONE).moments.items()}),
    ):
        assert values[name] == pytest.approx(found, rel=1e-9, abs=1e-9), name


def test_batch_size_changes_nothing():
    (first, seen), (second, others) = generated(ONE), generated(ONE, batch=70)
    assert all(torch.equal(seen[i], others[i]) for i in range(70))
    assert first.values() == pytest.approx(second.values(), rel=1e-4)


def test_killed_at_three_points_gives_the_same(tmp_path):
    class Killed(BaseException):
        pass

    result, seen = generated(ONE)
    chance = random.Random(1)
    for _ in range(3):
        left = chance.randint(0, 2)

        def interrupt():
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        with contextlib.suppress(Killed):
            generated(ONE, tmp_path, interrupt=interrupt)
    again, late = generated(ONE, tmp_path)
    assert len(late) < 70  # some of it was not done again
    assert again.values() == result.values() and all(torch.equal(seen[i], image) for i, image in late.items())


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
def test_draws_of_a_picture_do_not_depend_on_its_neighbours():
    produce = measure.producer(sample, torch.arange(20), 5, 4, CPU)
    assert torch.equal(produce(range(0, 20))[7], produce(range(7, 8))[0])
    assert not torch.equal(produce(range(7, 8)), measure.producer(sample, torch.arange(20), 6, 4, CPU)(range(7, 8)))
    assert torch.equal(measure.producer(sample, torch.arange(20), 5, 64, CPU)(range(20)), produce(range(20)))


def test_pixels_that_are_not_finite_are_no_picture():
    def broken(labels, draws):
        return sample(labels, draws) / (labels - 9)[:, None, None, None]  # picture 9 divides by zero

    with pytest.raises(UserError, match="between 8 and 11 has pixels that are not finite"):
        measure.producer(broken, torch.arange(20), 5, 4, CPU)(range(0, 20))


def test_d_ar_rounds_its_originals():
    """63 of the 256 levels come back one lower (spec of the evaluation, 6.4), for rFID alone: PSNR and SSIM compare with
    the originals (4.2, 4.3)."""
    levels = torch.arange(256, dtype=torch.uint8)
    lowered = through_model_range(levels, "truncate")
    assert int((lowered == levels - 1).sum()) == 63 and int((lowered == levels).sum()) == 193
    pictures = ArrayPictures(levels.view(1, 1, 16, 16).expand(6, 3, 16, 16).contiguous())
    dar, plain = (
        replace(protocols.get("dar", "reconstruction"), original_rounding=rounding) for rounding in ("truncate", None)
    )
    pairs = measure.ByPairs(pictures, pictures, 4, CPU, "truncate")
    pair = next(pairs(range(2)))
    assert torch.equal(pair.original[0, 0].flatten(), levels) and torch.equal(pair.rounded[1, 2].flatten(), lowered)
    how = Evaluation(dar, SmallInception(), ONE, 4, metrics=picture_metrics(dar, CPU)[0])
    found = how.of_reconstructions(pairs, Work(6, ONE)).values()
    assert found["psnr"] == 100 and found["ssim_llamagen"] == 1 and found["rfid_6"] > 1e-6  # equal but for the levels

    source = SourcePictures(SyntheticSource(size=32, count=40), 32)
    found, exact = (reconstruct(source, protocol, ONE, 8).values() for protocol in (dar, plain))
    assert found["psnr"] == exact["psnr"] and found["ssim_llamagen"] == exact["ssim_llamagen"]
    assert found["rfid_40"] != exact["rfid_40"]
    made = references.make_statistics(source, SmallInception(), ONE, 8, facts=references.Facts(rounding="truncate"))
    protocol = replace(dar, reconstruction=("fid",))
    how = Evaluation(protocol, SmallInception(), ONE, 8, reference=made)
    with Work(40, ONE) as work:
        stored = how.of_reconstructions(ByTokenizer(OneCode(), source, protocol, 8, CPU), work).values()
    assert stored["rfid_40"] == pytest.approx(found["rfid_40"], rel=1e-9)
    facts = {"network": "inception", "preprocess": "tf1", "image_size": 32, "originals": source}
    made.check(purpose="reconstruction", rounding="truncate", **facts)
    with pytest.raises(UserError, match='originals rounded by "truncate", and the protocol .* as they are'):
        made.check(purpose="reconstruction", **facts)


# ---------------------------------------------------------------------------------------------------------------------
# Reconstructions
# ---------------------------------------------------------------------------------------------------------------------
def test_reconstruction_scores():
    result = rebuilt(ONE)
    values = result.values()
    assert {"rfid_50", "psnr", "ssim", "ssim_gauss", "codebook_usage_mean", "codebook_perplexity_peak"} <= set(values)
    assert values["codebook_usage_mean"] < values["codebook_usage_peak"] <= 1 or values["codebook_usage_peak"] <= 1
    psnr = next(s for s in result.scores if s.name == "psnr")
    assert psnr.interval[0] < psnr.value < psnr.interval[1] and psnr.protocol == "adm" and psnr.reference == "originals"
    assert result.per_picture["psnr"].shape == (50,)


def test_pfid_is_measured_beside_rfid(tmp_path):
    """Under its own name, with alpha, beta and delta; rFID and everything else stay what they are."""
    pictures = SourcePictures(SyntheticSource(size=40, count=50), 32)
    protocol = replace(protocols.get("adm", "reconstruction"), reconstruction=("fid", "sfid", "psnr", "codebook"))

    def measured(perturb, batch=8):
        return reconstruct(pictures, protocol, ONE, batch, perturb)

    plain = measured(None)
    mild, none, strong = (measured(Perturbation(0.9, beta, delta)) for beta, delta in ((0.3, 4), (0.9, 1), (0.9, 16)))
    assert set(mild.values()) - set(plain.values()) == {"pfid_50"}
    assert {k: v for k, v in mild.values().items() if k != "pfid_50"} == plain.values()
    assert none.values()["pfid_50"] == pytest.approx(plain.values()["rfid_50"])  # the nearest code is itself
    values = [mild.values()["pfid_50"], strong.values()["pfid_50"], plain.values()["rfid_50"]]
    assert len({round(v, 3) for v in values}) == 3
    note = next(s.note for s in mild.scores if s.name == "pfid_50")
    assert note.startswith("alpha 0.9, beta 0.3, delta 4.")
    again = measured(Perturbation(0.9, 0.3, 4), batch=50)
    assert again.values()["pfid_50"] == pytest.approx(mild.values()["pfid_50"], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# While training
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_online_evaluation(kind, tokenizer_run, tmp_path, small_net):
    from core.train.run import read_metrics

    overrides = [
        f"work_dir={tmp_path}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "train.device=cpu",
        "train.duration=4step",
        "train.eval_every=2step",
        "eval.num_images=20",
        "data.val_url=synthetic://?size=32&classes=4&count=16&seed=v",
    ]
    overrides += [f"tokenizer.weights={tokenizer_run}"] if kind == "generator" else []
    config = load_config(TOY_GENERATOR if kind == "generator" else TOY_TOKENIZER, overrides)
    assert train(config) == 0
    records = [r for r in read_metrics(config.run_dir / "metrics.jsonl") if any(k.startswith("eval/") for k in r)]
    assert [r["step"] for r in records] == [2, 4]
    wanted = {"eval/fid_20", "eval/is_20"} if kind == "generator" else {"eval/rfid_16", "eval/psnr", "eval/ssim"}
    assert wanted <= set(records[0])
