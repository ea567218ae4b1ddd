"""Files that are replaced under the same names: nothing that was kept of the old ones is taken for the new ones."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from core.chunks import ALONE, changed_facts
from core.errors import UserError
from core.images import to_model_range
from data import tokens
from data.sources import open_source
from data.transforms import Transform
from evaluation.distances import Moments
from evaluation.pictures import open_any
from evaluation.references import Facts, Statistics
from run import reproduce
from run.latent_stats import measure_once
from run.linear_probe import job_of
from run.load import load_config, read_tokenizer
from run.measurement import open_folder, sizes_of
from scripts import evaluate, sweep
from tests.conftest import TOY_GENERATOR
from tests.run.test_living_run import train_on


@pytest.fixture
def pictures(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(8):
        place = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place)
    return tmp_path / "pictures"


def replace_one(folder: Path) -> None:
    Image.new("RGB", (32, 32)).save(next(folder.rglob("3.png")))


def test_what_two_jobs_differ_in():
    known = {"pictures": "a", "pictures_fingerprint": "names", "pictures_sizes": "s"}
    assert changed_facts(known, {**known, "pictures": "moved"}) == []
    assert changed_facts(known, {**known, "pictures_sizes": "t"}) == ["pictures_sizes"]
    before = {key: known[key] for key in ("pictures", "pictures_fingerprint")}  # of a version that knew no sizes
    assert changed_facts(before, known) == []
    assert changed_facts(before, {**known, "pictures": "resized"}) == ["pictures"]
    assert changed_facts({"reference": "a", "reference_sha256": "x"}, {"reference": "b", "reference_sha256": "x"}) == []


def test_results_of_an_evaluation(pictures, tokenizer_run, tmp_path, capsys):
    words = [str(tokenizer_run), str(pictures), "--workers", "0", "--out", str(tmp_path / "out"), "eval.network=lite0"]
    assert evaluate.main(words) == 0
    assert evaluate.main(words) == 0 and "measured before" in capsys.readouterr().out
    record = tmp_path / "out" / "metrics.json"
    text, noted = record.read_text(), json.loads(record.read_text())
    del noted["context"]["job"]["pictures_sizes"]
    record.write_text(json.dumps(noted))  # as versions before wrote it
    assert evaluate.main(words) == 0 and "measured before" in capsys.readouterr().out
    record.write_text(text)
    replace_one(pictures)
    with pytest.raises(UserError, match=r"other files under the same names \(pictures\)"):
        evaluate.main(words)


def test_names_of_folders_stay(pictures):
    """Where --out names none."""
    job = {"count": 8}
    sized = {**job, **sizes_of("pictures", open_any(str(pictures), 32), ALONE)}
    assert len(sized) == 2 and open_folder(None, "x", job, False, ALONE) == open_folder(None, "x", sized, False, ALONE)


def test_statistics_of_a_reference(pictures):
    moments = Moments.of(torch.randn(8, 4))
    before = open_any(str(pictures), 32)
    facts = Facts("reconstruction", "net", "tf1", 32, 8, before.fingerprint(), before.file_sizes())
    made = Statistics({"pool": (moments.mean, moments.covariance)}, facts, "reference.npz")
    how = {"purpose": "reconstruction", "network": "net", "preprocess": "tf1", "image_size": 32}
    made.check(**how, originals=before)
    replace_one(pictures)
    with pytest.raises(UserError, match="pictures of these names of which some have other sizes now"):
        made.check(**how, originals=open_any(str(pictures), 32))


def test_statistics_of_latents(pictures, tokenizer_run, tmp_path):
    config = load_config(TOY_GENERATOR, [f"data.cache_dir={tmp_path / 'cache'}", "data.workers=0"])
    tokenizer = read_tokenizer({"weights": str(tokenizer_run)})
    for _ in range(2):
        measure_once(config, tokenizer, open_source(str(pictures)), ALONE)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    replace_one(pictures)
    measure_once(config, tokenizer, open_source(str(pictures)), ALONE)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_store_of_tokens(pictures, tokenizer_run, tmp_path):
    module = read_tokenizer({"weights": str(tokenizer_run)}).module
    source = open_source(str(pictures))
    store = tokens.build(
        tmp_path / "tokens",
        source,
        Transform(32, "center"),
        module.spec,
        lambda images: module.precompute(to_model_range(images)),
        "tokenizer",
    )
    assert store.is_of(source) and store.file_sizes() == source.file_sizes()
    replace_one(pictures)
    assert not store.is_of(open_source(str(pictures)))


def test_accuracies_of_a_probe(pictures):
    names = ("epochs", "batch", "lr", "weight_decay", "schedule", "seed", "num", "features")
    options = argparse.Namespace(weights="w", raw=False, url=str(pictures), **dict.fromkeys(names, 1))
    jobs = []
    for _ in range(2):
        source = open_source(str(pictures))
        jobs.append(job_of(options, "fingerprint", source, source))
        replace_one(pictures)
    assert changed_facts(*jobs) == ["url_sizes"]


def test_published_numbers(tmp_path, monkeypatch):
    row = SimpleNamespace(target=str(tmp_path / "file.pt"), obstacle=lambda: "")
    row.command = lambda num, out, more, bootstrap: ["bash", str(out), *more]
    (tmp_path / "file.pt").write_bytes(b"weights")
    reproduce.claim(row, tmp_path / "row_8", 8, [], 50)
    reproduce.claim(row, tmp_path / "row_8", 8, [], 50)
    with pytest.raises(UserError, match="what another command gave .*sample.scale=2"):
        reproduce.claim(row, tmp_path / "row_8", 8, ["sample.scale=2"], 50)
    (tmp_path / "file.pt").write_bytes(b"others")
    with pytest.raises(UserError, match="target_sizes was 7, now 6"):
        reproduce.claim(row, tmp_path / "row_8", 8, [], 50)


def test_a_sweep_of_a_run_that_went_on(generator_run, tokenizer_run, tmp_path):
    folder = Path(shutil.copytree(generator_run, tmp_path / "generator", symlinks=True))
    words = [str(folder), f"tokenizer.weights={tokenizer_run}", "--scale", "1,2", "--num", "4", "--first", "2"]
    words += ["--bootstrap", "0", "--out", str(tmp_path / "out"), "eval.network=lite0", "eval.batch=4"]
    assert sweep.main(words) == 0 == sweep.main(words)
    train_on(folder, change=0.01)
    with pytest.raises(UserError, match="holds another sweep"):
        sweep.main(words)
