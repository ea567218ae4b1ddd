"""A small part of tests/tools/fuzz.py: what --check accepts is trained, previewed and evaluated; command lines are answered;
nothing ends in a traceback."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.tools import forked
from tests.tools.fuzz import FINE, Trials, refusal


@pytest.mark.parametrize("edits", [25, pytest.param(300, marks=pytest.mark.slow)])
def test_random_edits_are_refused_in_a_sentence_or_run(tmp_path, edits):
    command = [sys.executable, "-m", "tests.tools.fuzz", "--edits", str(edits), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "refused" in done.stdout and "ran" in done.stdout


@pytest.mark.parametrize("lines", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_command_lines_are_answered_in_a_sentence(tmp_path, lines):
    command = [sys.executable, "-m", "tests.tools.fuzz", "--lines", str(lines), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "refused" in done.stdout and "answered" in done.stdout


def test_how_many_are_tried():
    assert list(Trials(3, first=5).numbers()) == [5, 6, 7]
    assert list(itertools.islice(Trials(0, minutes=60).numbers(), 3)) == [0, 1, 2]
    assert not list(Trials(0, minutes=0).numbers())
    trials = Trials(3, seed=7)
    trials.note(0, "", "ran", "")
    assert str(trials) == "1 from number 0 of seed 7 on: 1 ran" and not trials.findings
    trials.note(1, "an edit", "traceback", "why")
    assert trials.findings


def test_refusals_are_told_apart():
    assert refusal("error: generator.layers=0: at least 1")[0] == "refused"
    assert refusal("error: a step of x would fail (RuntimeError: mat1 and mat2)")[0] == "refused by the rehearsed step"
    assert refusal("error: x.pt: 'list' object has no attribute 'get'")[0] not in FINE
    assert refusal("data.url is wrong")[0] not in FINE


def test_a_stop_ends_what_is_being_tried(tmp_path, monkeypatch):
    begun = []

    def stopped(child: int, seconds: float) -> None:
        begun.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(forked, "_wait", stopped)
    with pytest.raises(KeyboardInterrupt):
        forked.start("scripts.train", ["--help"], tmp_path, 10)
    with pytest.raises(ProcessLookupError):
        os.kill(begun[0], 0)
