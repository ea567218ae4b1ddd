"""Kernel Inception Distance (Binkowski et al. 2018): squared maximum mean discrepancy, averaged over random subsets.

torch-fidelity's form: 100 subsets of 1000, drawn without replacement with RandomState(2020), first set before second
in each round; kernel (x.y / d + 1)^3; the unbiased estimate. Ours computes kernels in float64, that library in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError

Kernel = Callable[[Tensor, Tensor], Tensor]


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3 of (N, D) and (M, D) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def rbf_kernel(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)) of (N, D) and (M, D) -> (N, M)."""
    squares = x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)
    return torch.exp(-squares.clamp(min=0) / (2 * sigma**2))


KERNELS: dict[str, Kernel] = {"polynomial": polynomial_kernel, "rbf": rbf_kernel}


def squared_mmd(x: Tensor, y: Tensor, kernel: Kernel = polynomial_kernel) -> Tensor:
    """Unbiased estimate from (N, D) and (M, D): pairs of a picture with itself are left out. Float64 scalar."""
    if min(len(x), len(y)) < 2:
        raise UserError(f"A discrepancy needs at least 2 pictures a side, got {len(x)} and {len(y)}.")
    x, y = x.double(), y.double()

    def within(z: Tensor) -> Tensor:
        values = kernel(z, z)
        return (values.sum() - values.diagonal().sum()) / (len(z) * (len(z) - 1))

    return within(x) + within(y) - 2.0 * kernel(x, y).mean()


def kid(
    first: Tensor, second: Tensor, subsets: int = 100, size: int = 1000, kernel: str = "polynomial", seed: int = 2020
) -> tuple[float, float]:
    """(mean, population standard deviation) over subsets of (N, D) and (M, D) features."""
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"KID of features with {first.shape[1]} and {second.shape[1]} dimensions: both sides must come "
            "from the same tap of the same network."
        )
    if min(len(first), len(second)) < size:
        raise UserError(
            f"KID over subsets of {size} needs as many pictures on each side, got {len(first)} and "
            f"{len(second)}. Choose a smaller subset size, and compare only numbers made with the same."
        )
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise UserError("The features hold NaN or infinity: KID has no value there.")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            features[torch.from_numpy(rng.choice(len(features), size, replace=False)).to(features.device)]
            for features in (first, second)
        )
        values.append(squared_mmd(x, y.to(x.device), KERNELS[kernel]))
    result = torch.stack(values)
    return float(result.mean()), float(result.std(correction=0))
