"""A part of tests/tools/odd_files.py: odd pictures and hostile weight files are taken or refused in a sentence; nothing runs."""

from __future__ import annotations

import mmap
import os

import pytest

from tests.tools import odd_files


@pytest.mark.parametrize("every", [24, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_odd_files_end_as_they_should(every, capsys):
    code = odd_files.main(["--every", str(every)])
    assert code == 0, capsys.readouterr().out


def test_a_finding_is_found(tmp_path):
    """Of code that ran, an exception, another ending and too much memory."""

    def look(path):
        if path.name == "runs":
            (tmp_path / "marker").touch()
        if path.name == "raises":
            raise RecursionError
        if path.name == "dies":
            os._exit(3)
        if path.name == "eats":
            # What malloc gives back may be this process's own already.
            with mmap.mmap(-1, odd_files.SLACK * 2) as fresh:
                fresh.write(b"x" * len(fresh))
        return 0

    for name, word in (
        ("runs", "ran code"),
        ("raises", "RecursionError"),
        ("dies", "status"),
        ("eats", "MB of memory"),
    ):
        ending = odd_files.trial(odd_files.Case(name, b"x", odd_files.TAKEN), look, tmp_path, tmp_path / "marker")
        (finding,) = ending.findings(60)
        assert word in finding
    whole = odd_files.trial(odd_files.Case("x", b"x", odd_files.REFUSED), look, tmp_path, tmp_path / "marker")
    assert whole.findings(60) == ["taken, expected refused: "]
