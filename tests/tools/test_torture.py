"""Every training and every program, killed and stopped a few times; and that the tool sees what is not as it should be."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from tests.tools.arena import Program, contents
from tests.tools.jobs import PROGRAMS, SYSTEMS, Workshop
from tests.tools.torture import KILL, STOPS, change_ranks, chosen, interrupt, lose_ranks

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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretokenize", "evaluate_generator"])
def test_other_ranks(tmp_path, name):
    score = change_ranks(Workshop(tmp_path).jobs(name)[0], 2, seed=3)
    assert score.full and score.total == 2, str(score)


@dataclass
class Changing(Program):
    """Gives something else each time."""

    def result(self, name: str) -> dict[str, object]:
        return {**contents(self.place(name)), "called": name}


def test_a_difference_is_seen(tmp_path):
    score = interrupt(Changing(tmp_path, lambda folder: ["--help"], "convert", "changing"), 1, KILL)
    assert not score.full and score.total == 1 and "'called'" in str(score)


def test_more_damage_than_there_are_cases():
    cases, rng = list(range(8)), random.Random(0)
    assert chosen(cases, None, rng) == cases and len(set(chosen(cases, 3, rng))) == 3
    many = chosen(cases, 30, rng)
    assert sorted(many.count(case) for case in cases) == [3, 3, 4, 4, 4, 4, 4, 4]
