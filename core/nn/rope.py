"""Rotary position embedding: one way to apply it, one table builder per convention.

A table is a pair (cos, sin) that broadcasts against (B, heads, N, head_dim); channels 2i and 2i+1 form a pair.
Tokens of a grid are row-major; the first half of the channels encodes the row, the second half the column.
Tables are always built on the CPU, also under `torch.device("meta")`: they are not in checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from core.errors import UserError

Rope = tuple[Tensor, Tensor]


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """x cos + R(x) sin with R(x)[2i] = -x[2i+1], R(x)[2i+1] = x[2i]. Arithmetic in the table's fp32."""
    cos, sin = rope
    rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)  # (B, heads, N, d)
    return (x * cos + rotated * sin).to(x.dtype)


def _grid_angles(rows: Tensor, columns: Tensor) -> Tensor:
    """(H, d/2) and (W, d/2) angles -> (H W, d)."""
    height, width = rows.shape[0], columns.shape[0]
    both = (rows[:, None].expand(height, width, -1), columns[None].expand(height, width, -1))
    return torch.cat(both, dim=-1).flatten(0, 1)


def _check(head_dim: int) -> None:
    if head_dim % 4:
        raise UserError(
            f"a 2-D rotary embedding needs a head dimension divisible by 4, not {head_dim}: change width or heads"
        )


def axial_rope(head_dim: int, grid: tuple[int, int], theta: float = 10000.0) -> Rope:
    """2-D RoPE of the DiT family: frequencies theta^(-2i / (d/2)) per axis, positions 0, 1, 2 ...; (N, d) each."""
    _check(head_dim)
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half)  # (d/4,)

    def angles(count: int) -> Tensor:
        positions = torch.arange(count, dtype=torch.float32, device="cpu")
        return (positions[:, None] * frequencies).repeat_interleave(2, dim=-1)  # (count, d/2), equal within a pair

    table = _grid_angles(angles(grid[0]), angles(grid[1]))
    return table.cos(), table.sin()


def line_rope(head_dim: int, length: int, theta: float = 10000.0) -> Rope:
    """1-D RoPE (Su et al. 2021): frequencies theta^(-2i / d), positions 0, 1, 2 ...; (length, d) each."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)  # (d/2,)
    angles = torch.arange(length, dtype=torch.float32, device="cpu")[:, None] * frequencies
    table = angles.repeat_interleave(2, dim=-1)  # (length, d), equal within a pair
    return table.cos(), table.sin()


def with_class_row(rope: Rope) -> Rope:
    """A grid's table with a row for the class token before it: (1 + N, d) each."""
    # parity: LlamaGen's row holds zeros, not the identity, so the class token has no query and no key: others attend to
    # it with score 0. The released weights were trained with it.
    zero = torch.zeros_like(rope[0][:1])
    return torch.cat((zero, rope[0])), torch.cat((zero, rope[1]))


def rectok_rope(head_dim: int, grid: tuple[int, int]) -> Rope:
    """The table of RecTok's transformers; (N, d) each.

    Frequencies run geometrically from 7 down to 7e-4, coordinates from 0 to 1 along each axis.
    """
    _check(head_dim)
    frequencies = 7.0 * (7.0 / 7e-4) ** torch.linspace(0, -1, head_dim // 4, device="cpu")  # (d/4,)
    # parity: the two copies are concatenated, not interleaved, so channels 2i and 2i+1 turn by different angles and
    # this is no rotation. The released weights were trained with it.
    frequencies = 2 * math.pi * torch.cat((frequencies, frequencies))  # (d/2,)

    def angles(count: int) -> Tensor:
        return torch.linspace(0, 1, count, device="cpu")[:, None] * frequencies  # (count, d/2)

    table = _grid_angles(angles(grid[0]), angles(grid[1]))
    return table.cos(), table.sin()


class AxialRope(nn.Module):
    """`axial_rope` tables for one grid, made at once, and for any other, made when it is first met.

    Args:
        head_dim, grid, theta: see axial_rope.
        extra: tokens after those of the grid that have no place and are not turned.
        places: (extra,) rows of the grid's table for them, in a grid of this size; None for no place.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, head_dim: int, grid: tuple[int, int], theta: float = 10000.0, extra: int = 0, places: Tensor | None = None
    ):
        super().__init__()
        self.head_dim, self.grid, self.theta, self.extra = head_dim, (grid[0], grid[1]), theta, extra
        cos, sin = self._table(self.grid)
        if places is not None:
            cos, sin = (torch.cat((table[:-extra], table[places])) for table in (cos, sin))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._others: dict[tuple, Rope] = {}

    def _table(self, grid: tuple[int, int]) -> Rope:
        cos, sin = axial_rope(self.head_dim, grid, self.theta)
        still = torch.ones(self.extra, self.head_dim, device="cpu")
        return torch.cat((cos, still)), torch.cat((sin, torch.zeros_like(still)))

    def forward(self, grid: tuple[int, int]) -> Rope:
        if grid == self.grid:
            return self.cos, self.sin
        key = (*grid, self.cos.device)
        if key not in self._others:
            cos, sin = self._table(grid)
            self._others[key] = cos.to(self.cos.device), sin.to(self.cos.device)
        return self._others[key]
