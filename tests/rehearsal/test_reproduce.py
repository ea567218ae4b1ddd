"""run_reproduce.sh with tiny files: a few rows always, the whole table among the slow tests."""

from __future__ import annotations

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
@pytest.mark.parametrize("system", ["evaluation", "rectok", "fqgan", "rear", "dar", "imagefolder"])
def test_the_whole_table(furnished, system):
    done = reproduce.rehearse(furnished, [system]).expect()
    assert measured(done.output) == rows_of([system]), done.output[-3000:]
