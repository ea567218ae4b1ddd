"""Every program that opens the folder of a run, while its trainer writes new checkpoints and deletes the old ones."""

from __future__ import annotations

import argparse
import importlib
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import run
from core.chunks import ALONE
from core.train.checkpoint import Checkpoint, CheckpointStore, step_name
from core.weights import hub
from run.load import read_generator, read_tokenizer
from run.playground.views import Models
from run.sweep import prepare
from run.target import open_generator
from tests.conftest import TOY_GENERATOR
from tests.ranks import in_processes

LITE = ["eval.network=lite0", "eval.batch=4"]
PICTURES = "synthetic://?size=32&classes=4&count=8"


def train_on(folder: Path, change: float = 0.0) -> None:
    """What a trainer with train.keep_checkpoints=1 does at its next checkpoint.

    Args:
        change: of all its weights.
    """
    checkpoints = folder / "checkpoints"
    *_, newest = CheckpointStore(checkpoints).steps()
    place = checkpoints / step_name(newest)
    tensors = {file.stem: load_file(file) for file in place.glob("*.safetensors")}
    for stem in tensors if change else ():
        if stem.startswith(("tokenizer", "generator")) and "optim" not in stem:
            tensors[stem] = {name: t + change if t.is_floating_point() else t for name, t in tensors[stem].items()}
    state = {**Checkpoint(place).state, "step": newest + 1}
    CheckpointStore(checkpoints, keep=1).save(newest + 1, tensors, state, wait=True)


@dataclass
class Living:
    """Copies of the toy runs. Each checkpoint that is chosen is gone when it is to be opened, a few times over."""

    tokenizer: Path
    generator: Path
    here: Path
    moved: Counter[str] = field(default_factory=Counter)

    def fill(self, word: str) -> str:
        return word.format(tokenizer=self.tokenizer, generator=self.generator, here=self.here)


@pytest.fixture
def living(tokenizer_run, generator_run, tmp_path, monkeypatch) -> Living:
    runs = {"tokenizer": tokenizer_run, "generator": generator_run}
    copies = {name: Path(shutil.copytree(place, tmp_path / name, symlinks=True)) for name, place in runs.items()}
    made, choose = Living(**copies, here=tmp_path), hub._newest_checkpoint

    def choose_and_delete(path: Path, kind: str | None) -> Path:
        chosen = choose(path, kind)
        for name, folder in copies.items():
            if chosen.is_relative_to(folder) and made.moved[name] < 8:
                made.moved[name] += 1
                train_on(folder)
                assert not chosen.exists()
        return chosen

    monkeypatch.setattr(hub, "_newest_checkpoint", choose_and_delete)
    monkeypatch.chdir(tmp_path)
    return made


PROGRAMS = {
    "convert": "{tokenizer} file.safetensors",
    "convert ": "--describe {tokenizer} {generator}",
    "publish": "{tokenizer} me/mine --dry-run",
    "reconstruct": "--weights {tokenizer} --url " + PICTURES + " --num 2 --out panels",
    "latent_stats": "{tokenizer} " + PICTURES + " --num 8 --out stats.safetensors",
    "linear_probe": "{tokenizer} " + PICTURES.replace("8", "8&seed={{split}}") + " --epochs 1 --workers 0 --out probe",
    "evaluate": "{tokenizer} " + PICTURES + " --num 4 --workers 0 --out eval eval.network=lite0",
    "pretokenize": TOY_GENERATOR
    + " tokenizer.weights={tokenizer} train.device=cpu --out tokens data.crop=center data.flip=false data.url="
    + PICTURES,
    "compare": "{tokenizer} {tokenizer}/checkpoints --data " + PICTURES + " --num 4 --seconds 0 --bootstrap 0 "
    "--workers 0 --out compared eval.network=lite0",
    "evaluate_generator": "{generator} tokenizer.weights={tokenizer} --num 4 --out samples " + " ".join(LITE),
    "sample": "{generator} tokenizer.weights={tokenizer} --labels 0 --num 1 --out samples",
    "edit": "{generator} photo.png --outpaint 0.2 --label 1 --out edited.png tokenizer.weights={tokenizer}",
    "sweep": "{generator} tokenizer.weights={tokenizer} --scale 1,2 --num 4 --first 2 --bootstrap 0 --out swept "
    + " ".join(LITE),
    "train": TOY_GENERATOR + " tokenizer.weights={tokenizer} train.init_from={generator} train.duration=1step "
    "train.device=cpu train.preview_every=never work_dir={here}/new data.cache_dir={here}/cache",
}


SLOW = ("compare", "sweep")  # they take what the others take


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PROGRAMS]
)
def test_every_program_takes_the_newest_weights(living, name):
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save("photo.png")
    words = [living.fill(word) for word in PROGRAMS[name].split()]
    assert importlib.import_module(f"scripts.{name.strip()}").main(words) == 0
    named = {kind for kind in ("tokenizer", "generator") if f"{{{kind}}}" in PROGRAMS[name]}
    assert set(living.moved) == named


def test_from_python_and_in_the_playground(living):
    run.load_tokenizer(str(living.tokenizer))
    run.load_generator(str(living.generator), tokenizer=str(living.tokenizer))
    assert not any(entry.error for entry in Models([str(living.tokenizer), str(living.generator)]).entries)
    assert living.moved["tokenizer"] > 1 < living.moved["generator"]


def _loses_the_checkpoint(world, folder: Path, moment: str) -> None:
    """The trainer goes on, with other weights, when one rank has chosen or opened the checkpoint and the other has not."""
    if moment == "chosen by the main rank":
        if world.rank == 1:
            choose = hub._newest_checkpoint

            def later(path: Path, kind: str | None) -> Path:
                train_on(folder, change=0.5)
                return choose(path, kind)

            hub._newest_checkpoint = later
    elif world.is_main:
        hold = Checkpoint.hold

        def hold_and_delete(checkpoint: Checkpoint) -> Checkpoint:
            held = hold(checkpoint)
            train_on(folder, change=0.5)
            Checkpoint.hold = hold
            return held

        Checkpoint.hold = hold_and_delete
    tokenizer = read_tokenizer({"weights": str(folder)}, world=world)
    assert world.on_main(lambda: tokenizer.fingerprint) == tokenizer.fingerprint
    with pytest.raises(AssertionError, match="another checkpoint of a living run"):
        read_tokenizer({"weights": str(folder)})


@pytest.mark.parametrize("moment", ["chosen by the main rank", "opened by the main rank"])
def test_all_ranks_read_the_same_weights(tokenizer_copy, moment):
    before = CheckpointStore(tokenizer_copy / "checkpoints").steps()
    assert in_processes(2, _loses_the_checkpoint, tokenizer_copy, moment) == [0, 0]
    assert CheckpointStore(tokenizer_copy / "checkpoints").steps() == [before[-1] + 1]


def test_a_sweep_tries_all_settings_on_the_same_weights(tokenizer_run, generator_run, tmp_path):
    """Also where --ema loads them twice and the trainer goes on between the two."""
    folder = Path(shutil.copytree(generator_run, tmp_path / "generator", symlinks=True))
    options = argparse.Namespace(target=str(folder), num=4, first=2, check=False, bootstrap=0, infinity=False)
    targets, _, _ = prepare(options, [f"tokenizer.weights={tokenizer_run}"], {"scale": "1,2", "ema": "true,false"})
    samplers = []
    for target in targets.values():
        samplers.append(open_generator(target, ALONE, keep=True))
        train_on(folder, change=0.5)
    states = [sampler.generator.state_dict() for sampler in samplers]
    expected = [
        read_generator(str(generator_run), section={"use_ema": ema}).module.state_dict() for ema in (True, False)
    ]
    assert all(torch.equal(state[name], t) for state, wanted in zip(states, expected) for name, t in wanted.items())
