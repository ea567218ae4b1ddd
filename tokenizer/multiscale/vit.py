"""Encoder and decoder of ImageFolder: DINOv2 trunks with latent tokens beside the patches (section 3.1).

The encoder reads patches and K grids of learned latent tokens; only the latent outputs are kept. A latent token shares
its position code with the image patches around it and with the token at the same place in the other branches, which is
what aligns the branches in space. The decoder paints repeated mask tokens from one grid of latents.

B batch, N image patches, K branches, P = side of a latent grid, D width. Names are those of the official files.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from core.nn.conv import pixel_convs
from core.nn.linear import Linear
from core.nn.vit import VisionTransformer, ViTSize
from core.rng import Draws


def _levels(*counts: int) -> Tensor:
    """0 for the first `counts[0]` tokens, 1 for the next ... (1, T)."""
    return torch.arange(len(counts), device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))[None]


class Encoder(nn.Module):
    """Pictures -> latent tokens (B, K P^2, D), branch by branch, row by row.

    Args:
        size, grid, patch_size, drop: of the trunk.
        side: P.
        branches: K.
    """

    def __init__(self, size: ViTSize, grid: int, patch_size: int, side: int, branches: int, drop: float):
        super().__init__()
        self.side, self.branches = side, branches
        self.model = VisionTransformer(size, grid, patch_size, drop=drop)
        self.latent_tokens = nn.Parameter(torch.randn(1, branches * side * side, size.width) * 1e-6)
        self.lvl_embed = nn.Embedding(1 + branches, size.width)
        nn.init.trunc_normal_(self.lvl_embed.weight, std=(1 / size.width / 3) ** 0.5)
        self.register_buffer("lvl1LC", _levels(1 + grid * grid, *[side * side] * branches), persistent=False)

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        patches = self.model.embed(self.model.patch_embed(images))  # (B, 1 + N, D)
        latents = self.latent_tokens + self.model.positions(self.side).repeat(1, self.branches, 1)
        x = torch.cat((patches, latents.expand(len(images), -1, -1)), dim=1) + self.lvl_embed(self.lvl1LC)
        return self.model.encode(x, draws)[:, -self.latent_tokens.shape[1] :]


class PixelHead(nn.Module):
    """(B, N, D) -> pictures; a token holds its patch as (row, column, colour).

    Args:
        channels: a token paints so many values per pixel, not three, of which `pixel_convs` makes colours. 0: as published.
    """

    def __init__(self, width: int, patch_size: int, grid: int, channels: int = 0):
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.model = Linear(width, (channels or 3) * patch_size**2)
        self.convs = pixel_convs(channels)

    @property
    def last_weight(self) -> nn.Parameter:
        """Of the layer that paints the pixels."""
        return self.convs[-1].weight if len(self.convs) else self.model.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.convs(
            rearrange(
                self.model(tokens),
                "b (h w) (p q c) -> b c (h p) (w q)",
                h=self.grid,
                p=self.patch_size,
                q=self.patch_size,
            )
        )


class Decoder(nn.Module):
    """Latents (B, P^2, D) -> pictures (B, 3, H, W), not clamped. Arguments as of Encoder; `pixel_channels`: see PixelHead."""

    def __init__(self, size: ViTSize, grid: int, patch_size: int, side: int, drop: float, pixel_channels: int = 0):
        super().__init__()
        self.side, self.patches = side, grid * grid
        self.model = VisionTransformer(size, grid, None, drop=drop)
        self.mask_token = nn.Parameter(torch.randn(1, 1, size.width) * 1e-6)
        self.lvl_embed = nn.Embedding(2, size.width)
        nn.init.trunc_normal_(self.lvl_embed.weight, std=(1 / size.width / 3) ** 0.5)
        self.register_buffer("lvl1LC", _levels(1 + grid * grid, 1 + side * side), persistent=False)
        self.to_pixel = PixelHead(size.width, patch_size, grid, pixel_channels)

    def forward(self, latents: Tensor, draws: Draws | None = None) -> Tensor:
        batch, model = len(latents), self.model
        canvas = model.embed(self.mask_token.expand(batch, self.patches, -1))  # (B, 1 + N, D)
        # parity: the class token, with its position, stands a second time before the latents.
        first = (model.cls_token + model.pos_embed[:, :1]).expand(batch, -1, -1)
        latents = latents + model.positions(self.side)
        x = torch.cat((canvas, first, latents), dim=1) + self.lvl_embed(self.lvl1LC)
        return self.to_pixel(model.encode(x, draws)[:, 1 : 1 + self.patches])
