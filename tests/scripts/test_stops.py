"""Programs as processes that are sent a signal at a random moment: 75, one sentence, and the same result afterwards."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, TOY_TOKENIZER

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def start(module: str, *words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", f"scripts.{module}", *map(str, words)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TESSERA_OFFLINE": "1"},
    )


def command(program: str, out: Path, generator: Path) -> tuple[object, ...]:
    """A short run of a program that writes into `out`."""
    return {
        "train": (TOY_TOKENIZER, f"work_dir={out}", "train.device=cpu", "train.duration=40step"),
        "sample": (generator, "--labels", "0-3", "--num", 48, "--batch", 4, "--out", out, "train.device=cpu"),
    }[program]


def contents(out: Path) -> dict[str, object]:
    """What a program made, without what tells the time."""
    made: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix in (".png", ".safetensors"):
            made[name] = path.read_bytes()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "sample"])
def test_stopped_anywhere(tmp_path, program, generator_run):
    chosen = random.Random(program)
    began = time.monotonic()
    whole = start(program, *command(program, tmp_path / "whole", generator_run))
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err[-2000:]
    takes = time.monotonic() - began
    codes = []
    for number in SIGNALS:
        process = start(program, *command(program, tmp_path / "parts", generator_run))
        time.sleep(chosen.uniform(0.3, takes))  # from the moment on when Python has begun
        process.send_signal(number)
        out, err = process.communicate(timeout=300)  # how soon it ends is not asked: this machine may be busy
        assert "Traceback" not in out + err
        codes.append(process.returncode)
        if process.returncode:
            assert process.returncode == 75, (number, err[-2000:])
            assert (out + err).count("run the same command again to continue") == 1
    assert 75 in codes
    last = start(program, *command(program, tmp_path / "parts", generator_run))
    _, err = last.communicate(timeout=300)
    assert last.returncode == 0, err[-2000:]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole") != {}
