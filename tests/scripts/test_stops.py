"""Programs as processes that are sent a signal at a random moment: 75, one sentence, and the same result afterwards."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from core.signals import Stopped, StopRequest
from scripts import convert, edit, make_reference, reconstruct
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


def commands(tokenizer: Path, generator: Path) -> dict[str, tuple[object, ...]]:
    """A short run of every program that computes; OUT stands for the folder that it writes into."""
    pictures = "synthetic://?size=32&classes=4&count=64"
    toy = (
        TOY_TOKENIZER,
        f"work_dir={tokenizer.parent}",
        f"data.url={pictures}",
        "data.crop=center",
        "train.device=cpu",
    )
    lite = ("eval.network=lite0", "eval.batch=4", "eval.num_images=24")
    return {
        "train": (TOY_TOKENIZER, "work_dir=OUT", "train.device=cpu", "train.duration=40step"),
        "sample": (generator, "--labels", "0-3", "--num", 48, "--batch", 4, "--out", "OUT", "train.device=cpu"),
        "pretokenize": (*toy, "--batch", 4, "--out", "OUT/store"),
        "evaluate": (tokenizer, pictures, *lite, "--write", "png", "--out", "OUT"),
        "evaluate_generator": (generator, *lite, "train.device=cpu", "--write", "png", "--out", "OUT"),
        "make_reference": (pictures, "OUT/r.safetensors", "--size", 32, "--network", "lite0", "--batch", 4),
        "latent_stats": (tokenizer, pictures, "--out", "OUT/stats.safetensors"),
        "linear_probe": (tokenizer, pictures, "--epochs", 2, "--out", "OUT"),
        "reconstruct": ("--weights", tokenizer, "--url", pictures, "--num", 16, "--out", "OUT"),
    }


def contents(out: Path) -> dict[str, object]:
    """What a program made, without what tells the time."""
    made: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix in (".png", ".safetensors", ".npy"):
            made[name] = path.read_bytes()
        if path.name == "metrics.json":
            made[name] = json.loads(path.read_text())["metrics"]
    return made


@pytest.mark.slow
@pytest.mark.parametrize("program", commands(Path(), Path()))
def test_stopped_anywhere(tmp_path, program, tokenizer_run, generator_run):
    """TESSERA_STOPS is how often, 3 times if nothing is said."""
    words = commands(tokenizer_run, generator_run)[program]

    def begin(out: str) -> subprocess.Popen:
        (tmp_path / out).mkdir(exist_ok=True)
        return start(program, *(str(word).replace("OUT", str(tmp_path / out)) for word in words))

    chosen = random.Random(program)
    began = time.monotonic()
    whole = begin("whole")
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err[-2000:]
    takes = time.monotonic() - began
    codes = []
    for _, number in zip(range(int(os.environ.get("TESSERA_STOPS", 3))), itertools.cycle(SIGNALS)):
        process = begin("parts")
        time.sleep(chosen.uniform(0.3, takes))  # from the moment on when Python has begun
        process.send_signal(number)
        out, err = process.communicate(timeout=300)  # how soon it ends is not asked: this machine may be busy
        assert "Traceback" not in out + err
        codes.append(process.returncode)
        if process.returncode:
            assert process.returncode == 75, (number, err[-2000:])
            assert (out + err).count("run the same command again to continue") == 1
        else:
            shutil.rmtree(tmp_path / "parts")
    assert 75 in codes
    (tmp_path / "parts").mkdir(exist_ok=True)
    last = begin("parts")
    _, err = last.communicate(timeout=300)
    assert last.returncode == 0, err[-2000:]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole") != {}


@pytest.mark.parametrize("program", ["convert", "edit", "make_reference", "reconstruct"])
def test_a_stop_when_the_last_file_is_there_comes_too_late(
    tmp_path, program, tokenizer_run, generator_run, monkeypatch
):
    """The same command would be refused; before, it goes on."""
    pictures, photo, out = "synthetic://?size=32&classes=4&count=8", tmp_path / "photo.png", tmp_path / "out"
    Image.linear_gradient("L").convert("RGB").save(photo)
    main, last, words = {
        "convert": (convert.main, "x.safetensors", (tokenizer_run, out / "x.safetensors")),
        "edit": (edit.main, "x.png", (generator_run, photo, "--outpaint", 0.2, "--label", 1, "--out", out / "x.png")),
        "make_reference": (
            make_reference.main,
            "r.npz",
            (pictures, out / "r.npz", "--network", "lite0", "--batch", 8, "--workers", 0),
        ),
        "reconstruct": (
            reconstruct.main,
            "grid.png",
            ("--weights", tokenizer_run, "--url", pictures, "--num", 2, "--out", out),
        ),
    }[program]
    replace, told = os.replace, []

    def telling(old, new):
        made = Path(new)
        if made.name != last:
            replace(old, new)
        told.append(made.name)
        if told.count(made.name) == 1:
            signal.raise_signal(signal.SIGTERM)  # of other files, when they are there; of the last one, before
        if made.name == last:
            replace(old, new)

    monkeypatch.setattr(os, "replace", telling)
    for _ in range(20):
        with StopRequest(at_once=True):
            try:
                assert (main([str(word) for word in words]) or 0) == 0
                break
            except Stopped:
                assert told[-1] != last and not (out / last).exists()
    assert (out / last).is_file() and told[-1] in (last, "x.json")
