"""run/unseen.py: what is measured on where no pictures were named, and how many of a tiny model's samples."""

from __future__ import annotations

import pytest
from PIL import Image

from core.errors import UserError
from run import unseen
from run.data import IMAGENET_VAL
from scripts import edit, evaluate, evaluate_generator, linear_probe, sample


def pictures(folder, colour):
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(folder / name / f"{colour}.png")


def test_the_half_that_training_left_out(tmp_path):
    for half, colour in (("train", "red"), ("val", "green")):
        pictures(tmp_path / "halves" / half, colour)
    pictures(tmp_path / "whole", "red")
    halves, whole = f"folder://{tmp_path}/halves", f"folder://{tmp_path}/whole"
    for data, left_out, both in (
        ({"url": "embedded://emoji64", "val_url": None}, "embedded://emoji64", "embedded://emoji64"),
        ({"url": halves}, halves, halves),
        ({"url": f"{halves}/train", "val_url": f"{halves}/val"}, f"{halves}/val", halves),
        ({"url": whole, "val_url": f"{halves}/val"}, f"{halves}/val", unseen.IMAGENET),
        ({"url": whole}, IMAGENET_VAL, unseen.IMAGENET),  # all of it was trained on
        ({"url": halves, "split": "val"}, IMAGENET_VAL, unseen.IMAGENET),  # the unseen half was trained on
        ({"url": "folder:///no/such"}, IMAGENET_VAL, unseen.IMAGENET),
        ({}, IMAGENET_VAL, unseen.IMAGENET),
    ):
        assert (unseen.unseen(data), unseen.both_halves(data)) == (left_out, both), data


def test_what_weights_tell(tokenizer_run):
    assert unseen.training_data("tiny/rear")["url"] == "embedded://emoji64"
    assert unseen.training_data(str(tokenizer_run))["url"].startswith("synthetic://")
    assert unseen.training_data("tiny/nix") == {}


def test_a_model_of_its_own_data_is_measured_on_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no ImageNet
    assert evaluate.main(["tiny/rear", "--check"]) == 0
    assert linear_probe.main(["tiny/rear", "--check"]) == 0
    said = capsys.readouterr().out
    assert said.count("no pictures were named: taking embedded://emoji64") == 2


def test_samples_of_tiny_models(generator_run):
    assert "eval.num_images=1000" in evaluate_generator.parse(["tiny/rear"])[1]
    for words in (["tiny/rear", "--num", "20"], ["tiny/rear", "eval.num_images=20"], [str(generator_run)]):
        options, settings = evaluate_generator.parse(words)
        assert "eval.num_images=1000" not in settings and not options.taken


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        (edit, ["tiny/rear"], "bash run_edit.sh tiny/rear photo.png --mask .* --label CLASS"),
        (edit, ["tiny/rear", "photo.png"], "bash run_sample.sh tiny/rear --list-labels"),
        (sample, ["tiny/rear"], "--labels and --out missing: bash run_sample.sh tiny/rear --labels 0-3 --out samples"),
        (sample, ["tiny/rear", "--labels", "food"], "^--out missing: bash run_sample.sh tiny/rear --labels food --out"),
    ],
)
def test_what_else_has_to_be_said(program, words, said):
    with pytest.raises(UserError, match=said):
        program.main(words)
