"""Bootstrap intervals and the value at infinitely many pictures."""

from __future__ import annotations

import pytest
import torch

from evaluation import intervals
from evaluation.distances import Moments, frechet_from_moments


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_extrapolation_removes_the_bias():
    """Two samples of one Gaussian: the distance at infinity is 0, at N it is not."""
    features = normal(2000, 8).double()
    mean, covariance = torch.zeros(8), torch.eye(8)

    def measure(rows):
        part = Moments.of(features[rows])
        return frechet_from_moments(part.mean, part.covariance, mean, covariance)

    found = intervals.at_infinity(measure, 2000)
    assert measure(torch.arange(200)) > 0.05
    assert abs(found.value) < 0.02 and found.slope > 0 and 0 < found.error < 0.02
    line = intervals.at_infinity(lambda rows: 3.0 + 40.0 / len(rows), 500)
    assert (line.value, line.slope, line.error) == pytest.approx((3.0, 40.0, 0.0), abs=1e-9)


def test_bootstrap_intervals_hold_what_they_should():
    values = normal(400).double() + 5
    low, high = intervals.bootstrap_percentile(lambda rows: float(values[rows].mean()), 400)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)
    features = normal(150, 4)

    def measure(rows):
        part = Moments.of(features[rows])
        return frechet_from_moments(part.mean, part.covariance, torch.zeros(4), torch.eye(4))

    value = measure(torch.arange(150))
    low, high = intervals.normal_interval(value, intervals.resampled(measure, 150, replicates=20))
    assert low < value < high and (low + high) / 2 == pytest.approx(value)
