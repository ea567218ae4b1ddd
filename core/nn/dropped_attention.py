"""Dropout of attention weights without laying out the scores: the masks of core.nn.dropout inside of FlexAttention.

With s the scores and m the mask, sum_j m_j exp(s_j) v_j / sum_j exp(s_j) is wanted: what is dropped counts below the line.
FlexAttention divides by the sum of what it sees, so one pass over what is kept gives the values, another over everything
its sum, and exp(difference of their logarithms) makes one of the other. A pass keeps what the fused kernels keep: queries,
keys, values, result and one number per row. Backward draws the mask again.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from core.devices import is_rehearsal
from core.nn.dropout import LANES, kept_at, threshold_of
from core.rng import derive

# Types of devices where this is done. FlexAttention has no backward on a CPU, which lays out the scores.
DEVICES = {"cuda"}


def works_on(device: torch.device) -> bool:
    return device.type in DEVICES or is_rehearsal()


def _causal(batch, head, query, key):
    return query >= key


def _make_mask(length: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(_causal, None, None, length, length, device=device)


_kept_mask = functools.lru_cache(maxsize=32)(_make_mask)


def _with_sums(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """(result, logarithm of the sum below the line)."""
    from torch.nn.attention import flex_attention as module

    if hasattr(module, "AuxRequest"):  # torch 2.9
        result, aux = module.flex_attention(q, k, v, return_aux=module.AuxRequest(lse=True), **options)
        assert aux.lse is not None
        return result, aux.lse
    return module.flex_attention(q, k, v, return_lse=True, **options)


@functools.lru_cache(maxsize=1)
def _compiled():
    return torch.compile(_passes, dynamic=False)


def _passes(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, threshold: int, scale: float | None, mask) -> Tensor:
    queries, seen = q.shape[2], k.shape[2]
    options = {"block_mask": mask, "scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}

    def kept(score, batch, head, query, key):
        element = (head.to(torch.int64) * queries + query) * seen + key  # as the scores would lie in memory
        return torch.where(kept_at(keys[batch], element, threshold), score, -float("inf"))

    result, sums = _with_sums(q, k, v, score_mod=kept, **options)
    _, all_sums = _with_sums(q, k, v, **options)
    factor = torch.exp(sums - all_sums) * (LANES / (LANES - threshold))
    return result * factor.unsqueeze(-1).to(result.dtype)


def _stand_in(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Costs what the two passes cost, in memory and FLOPs; FlexAttention takes no tensor without data."""
    kept, everything = (
        F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        for _ in range(2)
    )
    return kept * everything[..., :1]


def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, p: float, *, salt: int, causal: bool, scale: float | None = None
) -> Tensor:
    """(B, heads, N, d), keys and values (B, kv_heads, M, d) -> (B, heads, N, d), weights dropped with probability `p`.

    Args:
        keys: (B,) int64, see core.nn.dropout; with `salt` they give the mask that `dropout` gives a (B, heads, N, M) tensor.
        causal: query i sees keys up to i; N = M.
        scale: of the scores; None: d^-0.5.
    """
    if is_rehearsal():
        return _stand_in(q, k, v, causal, scale)
    compiling = torch.compiler.is_compiling()
    mask = (_make_mask if compiling else _kept_mask)(q.shape[2], str(q.device)) if causal else None
    passes = _compiled() if not compiling and q.device.type == "cuda" else _passes
    return passes(q.contiguous(), k.contiguous(), v.contiguous(), derive(keys, salt), threshold_of(p), scale, mask)
