"""The self-attention layer of every transformer in this repository."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from core.nn import dropped_attention
from core.nn.blockcausal import block_causal
from core.nn.dropout import dropout
from core.nn.kvcache import LayerCache
from core.nn.linear import Linear, linear
from core.nn.norms import RMSNorm
from core.nn.rope import Rope, apply_rope

QKNorm = Literal["none", "rms", "layer", "l2"]
CAUSAL_BY_NAME = {"cuda"}  # where a kernel that is told "causal" beats one that reads a mask


def head_norm(qk_norm: QKNorm, head_dim: int) -> nn.Module:
    """The module that normalises queries or keys; "l2" has no parameters and is done in place."""
    if qk_norm == "rms":
        return RMSNorm(head_dim, eps=None)
    return nn.LayerNorm(head_dim, eps=1e-6) if qk_norm == "layer" else nn.Identity()


class Attention(nn.Module):
    """Multi-head self-attention through PyTorch's fused kernels. Parameters: qkv, proj, and what the options add.

    Args:
        width: of the tokens; `heads` must divide it.
        qk_norm: what happens to each head's queries and keys before the rotary embedding. "rms": RMSNorm; "layer":
            LayerNorm with weight and bias, eps 1e-6; "l2": unit length, with a learned temperature per head in place of
            the scale (VAR); computed in fp32.
        bias: of qkv and proj. "qv" gives qkv biases for queries and values only, named q_bias and v_bias (VAR): a bias
            of the keys adds the same number to all scores of a query.
        kv_heads: fewer heads for keys and values than for queries (grouped-query attention); default `heads`.
        causal: position i sees positions up to i. With a cache the cache decides.
        scale: of the scores; default head_dim^-0.5.
        dropout: on the attention weights, in training. The fused kernels cannot take a mask that is a function of seed
            and sample: on a GPU core.nn.dropped_attention computes such masks on the way, elsewhere this multiplies out
            the weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: QKNorm = "none",
        *,
        bias: bool | Literal["qv"] = True,
        kv_heads: int | None = None,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        kv_heads = kv_heads or heads
        if width % heads:
            raise UserError(f"attention: {heads} heads do not divide width {width}")
        if heads % kv_heads:
            raise UserError(f"attention: {kv_heads} key/value heads do not divide {heads} heads")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.qk_norm, self.causal, self.scale, self.dropout = qk_norm, causal, scale, dropout
        self.qkv = Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=bias is True)
        if bias == "qv":
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(kv_heads * self.head_dim))
        if qk_norm == "l2":
            self.scale = 1.0
            self.scale_mul = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.q_norm, self.k_norm = (head_norm(qk_norm, self.head_dim) for _ in range(2))
        self.proj = Linear(width, width, bias=bool(bias))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries (B, heads, N, d), keys and values (B, kv_heads, N, d)."""
        batch, length, _ = x.shape
        if hasattr(self, "q_bias"):
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
            qkv = linear(x, self.qkv.weight, bias)
        else:
            qkv = self.qkv(x)
        qkv = qkv.view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.qk_norm == "l2":
            temperature = self.scale_mul.float().clamp_max(math.log(100.0)).exp()
            q, k = F.normalize(q.float(), dim=-1) * temperature, F.normalize(k.float(), dim=-1)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def forward(
        self,
        x: Tensor,
        rope: Rope | None = None,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
        keys: Tensor | None = None,
        prefix: int = 0,
        blocks: Any = None,
    ) -> Tensor:
        """
        Args:
            x: (B, N, width).
            rope: table for these N positions.
            prefix: so many first positions see one another and nothing else; the later ones see them all and, in order,
                themselves. Not with a cache or a mask.
            blocks: core.nn.blockcausal.prepare(ends, device): blocks of positions of which each sees itself and the
                earlier ones (VAR). Not with a cache or a mask.
            cache: keys and values of earlier positions; the new ones are added to it.
            mask: of the scores, bool (True is seen) or additive; replaces `causal`.
            keys: of the dropout mask, see core.nn.dropout; None for no dropout.
        """
        batch, length, width = x.shape
        q, k, v = self._heads(x)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        causal = self.causal and mask is None
        if cache is not None:
            k, v = cache.update(k, v)
            causal = cache.causal and mask is None
            mask = cache.mask if mask is None else mask
        if prefix:
            out = self._prefixed(q, k, v, prefix)
        elif blocks is not None:
            out = block_causal(q, k, v, blocks, self.scale)
        elif keys is not None and self.dropout > 0:
            if mask is None and len(keys) == batch and dropped_attention.works_on(q.device):
                out = dropped_attention.attend(q, k, v, keys, self.dropout, salt=0, causal=causal, scale=self.scale)
            else:
                out = self._explicit(q, k, v, mask, causal, keys)
        else:
            out = self._fused(q, k, v, mask, causal)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))

    def _prefixed(self, q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
        """Two fused calls: a mask over everything would lead away from the fastest kernels."""
        first = self._fused(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], None, False)
        if q.device.type in CAUSAL_BY_NAME:
            # Causal from the first row on, since the kernels know no other mask by name that a compiler takes: the rows
            # of the prefix are thrown away, for a third more of a small part of the work.
            later = self._fused(q, k, v, None, True)[:, :, prefix:]
        else:
            length = q.shape[2]
            seen = torch.ones(length - prefix, length, dtype=torch.bool, device=q.device).tril(prefix)
            later = self._fused(q[:, :, prefix:], k, v, seen, False)
        return torch.cat((first, later), dim=2)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        if self.kv_heads == self.heads:
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale)
        if q.shape[2] == 1:  # one new position: the queries of a group become positions, and nothing is copied
            grouped = q.reshape(q.shape[0], self.kv_heads, -1, self.head_dim)
            return F.scaled_dot_product_attention(grouped, k, v, mask, scale=self.scale).view_as(q)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=True)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, keys: Tensor) -> Tensor:
        """The same with dropout on the attention weights; softmax in fp32."""
        grouped = q.unflatten(1, (self.kv_heads, -1))  # (B, kv_heads, r, N, d)
        scores = grouped @ k.unsqueeze(2).transpose(-2, -1) * (self.scale or self.head_dim**-0.5)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = dropout(scores.float().softmax(-1), self.dropout, keys, salt=0)
        return (weights.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)


class CrossAttention(nn.Module):
    """Queries of one sequence read another: parameters q, kv, proj and the norms that the options add.

    Args:
        width, heads, qk_norm: as in Attention; "l2" is not offered.
    """

    def __init__(self, width: int, heads: int, qk_norm: Literal["none", "rms", "layer"] = "none"):
        super().__init__()
        if width % heads:
            raise UserError(f"attention: {heads} heads do not divide width {width}")
        self.heads, self.head_dim = heads, width // heads
        self.q, self.kv, self.proj = Linear(width, width), Linear(width, 2 * width), Linear(width, width)
        self.q_norm, self.k_norm = (head_norm(qk_norm, self.head_dim) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor, rope: Rope | None = None) -> Tensor:
        """x (B, N, width) reads context (B, M, width); `rope` turns the queries alone."""
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)  # (B, heads, N, d)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rope is not None:
            q = apply_rope(q, rope)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
