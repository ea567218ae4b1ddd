"""tests/tools/adapt_emoji.py on a few pictures and steps."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from core import cli
from core.train.checkpoint import Checkpoint
from core.train.low_rank import adapted_weights
from run.load import load_config, random_task
from scripts import train
from tests.tools import adapt_emoji


@pytest.fixture
def trainings(monkeypatch):
    """Trainings run in this process; the names of those that were started."""
    started = []

    def here(command: list[str], stdout: object = None) -> subprocess.CompletedProcess:
        started.append(next(word[5:] for word in command if word.startswith("name=")))
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", command[2:])
            cli.run(train.main)
        return subprocess.CompletedProcess(command, ended.value.code)

    monkeypatch.setattr(adapt_emoji, "subprocess", SimpleNamespace(run=here))
    monkeypatch.setattr(adapt_emoji, "WARM_UP", 1)
    return started


def test_three_ways_to_new_classes(trainings, tmp_path, monkeypatch, capsys):
    """All make the base's number of steps on the new classes alone; two start from the base, one of them with its trunk's
    bits but for low-rank changes; the same command trains nothing twice."""
    words = [
        "--minutes",
        "1e-9",
        "--pictures",
        "8",
        "--each",
        "2",
        "--rank",
        "2",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["adapt_emoji", *words])
    adapt_emoji.main()
    assert json.loads((tmp_path / "steps.json").read_text())["steps"] == 1
    assert trainings == ["warm", "base", "adapted_1_seed0", "lora2_0.006_1_seed0", "scratch_1_seed0"]
    results = json.loads((tmp_path / "results_1.json").read_text())
    assert [f"{name}_seed0" for name in results] == trainings[2:] and capsys.readouterr().out.count(": 1 steps in") == 3
    for name, scores in results.items():
        assert scores.keys() == {"all", "animals", "flags", "food"} and 0 <= scores["all"] <= 1
        assert scores["all"] == pytest.approx(sum(scores[n] for n in ("animals", "flags", "food")) / 3)
        assert (tmp_path / f"{name}_seed0.png").is_file()
        checkpoint = Checkpoint(tmp_path / f"{name}_seed0" / "checkpoints" / "latest")
        assert checkpoint.step == 1 and len(checkpoint.state["config"]["data"]["url"]) > 0
    base, adapted, lora, scratch = (
        Checkpoint(tmp_path / name / "checkpoints" / "latest").tensors("generator") for name in trainings[1:]
    )
    config = load_config("configs/tiny/imagefolder/generator.yaml", [])
    network = random_task(config, torch.device("cpu"), num_classes=3).generator
    changed, (table, _) = adapted_weights(network), network.class_rows()
    assert base[table].shape[0] == 7 and lora[table].shape[0] == 4
    for name, start in base.items():
        if name == table:
            continue
        assert name in changed or torch.equal(lora[name], start), name
        assert not start.is_floating_point() or (adapted[name] - start).abs().max() < 0.01, name
    assert max((scratch[name] - base[name]).abs().max() for name in changed) > 0.01
    before, seeds = len(trainings), words.index("--seeds") + 1
    words[seeds] = "2"  # the first is asked to go on, and is done
    monkeypatch.setattr(sys, "argv", ["adapt_emoji", *words])
    adapt_emoji.main()
    assert trainings[before:] == [f"{name}_seed{seed}" for name in results for seed in range(2)]
    both = json.loads((tmp_path / "results_1.json").read_text())
    assert all(both[name].keys() == results[name].keys() for name in results)
    seeds = [Checkpoint(tmp_path / f"scratch_1_seed{seed}" / "checkpoints" / "latest") for seed in range(2)]
    assert [checkpoint.state["config"]["seed"] for checkpoint in seeds] == [0, 1]


def test_a_budget_in_steps_heeds_no_clock(tmp_path, monkeypatch):
    """On a machine that others use too minutes say little."""
    asked = {}

    def train(folder, system, name, pictures, steps, *words):
        asked[name] = steps, words
        if name == "base":
            raise SystemExit("enough")
        return 0.0

    monkeypatch.setattr(adapt_emoji, "train", train)
    words = ["adapt_emoji", "--steps", "7", "--pictures", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="enough"):
        adapt_emoji.main()
    steps, words = asked["base"]
    assert steps == 7 and not any("time_limit" in word for word in words)
