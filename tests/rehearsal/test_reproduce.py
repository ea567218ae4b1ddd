"""run_reproduce.sh with tiny files: a few rows always, the whole table among the slow tests."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess

import pytest

from run import reproduce as product
from tests.rehearsal import reproduce


@pytest.fixture(scope="module")
def furnished(rehearsal):
    reproduce.furnish(rehearsal.house)
    return rehearsal.house


def rows_of(words: list[str]) -> set[tuple[str, str]]:
    return {(row.name, metric) for row in product.rows(words) if not row.obstacle() for metric in row.published}


def measured(output: str) -> set[tuple[str, str]]:
    """(row, metric) of the lines that hold a measured number."""
    lines = [line.split(" | ") for line in output.splitlines() if line.count(" | ") == 6]
    return {(line[0], line[1]) for line in lines if line[3]}


@pytest.mark.parametrize("words", [["adm_known_answer", "D-AR-L-360K", "XQGAN-4096"]])
def test_a_few_rows(furnished, words):
    done = reproduce.rehearse(furnished, words).expect()
    assert measured(done.output) == rows_of(words), done.output[-3000:]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_numbers(furnished, tmp_path):
    """SIGKILL of everything, four times and in turns with SIGTERM of the program alone; then once more undisturbed."""
    words, whole, broken = ["fqgan_dual_ds16", "titok_l32"], tmp_path / "whole", tmp_path / "broken"
    done = furnished.run(reproduce.command(words, str(whole))).expect()
    moments = random.Random(0)
    environment = furnished.environment(direct=True)
    for number in range(4):
        process = subprocess.Popen(
            ["bash", "-c", reproduce.command(words, str(broken))],
            cwd=furnished.folder,
            env=environment,
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0.1, 0.7) * done.seconds)
        if number % 2:
            process.terminate()
            assert process.wait() in (0, 75)
        else:
            with contextlib.suppress(ProcessLookupError):  # it was through
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    furnished.run(reproduce.command(words, str(broken))).expect()
    reproduce.check_again(furnished.run(reproduce.command(words, str(broken))).expect())

    def numbers(folder):
        files = sorted(folder.glob("*/metrics.json"))
        return {file.parent.name: json.loads(file.read_text())["metrics"] for file in files}

    assert len(numbers(whole)) == 2 and numbers(broken) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["evaluation", "rectok", "fqgan", "rear", "dar", "imagefolder"])
def test_the_whole_table(furnished, system):
    done = reproduce.rehearse(furnished, [system]).expect()
    assert measured(done.output) == rows_of([system]), done.output[-3000:]
