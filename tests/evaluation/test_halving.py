"""evaluation/halving.py: the best of a grid for a part of its cost."""

import itertools

import numpy as np
import pytest

from core.errors import UserError
from evaluation.halving import BUDGET, Rung, climb, cost, plan


@pytest.mark.parametrize("settings", [4, 5, 8, 12, 36, 150])
@pytest.mark.parametrize("full", [1024, 5000, 50_000])
def test_a_ladder_keeps_to_its_budget(settings, full):
    ladder = plan(settings, full)
    assert ladder[0].kept == settings and ladder[-1].pictures == full
    assert cost(ladder) <= BUDGET * settings * full
    for lower, upper in itertools.pairwise(ladder):
        assert upper.kept < lower.kept and upper.pictures > lower.pictures


def test_few_settings_and_pictures():
    assert plan(1, 500) == [Rung(1, 500)]
    assert plan(3, 500, first=500) == [Rung(3, 500)]
    assert plan(6, 20) == [Rung(6, 20)]  # too few pictures to tell anything from a part of them
    assert plan(8, 800, first=10)[0] == Rung(8, 10)
    assert [round(cost(plan(n, 400)) / (n * 400), 2) for n in (2, 3, 4)] == [0.58, 0.44, 0.4]  # docs/compare.md
    with pytest.raises(UserError, match="--first 900"):
        plan(8, 800, first=900)


def test_the_best_of_the_whole_grid_is_found_on_shared_noise():
    """A simulated distance: the setting's own value, a bias of 1 / N that differs between settings, and the luck of the
    pictures, most of it shared. The winner has to be that of the grid measured in full, nearly always."""
    full, found, regret = 5000, 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = 5 + np.abs(np.linspace(-2, 2, 24) - rng.uniform(-1, 1)) + rng.normal(0, 0.02, 24)
        bias = 400 * rng.uniform(0.98, 1.02, 24)
        shared, own = rng.normal(size=full), rng.normal(size=(24, full))
        drawn = np.zeros(24, int)

        def measure(i: int, count: int) -> float:
            drawn[i] = max(drawn[i], count)
            luck = shared[:count].mean() * 3 + own[i, :count].mean()
            return truth[i] + bias[i] / count + luck

        whole = int(np.argmin([measure(i, full) for i in range(24)]))
        drawn[:] = 0
        best = climb(range(24), plan(24, full), measure)[0]
        assert drawn.sum() == cost(plan(24, full)) <= BUDGET * 24 * full
        found += best == whole
        regret.append(measure(best, full) - measure(whole, full))
    assert found >= 54 and max(regret) < 0.1
