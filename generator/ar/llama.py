"""The decoder layers of LlamaGen (Sun et al. 2024, arXiv 2406.06525): RMSNorm, rotary attention, SwiGLU, no biases.

FAR stacks them twice (over positions, then over the codebooks of one position), D-AR once.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from core.nn.attention import Attention
from core.nn.dropout import drop_path, dropout, keyed_path_factors
from core.nn.kvcache import LayerCache
from core.nn.mlp import SwiGLU
from core.nn.norms import RMSNorm
from core.nn.rope import Rope
from core.rng import derive
from generator.engine import add_product, attend


def ffn_width(width: int, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """Hidden width of the feed-forward layer: 2/3 of 4 x width (times `multiplier`), rounded up to a multiple."""
    hidden = int(2 * 4 * width / 3)
    hidden = hidden if multiplier is None else int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


class Block(nn.Module):
    """x + attention(norm(x)), then + feed_forward(norm(x)).

    Args:
        hidden: width inside the feed-forward layer.
        kv_heads: of grouped-query attention; default `heads`.
        residual_dropout, ffn_dropout: at the end of either branch.
        path_dropout: how often a whole branch is skipped.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        kv_heads: int | None = None,
        norm_eps: float = 1e-5,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        path_dropout: float = 0.0,
    ):
        super().__init__()
        self.attention_norm = RMSNorm(width, norm_eps)
        self.attention = Attention(width, heads, bias=False, kv_heads=kv_heads, causal=True, dropout=attention_dropout)
        self.ffn_norm = RMSNorm(width, norm_eps)
        self.feed_forward = SwiGLU(width, hidden, bias=False)
        self.residual_dropout, self.ffn_dropout, self.path_dropout = residual_dropout, ffn_dropout, path_dropout

    def forward(self, x: Tensor, rope: Rope, keys: Tensor | None = None) -> Tensor:
        """x (B, N, width); `rope` and `keys` as in core.nn.attention."""
        branch = self.attention(self.attention_norm(x), rope, keys=keys)
        branch = dropout(branch, self.residual_dropout, keys, salt=1)
        x = x + drop_path(branch, keyed_path_factors(keys, self.path_dropout, 2, len(branch)))
        branch = dropout(self.feed_forward(self.ffn_norm(x)), self.ffn_dropout, keys, salt=3)
        return x + drop_path(branch, keyed_path_factors(keys, self.path_dropout, 4, len(branch)))


def make_blocks(count: int, *, path_dropout: float = 0.0, **settings: Any) -> nn.ModuleList:
    """A stack of Blocks. Path dropout grows linearly from 0 to its value, and where there is any the other two are off."""
    if path_dropout > 0:
        settings |= {"residual_dropout": 0.0, "ffn_dropout": 0.0}
    rates = [path_dropout * index / max(1, count - 1) for index in range(count)]
    return nn.ModuleList(Block(path_dropout=rate, **settings) for rate in rates)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    context: Any,
    keys: Tensor | None = None,
    taps: dict[int, Tensor | None] | None = None,
) -> Tensor:
    """Through all blocks, each called as block(x, context, keys=its own).

    Args:
        keys: (B,) dropout keys; every block derives its own.
        taps: receives the output of every block whose index is one of its keys.
    """
    for index, block in enumerate(blocks):
        x = block(x, context, keys=derive(keys, index) if keys is not None else None)
        if taps is not None and index in taps:
            taps[index] = x
    return x


def decode_blocks(blocks: list[Block], x: Tensor, row: Tensor, layers: list[LayerCache]) -> Tensor:
    """One new position through all blocks, in few kernels: x (R, D) in the precision of the products.

    Args:
        row: (2, d) of core.nn.rope's table, see generator.engine.turning.
    """
    for block, layer in zip(blocks, layers):
        attention, feed_forward = block.attention, block.feed_forward
        heads = attention.qkv(normed(x, block.attention_norm)).unflatten(-1, (-1, attention.head_dim))
        x = add_product(x, attend(heads, layer, attention.scale, row=row), attention.proj)
        gate, value = feed_forward.w12(normed(x, block.ffn_norm)).chunk(2, dim=-1)
        x = add_product(x, F.silu(gate).mul_(value), feed_forward.w3)
    return x


def normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """RMSNorm in the type of x; fp32 inside."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def init_weights(network: nn.Module) -> None:
    """Normal weights of standard deviation 0.02 and zero biases for every linear layer and embedding."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
