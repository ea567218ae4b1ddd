"""Embeddings: time, class label, fixed and learned positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError


class TimeEmbedding(nn.Module):
    """Gaussian Fourier features of a time in [0, 1], then an MLP.

    The frequencies `W` are random but frozen, so they are a saved parameter: an MLP trained with one draw is useless
    with another.
    """

    def __init__(self, width: int, num_frequencies: int = 256):
        super().__init__()
        self.W = nn.Parameter(torch.randn(num_frequencies), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = 2 * math.pi * t.float()[:, None] * self.W  # (B, frequencies)
        return self.mlp(torch.cat((angle.sin(), angle.cos()), dim=-1))  # (B, width)


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """Features (B, width) of numbers (B,): [cos | sin] with frequencies 10000^(-j / (width / 2)), fp32."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=positions.device) / half
    )
    angle = positions.float()[:, None] * frequencies
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class LabelEmbedding(nn.Module):
    """A row per class and one more, index `num_classes`, for "no class"."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def drop(self, labels: Tensor, uniform: Tensor, probability: float) -> Tensor:
        """Labels with "no class" wherever the (B,) draw falls below `probability`."""
        return torch.where(uniform < probability, self.num_classes, labels)

    def null(self, labels: Tensor) -> Tensor:
        """As many "no class" labels."""
        return torch.full_like(labels, self.num_classes)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)  # (B, width)


def sincos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed positions of MAE and DiT, (1, N, width): [sin | cos] of the column, then [sin | cos] of the row."""
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4))

    def axis(count: int) -> Tensor:
        angle = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * omega
        return torch.cat((angle.sin(), angle.cos()), dim=-1)  # (count, width/2)

    height, length = grid
    columns = axis(length)[None].expand(height, length, -1)
    rows = axis(height)[:, None].expand(height, length, -1)
    return torch.cat((columns, rows), dim=-1).reshape(1, height * length, width).float()


def resize_positions(positions: Tensor, grid: tuple[int, int], antialias: bool = False) -> Tensor:
    """Learned positions (1, N, D) of a square grid, bicubically resized to (1, grid[0] * grid[1], D)."""
    side = math.isqrt(positions.shape[1])
    image = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    image = F.interpolate(image.float(), size=tuple(grid), mode="bicubic", align_corners=False, antialias=antialias)
    return image.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1).to(positions.dtype)


def resize_rows(table: Tensor, grid: tuple[int, int], first: int = 0, last: int = 0) -> Tensor:
    """Learned positions (..., first + N + last, D), of which N lie on a square grid, for another grid: those are resized
    like a picture, the rows before and after them stay. UserError where they lie on no square."""
    before, places, after = table.split((first, table.shape[-2] - first - last, last), dim=-2)
    if places.shape[-2] == grid[0] * grid[1]:
        return table
    if math.isqrt(places.shape[-2]) ** 2 != places.shape[-2]:
        raise UserError(f"{places.shape[-2]} learned positions are no square grid, and cannot be resized to {grid}")
    resized = resize_positions(places.reshape(1, -1, table.shape[-1]), grid)
    return torch.cat((before, resized.reshape(*table.shape[:-2], -1, table.shape[-1]), after), dim=-2)
