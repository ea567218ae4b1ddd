"""How far a set of pictures is from another, on features: Frechet distance, KID, precision and recall; and the
Inception Score, which looks at one set alone. Functions on arrays; everything is computed in float64 unless a published
number asks for less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError, nearest
from evaluation.networks import full_precision

# ---------------------------------------------------------------------------------------------------------------------
# Moments
# ---------------------------------------------------------------------------------------------------------------------
# Mean and covariance of feature vectors, gathered batch by batch and merged across processes, in float64.
#
# Sums are taken around a shift (the mean of the first batch), so means far from zero cost no digits, and a batch costs
# one matrix product. Two gatherings with different shifts merge as Chan, Golub & LeVeque (1979) do. How the pictures
# were cut into batches, shards or ranks changes the result by rounding only (1e-12 relative).


class Moments:
    """Mean and covariance of (N, dim) features.

    Args:
        dim: width of a feature vector.
        device: where sums live; batches are moved there. A GPU is worth it: float64 products are quick enough on all.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.shift: Tensor | None = None  # (D,)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)  # (D,) sum of x - shift
        self.squares = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # (D, D) outer products

    @classmethod
    def of(cls, features: Tensor, block: int = 8192) -> Moments:
        """Of (N, D) features at hand, on their device; `block` rows are held in float64 at a time."""
        gathered = cls(features.shape[1], features.device)
        for rows in features.split(block):
            gathered.update(rows)
        return gathered

    @property
    def dim(self) -> int:
        return self.total.numel()

    @torch.no_grad()
    def update(self, features: Tensor) -> Moments:
        """Add (B, D) features of any float dtype."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UserError(f"Moments of (B, {self.dim}) features were given {tuple(features.shape)}.")
        if features.shape[0] == 0:
            return self
        x = features.detach().to(self.total.device, torch.float64, copy=True)
        if self.shift is None:
            self.shift = x.mean(0)
        x -= self.shift
        self.count += x.shape[0]
        self.total += x.sum(0)
        if x.device.type != "cpu":
            self.squares.addmm_(x.T, x)
        else:
            rows = x.numpy()
            self.squares += torch.from_numpy(rows.T @ rows)  # NumPy sees one matrix twice and does half the work
        return self

    def merge(self, other: Moments) -> Moments:
        """Add what another one on the same device has gathered."""
        if other.dim != self.dim:
            raise UserError(f"Moments of {self.dim} and of {other.dim} dimensions cannot be merged.")
        if other.count == 0:
            return self
        if self.count == 0:
            self.count, self.shift = other.count, other.shift
            self.total, self.squares = other.total.clone(), other.squares.clone()
            return self
        offset = other.shift - self.shift  # x - our shift = (x - the other's) + offset
        cross = torch.outer(other.total, offset)
        squares = other.squares + cross + cross.T + other.count * torch.outer(offset, offset)
        self.total, self.squares = self.total + (other.total + other.count * offset), self.squares + squares
        self.count += other.count
        return self

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        if self.count == 0:
            raise UserError("A mean was asked for before any picture was added.")
        return self.shift + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, symmetric, unbiased (N - 1)."""
        if self.count < 2:
            raise UserError(f"A covariance needs at least 2 pictures, got {self.count}.")
        return torch.addr(self.squares, self.total, self.total, alpha=-1 / self.count).div_(self.count - 1)

    def state(self) -> dict[str, Tensor]:
        """What `restored` takes back: tensors only, fit for a safetensors file. Of at least one picture."""
        return {"count": torch.tensor([self.count]), "shift": self.shift, "total": self.total, "squares": self.squares}

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> Moments:
        """What a stored `state` had gathered."""
        result = cls(0)
        result.count = int(state["count"])
        result.shift, result.total, result.squares = state["shift"], state["total"], state["squares"]
        return result


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance
# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017).
#
#     d = |m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2)
#
# Everything is float64. No root of a non-symmetric matrix is taken and no epsilon is added. With S1 = L L^T (Cholesky)
# the last trace is the sum of the roots of the eigenvalues of L^T S2 L. Where S1 has no full rank (fewer pictures than
# dimensions, dead channels) or rounding could show in a root, it is the sum of the singular values of A B^T with
# S1 = A^T A and S2 = B^T B, which needs no full rank.
#
# A set's distance from itself may come out as -1e-12: rounding is not hidden here. Clamp what you print, not the value.

_EPS = torch.finfo(torch.float64).eps


def frechet_distance(first: Moments, second: Moments) -> float:
    """Of two gathered sets."""
    return frechet_from_moments(first.mean, first.covariance, second.mean, second.covariance)


def frechet_from_moments(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Of stored means (D,) and covariances (D, D), any float dtype."""
    mean1, mean2 = mean1.double().flatten(), mean2.to(mean1.device).double().flatten()
    covariance1, covariance2 = (c.to(mean1.device).double() for c in (covariance1, covariance2))
    if mean1.numel() != mean2.numel():
        raise UserError(
            f"Frechet distance of features with {mean1.numel()} and {mean2.numel()} dimensions: "
            "both sides must come from the same tap of the same network."
        )
    for side, tensors in (("first", (mean1, covariance1)), ("second", (mean2, covariance2))):
        if not all(bool(torch.isfinite(t.sum())) for t in tensors):  # NaN and infinity survive a sum
            raise UserError(f"The {side} set's statistics hold NaN or infinity: a picture or a feature was not finite.")
    means = (mean1 - mean2).square().sum()
    return float(means + covariance1.trace() + covariance2.trace() - 2.0 * _trace_of_root(covariance1, covariance2))


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


# ---------------------------------------------------------------------------------------------------------------------
# Kernel Inception Distance
# ---------------------------------------------------------------------------------------------------------------------
# Kernel Inception Distance (Binkowski et al. 2018): squared maximum mean discrepancy, averaged over random subsets.
#
# torch-fidelity's form: 100 subsets of 1000, drawn without replacement with RandomState(2020), first set before second
# in each round; kernel (x.y / d + 1)^3; the unbiased estimate. Ours computes kernels in float64, that library in
# float32.

Kernel = Callable[[Tensor, Tensor], Tensor]


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3 of (N, D) and (M, D) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


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
    first: Tensor,
    second: Tensor,
    subsets: int = 100,
    size: int = 1000,
    kernel: Kernel = polynomial_kernel,
    seed: int = 2020,
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
            f"{len(second)}. Measure more pictures: with other subsets it is another number."
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
        values.append(squared_mmd(x, y.to(x.device), kernel))
    result = torch.stack(values)
    return float(result.mean()), float(result.std(correction=0))


# ---------------------------------------------------------------------------------------------------------------------
# Precision and recall
# ---------------------------------------------------------------------------------------------------------------------
# Precision and recall of generated pictures (Kynkaanniemi et al. 2019), on features.
#
# Each set covers the balls around its points that reach to their k-th neighbour. Precision is the share of generated
# pictures inside a ball of a real one, recall the share of real pictures inside a ball of a generated one; a point on
# the rim is inside. Distances are squared Euclidean, max(|u|^2 - 2 u.v + |v|^2, 0).
#
# mode "exact" (default): float64 throughout; what lies beyond a rim by rounding alone is inside. Equals
# torch-fidelity's precision and recall, which take roots, up to ties.
# mode "adm_fp16": what guided-diffusion publishes. Each block of distances is computed in half precision, and again in
# float32 only if something in it overflowed. Radii are off by up to 2e-3 of their value and ties appear.
#
# Memory: "exact" holds a few blocks of `block` x `block` float64, "adm_fp16" one of 10,000 x 10,000 halves, never
# N x M.

MODES = ("exact", "adm_fp16")
_ADM_BLOCK = 10_000
_STRIP = 1024
_SLACK = 1e-9  # of a radius: the distance of a point on the rim is computed twice, with other roundings
_LARGEST_NORM = 65_504 / 2  # beyond it twice the product can overflow while the sum would not


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]; `note` is a sentence to print beside them, or ""."""

    precision: float
    recall: float
    note: str = ""


def precision_recall(
    *, real: Tensor, generated: Tensor, k: int = 3, mode: str = "exact", block: int | None = None
) -> PrecisionRecall:
    """Of (N, D) features of real and (M, D) of generated pictures, on the device of `real`.

    Args:
        k: a ball reaches to the k-th neighbour, the point itself not counted.
        block: rows and columns of a block of distances. None: 4096, or ADM's 10,000 in its mode, where it decides which
            distances are computed again.
    """
    generated = generated.to(real.device)
    if real.shape[1] != generated.shape[1]:
        raise UserError(
            f"Precision and recall of features with {real.shape[1]} and {generated.shape[1]} dimensions: "
            "both sides must come from the same tap of the same network."
        )
    real_radii, generated_radii = (manifold_radii(side, k, mode, block) for side in (real, generated))
    if mode == "exact":
        rounding = 1e-3 * _SLACK * max(float(side.double().square().sum(1).max()) for side in (real, generated))
        real_radii, generated_radii = (radii * (1 + _SLACK) + rounding for radii in (real_radii, generated_radii))
    size = block or (_ADM_BLOCK if mode == "adm_fp16" else 4096)
    covered_real = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered_generated = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    with full_precision():
        for rows in _slices(len(real), size):
            for columns in _slices(len(generated), size):
                distances = _block(real[rows], generated[columns], mode)
                for strip in _slices(len(distances), _STRIP):
                    part = distances[strip]
                    inside = part <= real_radii[rows][strip, None]
                    covered_generated[columns] |= inside.any(0)
                    within = part <= generated_radii[columns]
                    covered_real[rows.start + strip.start : rows.start + strip.stop] |= within.any(1)
    note = ""
    if mode == "adm_fp16":
        largest = max(float(side.float().square().sum(1).max()) for side in (real, generated))
        if largest > _LARGEST_NORM:
            note = (
                f"Features reach a squared norm of {largest:.0f}: half precision overflows beyond 32752 and may "
                'call every distance 0. Use mode "exact".'
            )
    return PrecisionRecall(float(covered_generated.double().mean()), float(covered_real.double().mean()), note)


def manifold_radii(features: Tensor, k: int = 3, mode: str = "exact", block: int | None = None) -> Tensor:
    """(N,) squared distance of each of (N, D) features to its k-th neighbour in the set; float32 in ADM's mode."""
    if mode not in MODES:
        raise UserError(f'unknown mode "{mode}" of precision and recall.{nearest(mode, MODES)}')
    if not 0 < k < len(features):
        raise UserError(f"The distance to neighbour {k} needs more than {k} pictures, got {len(features)}.")
    if not torch.isfinite(features).all():
        raise UserError("The features hold NaN or infinity: precision and recall have no value there.")
    size = block or (_ADM_BLOCK if mode == "adm_fp16" else 4096)
    radii = []
    with full_precision():
        for rows in _slices(len(features), size):
            smallest = None  # (rows, k + 1) so far
            for columns in _slices(len(features), size):
                distances = _block(features[rows], features[columns], mode)
                strips = []
                for strip in _slices(len(distances), _STRIP):
                    part = distances[strip]
                    part = part if smallest is None else torch.cat((smallest[strip], part.to(smallest.dtype)), 1)
                    strips.append(part.to(_result_dtype(mode)).topk(min(k + 1, part.shape[1]), largest=False).values)
                smallest = torch.cat(strips)
            radii.append(smallest[:, k])  # sorted: the point itself comes first
    return torch.cat(radii)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _result_dtype(mode: str) -> torch.dtype:
    return torch.float32 if mode == "adm_fp16" else torch.float64


def _block(rows: Tensor, columns: Tensor, mode: str) -> Tensor:
    """(n, m) squared distances of (n, D) and (m, D): float64; in ADM's mode half, or float32 where that overflows."""
    if mode == "exact":
        rows, columns = rows.double(), columns.double()
        squares = rows.square().sum(1)[:, None] - 2.0 * (rows @ columns.T) + columns.square().sum(1)
        return squares.clamp_(min=0)
    rows, columns = rows.float(), columns.float()
    half = torch.cat([_half_distances(rows[strip], columns) for strip in _slices(len(rows), _STRIP)])
    if all(bool(torch.isfinite(half[strip]).all()) for strip in _slices(len(half), _STRIP)):
        return half
    squares = rows.square().sum(1)[:, None] - 2.0 * (rows @ columns.T) + columns.square().sum(1)
    return squares.clamp_(min=0)


def _half_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """As TensorFlow does it with half inputs: sums in float32, every intermediate result rounded to half."""
    rows, columns = rows.half().float(), columns.half().float()
    row_norms, column_norms = rows.square().sum(1).half(), columns.square().sum(1).half()
    products = (rows @ columns.T).half()
    # parity: ADM evaluator - this order of additions, and a maximum that keeps NaN (clamp does)
    return ((row_norms[:, None] - 2.0 * products) + column_norms).clamp_(min=0)


# ---------------------------------------------------------------------------------------------------------------------
# Inception Score
# ---------------------------------------------------------------------------------------------------------------------
# Inception Score (Salimans et al. 2016) of classifier outputs: exp of the mean KL from p(y|x) to p(y), in float64.
#
# Published numbers differ in how the pictures are cut before the marginal p(y) is taken:
#
# | form | parts | who |
# |---|---|---|
# | "adm" | chunks of 5,000 in the order given, the last may be shorter and counts the same | guided-diffusion |
# | "shuffled" | ten parts after one shuffle with RandomState(2020); mean and population deviation | torch-fidelity |
# | "single" | one part | reAR's evaluator |
#
# All take logits without the classifier's bias. Softmax is never formed in float32, where 0 log 0 is NaN.

CHUNK = 5000


def _log_p(logits: Tensor, least: int) -> Tensor:
    """(N, classes) float64."""
    if logits.shape[0] < least:
        raise UserError(f"An Inception Score over {least} splits needs at least {least} pictures, got {len(logits)}.")
    log_p = logits.detach().double().log_softmax(dim=1)
    if not torch.isfinite(log_p.sum()):
        raise UserError("The classifier's outputs hold NaN or infinity: an Inception Score has no value there.")
    return log_p


def _scores(log_p: Tensor, edges: list[int]) -> tuple[float, float]:
    scores = []
    for start, stop in pairwise(edges):
        part = log_p[start:stop]  # (n, classes)
        log_marginal = part.logsumexp(0) - np.log(stop - start)
        scores.append((part.exp() * (part - log_marginal)).sum(1).mean().exp())
    result = torch.stack(scores)
    return float(result.mean()), float(result.std(correction=0))


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = 2020) -> tuple[float, float]:
    """(mean, population standard deviation) over splits: torch-fidelity's form.

    Args:
        logits: (N, classes) without the classifier's bias.
        splits: parts of N / splits pictures, each scored by itself.
        seed: of the shuffle; None: no shuffle.
    """
    log_p = _log_p(logits, splits)
    count = log_p.shape[0]
    if seed is not None:
        log_p = log_p[torch.from_numpy(np.random.RandomState(seed).permutation(count)).to(log_p.device)]
    return _scores(log_p, [i * count // splits for i in range(splits + 1)])


def inception_score_adm(logits: Tensor, chunk: int = CHUNK) -> tuple[float, float]:
    """(mean, population standard deviation) over consecutive chunks. The order of the pictures matters: index order."""
    log_p = _log_p(logits, 1)
    return _scores(log_p, [*range(0, log_p.shape[0], chunk), log_p.shape[0]])


def inception_score_single(logits: Tensor) -> tuple[float, float]:
    """(score, 0) of all pictures as one part."""
    return inception_score(logits, splits=1, seed=None)


FORMS: dict[str, Callable[[Tensor], tuple[float, float]]] = {
    "adm": inception_score_adm,
    "shuffled": inception_score,
    "single": inception_score_single,
}


def uneven_chunks(labels: Tensor, chunk: int = CHUNK) -> str:
    """A sentence when a chunk of the "adm" form has far fewer classes than the whole, else "".

    Pictures sorted by label give chunks whose marginal is nearly one class, and a score far too low.
    """
    classes = len(torch.unique(labels))
    for number, part in enumerate(labels.split(chunk)):
        present, expected = len(torch.unique(part)), min(classes, len(part))
        if present < 0.5 * expected:
            return (
                f"Chunk {number} of the Inception Score holds {present} of {classes} classes: the pictures are "
                "sorted by label and the score is too low. Give them in another order, such as class i mod classes."
            )
    return ""
