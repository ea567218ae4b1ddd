"""Convolutional blocks of the VQGAN family (Esser et al. 2021): residual, attention, halving and doubling.

The options that differ between published networks are those of MaskGIT-VQGAN and VQGAN+. Norms are GroupNorm with
eps 1e-6, activations x sigmoid(x). Parameter names are the published ones.

B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import UserError


def channels_last(network: nn.Module) -> None:
    """Keep the kernels of `network`, and with them all its maps, with the channels side by side: what tensor cores and a
    CPU's vector units compute on (convolutional networks train a tenth faster). Shapes, names and files stay as they are."""
    network.to(memory_format=torch.channels_last)


def group_norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    if channels % groups:
        raise UserError(f"{channels} channels cannot be normalised in {groups} groups: use a multiple of {groups}")
    return nn.GroupNorm(groups, channels, eps=1e-6)


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """silu(norm(x)); written over the norm where no gradient will ask for it, since fresh memory costs as much as the work."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """norm, silu, 3x3; norm, silu, 3x3; plus the input.

    Args:
        bias: of the convolutions.
        shortcut: what is added where the number of channels changes. "input": a 1x1 convolution of the input.
            "branch": one of the branch itself. parity: MaskGIT-VQGAN and its descendants drop the input there, and
            their weights were trained with it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, bias: bool = True, shortcut: str = "input", groups: int = 32
    ):
        super().__init__()
        if shortcut not in ("input", "branch"):
            raise UserError(f'shortcut is "input" or "branch", not "{shortcut}"')
        self.from_branch = shortcut == "branch"
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        if in_channels != out_channels:
            channels = out_channels if self.from_branch else in_channels
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1, bias=bias)
        else:
            self.nin_shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(h if self.from_branch else x)
        return x + h if torch.is_grad_enabled() or h.dtype != x.dtype else h.add_(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a map, with a residual."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2)[:, None] for project in (self.q, self.k, self.v))  # (B,1,HW,C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Half the size: 3x3 with stride 2, zeros at the right and bottom (TensorFlow's "same" padding of even sizes)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then 3x3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one width, each followed by attention or not, then perhaps a change of size.

    Args:
        attention: an AttnBlock after every residual block.
        resize: makes the last module from the number of channels; None keeps the size.
        block: settings of the residual blocks.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        blocks: int,
        *,
        attention: bool = False,
        resize: Callable[[int], nn.Module] | None = None,
        groups: int = 32,
        **block: Any,
    ):
        super().__init__()
        self.res = nn.ModuleList(
            ResBlock(in_channels if i == 0 else channels, channels, groups=groups, **block) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(channels, groups) for _ in range(blocks if attention else 0))
        self.resize = resize(channels) if resize else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x if self.resize is None else self.resize(x)


def shrinking_levels(
    channels: int,
    mult: Sequence[int],
    blocks: int,
    *,
    halve: Callable[[int], nn.Module] = Downsample,
    attention: bool = False,
    **block: Any,
) -> nn.ModuleList:
    """One Level per entry of `mult`, from the finest of `channels` on; each but the last halves the map.

    Args:
        mult: widths of the levels, as factors of `channels`.
        attention: at the coarsest level.
        block: `groups` and settings of the residual blocks.
    """
    widths = [channels * m for m in (1, *mult)]
    coarsest = len(mult) - 1
    return nn.ModuleList(
        Level(
            widths[i],
            widths[i + 1],
            blocks,
            attention=attention and i == coarsest,
            resize=None if i == coarsest else halve,
            **block,
        )
        for i in range(len(mult))
    )


def growing_levels(
    channels: int, mult: Sequence[int], blocks: int, *, attention: bool = False, **block: Any
) -> nn.ModuleList:
    """The same backwards: from the coarsest, which keeps its width, to the finest; each but the last doubles the map."""
    widths = [channels * m for m in reversed((*mult, mult[-1]))]
    finest = len(mult) - 1
    return nn.ModuleList(
        Level(
            widths[i],
            widths[i + 1],
            blocks,
            attention=attention and i == 0,
            resize=None if i == finest else Upsample,
            **block,
        )
        for i in range(len(mult))
    )


def through(x: Tensor, *stacks: Iterable[nn.Module]) -> Tensor:
    """`x` through the modules of each stack, one after the other."""
    for module in itertools.chain(*stacks):
        x = module(x)
    return x


def pixel_convs(channels: int, seen: int = 0) -> nn.Sequential:
    """Two 3x3 convolutions that make colours of `channels` values per pixel, over the whole picture, so that no seams show
    between patches: (B, channels + seen, H, W) -> (B, 3, H, W). `seen` values per pixel come beside them. Nothing for 0
    channels. Ours: the published decoders paint patches."""
    if not channels:
        return nn.Sequential()
    first = nn.Conv2d(channels + seen, channels, 3, padding=1)
    return nn.Sequential(first, nn.GELU(), nn.Conv2d(channels, 3, 3, padding=1))
