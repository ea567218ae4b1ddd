"""How far a number may be trusted: bootstrap intervals and the value that infinitely many pictures would have.

All take `measure(rows) -> float`, the metric of the pictures with these row numbers:

    measure = lambda rows: frechet_distance(Moments.of(features[rows]), reference)
    at_infinity(measure, len(features))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError

Measure = Callable[[Tensor], float]


@dataclass(frozen=True)
class Extrapolation:
    """metric(N) = value + slope / N; `error` is the standard error of `value`."""

    value: float
    error: float
    slope: float


POINTS = 15  # of an extrapolation: numbers of pictures that it is measured with
FEWEST = 20  # pictures of an extrapolation, whose smallest subset is a tenth


def check_extras(replicates: int, infinity: bool, count: int) -> None:
    """UserError where a bootstrap of `replicates` (0: none) or an extrapolation cannot be had of `count` pictures."""
    if replicates < 0 or replicates == 1:
        raise UserError(f"--bootstrap {replicates}: an interval needs at least 2 replicates; 50 are usual.")
    if infinity and count < FEWEST:
        raise UserError(
            f"--infinity: extrapolating to infinitely many pictures needs at least {FEWEST}, there are {count}."
        )


def at_infinity(measure: Measure, count: int) -> Extrapolation:
    """The metric without its bias for finite N (Chong & Forsyth 2020): least squares on 1 / N.

    Measured on POINTS random subsets, without replacement, of sizes evenly spaced from N / 10 to N. Removes the bias
    of the generated side only; the reference is as large as it is.
    """
    if count < FEWEST:
        raise UserError(f"Extrapolating to infinitely many pictures needs at least {FEWEST} pictures, got {count}.")
    rng = np.random.default_rng(0)
    sizes = np.unique(np.linspace(count / 10, count, POINTS).round().astype(int))
    values = [measure(torch.from_numpy(rng.permutation(count)[:size])) for size in sizes]
    design = np.stack([np.ones(len(sizes)), 1.0 / sizes], axis=1)
    (value, slope), *_ = np.linalg.lstsq(design, np.array(values), rcond=None)
    residual = np.array(values) - design @ np.array([value, slope])
    variance = (residual**2).sum() / max(len(sizes) - 2, 1)
    error = np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
    return Extrapolation(float(value), float(error), float(slope))


def resampled(measure: Measure, count: int, replicates: int, seed: int = 0) -> np.ndarray:
    """(replicates,) values for pictures drawn again. Which ones depends on count and seed alone: replicate r of two
    models is about the same pictures, so that the differences of such values are replicates of the paired difference."""
    if count < 2 or replicates < 2:
        raise UserError(f"A bootstrap needs at least 2 pictures and 2 replicates, got {count} and {replicates}.")
    rng = np.random.default_rng(seed)
    return np.array([measure(torch.from_numpy(rng.integers(count, size=count))) for _ in range(replicates)])


def normal_interval(value: float, replicates: np.ndarray) -> tuple[float, float]:
    """95 % interval of a biased metric such as FID: value +- 1.96 deviations of the replicates.

    Duplicates in a replicate shrink the effective N, which about doubles the bias of a Frechet distance: only the
    spread of the replicates is used, not their mean.
    """
    spread = 1.96 * replicates.std(ddof=1)
    return float(value - spread), float(value + spread)


def bootstrap_percentile(measure: Measure, count: int, replicates: int = 200) -> tuple[float, float]:
    """95 % interval, between percentiles, of metrics that hardly depend on N: Inception Score, PSNR, SSIM, LPIPS."""
    low, high = np.quantile(resampled(measure, count, replicates), [0.025, 0.975])
    return float(low), float(high)
