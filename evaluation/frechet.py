"""Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).

    d = |m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2)

Everything is float64. No root of a non-symmetric matrix is taken and no epsilon is added. With S1 = L L^T (Cholesky)
the last trace is the sum of the roots of the eigenvalues of L^T S2 L. Where S1 has no full rank (fewer pictures than
dimensions, dead channels) or rounding could show in a root, it is the sum of the singular values of A B^T with
S1 = A^T A and S2 = B^T B, which needs no full rank.

A set's distance from itself may come out as -1e-12: rounding is not hidden here. Clamp what you print, not the value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.errors import UserError
from evaluation.moments import Moments

_EPS = torch.finfo(torch.float64).eps


def frechet_distance(first: Moments, second: Moments) -> float:
    """Of two gathered sets."""
    return frechet_from_moments(first.mean, first.covariance, second.mean, second.covariance)


class FrechetMetric(Moments):
    """The distance of what is gathered from a reference.

    Args:
        name: of the result, `FeatureNet.distance_name(tap)`.
    """

    def __init__(self, name: str, reference: Moments, device: torch.device | str = "cpu"):
        super().__init__(reference.dim, device)
        self.name, self.reference = name, reference

    def compute(self) -> dict[str, float]:
        return {self.name: frechet_distance(self, self.reference)}


def frechet_from_moments(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Of stored means (D,) and covariances (D, D), any float dtype."""
    mean1, mean2 = mean1.double().flatten(), mean2.to(mean1.device).double().flatten()
    covariance1, covariance2 = (c.to(mean1.device).double() for c in (covariance1, covariance2))
    _same_width(mean1.numel(), mean2.numel())
    for side, tensors in (("first", (mean1, covariance1)), ("second", (mean2, covariance2))):
        if not all(bool(torch.isfinite(t.sum())) for t in tensors):  # NaN and infinity survive a sum
            raise UserError(f"The {side} set's statistics hold NaN or infinity: a picture or a feature was not finite.")
    means = (mean1 - mean2).square().sum()
    return float(means + covariance1.trace() + covariance2.trace() - 2.0 * _trace_of_root(covariance1, covariance2))


def frechet_from_features(first: Tensor, second: Tensor) -> float:
    """Of (N, D) and (M, D) features at hand: singular values of an N x M matrix, the quickest and most exact way while
    N, M <= D. Larger sets go through their moments."""
    _same_width(first.shape[1], second.shape[1])
    if min(first.shape[0], second.shape[0]) < 2:
        raise UserError(f"A covariance needs at least 2 pictures, got {first.shape[0]} and {second.shape[0]}.")
    if max(first.shape[0], second.shape[0]) > first.shape[1]:
        return frechet_distance(Moments.of(first), Moments.of(second))
    first, second = first.double(), second.to(first.device).double()
    mean1, mean2 = first.mean(0), second.mean(0)
    first, second = (first - mean1) / (first.shape[0] - 1) ** 0.5, (second - mean2) / (second.shape[0] - 1) ** 0.5
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise UserError("The features hold NaN or infinity: a Frechet distance has no value there.")
    cross = torch.linalg.svdvals(first @ second.T).sum()
    spread = first.square().sum() + second.square().sum()
    return float((mean1 - mean2).square().sum() + spread - 2.0 * cross)


def _same_width(first: int, second: int) -> None:
    if first != second:
        raise UserError(
            f"Frechet distance of features with {first} and {second} dimensions: "
            "both sides must come from the same tap of the same network."
        )


def _trace_of_root(covariance1: Tensor, covariance2: Tensor) -> Tensor:
    """Tr (S1 S2)^(1/2), a scalar."""
    lower1 = _cholesky(covariance1)
    if lower1 is not None:  # one factor is enough: S1 S2 has the eigenvalues of L^T S2 L
        roots, precise = _roots(_between(lower1, covariance2))
        if precise:
            return roots.sum()
    root1 = _root(covariance1) if lower1 is None else lower1.T
    lower2 = _cholesky(covariance2)
    root2 = _root(covariance2) if lower2 is None else lower2.T
    product = root1 @ root2.T if len(root1) <= len(root2) else root2 @ root1.T  # (smaller rank, larger rank)
    if product.shape[0] == 0:
        return product.sum()
    if len(product) < len(covariance1):  # without the zeros of what has no full rank
        roots, precise = _roots(product @ product.T)
        if precise:
            return roots.sum()
    return torch.linalg.svdvals(product).sum()


def _roots(square: Tensor) -> tuple[Tensor, bool]:
    """(roots of the eigenvalues, whether their sum is right to 1e-8) of a symmetric matrix, of which the lower half is
    read."""
    eigenvalues = _eigenvalues(square).clamp(min=0)
    # A solver's error is about eps times the largest eigenvalue, in the root of a small one possibly much more.
    error, roots = 4 * _EPS * eigenvalues[-1], eigenvalues.sqrt()
    worst = torch.minimum(error / (2 * roots).clamp(min=1e-300), error.sqrt()).sum()
    return roots, bool(worst <= 1e-8 * roots.sum())


def _eigenvalues(square: Tensor) -> Tensor:
    """Of a symmetric matrix that is not needed any more, ascending."""
    if square.device.type != "cpu":
        return torch.linalg.eigvalsh(square)
    from scipy.linalg import eigvalsh  # as torch's, without its copy

    return torch.from_numpy(eigvalsh(square.numpy().T, lower=False, driver="ev", overwrite_a=True, check_finite=False))


def _cholesky(covariance: Tensor) -> Tensor | None:
    """Lower L with L L^T = covariance; None where it has, to rounding, no full rank."""
    if covariance.device.type == "cpu":
        from scipy.linalg.lapack import dpotrf  # OpenBLAS is much quicker here than torch

        upper, failed = dpotrf(covariance.numpy().T)
        lower = torch.from_numpy(upper.T)
    else:
        lower, failed = torch.linalg.cholesky_ex(covariance)
    pivots = lower.diagonal().square()
    if int(failed) or bool(pivots.min() <= pivots.max() * covariance.shape[0] * _EPS):
        return None
    return lower


def _between(lower: Tensor, covariance: Tensor) -> Tensor:
    """L^T S L, lower half; what lies above it is not to be read."""
    if covariance.device.type == "cpu":
        from scipy.linalg.lapack import dsygst  # half the work of two products: one triangle of everything

        upper, _ = dsygst(covariance.numpy().T, lower.numpy().T, itype=2)
        return torch.from_numpy(upper.T)
    return lower.T @ (covariance @ lower)


def _root(covariance: Tensor) -> Tensor:
    """R of shape (rank, D) with R^T R = covariance, by Cholesky with pivoting: what is below rounding is left out."""
    from scipy.linalg.lapack import dpstrf  # torch has no such factorisation, on any device

    upper, order, rank, _ = dpstrf(((covariance + covariance.T) / 2).cpu().numpy())
    root = torch.zeros(rank, covariance.shape[0], dtype=torch.float64)
    root[:, torch.from_numpy(order).long() - 1] = torch.from_numpy(upper).triu()[:rank]
    return root.to(covariance.device)
