"""Paths of the command line are relative to the caller's folder, those of YAML files to the repository."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re

import pytest

from core import caller, schema
from scripts import train
from tests.conftest import ROOT


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The caller's folder; the process is in another one, where there are a config and a run."""
    here, place = tmp_path / "repository", tmp_path / "callers"
    for file in ("configs/a.yaml", "both.pt", "work_dirs/run/x", "outputs/begun/x"):
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).touch()
    for file in ("my.yaml", "both.pt", "run/x", "pictures/0.png", "shards/00.tar", "cls.txt", "10", "a#b[1]/{c}.pt"):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv(caller.VARIABLE, str(place))
    return place


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("my.yaml", "PLACE/my.yaml"),
        ("both.pt", "PLACE/both.pt"),  # the caller's before the repository's
        ("configs/a.yaml seed=3", "configs/a.yaml seed=3"),
        ("run", "run"),  # the name of a run
        ("./run", "PLACE/run"),
        ("reAR-L.safetensors --labels 10 --check pictures", "reAR-L.safetensors --labels 10 --check PLACE/pictures"),
        ("--out new --npz=x.npz", "--out PLACE/new --npz=PLACE/x.npz"),
        ("--out outputs/begun", "--out outputs/begun"),  # goes on
        ("--out /else --weights ~/w.pt", "--out /else --weights ~/w.pt"),
        ("--to jsonl x.jsonl", "--to jsonl PLACE/x.jsonl"),
        ("tokenizer.weights=both.pt name=run", "tokenizer.weights=PLACE/both.pt name=run"),
        ("work_dir=mine sample.scale=10", "work_dir=PLACE/mine sample.scale=10"),
        ("data.url=folder://pictures?classes=cls.txt", "data.url=folder://PLACE/pictures?classes=PLACE/cls.txt"),
        ("data.url=wds://shards/{00..07}.tar", "data.url=wds://PLACE/shards/{00..07}.tar"),
        ("--url folder://nowhere hf://both.pt/x/y", "--url folder://nowhere hf://both.pt/x/y"),
        ("eval.network=run eval.network=./both.pt", "eval.network=run eval.network=PLACE/both.pt"),
        ("tokenizer.latent_stats=both.pt#run", "tokenizer.latent_stats=PLACE/both.pt#run"),
        ("--weights a#b[1]/{c}.pt", "--weights PLACE/a#b[1]/{c}.pt"),
        ("--out x[1]#{2} work_dir=y*#z", "--out PLACE/x[1]#{2} work_dir=PLACE/y*#z"),
    ],
)
def test_whose_path_is_meant(place, words, meant):
    assert caller.from_caller(words.split()) == [word.replace("PLACE", str(place)) for word in meant.split()]


def test_a_caller_in_the_repository(place, monkeypatch):
    here = place.parent / "repository"
    monkeypatch.setenv(caller.VARIABLE, str(here))
    assert caller.from_caller(["--out", "new"]) == ["--out", "new"]
    monkeypatch.setenv(caller.VARIABLE, str(here / "configs"))  # names of before, also in what a job records
    assert caller.from_caller(["a.yaml", "--out", "new"]) == ["configs/a.yaml", "--out", "configs/new"]
    monkeypatch.delenv(caller.VARIABLE)
    assert caller.from_caller(["a.yaml"]) == ["a.yaml"] and caller.written("x.npz") == "x.npz"
    monkeypatch.setenv(caller.VARIABLE, str(place))
    assert caller.written("x.npz") == str(place / "x.npz")


def test_every_command_says_where_it_was_called_from():
    for script in ROOT.glob("run_*.sh"):
        text = script.read_text()
        if "scripts/launch.sh" in text:
            assert text.index('export TESSERA_CALLER="$PWD"') < text.index("cd "), script


# Words that are no paths. Whoever adds an option or a setting has to say here, or in core/caller.py, which it is.
PLAIN_OPTIONS = {"--features", "--only", "--perturb", "--probe", "--protocol", "--scale", "--work"}
PLAIN_OPTIONS |= {"--ema", "--interval", "--power", "--schedule", "--steps", "--temperature", "--top-k", "--top-p"}
PLAIN_SETTINGS = {
    "split",
    "keep_best",
    "protocol",
    "wandb_project",
    "wandb_entity",
    "trackio_project",
    "name",
    "new_classes",
}


def actions(monkeypatch) -> list[argparse.Action]:
    """Of the parsers of all programs that run_*.sh start through scripts/launch.sh."""
    found: list[argparse.Action] = []

    def parse(self, *_, **__):
        found.extend(self._actions)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse)
    for name in re.findall(r"scripts\.(\w+)", "".join(p.read_text() for p in ROOT.glob("run_*.sh"))):
        if name not in ("train", "download", "quickstart"):
            with pytest.raises(SystemExit):
                importlib.import_module(f"scripts.{name}").main([])
    return found


def test_options_without_a_value_are_known(monkeypatch):
    """What stands behind one of them is not its value."""
    flags = {word for action in actions(monkeypatch) if action.nargs == 0 for word in action.option_strings}
    assert len(flags) > 5 and flags - {"-h", "--help"} <= caller.FLAGS
    assert set(re.findall(r"(--check|--dry-run)", train.USAGE)) <= caller.FLAGS


def test_every_option_is_a_path_or_known_not_to_be_one(monkeypatch):
    paths = caller.READ | caller.WRITTEN | caller.NAMES
    words = {
        action.option_strings[-1]
        for action in actions(monkeypatch)
        if action.option_strings and action.nargs != 0 and action.type in (None, str) and not action.choices
    }
    assert "--out" in words and {w for w in words if w[2:] not in paths} - {"--to"} == PLAIN_OPTIONS


def test_every_setting_is_a_path_or_known_not_to_be_one():
    paths = caller.READ | caller.WRITTEN | caller.NAMES
    classes = [kind for kind in vars(schema).values() if dataclasses.is_dataclass(kind)]
    texts = {
        field.name for kind in classes for field in dataclasses.fields(kind) if field.type in ("str", "str | None")
    }
    assert "val_url" in texts and texts - paths == PLAIN_SETTINGS
