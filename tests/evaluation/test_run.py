"""Evaluations as a whole: any number of ranks and any interruption give the same pictures and the same numbers."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image

from core import dist
from core.dist import World
from core.errors import UserError
from data.sources import SyntheticSource
from evaluation import measure, protocols, references, scores
from evaluation.images import Perturbation, picture_metrics
from evaluation.measure import ByTokenizer, Evaluation
from evaluation.pictures import SourcePictures
from evaluation.work import Work
from run import evaluate as evaluation
from run.load import Loaded, load_config
from run.train import train
from scripts import evaluate, evaluate_generator, make_reference
from tests.conftest import TOY_GENERATOR, TOY_TOKENIZER
from tests.evaluation.conftest import CPU, ONE, OneCode, SmallInception, metrics, real, sample


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
    world = dist.start("cpu")
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
    world.stop()


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

        try:
            generated(ONE, tmp_path, interrupt=interrupt)
        except Killed:
            pass
    again, late = generated(ONE, tmp_path)
    assert len(late) < 70  # some of it was not done again
    assert again.values() == result.values() and all(torch.equal(seen[i], image) for i, image in late.items())


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


# ---------------------------------------------------------------------------------------------------------------------
# Scores
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


def test_d_ar_rounds_its_originals():
    """63 of the 256 levels come back one lower (spec of the evaluation, 6.4)."""
    source = SyntheticSource(size=32, count=1)
    rebuild = ByTokenizer(OneCode(), SourcePictures(source, 32), protocols.get("dar", "reconstruction"), 8, CPU)
    pictures = SourcePictures(source, 32).read(0, 1)
    lost = pictures.int() - next(rebuild(range(1))).original.int()
    assert set(lost.unique().tolist()) <= {0, 1}
    levels = torch.arange(256, dtype=torch.uint8)
    from core.images import to_uint8

    assert int((to_uint8(levels.float() / 255 * 2 - 1, "truncate") != levels).sum()) == 63


def test_what_cannot_be_measured_is_left_out_with_its_reason():
    features = SmallInception()(measure.producer(sample, torch.arange(40) % 10, 1, 8, CPU)(range(40)))
    comparison = scores.Comparison(protocols.get("torch-fidelity"), SmallInception(), features, real())
    found, left_out = scores.score(comparison)
    assert [s.name for s in found] == ["fid_40", "is_torch_fidelity_40"] and found[1].std > 0
    assert set(left_out) == {"kid", "precision", "recall"} and "arr_0" in left_out["precision"]
    comparison = scores.Comparison(
        protocols.get("pytorch-fid"), SmallInception(), features, real(), infinity=True, replicates=5
    )
    (plain, limit), _ = scores.score(comparison)
    assert (
        plain.interval[0] < plain.value < plain.interval[1] and limit.name == "fid_infinity_from_40" and limit.std > 0
    )


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
def test_generator_command(generator_run, tmp_path, small_net, capsys):
    common = [str(generator_run), "--num", "20", "eval.batch=8", "seed=4"]
    assert evaluate_generator.main([*common, "--out", str(tmp_path / "a"), "--write", "npz", "--keep"]) == 0
    out = capsys.readouterr().out
    assert "fid_20" in out and "adm" in out and "48 training pictures" in out
    found = metrics(tmp_path / "a")
    assert {"fid_20", "sfid_20", "is_20"} <= set(found)
    context = json.loads((tmp_path / "a" / "metrics.json").read_text())["context"]
    assert context["seed"] == 4 and context["protocol"] == "adm" and context["labels"] == "balanced"
    assert (
        context["rounding"] == "nearest"
        and context["precision"]["tf32"] is False
        and context["seconds"]["features"] >= 0
    )
    assert context["left_out"]["precision"] and context["label_counts"]["most_per_class"] == 5
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "features.safetensors",
        "metrics.json",
        "report.html",
        "samples.npz",
        "samples.png",
    ]
    assert evaluate_generator.main([*common, "--out", str(tmp_path / "a"), "--write", "npz"]) == 0  # nothing to do
    assert "measured before" in capsys.readouterr().out
    with pytest.raises(UserError, match="different: seed"):
        evaluate_generator.main([*common, "--out", str(tmp_path / "a"), "--write", "npz", "seed=5"])

    assert evaluate_generator.main([*common, "--out", str(tmp_path / "b"), "--write", "png", "eval.batch=3"]) == 0
    stored = np.load(tmp_path / "a" / "samples.npz")["arr_0"]
    assert np.array_equal(stored[11], np.asarray(Image.open(tmp_path / "b" / "samples" / "000011.png")))

    # samples that exist, as .npz and as PNGs, give the same numbers
    assert (
        make_reference.main(
            [
                "synthetic://?size=32&classes=4&count=48",
                str(tmp_path / "train.npz"),
                "--size",
                "32",
                "--for",
                "generation",
                "--keep-pictures",
                "12",
            ]
        )
        == 0
    )
    reference = f"eval.reference={tmp_path / 'train.npz'}"
    for name, samples in (("c", tmp_path / "a" / "samples.npz"), ("d", tmp_path / "b" / "samples")):
        assert evaluate_generator.main([str(samples), reference, "--out", str(tmp_path / name)]) == 0
        again = metrics(tmp_path / name)
        assert again["fid_20"] == pytest.approx(found["fid_20"], rel=1e-6) and "precision_20" in again


def test_a_continued_command_writes_every_picture(generator_run, tmp_path, small_net, monkeypatch):
    """Killed while writing the .npz: the rows that are there stay, the others follow."""

    class Killed(BaseException):
        pass

    calls, original = [], measure.features_of

    def dies(net, images, batch):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return original(net, images, batch)

    command = [str(generator_run), "--num", "40", "--out", str(tmp_path / "a"), "--write", "npz"]
    monkeypatch.setattr(measure, "features_of", dies)
    with pytest.raises(Killed):
        evaluate_generator.main(command)
    assert (tmp_path / "a" / "work" / "samples.npz.partial").is_file()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["work"]
    assert evaluate_generator.main(command) == 0
    assert evaluate_generator.main([*command[:-4], "--out", str(tmp_path / "b"), "--write", "npz"]) == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert np.array_equal(*(np.load(tmp_path / x / "samples.npz")["arr_0"] for x in "ab"))


def test_tokenizer_command(tokenizer_run, tmp_path, small_net, capsys):
    val = "synthetic://?size=40&classes=4&count=24"
    common = [str(tokenizer_run), val, "--workers", "0"]
    assert evaluate.main([*common, "--out", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "rfid_24" in out and "originals" in out and "ssim" in out
    assert {"worst.png", "best.png", "reconstructions.png", "report.html"} <= {
        p.name for p in (tmp_path / "a").iterdir()
    }
    assert "By class" in (tmp_path / "a" / "report.html").read_text()
    # statistics of the originals, made beforehand, give the same rFID
    reference = [val, str(tmp_path / "val.npz"), "--size", "32", "--for", "reconstruction", "--dtype", "float64"]
    assert make_reference.main(reference) == 0
    assert evaluate.main([*common, f"eval.reference={tmp_path / 'val.npz'}", "--out", str(tmp_path / "b")]) == 0
    assert metrics(tmp_path / "b")["rfid_24"] == pytest.approx(metrics(tmp_path / "a")["rfid_24"], rel=1e-9)
    with pytest.raises(UserError, match="describes other pictures"):
        evaluate.main(
            [
                str(tokenizer_run),
                "synthetic://?size=32&classes=4&count=20",
                "--workers",
                "0",
                f"eval.reference={tmp_path / 'val.npz'}",
                "--out",
                str(tmp_path / "c"),
            ]
        )
    assert make_reference.main([val, str(tmp_path / "train.npz"), "--size", "32", "--for", "generation"]) == 0
    with pytest.raises(UserError, match="reference for generation"):
        evaluate.main([*common, f"eval.reference={tmp_path / 'train.npz'}", "--out", str(tmp_path / "d")])
    assert not (tmp_path / "c" / "metrics.json").exists() and not (tmp_path / "d").exists()


def save_folder(folder, images: np.ndarray) -> None:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def test_two_folders(tmp_path, small_net):
    images = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    save_folder(tmp_path / "real", images)
    save_folder(tmp_path / "fake", images // 2)
    np.savez(tmp_path / "fake.npz", arr_0=images // 2)
    for name, fake in (("a", tmp_path / "fake"), ("b", tmp_path / "fake.npz")):
        assert (
            evaluate.main(
                [
                    "--original",
                    str(tmp_path / "real"),
                    "--reconstructed",
                    str(fake),
                    "--workers",
                    "0",
                    "--out",
                    str(tmp_path / name),
                ]
            )
            == 0
        )
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") and "psnr" in metrics(tmp_path / "a")
    np.savez(tmp_path / "short.npz", arr_0=images[:5])
    with pytest.raises(UserError, match="12 pictures and .* has 5"):
        evaluate.main(["--original", str(tmp_path / "real"), "--reconstructed", str(tmp_path / "short.npz")])


def test_torn_and_unequal_pictures_by_name(tmp_path, small_net):
    images = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    save_folder(tmp_path / "real", images)
    save_folder(tmp_path / "fake", images // 2)
    Image.new("L", (10, 24)).save(tmp_path / "real" / "005.png")
    with pytest.raises(UserError, match="005.png is 24x10, the first picture is 24x24"):
        evaluate.main(["--original", str(tmp_path / "real"), "--reconstructed", str(tmp_path / "fake")])
    (tmp_path / "real" / "005.png").write_bytes(b"\x89PNG torn")
    with pytest.raises(UserError, match="005.png.*cannot be read"):
        evaluate.main(["--original", str(tmp_path / "real"), "--reconstructed", str(tmp_path / "fake")])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing.npz"], "no such file"),
        (["eval.protocol=rectoc"], 'mean "rectok"'),
        (["eval.reference=absent.npz"], "there is no absent"),
        (["sample.scale=x"], "sample.scale"),
        (["eval.labels=val"], None),
        (["eval.rounding=up"], "nearest"),
    ],
)
def test_mistakes_are_found_by_check(generator_run, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = arguments if arguments[0] == "nothing.npz" else [str(generator_run), *arguments]
    if message is None:
        assert evaluate_generator.main([*words, "--check"]) == 0
        return
    with pytest.raises(UserError, match=message):
        evaluate_generator.main([*words, "--check"])
    assert not list(tmp_path.iterdir())


def test_one_picture_has_no_covariance(tmp_path, small_net):
    with pytest.raises(UserError, match="at least 2"):
        make_reference.main(["synthetic://?size=32&classes=1&count=1", str(tmp_path / "x.npz"), "--size", "32"])


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


def test_intervals_of_reconstructions(tmp_path, small_net):
    images = np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=images)
    np.savez(tmp_path / "fake.npz", arr_0=images // 4 * 4)
    both = ["--original", str(tmp_path / "real.npz"), "--reconstructed", str(tmp_path / "fake.npz")]
    assert evaluate.main([*both, "--bootstrap", "10", "--infinity", "--out", str(tmp_path / "a")]) == 0
    scores = json.loads((tmp_path / "a" / "metrics.json").read_text())["context"]["scores"]
    low, high = scores["rfid_40"]["interval"]
    # each replicate keeps its pairs: unpaired ones would spread as widely as the pictures themselves
    assert low < scores["rfid_40"]["value"] < high and high - low < 0.2 * scores["rfid_40"]["value"]
    assert "rfid_infinity_from_40" in scores


def test_perturbing_from_the_command_line(tokenizer_run, tmp_path, small_net, monkeypatch, capsys):
    val = ["synthetic://?size=32&classes=4&count=24", "--workers", "0", "--out", str(tmp_path / "a")]
    with pytest.raises(UserError, match="continuous latents"):
        evaluate.main([str(tokenizer_run), *val, "--perturb", "0.5,0.1,4"])
    with pytest.raises(UserError, match="give ALPHA,BETA,DELTA"):
        evaluate.main([str(tokenizer_run), *val, "--perturb", "0.5", "--check"])
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(evaluation, "load_tokenizer", lambda section: Loaded(OneCode(), {}, "one"))
    monkeypatch.setattr(measure, "reconstruction_grid", lambda *a: torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert evaluate.main([str(tokenizer_run), *val, "--perturb", "0.5,0.5,8"]) == 0
    assert {"rfid_24", "pfid_24", "psnr"} <= set(metrics(tmp_path / "a"))
    context = json.loads((tmp_path / "a" / "metrics.json").read_text())["context"]
    assert context["perturbation"] == {"alpha": 0.5, "beta": 0.5, "delta": 8}
    assert "alpha 0.5, beta 0.5, delta 8" in capsys.readouterr().out
    with pytest.raises(UserError, match="different: perturbation"):
        evaluate.main([str(tokenizer_run), *val])
