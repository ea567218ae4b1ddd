"""A small part of tests/tools/fuzz.py: what --check accepts is trained, previewed and evaluated; command lines are answered;
nothing ends in a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


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
