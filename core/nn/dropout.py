"""Dropout whose masks are functions of (seed, sample, layer), so that resumed runs and other rank counts see the same.

A network takes one key per sample from its draws (`draws.keys("dropout")`, (B,) int64) and derives from it a key per
layer (`core.rng.derive`); inside a layer a constant `salt` tells the places apart. One 64-bit draw decides four
elements, so the rate is exact to 1/65536 and costs about as much as reading the activations once. Without keys (in
sampling and evaluation) nothing happens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.rng import derive, random_bits, random_bits_at

LANES = 65536  # values of one draw


def threshold_of(p: float) -> int:
    """Of the values of a draw so many drop an element."""
    return round(p * LANES)


def _kept(keys: Tensor, salt: int, count: int, p: float) -> tuple[Tensor, float]:
    """((B, count) bool, True with probability 1 - p; 1 / (1 - p) for the p that is realised)."""
    threshold = threshold_of(p)
    lanes = random_bits(derive(keys, salt), (count + 3) // 4).view(torch.int16)[:, :count]
    return lanes >= threshold - LANES // 2, LANES / (LANES - threshold)


def kept_at(keys: Tensor, element: Tensor, threshold: int) -> Tensor:
    """The mask at single elements, bool: what `dropout` keeps at these places of a sample, for keys derived already."""
    lane = random_bits_at(keys, element >> 2) >> (16 * (element & 3))
    return (lane & 0xFFFF) ^ 0x8000 >= threshold


def dropout(x: Tensor, p: float, keys: Tensor | None, salt: int) -> Tensor:
    """Zero elements of x with probability p and scale the others. x has B or a multiple of B rows."""
    if keys is None or p == 0:
        return x
    kept, scale = _kept(keys, salt, x.numel() // keys.shape[0], p)
    return x * kept.view(x.shape) * scale


def drop_path(x: Tensor, factors: Tensor | None) -> Tensor:
    """Stochastic depth (Huang et al. 2016): each row of a residual branch times its factor, (rows,); None drops none."""
    return x if factors is None else (x * factors.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)


def path_factors(uniform: Tensor | None, p: float, dtype: torch.dtype) -> Tensor | None:
    """For drop_path: 0 where the (rows,) draw is below `p`, else 1 / (1 - p)."""
    return None if uniform is None or p == 0 else (uniform >= p).to(dtype) / (1.0 - p)


def keyed_path_factors(keys: Tensor | None, p: float, salt: int, rows: int) -> Tensor | None:
    """The same from one key per sample, (B,); `rows` is a multiple of B."""
    if keys is None or p == 0:
        return None
    kept, scale = _kept(keys, salt, rows // keys.shape[0], p)
    return kept.flatten() * scale
