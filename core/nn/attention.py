"""The attention layer of every transformer in this repository."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from core.nn.norms import RMSNorm
from core.nn.rope import Rope, apply_rope


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, through PyTorch's fused kernels.

    Args:
        width: of the tokens; `heads` must divide it.
        qk_norm: RMSNorm over each head's queries and keys, before the rotary embedding.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        if width % heads:
            raise UserError(f"attention: {heads} heads do not divide width {width}")
        self.heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(self.head_dim, eps=None) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=None) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, d) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))
