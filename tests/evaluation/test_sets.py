"""The pictures that evaluations read and keep, and what may be asked for beside a number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from data.sources import SyntheticSource
from evaluation import measure, networks, protocols, references, scores
from evaluation import pictures as pictures_module
from evaluation.distances import Moments
from evaluation.pictures import SourcePictures
from run import evaluate as evaluation
from scripts import evaluate, evaluate_generator, make_reference
from tests.evaluation.conftest import CPU, ONE, SmallInception, metrics, real, sample


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_pictures_read_ahead_are_the_ones_asked_for(workers, monkeypatch):
    """Pieces of unequal lengths, one out of order: the same pictures and moments, whoever decodes them."""
    source = SyntheticSource(size=12, count=61)
    rows = [i * 7 % 61 for i in range(50)]
    pictures = SourcePictures(source, 8, workers, rows)
    ranges = [range(0, 9), range(9, 11), range(30, 39), range(11, 30), range(39, 40), range(40, 50)]
    pictures.expect(ranges)
    for wanted in [*ranges[:3], range(2, 5), *ranges[3:], range(0, 50)]:
        images, labels = pictures.labelled(wanted.start, wanted.stop)
        assert labels.tolist() == [rows[i] % 4 for i in wanted]
        assert all(
            torch.equal(a, pictures.transform.apply_view(source[rows[i]].image, 0))
            for a, i in zip(images, wanted, strict=True)
        )
    monkeypatch.setattr(pictures_module, "READ", 7)  # 50 = 7 x 7 + 1
    made = references.make_statistics(pictures, SmallInception(), ONE, 4)
    whole = Moments.of(SmallInception()(pictures.read(0, 50))["pool"])
    assert made.facts.count == 50
    torch.testing.assert_close(made.moments["pool"], (whole.mean, whole.covariance))


def test_extras_that_cannot_be_had_cost_no_number(monkeypatch):
    """They are left out with their reason; what was measured stays what it is."""
    features = SmallInception()(measure.producer(sample, torch.arange(40) % 10, 1, 8, CPU)(range(40)))
    plain, _ = scores.score(scores.Comparison(protocols.get("torch-fidelity"), SmallInception(), features, real()))
    asked = scores.Comparison(
        protocols.get("torch-fidelity"), SmallInception(), features, real(), replicates=1, infinity=True
    )
    found, left_out = scores.score(asked)
    # subsets of 4 to 9 pictures are too small for ten splits; one replicate has no spread
    assert [s.name for s in found] == ["fid_40", "fid_infinity_from_40", "is_torch_fidelity_40"]
    assert [s.value for s in plain] == [found[0].value, found[2].value] and found[0].interval is None
    assert {"interval of fid_40", "interval of is_40", "is_infinity_from_40"} <= set(left_out)
    assert "at least 10 pictures, got 4" in left_out["is_infinity_from_40"]


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
    monkeypatch.setattr(evaluation, "load_tokenizer", never)
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
