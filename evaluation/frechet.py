"""Frechet distance between Gaussians fitted to two sets of features.

    d = |m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2)

Everything is float64 on the CPU. The last trace is the sum of the singular values of S1^(1/2) S2^(1/2): no root of a
non-symmetric product is ever taken, and covariances without full rank (fewer pictures than dimensions, dead channels)
need no epsilon. Rounding noise in null directions enters linearly; after an eigenvalue solver of the product it would
enter through a square root.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import UserError


@dataclass
class Gaussian:
    """Mean and covariance of feature vectors, gathered batch by batch and mergeable across processes.

    Stores the scatter around the running mean and merges as Chan, Golub & LeVeque (1979) do: means far from zero cost
    no digits, and the result does not depend on how the pictures were split beyond rounding.
    """

    count: int
    mean: Tensor  # (D,) float64
    scatter: Tensor  # (D, D) float64, sum of (x - mean)(x - mean)^T

    @classmethod
    def empty(cls, dim: int) -> "Gaussian":
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> "Gaussian":
        """Of (N, D) features."""
        x = features.detach().cpu().double()
        if x.shape[0] == 0:
            return cls.empty(x.shape[1])
        mean = x.mean(0)
        centred = x - mean
        return cls(x.shape[0], mean, centred.T @ centred)

    def update(self, features: Tensor) -> "Gaussian":
        """Add (B, D) features, in place."""
        return self.merge(Gaussian.of(features))

    def merge(self, other: "Gaussian") -> "Gaussian":
        """Add what another one has gathered, in place."""
        total = self.count + other.count
        if other.count:
            shift = other.mean - self.mean
            weight = other.count / total
            self.scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * weight)
            self.mean = self.mean + shift * weight
        self.count = total
        return self

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased."""
        if self.count < 2:
            raise UserError(f"A covariance needs at least 2 pictures, got {self.count}.")
        return self.scatter / (self.count - 1)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Of two gathered Gaussians. Identical sets may give about -1e-12: rounding is not hidden."""
    return frechet_from_moments(first.mean, first.covariance, second.mean, second.covariance)


def frechet_from_moments(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Of stored means (D,) and covariances (D, D), any float dtype."""
    mean1, covariance1, mean2, covariance2 = (t.cpu().double() for t in (mean1, covariance1, mean2, covariance2))
    if mean1.shape != mean2.shape:
        raise UserError(
            f"Frechet distance of features with {mean1.numel()} and {mean2.numel()} dimensions: "
            "both sides must come from the same tap of the same network."
        )
    cross = torch.linalg.svdvals(_root(covariance1) @ _root(covariance2).T).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2.0 * cross
    return float(distance)


def _root(covariance: Tensor) -> Tensor:
    """R of shape (rank, D) with R^T R = covariance. Directions below the rounding of the largest are left out."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    keep = values > values.clamp(min=0).max() * covariance.shape[0] * torch.finfo(torch.float64).eps
    return values[keep].sqrt()[:, None] * vectors[:, keep].T
