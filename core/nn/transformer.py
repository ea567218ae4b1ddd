"""The plain transformer that FQGAN's adapters and TiTok's halves are: CLIP's (Radford et al. 2021), without a mask."""

from __future__ import annotations

from torch import Tensor, nn

from core.nn.vit import Block, ViTSize

# The published names of a block's tensors, OpenAI's with nn.MultiheadAttention, and ours: a table of core.weights.names.
PUBLISHED_NAMES = tuple(
    (f".transformer.{{}}.{published}", f".transformer.{{}}.{ours}")
    for published, ours in (
        ("ln_1.", "norm1."),
        ("ln_2.", "norm2."),
        ("attn.in_proj_weight", "attn.qkv.weight"),
        ("attn.in_proj_bias", "attn.qkv.bias"),
        ("attn.out_proj.", "attn.proj."),
        ("mlp.c_fc.", "mlp.fc1."),
        ("mlp.c_proj.", "mlp.fc2."),
    )
)


class Transformer(nn.Module):
    """LayerNorm, pre-norm blocks, LayerNorm, all with eps 1e-5. Initialised like nn.MultiheadAttention."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        size = ViTSize(width, layers, heads)
        self.ln_pre = nn.LayerNorm(width)
        blocks = [Block(size, None, "gelu", False, 0.0, eps=1e-5) for _ in range(layers)]
        self.transformer = nn.ModuleList(blocks)
        self.ln_post = nn.LayerNorm(width)
        for block in blocks:
            nn.init.xavier_uniform_(block.attn.qkv.weight)
            nn.init.zeros_(block.attn.qkv.bias)
            nn.init.zeros_(block.attn.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x)
        return self.ln_post(x)
