"""Dropout whose masks are functions of (seed, sample, layer), so that resumed runs and other rank counts see the same.

A network takes one key per sample from its draws (`draws.keys("dropout")`, (B,) int64) and derives from it a key per
layer (`core.rng.derive`); inside a layer a constant `salt` tells the places apart. One 64-bit draw decides four
elements, so the rate is exact to 1/65536. Without keys (in sampling and evaluation) nothing happens.

On a GPU one Triton kernel draws and applies a mask, and backward draws it again instead of keeping it; inside of what
torch.compile compiles, its kernels do. The masks are the same everywhere.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from core.devices import is_rehearsal
from core.nn.gated_norm import has_triton, kernel_works
from core.rng import GOLDEN, MIX1, MIX2, derive, random_bits, random_bits_at, salt_of

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
    if x.device.type == "cuda" or is_rehearsal():
        apply = _by_element if torch.compiler.is_compiling() or not has_triton() else torch.ops.tessera.dropout
        return apply(x, keys, salt, threshold_of(p))
    kept, scale = _kept(keys, salt, x.numel() // keys.shape[0], p)
    return x * kept.view(x.shape) * scale


def _by_element(x: Tensor, keys: Tensor, salt: int, threshold: int) -> Tensor:
    rows = x.reshape(keys.shape[0], -1)
    element = torch.arange(rows.shape[1], device=x.device)
    kept = kept_at(derive(keys, salt)[:, None], element, threshold)
    return (rows * kept * (LANES / (LANES - threshold))).view(x.shape)


@torch.library.custom_op("tessera::dropout", mutates_args=(), device_types="cuda")
def _on_gpu(x: Tensor, keys: Tensor, salt: int, threshold: int) -> Tensor:
    return (_launch if _kernel_works(x.device, x.dtype) else _by_element)(x, keys, salt, threshold)


@_on_gpu.register_fake
def _(x, keys, salt, threshold):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember(ctx, inputs, output) -> None:
    _, keys, ctx.salt, ctx.threshold = inputs
    ctx.save_for_backward(keys)


def _backward(ctx, gradient: Tensor):
    (keys,) = ctx.saved_tensors
    return torch.ops.tessera.dropout(gradient, keys, ctx.salt, ctx.threshold), None, None, None


_on_gpu.register_autograd(_backward, setup_context=_remember)


def _launch(x: Tensor, keys: Tensor, salt: int, threshold: int) -> Tensor:
    from core.nn.triton_kernels import dropout_kernel

    x, draws = x.contiguous(), 256
    count, y = x.numel() // keys.shape[0], torch.empty_like(x)
    kernel: Any = dropout_kernel[(-(-count // (4 * draws)), keys.shape[0])]
    kernel(
        x,
        y,
        keys,
        count,
        salt_of(salt),
        threshold,
        LANES / (LANES - threshold),
        GOLDEN=GOLDEN,
        FIRST=MIX1,
        SECOND=MIX2,
        DRAWS=draws,
    )
    return y


@functools.lru_cache(None)
def _kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Tried once per process, with several programs for a sample."""
    keys = torch.arange(-2, 1, device=device)
    x = torch.arange(3 * 41 * 51, device=device).cos().view(3, 41, 51).to(dtype)
    return kernel_works(
        "training goes on without the fused dropout, with the same masks",
        dtype,
        lambda: [_launch(x, keys, 3, 20000)],
        lambda: [_by_element(x, keys, 3, 20000)],
    )


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
