"""Ceilings of what a training step asks of a GPU, in every published recipe."""

from __future__ import annotations

import pytest

from tests.gpu_path.training import RECIPES, compiled_share, measure


def names(*fast: str) -> list:
    """All recipes, of which these are tested whenever tests run."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]


@pytest.mark.parametrize("name", names("FAR-B", "ImageFolder"))
def test_the_work_is_compiled(name):
    """Frozen tokenizers, teachers, loss networks and discriminators count as well."""
    share, outside = compiled_share(name)
    assert 0.95 <= share <= 1, outside


@pytest.mark.parametrize("name", names("D-AR", "reAR-B"))
def test_a_step_compiles_in_one_piece_and_does_not_wait(name):
    """D-AR's masks, VAR's FlexAttention and reAR's dropped attention weights are what a GPU alone runs."""
    report = measure(name)
    assert report.kernels > 500 and report.graphs >= 2
    assert not report.breaks and not report.waits
