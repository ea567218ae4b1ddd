"""MaskGIT-VQGAN (Chang et al. 2022) and VQGAN+ (Weber et al., MaskBit, arXiv 2409.16211): convolutional tokenizers
without attention, one code per position.

Both are `ConvTokenizer`; what differs is how the picture is halved and which quantiser follows. The networks work on
pixels in [0, 1]; the tokenizer's interface is [-1, 1] like everywhere.

Shape letters: B batch, C channels, h x w the grid, L = h w, V codebook size, D width of a code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from core.errors import UserError, nearest
from core.images import to_unit_range
from core.limits import Count, Factor, Pixels, Positive, Whole, Width
from core.nn.conv import (
    Downsample,
    ResBlock,
    channels_last,
    group_norm,
    growing_levels,
    norm_silu,
    shrinking_levels,
    through,
)
from core.specs import Codes
from tokenizer.codes import CodesOfOneBranch
from tokenizer.vq.quantizer import LookupFreeQuantizer, Quantizer, VectorQuantizer

_BLOCK = {"bias": False, "shortcut": "branch"}  # parity: the published weights were trained with this shortcut
HALVING = {"pool": lambda channels: nn.AvgPool2d(2), "conv": Downsample}


class ConvEncoder(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, out_channels, h, w)."""

    def __init__(self, channels: int, mult: tuple[int, ...], blocks: int, out_channels: int, halving: str, groups: int):
        super().__init__()
        width = channels * mult[-1]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.levels = shrinking_levels(channels, mult, blocks, halve=HALVING[halving], groups=groups, **_BLOCK)
        self.mid = nn.ModuleList(ResBlock(width, width, groups=groups, **_BLOCK) for _ in range(blocks))
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, out_channels, 1)
        channels_last(self)

    def forward(self, pixels: Tensor) -> Tensor:
        x = through(self.conv_in(pixels), self.levels, self.mid)
        return self.conv_out(norm_silu(self.norm_out, x))


class ConvDecoder(nn.Module):
    """(B, in_channels, h, w) -> (B, 3, H, W) around [0, 1], not clamped."""

    def __init__(self, channels: int, mult: tuple[int, ...], blocks: int, in_channels: int, groups: int):
        super().__init__()
        width = channels * mult[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.mid = nn.ModuleList(ResBlock(width, width, groups=groups, **_BLOCK) for _ in range(blocks))
        self.levels = growing_levels(channels, mult, blocks, groups=groups, **_BLOCK)
        self.norm_out = group_norm(channels * mult[0], groups)
        self.conv_out = nn.Conv2d(channels * mult[0], 3, 3, padding=1)
        channels_last(self)

    def forward(self, z: Tensor) -> Tensor:
        x = through(self.conv_in(z), self.mid, self.levels)
        return self.conv_out(norm_silu(self.norm_out, x))


class ConvTokenizer(CodesOfOneBranch):
    """core.specs.Tokenizer with one code per position. `decode` and `embed` also take maps of codes, (B, h, w, 1) with
    any h and w. Defaults are those of the released files.

    Args:
        quantizer: of vectors of `quantizer.dim` channels.
        image_size: any multiple of the stride: nothing in the weights depends on it.
        channels, channel_mult: width of the first level, and factors; every level but the last halves the picture.
        res_blocks, decoder_res_blocks: residual blocks per level, and in the middle of each half.
        halving: "pool" or "conv".
        groups: of the norms.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        /,
        *,
        image_size: Pixels = 256,
        channels: Width = 128,
        channel_mult: list[Count] = (1, 1, 2, 2, 4),
        res_blocks: Whole = 2,
        decoder_res_blocks: Whole | None = None,
        halving: str = "conv",
        groups: Count = 32,
    ):
        super().__init__()
        if halving not in HALVING:
            raise UserError(f'halving "{halving}" is not known.{nearest(str(halving), HALVING)}')
        mult, stride = tuple(channel_mult), 2 ** (len(channel_mult) - 1)
        if image_size % stride:
            raise UserError(f"image_size {image_size} is not a multiple of {stride}, the stride of this tokenizer")
        self.image_size = image_size
        grid = (image_size // stride, image_size // stride)
        self.spec = Codes(grid[0] * grid[1], 1, quantizer.vocab, quantizer.dim, grid)
        self.encoder = ConvEncoder(channels, mult, res_blocks, quantizer.dim, halving, groups)
        self.decoder = ConvDecoder(channels, mult, decoder_res_blocks or res_blocks, quantizer.dim, groups)
        self.quantizer = quantizer

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    def vectors(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, L, D)."""
        return self.encoder(to_unit_range(images)).flatten(2).transpose(1, 2)

    def paint(self, vectors: Tensor) -> Tensor:
        """(B, L, D), or (B, h, w, D) of any h and w -> images (B, 3, H, W)."""
        maps = vectors.unflatten(1, self.spec.grid) if vectors.ndim == 3 else vectors
        return self.decoder(maps.movedim(-1, 1)) * 2 - 1


class MaskGITVQGAN(ConvTokenizer):
    """The tokenizer of MaskGIT, RAR and reAR. The defaults are the released one.

    The published codebook loss is 1 * commitment + 0.25 * codebook, the reverse of the usual weights.

    Args:
        vocab, code_dim: V and D.
        usage_window: latest assignments whose distinct share is logged in training; 0: not at all.
        others: see ConvTokenizer.
    """

    def __init__(
        self,
        *,
        vocab: Count = 1024,
        code_dim: Width = 256,
        usage_window: Whole = 0,
        halving: str = "pool",
        **others: Any,
    ):
        quantizer = VectorQuantizer(vocab, code_dim, normalise=False, usage_window=usage_window)
        super().__init__(quantizer, halving=halving, **others)


class VQGANPlus(ConvTokenizer):
    """The tokenizer of MaskBit's VQGAN+. The defaults are the released 12-bit one.

    Args:
        quantizer: "lookup" (a learnt table) or "lookup_free" (`code_dim` bits; `vocab` is then 2^code_dim).
        vocab, code_dim: V and D.
        normalise: unit vectors, of "lookup".
        entropy_loss: report the term "entropy".
        entropy_temperature, entropy_gamma: of that term, see tokenizer.vq.quantizer.
        across_ranks: means of that term over the batch of all ranks. parity: False is what was published.
        usage_window: latest assignments whose distinct share is logged in training; 0: not at all.
        others: see ConvTokenizer.
    """

    def __init__(
        self,
        *,
        quantizer: str = "lookup",
        vocab: Count = 4096,
        code_dim: Width = 64,
        normalise: bool = False,
        entropy_loss: bool = False,
        entropy_temperature: Positive = 0.01,
        entropy_gamma: Factor = 1.0,
        across_ranks: bool = True,
        usage_window: Whole = 0,
        **others: Any,
    ):
        known = ("lookup", "lookup_free")
        if quantizer not in known:
            raise UserError(f'quantizer "{quantizer}" is not known.{nearest(str(quantizer), known)}')
        shared = {
            "entropy": entropy_loss,
            "temperature": entropy_temperature,
            "gamma": entropy_gamma,
            "floor": "clamp",
            "across_ranks": across_ranks,
            "usage_window": usage_window,
        }
        if quantizer == "lookup":
            super().__init__(VectorQuantizer(vocab, code_dim, normalise=normalise, **shared), **others)
        else:
            super().__init__(LookupFreeQuantizer(code_dim, **shared), **others)
