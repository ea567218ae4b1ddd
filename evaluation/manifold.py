"""Precision and recall of generated pictures (Kynkaanniemi et al. 2019), on features.

Each set covers the balls around its points that reach to their k-th neighbour. Precision is the share of generated
pictures inside a ball of a real one, recall the share of real pictures inside a ball of a generated one; a point on the
rim is inside. Distances are squared Euclidean, max(|u|^2 - 2 u.v + |v|^2, 0).

mode "exact" (default): float64 throughout; what lies beyond a rim by rounding alone is inside. Equals torch-fidelity's
precision and recall, which take roots, up to ties.
mode "adm_fp16": what guided-diffusion publishes. Each block of distances is computed in half precision, and again in
float32 only if something in it overflowed. Radii are off by up to 2e-3 of their value and ties appear.

Memory: "exact" holds a few blocks of `block` x `block` float64, "adm_fp16" one of 10,000 x 10,000 halves; never N x M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import UserError, nearest
from evaluation.features import full_precision

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
