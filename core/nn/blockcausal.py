"""Attention in which every position sees its own block and all earlier ones: the mask of scale-by-scale models (VAR).

No mask is ever laid out in memory. On a GPU FlexAttention (Dong et al. 2024) skips the tiles that nobody sees; elsewhere
each block of queries is one call of the fused kernel on as many keys as it sees.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.lru_cache(maxsize=32)
def _block_mask(ends: tuple[int, ...], device: str):
    """FlexAttention's sparse description of the mask; made once per list of blocks and device."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = ends[-1]
    seen = torch.empty(length, dtype=torch.int64, device=device)  # how many keys each query sees
    for start, stop in zip((0, *ends), ends):
        seen[start:stop] = stop

    def visible(batch, head, query, key):
        return key < seen[query]

    return create_block_mask(visible, None, None, length, length, device=device)


@functools.lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def prepare(ends: tuple[int, ...], device: torch.device):
    """What `block_causal` takes on this device: a sparse description on a GPU, elsewhere the ends themselves.

    Made outside of compiled code and handed to every layer. `ends`: where each block ends, ascending; the last is N.
    """
    return _block_mask(ends, str(device)) if device.type == "cuda" else ends


def flex(q: Tensor, k: Tensor, v: Tensor, mask, scale: float | None, compiled: bool = True) -> Tensor:
    """By FlexAttention. Uncompiled it lays out all scores: for tests only."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = _compiled_flex() if compiled and not torch.compiler.is_compiling() else flex_attention
    # Contiguous: inside a larger compiled graph torch 2.15's kernel for the CPU misreads transposed keys and values.
    return attend(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=mask, scale=scale)


class _Prefixes(torch.autograd.Function):
    """x[:, :, :end] for each of the ends. Their gradients are summed in one tensor, instead of one of full length each."""

    @staticmethod
    def forward(ctx, x: Tensor, ends: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.ends = ends
        return tuple(x[:, :, :end] for end in ends)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        total = gradients[-1].clone()
        for end, gradient in zip(reversed(ctx.ends[:-1]), reversed(gradients[:-1])):  # the order in which autograd adds
            total[:, :, :end] += gradient
        return total, None


def blockwise(q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, ...], scale: float | None) -> Tensor:
    """By one fused call per block."""
    queries = q.split([stop - start for start, stop in zip((0, *ends), ends)], dim=2)
    seen = zip(queries, _Prefixes.apply(k, ends), _Prefixes.apply(v, ends))
    return torch.cat([F.scaled_dot_product_attention(*block, scale=scale) for block in seen], dim=2)


def block_causal(q: Tensor, k: Tensor, v: Tensor, blocks, scale: float | None = None) -> Tensor:
    """(B, heads, N, d) each -> (B, heads, N, d).

    Args:
        blocks: from `prepare`, for N positions.
        scale: of the scores; None: d^-0.5.
    """
    return blockwise(q, k, v, blocks, scale) if isinstance(blocks, tuple) else flex(q, k, v, blocks, scale)
