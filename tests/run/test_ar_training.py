"""FAR, RAR and reAR in the trainer, on the codes of a stand-in tokenizer: learning, resume, accumulation, ranks, dropout."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from core.rng import Draws
from core.specs import Progress
from core.train.run import read_metrics
from tests.conftest import ROOT
from tests.tools import torture
from tokenizer import TOKENIZERS

FAR, REAR = (str(ROOT / "configs" / "toy" / f"{name}.yaml") for name in ("far", "rear"))
TOY = ["tokenizer.weights=null", "tokenizer.name=toy_codes"]
ONE = [*TOY, "tokenizer.branches=1"]
FAR_REAR = [*TOY, "generator.rear.projection=32"]
CASES = {"far": (FAR, TOY), "rear": (REAR, ONE), "far_rear": (FAR, FAR_REAR)}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(TOKENIZERS.entries, "toy_codes", "tests.toy_codes:ToyCodes")


@pytest.fixture
def run(train_main, tmp_path):
    """run(config, name, *overrides) -> (exit code, run folder)."""

    def call(config: str, name: str, *overrides: str):
        code, _, err = train_main(
            config,
            "train.device=cpu",
            f"work_dir={tmp_path}",
            f"data.cache_dir={tmp_path}/cache",
            "train.preview_every=never",
            f"name={name}",
            *overrides,
        )
        assert code in (0, 75), err
        return code, tmp_path / name

    return call


@pytest.mark.parametrize("case", CASES)
def test_stop_and_resume_at_any_step(run, case):
    """With dropout, noise and permutation: a run in pieces ends with the bits of one in one piece."""
    config, overrides = CASES[case]
    settings = [*overrides, "train.duration=7step", "train.checkpoint_every=3step", "train.log_every=2step"]
    _, whole = run(config, "whole", *settings)
    codes = []
    while not codes or (codes[-1] == 75 and len(codes) < 10):
        code, pieces = run(config, "pieces", *settings, "train.time_limit_minutes=1e-9")
        codes.append(code)
    assert codes == [75] * 6 + [0]
    assert not torture.differences(torture.read_result(whole), torture.read_result(pieces))


@pytest.mark.parametrize("case", CASES)
def test_accumulation_changes_nothing(run, case):
    config, overrides = CASES[case]
    settings = [*overrides, "train.duration=4step"]
    records = [
        torture.read_metrics(run(config, name, *settings, f"train.micro_batch={micro}")[1])
        for name, micro in (("whole", 8), ("parts", 2))
    ]
    assert torture.worst_difference(*records) <= 1


def test_what_is_logged(run):
    (first, *_, last) = read_metrics(run(FAR, "far", *FAR_REAR)[1] / "metrics.jsonl")
    assert {"ce", "ce_1", "ce_2", "ce_3", "alignment", "loss"} <= first.keys() and last["ce"] < first["ce"]
    (first, *_, last) = read_metrics(run(REAR, "rear", *ONE)[1] / "metrics.jsonl")
    assert {"ce", "accuracy", "alignment", "loss"} <= first.keys() and last["ce"] < first["ce"]


def test_previews(build_trainer):
    for config, overrides in CASES.values():
        trainer = build_trainer(config, *overrides)
        trainer.preview()
        assert list((trainer.run.path / "samples").glob("*.png"))


def test_stored_codes_give_the_same_run(run):
    settings = [*TOY, "train.duration=4step", "data.flip=false"]
    results = [
        torture.read_metrics(run(FAR, name, *settings, *more)[1])
        for name, more in (("fly", []), ("stored", ["data.cache_latents=true"]))
    ]
    assert torture.worst_difference(*results) == 0


RANK = """
import sys
sys.path.insert(0, {root!r})
import torch
from tokenizer import TOKENIZERS
TOKENIZERS.entries["toy_codes"] = "tests.toy_codes:ToyCodes"
torch.set_num_threads(1)
from scripts import train
from core import cli
cli.run(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["far_rear", "rear"])
def test_two_ranks_are_one(run, tmp_path, case):
    config, overrides = CASES[case]
    settings = [*overrides, "train.duration=4step"]
    _, one = run(config, "one", *settings)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        config,
        "train.device=cpu",
        f"work_dir={tmp_path}",
        f"data.cache_dir={tmp_path}/cache",
        "train.preview_every=never",
        "name=two",
        *settings,
    ]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.format(root=str(ROOT)), *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]
    assert [process.wait(120) for process in ranks] == [0, 0]
    assert torture.worst_difference(torture.read_metrics(one), torture.read_metrics(tmp_path / "two")) <= 1


def test_tokens_are_drawn_from_the_generator_of_the_run(build_trainer):
    """Two trainers of one seed sample the same pictures; another seed other ones."""
    shown = []
    for seed in (0, 0, 1):
        trainer = build_trainer(REAR, *ONE, f"seed={seed}")
        trainer.preview()
        shown.append((trainer.run.path / "samples" / "step_00000000.png").read_bytes())
    assert shown[0] == shown[1] != shown[2]


def test_annealing_reaches_its_end(build_trainer):
    trainer = build_trainer(REAR, *ONE, "generator.rear.noise=switch")
    network = trainer.networks["generator"]
    batch = next(trainer.batches(0))
    codes = trainer.task.tokenizer.encode(batch.images.float() / 127.5 - 1)
    draws = Draws(0, batch.positions)
    late = [network(codes, batch.labels, draws, Progress(n, 100, 10, n)).total for n in (75, 99)]
    early = [network(codes, batch.labels, draws, Progress(n, 100, 10, n)).total for n in (0, 20)]
    assert late[0] == late[1] != early[0] != early[1]
    assert torch.isfinite(torch.stack(early)).all()
