"""run_eval_generator.sh and run_eval_tokenizer.sh from the words to the files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.schema import EvalConfig
from data.sources import SyntheticSource
from evaluation import measure, networks, protocols, references
from evaluation.distances import Moments
from evaluation.pictures import SourcePictures
from run import evaluate as evaluation
from run.load import Loaded
from scripts import evaluate, evaluate_generator, make_reference
from tests.evaluation.conftest import ONE, OneCode, SmallInception, metrics


def save_folder(folder, images: np.ndarray) -> None:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


# ---------------------------------------------------------------------------------------------------------------------
# Samples
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
        and context["precision"]["pictures"] == context["job"]["precision"] == "fp32"
        and context["seconds"]["features"] >= 0
    )
    page = re.sub(r"<[^>]+>", " ", (tmp_path / "a" / "report.html").read_text())
    assert all(
        re.search(rf"{name}\s+{value}\s", page)
        for name, value in (("sample.scale", 1.5), ("precision.pictures", "fp32"))
    )
    assert context["left_out"]["precision"] and context["label_counts"]["most_per_class"] == 5
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "features.safetensors",
        "metrics.json",
        "report.html",
        "samples.npz",
        "samples.png",
    ]
    (tmp_path / "a" / "work" / "samples").mkdir(parents=True)  # of one that was killed just before it deleted them
    assert evaluate_generator.main([*common, "--out", str(tmp_path / "a"), "--write", "npz"]) == 0  # nothing to do
    assert "measured before" in capsys.readouterr().out and not (tmp_path / "a" / "work").exists()
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


def test_what_is_left_out_is_told(tmp_path, capsys, small_net):
    """Of samples, and of both sides of a comparison; folders beside samples are not looked into."""
    images = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    for name in ("original", "recon"):
        save_folder(tmp_path / name, images)
    (tmp_path / "original" / "notes.md").touch()
    (tmp_path / "recon" / "12.avif").touch()
    save_folder(tmp_path / "recon" / "sheets", images[:1])
    words = ["--original", str(tmp_path / "original"), "--reconstructed", str(tmp_path / "recon")]
    assert evaluate.main([*words, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/original: not read: 1 .md (notes.md)\n" in out
    assert f"{tmp_path}/recon: not read: 1 .avif (12.avif); 1 folder(s) beside the pictures (sheets)\n" in out
    reference = str(tmp_path / "r.npz")
    assert make_reference.main([str(tmp_path / "original"), reference]) == 0
    assert "original: not read: 1 .md" in capsys.readouterr().out
    words = [str(tmp_path / "recon"), f"eval.reference={reference}", "--out", str(tmp_path / "o")]
    assert evaluate_generator.main(words) == 0
    assert "recon: not read: 1 .avif" in capsys.readouterr().out


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


# ---------------------------------------------------------------------------------------------------------------------
# Reconstructions
# ---------------------------------------------------------------------------------------------------------------------
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


def test_rounding_of_reconstructions(tokenizer_run, tmp_path, small_net):
    """eval.rounding takes the place of the protocol's, is told, and makes another job; what has no effect is refused."""
    command = [
        str(tokenizer_run),
        "synthetic://?size=40&classes=4&count=24",
        "--workers",
        "0",
        "--out",
        str(tmp_path / "a"),
    ]
    assert evaluate.main(command) == 0
    exact = metrics(tmp_path / "a")
    with pytest.raises(UserError, match="another evaluation .different: rounding"):
        evaluate.main([*command, "eval.rounding=truncate"])
    assert evaluate.main([*command, "eval.rounding=truncate", "--again"]) == 0
    record = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert record["context"]["rounding"] == "truncate" and metrics(tmp_path / "a")["psnr"] != exact["psnr"]
    images = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images)
    there, both = (
        str(tmp_path / "x.npz"),
        ["--original", str(tmp_path / "x.npz"), "--reconstructed", str(tmp_path / "x.npz")],
    )
    for program, words, why in (
        (
            evaluate,
            [*command, "eval.labels=random"],
            "eval.labels=random changes nothing here: classes are asked of gen",
        ),
        (
            evaluate,
            [*both, "eval.rounding=nearest"],
            "eval.rounding=nearest changes nothing here: the pictures are there",
        ),
        (evaluate_generator, [there, "eval.rounding=nearest"], "eval.rounding=nearest changes nothing here"),
        (
            evaluate_generator,
            [there, "eval.labels=val"],
            "eval.labels=val changes nothing here: the pictures are there",
        ),
    ):
        for check in ([], ["--check"]):
            with pytest.raises(UserError, match=why):
                program.main([*words, *check])


def test_samples_sorted_by_class_are_told(tmp_path, small_net):
    """Chunks of ADM's Inception Score take pictures in their order; classes are those of folders, or arr_1."""
    images = np.random.default_rng(0).integers(0, 256, (5040, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "sorted.npz", images, np.arange(5040) // 504)
    np.savez(tmp_path / "turn.npz", images, np.arange(5040) % 10)
    np.savez(tmp_path / "r.npz", arr_0=images[:300])
    for name, expected in (("sorted", True), ("turn", False)):
        words = [str(tmp_path / f"{name}.npz"), f"eval.reference={tmp_path / 'r.npz'}", "--out", str(tmp_path / name)]
        assert evaluate_generator.main(words) == 0
        entries = json.loads((tmp_path / name / "metrics.json").read_text())["context"]["scores"]
        assert ("sorted by label" in entries["is_5040"].get("note", "")) == expected


def test_a_reference_of_a_protocol_is_about_imagenet(monkeypatch):
    """CIFAR-10's training pictures are 50,000 too."""
    file = "val_fid_statistics_file_256.npz"
    monkeypatch.setattr(references, "find_reference", lambda name: Path("stats") / name)
    monkeypatch.setattr(
        references, "load_reference", lambda path, *_: references.Statistics({}, references.Facts(), path.name)
    )
    settings, protocol = EvalConfig(), protocols.get("rectok", "reconstruction")
    for count, classes, expected in (
        (50_000, 1000, f"stats/{file}"),
        (50_000, 1, f"stats/{file}"),
        (50_000, 10, "originals"),
        (5_000, 1000, "originals"),
    ):
        pictures = SourcePictures(SyntheticSource(size=8, count=count, classes=classes), 256)
        assert evaluation.reference_for(settings, protocol, SmallInception(), pictures, ONE)[0] == expected
    asked = EvalConfig(reference=file)
    assert evaluation.reference_for(asked, protocol, SmallInception(), pictures, ONE)[0] == f"stats/{file}"


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
    monkeypatch.setattr(evaluation, "read_tokenizer", lambda section, world: Loaded(OneCode(), {}, "one"))
    monkeypatch.setattr(measure, "reconstruction_grid", lambda *a: torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert evaluate.main([str(tokenizer_run), *val, "--perturb", "0.5,0.5,8"]) == 0
    assert {"rfid_24", "pfid_24", "psnr"} <= set(metrics(tmp_path / "a"))
    context = json.loads((tmp_path / "a" / "metrics.json").read_text())["context"]
    assert context["perturbation"] == {"alpha": 0.5, "beta": 0.5, "delta": 8}
    assert "alpha 0.5, beta 0.5, delta 8" in capsys.readouterr().out
    with pytest.raises(UserError, match="different: perturbation"):
        evaluate.main([str(tokenizer_run), *val])


def test_written_reconstructions_and_flat_folders(tokenizer_run, tmp_path, small_net, capsys):
    """What --write kept is what was measured; originals and references may be folders without classes."""
    source = SyntheticSource(size=32, count=18)
    (tmp_path / "flat").mkdir()
    for i in range(18):
        source[i].image.save(tmp_path / "flat" / f"{i}.png")  # 2.png comes before 10.png
    common = [str(tokenizer_run), f"folder://{tmp_path / 'flat'}", "--workers", "0", "eval.batch=5"]
    for kind in ("npz", "png"):
        assert evaluate.main([*common, "--write", kind, "--out", str(tmp_path / kind)]) == 0
    with np.load(tmp_path / "npz" / "reconstructions.npz") as file:
        kept = file["arr_0"]
    written = sorted((tmp_path / "png" / "reconstructions").iterdir())
    assert kept.shape == (18, 32, 32, 3) and kept.dtype == np.uint8
    assert np.array_equal(kept, np.stack([np.asarray(Image.open(p)) for p in written]))
    measured = metrics(tmp_path / "npz")
    arrays = np.stack([np.asarray(source[i].image) for i in range(18)])
    np.savez(tmp_path / "val.npz", arr_0=arrays)
    assert evaluate.main([common[0], str(tmp_path / "val.npz"), "eval.batch=5", "--out", str(tmp_path / "array")]) == 0
    assert metrics(tmp_path / "array") == measured
    # samples may be named by a data URL
    for target in (common[1], str(tmp_path / "flat")):
        words = [target, f"eval.reference={tmp_path / 'flat.npz'}", "--out", str(tmp_path / f"g{len(target)}")]
        if not (tmp_path / "flat.npz").is_file():
            assert make_reference.main([common[1], str(tmp_path / "flat.npz"), "--workers", "0"]) == 0
        assert evaluate_generator.main(words) == 0
        assert abs(metrics(tmp_path / f"g{len(target)}")["fid_18"]) < 1e-5
    (tmp_path / "flat.npz").unlink()
    # a reference of the first pictures is one for the first pictures
    part = ["--num", "7", "--workers", "0"]
    assert make_reference.main([common[1], str(tmp_path / "7.npz"), "--size", "32", *part]) == 0
    assert (
        evaluate.main([*common[:2], f"eval.reference={tmp_path / '7.npz'}", *part, "--out", str(tmp_path / "7")]) == 0
    )
    assert "rfid_7" in metrics(tmp_path / "7")
    for recon in (tmp_path / "npz" / "reconstructions.npz", tmp_path / "png" / "reconstructions"):
        words = [
            "--original",
            str(tmp_path / "flat"),
            "--reconstructed",
            str(recon),
            "--out",
            str(tmp_path / recon.suffix / "o"),
        ]
        assert evaluate.main(words) == 0
        again = metrics(tmp_path / recon.suffix / "o")
        for name in ("rfid_18", "psnr", "ssim"):
            assert again[name] == pytest.approx(measured[name], rel=1e-6), name
    for name in ("flat", "npz/reconstructions.npz"):
        assert (
            make_reference.main([str(tmp_path / name), str(tmp_path / f"{Path(name).stem}.npz"), "--workers", "0"]) == 0
        )
    assert "18 pictures of 32 px" in capsys.readouterr().out
    values = [references.load(tmp_path / f"{name}.npz").moments["pool"] for name in ("flat", "reconstructions")]
    taken = [Moments.of(SmallInception()(torch.from_numpy(a).permute(0, 3, 1, 2))["pool"]) for a in (arrays, kept)]
    for (mean, covariance), wanted in zip(values, taken):
        torch.testing.assert_close(mean, wanted.mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(covariance, wanted.covariance)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing.npz"], "no such file"),
        (["eval.protocol=rectoc"], 'mean "rectok"'),
        (["eval.reference=absent.npz"], "there is no absent"),
        (["sample.scale=x"], "sample.scale"),
        (["eval.labels=random", "eval.network=lite0"], None),
        (["eval.labels=val"], "needs the validation set"),
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


@pytest.mark.parametrize(
    "words, message",
    [
        (["--bootstrap", "1"], "--bootstrap 1: an interval needs at least 2 replicates"),
        (["--bootstrap", "-3"], "--bootstrap -3"),
        (["--infinity", "--num", "12"], "--infinity: .* needs at least 20, there are 12"),
    ],
)
def test_extras_that_mean_nothing_are_refused_before_anything_is_measured(tmp_path, monkeypatch, words, message):
    def never(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr(networks, "feature_net", never)
    monkeypatch.setattr(evaluation, "read_tokenizer", never)
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((24, 16, 16, 3), np.uint8))
    for command, target in (
        (evaluate_generator, [str(tmp_path / "s.npz")]),
        (evaluate, [str(tmp_path / "no_weights"), "synthetic://?size=32&count=24"]),
        (evaluate, ["--original", str(tmp_path / "s.npz"), "--reconstructed", str(tmp_path / "s.npz")]),
    ):
        if command is evaluate_generator and "--num" in words:
            target.append("eval.num_images=12")
        with pytest.raises(UserError, match=message):
            command.main([*target, *words, "--out", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()
