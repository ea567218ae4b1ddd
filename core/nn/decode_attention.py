"""Attention from one new position, in one kernel: normalise or turn its queries and keys, store keys and values, attend.

In plain PyTorch these are four or five kernels a layer, the last of which is told by a mask how much of the cache is filled
and so reads what is not. Here the position lies on the device and nothing behind it is read: a step moves the weights and
the filled part of the cache once. Triton makes the kernel; where it cannot, plain operations do the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.nn.gated_norm import has_triton, kernel_works

TILE, MIN_PLACES = 4096, 16  # numbers that a program of the kernel holds of keys, and earlier positions at least


def fuses(device: torch.device) -> bool:
    """Whether `decode_attention` is for this device."""
    return device.type == "cuda" and has_triton()


def decode_attention(
    heads: Tensor,
    memory: Tensor,
    position: Tensor,
    scale: float | None = None,
    affine: Tensor | None = None,
    eps: float = 0.0,
    row: Tensor | None = None,
) -> Tensor:
    """Queries, keys and values of one position (R, heads + 2 kv_heads, d) -> (R, heads d); inference only.

    Args:
        memory: (R, 2 kv_heads, N, d), keys then values of earlier positions, to which the new ones are added; positions lie
            one behind the other in memory.
        position: (1,) int64, of the new one, below N; what lies behind it is not read.
        scale: of the scores; None: d^-0.5.
        affine: (2, heads + kv_heads, d) fp32, weight and bias of the norms of queries and keys; None: they have none.
        row: (2, d) fp32, cosines and signed sines as generator.engine.turning has them; None: nothing is turned. At most
            one of `affine` and `row`.
    """
    scale = heads.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.tessera.decode_attention(heads, memory, position, scale, affine, eps, row)


def _plain(
    heads: Tensor, memory: Tensor, position: Tensor, scale: float, affine: Tensor | None, eps: float, row: Tensor | None
) -> Tensor:
    both = memory.shape[1]  # keys and values
    turned = heads[:, : heads.shape[1] - both // 2].float()
    if affine is not None:
        turned = torch.addcmul(affine[1], F.layer_norm(turned, turned.shape[-1:], eps=eps), affine[0])
    if row is not None:
        swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        turned = torch.addcmul(swapped * row[1], turned, row[0])
    turned = turned.to(heads.dtype)
    new = torch.cat((turned[:, -both // 2 :], heads[:, -both // 2 :]), dim=1)
    memory.index_copy_(2, position, new[:, :, None].to(memory.dtype))
    k, v = memory.chunk(2, dim=1)
    seen = torch.arange(memory.shape[2], device=memory.device) <= position
    q = turned[:, : -both // 2].unflatten(1, (both // 2, -1))  # the queries of a group become positions
    return F.scaled_dot_product_attention(q, k, v, seen[None], scale=scale).flatten(1)


@torch.library.custom_op("tessera::decode_attention", mutates_args={"memory"}, device_types="cuda")
def _on_gpu(
    heads: Tensor, memory: Tensor, position: Tensor, scale: float, affine: Tensor | None, eps: float, row: Tensor | None
) -> Tensor:
    _, count, width = heads.shape
    kind = heads.dtype, count, memory.shape[1] // 2, width, affine is not None, row is not None
    run = _launch if works(heads.device, *kind) else _plain
    return run(heads, memory, position, scale, affine, eps, row)


@_on_gpu.register_fake
def _(heads, memory, position, scale, affine, eps, row):
    return heads.new_empty(heads.shape[0], (heads.shape[1] - memory.shape[1]) * heads.shape[2])


def _channels(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _launch(
    heads: Tensor, memory: Tensor, position: Tensor, scale: float, affine: Tensor | None, eps: float, row: Tensor | None
) -> Tensor:
    from core.nn.triton_kernels import decode_attention_kernel

    heads = heads.contiguous()
    samples, count, width = heads.shape
    kv_heads = memory.shape[1] // 2
    queries = count - 2 * kv_heads
    assert memory.stride()[2:] == (width, 1) and memory.dtype == heads.dtype
    out = heads.new_empty(samples, queries * width)
    channels = _channels(width)
    kernel: Any = decode_attention_kernel[(samples, queries)]
    kernel(
        heads,
        memory,
        out,
        position,
        heads if affine is None else affine.contiguous(),
        heads if row is None else row.contiguous(),
        queries,
        kv_heads,
        width,
        memory.stride(0),
        memory.stride(1),
        scale,
        eps,
        NORMED=affine is not None,
        TURNED=row is not None,
        CHANNELS=channels,
        PLACES=max(MIN_PLACES, TILE // channels),
        num_warps=4,
    )
    return out


@functools.lru_cache(None)
def works(
    device: torch.device, dtype: torch.dtype, count: int, kv_heads: int, width: int, normed: bool, turned: bool
) -> bool:
    """Whether the kernel can be compiled on `device` for tensors of this kind (`count` heads in all) and computes there what
    the plain operations do, in the first place and at the ends of its chunks: tried once per process, before the first
    recording of a step. A kernel that is wrong is not used.
    """
    chunk = max(MIN_PLACES, TILE // _channels(width))
    samples, length = 3, 2 * chunk + 9

    def numbers(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape), dtype=torch.float32, device=device).sin().view(shape)

    heads, memory = numbers(samples, count, width).to(dtype), numbers(samples, 2 * kv_heads, length, width).to(dtype)
    affine = numbers(2, count - kv_heads, width) if normed else None
    row = numbers(2, width) if turned else None

    def result(run: Callable[..., Tensor], behind: float) -> list[Tensor]:
        found = []
        for place in (0, 1, chunk, chunk + 1, 2 * chunk + 3):
            kept = memory.clone()
            for edge in {0, chunk - 1, chunk, place - 1} & set(range(place)):
                kept[:, kv_heads:, edge] *= 30  # values that nobody can overlook
            kept[:, :, place:] = behind
            position = torch.full((1,), place, dtype=torch.int64, device=device)
            seen = kept[:, :, : place + 2]  # as a step gives it: not laid out for itself
            found += [run(heads, seen, position, width**-0.5, affine, 1e-6, row), kept[:, :, : place + 1]]
        return found

    return kernel_works(
        "sampling goes on without the fused attention, with the same results",
        dtype,
        lambda: result(_launch, float("nan")),  # nothing is read there
        lambda: result(_plain, 0.0),
    )
