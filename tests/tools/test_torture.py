"""Every training and every program, killed and stopped a few times; and that the tool sees what is not as it should be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.tools.arena import Program, contents
from tests.tools.jobs import PROGRAMS, SYSTEMS, Workshop
from tests.tools.torture import KILL, STOPS, interrupt, lose_ranks

HERE = {
    "compare",
    "convert",
    "edit",
    "latent_stats",
    "latents",
    "linear_probe",
    "quickstart",
    "sweep",
}  # are stopped here, the others in tests/scripts/test_stops.py
CASES = [(name, KILL) for name in [*SYSTEMS, *PROGRAMS]] + [(name, STOPS) for name in [*SYSTEMS, *sorted(HERE)]]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "numbers"), CASES)
def test_interrupted(tmp_path, name, numbers):
    for runs in Workshop(tmp_path).jobs(name):
        score = interrupt(runs, 4, numbers, seed=3)
        assert score.full and score.total == sum(score.where.values()) == 4, str(score)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rectok", "pretokenize", "evaluate"])
def test_lost_ranks(tmp_path, name):
    runs = Workshop(tmp_path).jobs(name)[0]
    score = lose_ranks(runs, 2, seed=3)
    assert score.full and score.total == 2, str(score)


@dataclass
class Changing(Program):
    """Gives something else each time."""

    def result(self, name: str) -> dict[str, object]:
        return {**contents(self.place(name)), "called": name}


def test_a_difference_is_seen(tmp_path):
    score = interrupt(Changing(tmp_path, lambda folder: ["--help"], "convert", "changing"), 1, KILL)
    assert not score.full and score.total == 1 and "'called'" in str(score)
