"""Shared by all tests: one thread, the CPU, no network, and small runs to look at.

The toy runs are made once per session. Tests that change a run work on a copy of it.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # for child processes
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TESSERA_EXIT_FILE"):
    os.environ.pop(name, None)

ROOT = Path(__file__).resolve().parents[1]
TOY_TOKENIZER, TOY_GENERATOR = (
    str(ROOT / "configs" / "toy" / f"rectok_{kind}.yaml") for kind in ("tokenizer", "generator")
)


_TABLES = pytest.StashKey[dict]()


def print_at_the_end(config: pytest.Config, title: str, table: str) -> None:
    """Show a table below the results of all tests, also one that a worker of pytest-xdist made."""
    if hasattr(config, "workeroutput"):
        config.workeroutput.setdefault("tables", []).append((title, table))
    else:
        config.stash.setdefault(_TABLES, {}).setdefault(title, []).append(table)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for title, table in getattr(node, "workeroutput", {}).get("tables", ()):
        print_at_the_end(node.config, title, table)


def pytest_terminal_summary(terminalreporter, config):
    for title, tables in config.stash.get(_TABLES, {}).items():
        terminalreporter.section(title)
        terminalreporter.write_line("\n".join(tables))


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order everywhere."""
    torch = sys.modules.get("torch")  # not imported here: some tests prove that they do without
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train_main(monkeypatch, capfd):
    """scripts/train.py in this process: train_main(*arguments) -> (exit code, stdout, stderr)."""
    from core import cli
    from scripts import train

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.run(train.main)
        out, err = capfd.readouterr()
        return stopped.value.code, out, err

    return call


def toy(name: str) -> str:
    """A configuration of configs/toy."""
    return str(ROOT / "configs" / "toy" / f"{name}.yaml")


def finished_run(factory, config: str, *overrides: str) -> Path:
    """The folder of a training on the CPU, made by the programs' own code."""
    from run.load import load_config
    from run.train import train

    folder = factory.mktemp("runs")
    loaded = load_config(
        config, [f"work_dir={folder}", f"data.cache_dir={folder / 'cache'}", "train.device=cpu", *overrides]
    )
    assert train(loaded) == 0
    return loaded.run_dir


@pytest.fixture(scope="session")
def _tokenizer_run(tmp_path_factory) -> Path:
    import torch

    torch.set_num_threads(1)
    return finished_run(tmp_path_factory, TOY_TOKENIZER)


@pytest.fixture(scope="session")
def _generator_run(tmp_path_factory, _tokenizer_run) -> Path:
    return finished_run(tmp_path_factory, TOY_GENERATOR, f"tokenizer.weights={_tokenizer_run}")


@pytest.fixture
def tokenizer_run(_tokenizer_run) -> Path:
    """Run folder of a finished configs/toy/rectok_tokenizer.yaml; do not change it."""
    return _tokenizer_run


@pytest.fixture
def generator_run(_generator_run) -> Path:
    """Run folder of a finished configs/toy/rectok_generator.yaml; do not change it."""
    return _generator_run


@pytest.fixture
def tokenizer_copy(_tokenizer_run, tmp_path) -> Path:
    """A copy of the toy tokenizer's run folder, under the same name in `tmp_path`."""
    return Path(shutil.copytree(_tokenizer_run, tmp_path / _tokenizer_run.name, symlinks=True))


@pytest.fixture
def build_trainer(monkeypatch, tmp_path):
    """build_trainer(config, *overrides) -> a Trainer as scripts/train.py makes it, on the CPU, before its first step."""
    from core.train.trainer import Trainer
    from run.load import load_config
    from run.train import train

    built: list[Trainer] = []

    def build(config: str, *overrides: str, device: str = "cpu") -> Trainer:
        common = [
            f"work_dir={tmp_path}",
            f"name=run_{len(built)}",
            f"data.cache_dir={tmp_path / 'cache'}",
            f"train.device={device}",
        ]
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "fit", lambda self: built.append(self) or 0)
            train(load_config(config, [*common, *overrides]))
        return built[-1]

    return build


@pytest.fixture
def released_tokenizer(tmp_path) -> dict[str, str]:
    """Section of a RecTok tokenizer known by one weight file alone, in the layout of the released ones."""
    import torch

    from tokenizer.continuous.rectok import RecTok

    torch.manual_seed(0)
    size = {"width": 192, "layers": 1, "heads": 4}
    weights = RecTok(image_size=32, channels=8, encoder=size, decoder=size).state_dict()
    path = tmp_path / "toy.pth"
    torch.save({"model": weights, "model_ema": weights, "epoch": 99}, path)
    return {"weights": str(path)}


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
def shell(*command: object, **extra: str) -> subprocess.CompletedProcess:
    """A run_*.sh with its arguments, as a user starts it."""
    environment = {**os.environ, "TESSERA_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NPROC": "1", **extra}
    return subprocess.run(
        ["bash", *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def program(script: str, *arguments: object) -> int:
    """What a run_*.sh starts, in this process: one import of torch is enough."""
    started = r'^exec bash scripts/launch.sh scripts\.(\w+)(.*) "\$@"$'
    ((name, first),) = re.findall(started, (ROOT / script).read_text(), re.M)
    return importlib.import_module(f"scripts.{name}").main([*first.split(), *map(str, arguments)])
