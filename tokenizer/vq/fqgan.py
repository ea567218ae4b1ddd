"""FQGAN: a VQGAN whose picture is several parallel maps of codes (Bai et al., arXiv 2411.16681).

The encoder's last map goes through K small transformers, the adapters, and each result has its own codebook. The
sub-codebooks are pushed apart by a penalty on their cosines ("disentangle"), and some of them also predict the class
token of a frozen network. The decoder sees the K code vectors side by side. K is an integer: dual (2) and triple (3)
are configs of this one class. Losses and teachers live elsewhere (tokenizer/losses, tokenizer/teachers.py).

Shape letters: B batch, K sub-codebooks, C channels, h x w the grid, L = h w, V codebook size, D width of a code.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from core.config import parse_section
from core.errors import UserError, nearest
from core.limits import Count, Layers, Pixels, Whole, Width
from core.nn.conv import (
    AttnBlock,
    ResBlock,
    channels_last,
    group_norm,
    growing_levels,
    norm_silu,
    shrinking_levels,
    through,
)
from core.nn.linear import Linear
from core.nn.transformer import Transformer
from core.rng import Draws
from core.specs import Chart, Codes, Recon
from tokenizer.codes import CodeTokenizer
from tokenizer.vq.quantizer import Quantized, VectorQuantizer, unit

SIZES = {"vq16": (1, 1, 2, 2, 4), "vq8": (1, 2, 2, 4)}  # widths of the levels; each but the last halves the picture
NAMES = {1: ("vis",), 2: ("vis", "sem"), 3: ("vis", "sem_mid", "sem_high")}  # the published order of FAR's codes


def branch_names(count: int) -> tuple[str, ...]:
    """Names of K sub-codebooks: the published ones where there are any."""
    return NAMES.get(count) or ("vis", *(f"sem_{i}" for i in range(1, count)))


# ---------------------------------------------------------------------------------------------------------------------
# The convolutional halves
# ---------------------------------------------------------------------------------------------------------------------
def _middle(channels: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        (
            ResBlock(channels, channels, groups=groups),
            AttnBlock(channels, groups),
            ResBlock(channels, channels, groups=groups),
        )
    )


class Adapter(Transformer):
    """A transformer over the positions of a map, without a residual around it."""

    def __init__(self, width: int, grid: tuple[int, int], layers: int, heads: int):
        super().__init__(width, layers, heads)
        self.positional_embedding = nn.Parameter(torch.randn(grid[0] * grid[1], width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) + self.positional_embedding  # (B, L, C)
        return super().forward(tokens).transpose(1, 2).reshape(x.shape)


class Branch(nn.Module):
    """What turns the shared map into the input of one sub-codebook."""

    def __init__(self, width: int, z_channels: int, grid: tuple[int, int], layers: int, heads: int, groups: int):
        super().__init__()
        self.adapter = Adapter(width, grid, layers, heads)
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(norm_silu(self.norm_out, self.adapter(x)))


class Encoder(nn.Module):
    """(B, 3, H, W) -> the map (B, C, h, w) that all branches share."""

    def __init__(self, channels: int, mult: tuple[int, ...], res_blocks: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.conv_blocks = shrinking_levels(channels, mult, res_blocks, attention=True, groups=groups)
        self.mid = _middle(channels * mult[-1], groups)

    def forward(self, images: Tensor) -> Tensor:
        return through(self.conv_in(images), self.conv_blocks, self.mid)


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3, H, W), not clamped."""

    def __init__(self, channels: int, mult: tuple[int, ...], res_blocks: int, z_channels: int, groups: int):
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, channels * mult[-1], 3, padding=1)
        self.mid = _middle(channels * mult[-1], groups)
        self.conv_blocks = growing_levels(channels, mult, res_blocks + 1, attention=True, groups=groups)
        self.norm_out = group_norm(channels * mult[0], groups)
        self.conv_out = nn.Conv2d(channels * mult[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = through(self.conv_in(z), self.mid, self.conv_blocks)
        return self.conv_out(norm_silu(self.norm_out, x))


class FeaturePredictor(Transformer):
    """Predicts a teacher's class token from a quantised map. Only in training."""

    def __init__(self, width: int, code_dim: int, grid: tuple[int, int], layers: int, heads: int):
        super().__init__(width, layers, heads)
        self.upscale = nn.Sequential(Linear(code_dim, width), nn.ReLU(), Linear(width, width))
        self.class_embedding = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(grid[0] * grid[1] + 1, width) * width**-0.5)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, L, D) -> (B, 1 + L, width); row 0 is the prediction."""
        x = self.upscale(codes)
        x = torch.cat((self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), dim=1)
        return super().forward(x + self.positional_embedding)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Semantic:
    """Which sub-codebooks predict a teacher's class token, and the transformers that do it."""

    teachers: dict[str, Width] = field(default_factory=dict)  # name -> feature width
    branches: dict[str, str] = field(default_factory=dict)  # teacher -> sub-codebook
    layers: Layers = 3
    heads: Width = 8

    @classmethod
    def parse(cls, value: dict[str, Any] | None, names: tuple[str, ...]) -> Semantic:
        """Checked against the names of the sub-codebooks; without teachers for none."""
        if not value:
            return cls()
        filled = {
            key: {} if part is None else part for key, part in value.items()
        }  # a table that a YAML names and leaves empty
        semantic = parse_section("semantic", filled, cls)
        if not semantic.teachers:
            return cls()
        for teacher in semantic.teachers:
            if teacher not in semantic.branches:
                raise UserError(
                    f"semantic.branches: say which sub-codebook predicts teacher {teacher}, "
                    f"{{{teacher}: {names[-1]}}} or the like; there are {', '.join(names)}."
                )
        for teacher, name in semantic.branches.items():
            if teacher not in semantic.teachers:
                raise UserError(
                    f'semantic.branches: there is no teacher "{teacher}".{nearest(teacher, semantic.teachers)}'
                )
            if name not in names:
                raise UserError(f'semantic.branches: there is no sub-codebook "{name}".{nearest(name, names)}')
        return semantic


class FQGAN(CodeTokenizer):
    """core.specs.Tokenizer with K codes per position. The defaults are the published dual tokenizer with stride 16.

    Args:
        image_size: published weights are of 256; others are for training, or resize the adapters' position tables.
        branches: K, the number of sub-codebooks. Their names, in the order of the codes, are vis, sem (2),
            vis, sem_mid, sem_high (3) or vis, sem_1, sem_2 ...
        size: widths of the levels: "vq16" (stride 16), "vq8" (stride 8), or a list of factors of `channels`.
        decoder_mult: another such list for the decoder; None for the same.
        channels, res_blocks, z_channels, groups: of the convolutional halves.
        vocab, code_dim: V and D of every sub-codebook.
        normalise: codes are unit vectors, as in all published weights.
        adapter_layers, adapter_heads: of the K transformers behind the encoder.
        semantic: {teachers: {name: feature width}, branches: {teacher: sub-codebook}, layers: 3, heads: 8}, or None.
            In a config only `branches` is needed: the widths are those of the configured teachers.
        entropy_loss: report the term "entropy".
        across_ranks: means of that term over the batch of all ranks. parity: False is what was published.
        usage_window: latest assignments whose distinct share is logged as usage.
    """

    charts = (
        Chart("share of codes in use", ("usage/*",)),
        Chart("codebook terms of each branch", ("codebook/*", "commitment/*")),
        Chart("entropy terms of each branch", ("entropy/*", "per_sample_entropy/*", "batch_entropy/*")),
    )

    def __init__(
        self,
        *,
        image_size: Pixels = 256,
        branches: Count = 2,
        size: str | list[int] = "vq16",
        decoder_mult: list[Count] | None = None,
        channels: Width = 128,
        res_blocks: Whole = 2,
        z_channels: Width = 256,
        groups: Count = 32,
        vocab: Count = 16384,
        code_dim: Width = 8,
        normalise: bool = True,
        adapter_layers: Layers = 6,
        adapter_heads: Width = 8,
        semantic: Annotated[dict, Semantic] | None = None,
        entropy_loss: bool = True,
        across_ranks: bool = True,
        usage_window: Whole = 65536,
    ):
        super().__init__()
        if isinstance(size, str) and size not in SIZES:
            raise UserError(f'size "{size}" is not known.{nearest(size, SIZES)}')
        mult = tuple(SIZES[size] if isinstance(size, str) else size)
        decoder_mult = tuple(decoder_mult or mult)
        if len(decoder_mult) != len(mult):
            raise UserError(
                f"decoder_mult has {len(decoder_mult)} levels and the encoder {len(mult)}: "
                "pictures would come out in another size"
            )
        if branches < 1:
            raise UserError(f"branches = {branches}: at least one sub-codebook is needed")
        stride = 2 ** (len(mult) - 1)
        if image_size % stride:
            raise UserError(f"image_size {image_size} is not a multiple of {stride}, the stride of this tokenizer")

        self.image_size, self.names = image_size, branch_names(branches)
        grid = (image_size // stride, image_size // stride)
        self.spec = Codes(grid[0] * grid[1], branches, vocab, code_dim, grid, self.names)
        self.semantic = Semantic.parse(semantic, self.names)
        self.term_names = (
            "codebook",
            "commitment",
            *(("entropy",) if entropy_loss else ()),
            *(("disentangle",) if branches > 1 else ()),
        )

        width = channels * mult[-1]
        self.encoder = Encoder(channels, mult, res_blocks, groups)
        self.heads = nn.ModuleDict(
            {name: Branch(width, z_channels, grid, adapter_layers, adapter_heads, groups) for name in self.names}
        )
        self.quant_convs = nn.ModuleDict({name: nn.Conv2d(z_channels, code_dim, 1) for name in self.names})
        self.quantizers = nn.ModuleDict(
            {
                name: VectorQuantizer(
                    vocab,
                    code_dim,
                    normalise=normalise,
                    entropy=entropy_loss,
                    across_ranks=across_ranks,
                    usage_window=usage_window,
                )
                for name in self.names
            }
        )
        self.post_quant_conv = nn.Conv2d(branches * code_dim, z_channels, 1)
        self.decoder = Decoder(channels, decoder_mult, res_blocks, z_channels, groups)
        self.predictors = nn.ModuleDict(
            {
                teacher: FeaturePredictor(width, code_dim, grid, self.semantic.layers, self.semantic.heads)
                for teacher, width in self.semantic.teachers.items()
            }
        )
        channels_last(self)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed (the published recipe decays none)."""
        return {name for name, p in self.named_parameters() if p.ndim < 2 or "embedding" in name}

    # -- training -----------------------------------------------------------------------------------------------------
    def branch_maps(self, images: Tensor) -> dict[str, Tensor]:
        """What each branch hands to its projection, (B, z_channels, h, w) by name."""
        shared = self.encoder(images)
        return {name: head(shared) for name, head in self.heads.items()}

    def vectors(self, images: Tensor) -> dict[str, Tensor]:
        """Vectors before quantisation, (B, L, D) by name."""
        maps = self.branch_maps(images)
        return {name: self.quant_convs[name](z).flatten(2).transpose(1, 2) for name, z in maps.items()}

    def paint(self, vectors: list[Tensor]) -> Tensor:
        """K code vectors (B, L, D) -> images (B, 3, H, W)."""
        z = torch.cat(vectors, dim=-1).transpose(1, 2).unflatten(2, self.spec.grid)  # (B, K D, h, w)
        return self.decoder(self.post_quant_conv(z))

    def disentangle(self, vectors: list[Tensor]) -> Tensor:
        """Squared cosine of the codes of two sub-codebooks, mean over positions and over pairs, ()."""
        units = [unit(v) for v in vectors]
        return torch.stack([(a * b).sum(-1).square().mean() for a, b in itertools.combinations(units, 2)]).mean()

    def forward(self, images: Tensor, draws: Draws) -> Recon:
        quantized: dict[str, Quantized] = {name: self.quantizers[name](z) for name, z in self.vectors(images).items()}
        values = [quantized[name].values for name in self.names]
        terms = {term: sum(q.terms[term] for q in quantized.values()) for term in next(iter(quantized.values())).terms}
        if len(values) > 1:
            terms["disentangle"] = self.disentangle(values)
        # parity: not detached, so that the teachers reach adapter and encoder.
        features = {
            teacher: predict(quantized[self.semantic.branches[teacher]].values)
            for teacher, predict in self.predictors.items()
        }
        logs = {
            f"{term}/{name}": value.detach()
            for name, q in quantized.items()
            for term, value in {**q.terms, **q.logs}.items()
        }
        if self.training:
            logs |= {f"usage/{name}": self.quantizers[name].track(q.codes) for name, q in quantized.items()}
        return Recon(
            images=self.paint(values),
            terms=terms,
            predictions={teacher: rows[:, :1] for teacher, rows in features.items()},
            details={"quantized": quantized, "features": features},
            logs=logs,
            last_layer=self.decoder.conv_out.weight,
        )

    # -- use ----------------------------------------------------------------------------------------------------------
    def encode(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> codes (B, L, K) int64, row by row, in the order of `names`."""
        vectors = self.vectors(images)
        return torch.stack([self.quantizers[name].encode(vectors[name]) for name in self.names], dim=-1)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (B, L, K) -> the vectors behind them, (B, L, K, D) fp32."""
        return torch.stack([self.quantizers[name].embed(codes[..., k]) for k, name in enumerate(self.names)], dim=2)

    def decode(self, latents: Tensor, draws: Draws | None = None) -> Tensor:
        """Codes (B, L, K) -> images in [-1, 1], not clamped."""
        return self.paint(list(self.embed(latents).unbind(2)))
