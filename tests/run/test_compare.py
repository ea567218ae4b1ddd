"""run/compare.py: tokenizers and generators side by side, from the command line to a page."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

from core.errors import UserError
from core.weights import released
from evaluation.comparison import Difference
from evaluation.images import interval_of
from run import compare as module
from run.load import read_tokenizer
from run.speeds import speeds
from scripts import compare
from tests.conftest import finished_run, toy

DATA = ("--data", "synthetic://?size=32&classes=4&count=24", "--workers", "0", "--bootstrap", "2")


@pytest.fixture(scope="module")
def fqgan(tmp_path_factory):
    return finished_run(tmp_path_factory, toy("fqgan_tokenizer"))


def numbers(folder) -> dict[tuple[str, str], float]:
    rows = csv.DictReader((folder / "compare.csv").read_text().splitlines())
    return {(row["name"], row["metric"]): float(row["value"]) for row in rows}


def test_tokenizers(fqgan, tokenizer_run, tmp_path, capsys):
    out = tmp_path / "out"
    words = [str(fqgan), str(tokenizer_run), *DATA, "--seconds", "0.01", "--out", str(out)]
    assert compare.main(words) == 0
    found, page = numbers(out), (out / "report.html").read_text()
    a, b = module.names_of([str(fqgan), str(tokenizer_run)])
    record = json.loads((out / a.replace("/", "-") / "metrics.json").read_text())
    assert found[a, "psnr"] == record["metrics"]["psnr"]["value"]
    assert 0 < found[a, "entropy_coded_bpp"] <= found[a, "bpp"] and (b, "entropy_coded_bpp") not in found
    assert not any(metric.startswith("rfid") for _, metric in found), "only FID's own network gives one"
    assert any(metric.startswith("rfd_lite0") for _, metric in found)
    pictures = module.load_file(out / a.replace("/", "-") / module.PER_PICTURE)
    assert pictures["picture/psnr"].mean() == pytest.approx(found[a, "psnr"])
    assert record["context"]["scores"]["psnr"]["interval"] == pytest.approx(interval_of(pictures["picture/psnr"]))
    rows = list(csv.DictReader((out / "differences.csv").read_text().splitlines()))
    metric = next(metric for _, metric in found if metric.startswith("rfd_lite0"))
    row = {row["metric"]: row for row in rows}[metric]
    assert {"psnr", metric} < {row["metric"] for row in rows} and (row["name"], row["minus"]) == (b, a)
    assert float(row["value"]) == found[b, metric] - found[a, metric] and float(row["low"]) < float(row["high"])
    assert metric.replace("_", r"\_") in (out / "differences.tex").read_text()
    for said in (
        "Paired differences",
        f"{metric}</td>",
        "2 replicates",
        "Where they disagree most",
        "TokBench",
        "synthetic://",
        "over bits per pixel",
    ):
        assert said in page
    assert 'src="http' not in page and "<link" not in page
    assert (out / "compare.tex").read_text().count(r"\\") == 3
    # again: nothing is measured anew, and the numbers are the same
    before = (out / "compare.csv").read_text()
    capsys.readouterr()
    assert compare.main(words) == 0
    assert capsys.readouterr().out.count("measured before") == 2 and (out / "compare.csv").read_text() == before


def test_a_difference_between_resolutions_is_no_verdict():
    difference = Difference(-3.0, -4.0, -2.0)
    same, other = (module.Pair("a", "b", "psnr", difference, (size, 64)).row() for size in (64, 32))
    assert same[:-1] == other[:-1] and same[-1] == "lower" and other[-1] == "not the same scale: 32 px, 64 px"


def test_without_targets_the_tiny_tokenizers_are_compared(generator_run, capsys, monkeypatch):
    options, words = compare.parse(["--check", "--seconds", "0"])
    assert options.targets == released.shipped() and module.prepare(options, words) == "tokenizer"
    assert options.data == "embedded://emoji64"
    assert module.kind_of(["tiny/rear", str(generator_run)]) == "generator"
    monkeypatch.setattr(module, "compare", lambda *_: print("began") or 0)
    capsys.readouterr()  # what the check above says
    assert compare.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("no model was named: comparing the tiny tokenizers tiny/") and "embedded://emoji64" in said


def test_pictures_that_nobody_named(tokenizer_run):
    """Those that the training of all left out; none where they were trained on different ones."""
    options, words = compare.parse(["tiny/rear", "tiny/fqgan"])
    module.prepare(options, words)
    assert options.data == "embedded://emoji64"
    options, words = compare.parse(["tiny/rear", str(tokenizer_run)])
    with pytest.raises(UserError, match="not trained on the same pictures.* --data embedded://emoji64"):
        module.prepare(options, words)
    options, words = compare.parse(["tiny/rear", str(tokenizer_run), "--data", "synthetic://?size=32"])
    module.prepare(options, words)
    assert options.data == "synthetic://?size=32"


def test_generators(generator_run, tmp_path):
    other = shutil.copytree(generator_run, tmp_path / "other", symlinks=True)
    out = tmp_path / "out"
    assert compare.main([str(generator_run), str(other), "--num", "32", "--bootstrap", "2", "--out", str(out)]) == 0
    found = numbers(out)
    assert len({name for name, _ in found}) == 2 and len({*found.values()}) == len(found) // 2  # the same weights
    page = (out / "report.html").read_text()
    assert "fd_lite0" in page and page.count("has no spatial features") == 1, "said once for both"


def test_accuracies_of_a_probe(fqgan, tokenizer_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # features are kept in work_dirs/cache
    url = "synthetic://?size=32&classes=4&count=24"
    words = [
        str(fqgan),
        str(tokenizer_run),
        *DATA,
        "--probe",
        url,
        "--seconds",
        "0",
        "--bootstrap",
        "0",
        "--out",
        "out",
    ]
    assert compare.main(words) == 0
    found = {name for name, metric in numbers(tmp_path / "out") if metric.startswith("probe_top1_")}
    assert len(found) == 2
    page = (tmp_path / "out" / "report.html").read_text()
    told = page[page.index("Linear probe, top-1") :]
    assert all(f">{name}<" in told for name in ("latents", *(n.removeprefix("probe_top1_") for n in found)))
    assert "probe_top1_" not in page[: page.index("Paired differences")]
    assert page.count("VGG16 of torchvision") == 1  # once for all that lack it
    assert "there is no paired difference without replicates" in (tmp_path / "out" / "report.html").read_text()


def test_speeds_are_of_both_batches(fqgan):
    found = speeds(read_tokenizer({"weights": str(fqgan)}).module, torch.device("cpu"), 0.01)
    assert {f"{what}_img_per_s_batch{batch}" for what in ("encode", "decode") for batch in (1, 32)} <= found.keys()
    assert found["encode_memory_batch1"] is None and found["encode_ms_batch1"] > 0


def test_mistakes_are_told_before_anything_is_loaded(fqgan, tokenizer_run, generator_run, monkeypatch):
    monkeypatch.setattr(module, "by_tokenizer", lambda *_: pytest.fail("a network was loaded"))
    for words, said in (
        ([fqgan], "two or more"),
        ([fqgan, fqgan], "named twice"),
        ([fqgan, generator_run, *DATA], "generators with generators"),
        ([fqgan, "missing.pt", *DATA], "missing.pt"),
        ([fqgan, tokenizer_run, "--data", "nowhere"], "nowhere"),
    ):
        with pytest.raises(UserError, match=said):
            compare.main([str(word) for word in words])
