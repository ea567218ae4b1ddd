"""Residual quantisation over growing scales, in several branches at once (ImageFolder, arXiv 2410.01756, section 3.2).

A branch writes its map f as a sum over scales: what is left over is shrunk to p x p, every cell takes its nearest code,
the codes are enlarged again and smoothed by a convolution phi, and the result is subtracted. Scales run from one cell to
the whole map. Branches (product quantisation) have a codebook and convolutions each and run side by side.

With one scale, no phi and `normalise` this is the plain vector quantiser of the XQ-GAN files; with a binary codebook it
is their binary spherical quantiser.

B batch, K branches, C channels of a branch, S scales, P = side of the last scale, V codes, L = sum of squared scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.dist import mean_over_ranks, sum_over_ranks
from core.errors import UserError
from core.nn.precision import no_autocast
from tokenizer.vq.quantizer import nearest_codes, unit


def phi_index(scale: int, scales: int, count: int) -> int:
    """Which of `count` shared convolutions scale number `scale` of `scales` uses: the nearest tick, first minimum."""
    edge = 1 / (3 * count) if count == 4 else 1 / (2 * count)  # parity: four phis sit at other places than other counts
    ticks = torch.linspace(edge, 1 - edge, count, dtype=torch.float64, device="cpu")
    place = scale / (scales - 1) if scales > 1 else 0.0
    return int((ticks - place).abs().argmin())


def enlarge(x: Tensor, side: int) -> Tensor:
    """(N, C, p, p) -> (N, C, side, side), bicubic."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="bicubic")


def shrink(x: Tensor, side: int) -> Tensor:
    """(N, C, P, P) -> (N, C, side, side), area mean."""
    return x if x.shape[-1] == side else F.interpolate(x, size=(side, side), mode="area")


def _masked_mse(a: Tensor, b: Tensor, mask: Tensor | None, share: Tensor | float) -> Tensor:
    """Mean squared difference over the samples in `mask`, which are this share of all; None: over all."""
    return F.mse_loss(a, b) if mask is None else (mask * (a - b).square()).mean() / share


class Branch(nn.Module):
    """Weights of one branch: the codebook, the convolutions and how often each code is used.

    Args:
        vocab, dim: of the codebook; rows start with unit length.
        scales: number of scales.
        phis: number of convolutions.
        binary: the codebook is fixed: all 2^dim sign patterns, with unit length; bit c of an index is channel c.
    """

    def __init__(self, vocab: int, dim: int, scales: int, phis: int, binary: bool):
        super().__init__()
        if binary:
            bits = (torch.arange(vocab, device="cpu")[:, None] >> torch.arange(dim, device="cpu")) & 1  # (V, C)
            self.register_buffer("rows", (bits * 2 - 1) * dim**-0.5, persistent=False)
        else:
            self.embedding = nn.Embedding(vocab, dim)
            nn.init.uniform_(self.embedding.weight, -1 / vocab, 1 / vocab)
            with torch.no_grad():
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        self.phis = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(phis))
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(scales, vocab))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # of the row above, all scales together

    @property
    def codebook(self) -> Tensor:
        """(V, C)"""
        return self.embedding.weight if hasattr(self, "embedding") else self.rows


@dataclass
class QuantizedMaps:
    """What a training pass over (B, K, C, P, P) features gives."""

    features: Tensor  # (B, K, C, P, P), forward the quantised map, backward the features (straight-through)
    codes: Tensor  # (B, L, K)
    codebook_loss: Tensor  # scalar; pulls codes and phi towards the features
    commitment_sum: Tensor  # scalar, summed over scales; pulls features towards the codes. Divide by S for the mean.
    partial: list[Tensor]  # S x (B, K, C, P, P), the map after each scale


class Tables(NamedTuple):
    """What all scales share, in fp32: made once, not once per scale."""

    codebooks: Tensor  # (K, V, C), as `embed` returns rows
    phis: list[tuple[Tensor, Tensor]]  # see MultiScaleQuantizer.phi_weights


class MultiScaleQuantizer(nn.Module):
    """K residual quantisers over the same scales. Always computes in fp32.

    Args:
        vocab, dim: codes per branch and their width.
        scales: sides, coarse to fine; the last is the side of the map.
        branches: K.
        shared_phi: how many phi convolutions the scales of a branch share; 0: one per scale; None: no phi at all.
        phi_ratio: phi(h) = (1 - ratio) h + ratio conv(h).
        cosine: nearest by angle; else by Euclidean distance.
        normalise: features and codes are brought to unit length before anything else.
        binary: fixed codebook of sign patterns, see Branch.
    """

    USED_SHARE = 0.08  # a code counts as used from this share of its even share of hits on

    def __init__(
        self,
        vocab: int,
        dim: int,
        scales: tuple[int, ...],
        branches: int = 2,
        shared_phi: int | None = 4,
        phi_ratio: float = 0.5,
        cosine: bool = True,
        normalise: bool = False,
        binary: bool = False,
    ):
        super().__init__()
        if binary and vocab != 2**dim:
            raise UserError(f"a binary codebook of width {dim} has 2^{dim} = {2**dim} codes, not {vocab}")
        self.vocab, self.dim, self.scales, self.branches = vocab, dim, tuple(scales), branches
        self.side, self.length = self.scales[-1], sum(p * p for p in self.scales)
        self.phi_ratio, self.cosine, self.normalise = phi_ratio, cosine, normalise
        self.shared_phi, self.binary = shared_phi, binary
        count = 0 if shared_phi is None else shared_phi or len(self.scales)
        self.phi_of = [phi_index(s, len(self.scales), count) for s in range(len(self.scales))] if count else []
        level = torch.arange(len(self.scales), device="cpu").repeat_interleave(
            torch.tensor([p * p for p in self.scales], device="cpu")
        )
        self.register_buffer("level", level, persistent=False)  # (L,), the scale of each code
        self.quantizes = nn.ModuleList(Branch(vocab, dim, len(self.scales), count, binary) for _ in range(branches))
        # With few scales some convolutions are never used; DDP would wait for their gradients.
        for branch in self.quantizes:
            for index, conv in enumerate(branch.phis):
                conv.requires_grad_(index in self.phi_of)

    # -- pieces ---------------------------------------------------------------------------------------------------------
    def codebooks(self) -> Tensor:
        """(K, V, C) fp32, as `embed` returns rows."""
        rows = torch.stack([branch.codebook for branch in self.quantizes]).float()
        return unit(rows) if self.normalise else rows

    def tables(self) -> Tables:
        return Tables(self.codebooks(), self.phi_weights())

    def nearest(self, z: Tensor, codebooks: Tensor) -> Tensor:
        """Index of the nearest code of each branch: z (K, N, C), codebooks (K, V, C) -> (K, N) int64."""
        if self.cosine:
            z, codebooks = unit(z), unit(codebooks)
        return torch.stack([nearest_codes(vectors, table) for vectors, table in zip(z, codebooks)])

    def spread(self, codes: Tensor, scale: int, tables: Tables) -> Tensor:
        """What the codes of one scale, (B, p p, K), add to the map: (B, K, C, P, P)."""
        batch, side = len(codes), self.scales[scale]
        which = torch.arange(self.branches, device=codes.device)
        rows = tables.codebooks[which, codes]  # (B, p p, K, C)
        h = rows.permute(0, 2, 3, 1).reshape(batch, -1, side, side)  # (B, K C, p, p)
        h = enlarge(h, self.side)
        if tables.phis:
            weight, bias = tables.phis[self.phi_of[scale]]
            smoothed = F.conv2d(h, weight, bias, padding=1, groups=self.branches)
            h = torch.lerp(h, smoothed, self.phi_ratio)
        return h.view(batch, self.branches, self.dim, self.side, self.side)

    def phi_weights(self) -> list[tuple[Tensor, Tensor]]:
        """The convolutions of all branches side by side, so that one grouped convolution does: (K C, C, 3, 3), (K C,)."""
        return [
            (torch.cat([conv.weight for conv in convs]).float(), torch.cat([conv.bias for conv in convs]).float())
            for convs in zip(*(branch.phis for branch in self.quantizes))
        ]

    def split(self, codes: Tensor) -> list[Tensor]:
        """(B, L, K) -> one (B, p p, K) per scale; codes of the first scales only are fine too."""
        sizes = [p * p for p in self.scales]
        while sum(sizes) > codes.shape[1]:
            sizes.pop()
        return list(codes.split(sizes, dim=1))

    # -- quantising -----------------------------------------------------------------------------------------------------
    def forward(self, features: Tensor, kept: Tensor | None = None, update_usage: bool = False) -> QuantizedMaps:
        """Quantise and score (B, K, C, P, P).

        Args:
            kept: (B,) how many scales each sample keeps (quantiser dropout); None keeps all. Later scales are still
                computed, but neither enter the map nor the losses.
            update_usage: count the codes into the usage statistics.
        """
        with no_autocast(features):
            f = features.float()
            if self.normalise:
                f = F.normalize(f, dim=2)
            tables = self.tables()
            rest, f_hat = f.detach(), torch.zeros_like(f)
            codes, partial = [], []
            losses, commitments = [], []
            for s, side in enumerate(self.scales):
                codes.append(self._codes_of(rest, side, tables))
                h = self.spread(codes[-1], s, tables)
                rest = rest - h.detach()
                mask, share = None, 1.0
                if kept is not None:
                    mask = (kept > s).to(f.dtype)  # (B,)
                    share = mean_over_ranks(mask.mean()).clamp(min=1e-6)
                    mask = mask.view(-1, 1, 1, 1, 1)
                f_hat = f_hat + (h if mask is None else mask * h)
                losses.append(_masked_mse(f_hat, f.detach(), mask, share))
                commitments.append(_masked_mse(f_hat.detach(), f, mask, share))
                partial.append(f_hat)
            codes = torch.cat(codes, dim=1)
            if update_usage:
                self._count(codes)
            straight = f + (f_hat - f).detach()
            return QuantizedMaps(straight, codes, torch.stack(losses).mean(), torch.stack(commitments).sum(), partial)

    def _codes_of(self, rest: Tensor, side: int, tables: Tables) -> Tensor:
        """Nearest codes (B, p p, K) of what is left over, (B, K, C, P, P), shrunk to `side`."""
        batch = len(rest)
        z = shrink(rest.flatten(0, 1), side).view(batch, self.branches, self.dim, side * side)
        z = z.permute(1, 0, 3, 2).reshape(self.branches, -1, self.dim)  # (K, B p p, C)
        return self.nearest(z, tables.codebooks.detach()).view(self.branches, batch, side * side).permute(1, 2, 0)

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:
        """(B, K, C, P, P) -> codes (B, L, K)."""
        with no_autocast(features):
            rest = F.normalize(features.float(), dim=2) if self.normalise else features.float()
            tables = self.tables()
            codes = []
            for s, side in enumerate(self.scales):
                codes.append(self._codes_of(rest, side, tables))
                if s + 1 < len(self.scales):
                    rest = rest - self.spread(codes[-1], s, tables)
            return torch.cat(codes, dim=1)

    # -- back from codes ------------------------------------------------------------------------------------------------
    def embed(self, codes: Tensor) -> Tensor:
        """(B, L, K) -> codebook rows (B, L, K, C)."""
        return self.codebooks()[torch.arange(self.branches, device=codes.device), codes]

    def partial_maps(self, codes: Tensor) -> list[Tensor]:
        """The map after each scale of `codes` (B, L, K), or of as many scales as they cover: (B, K, C, P, P) each."""
        with no_autocast(codes):
            tables = self.tables()
            maps, f_hat = [], 0.0
            for s, part in enumerate(self.split(codes)):
                f_hat = f_hat + self.spread(part, s, tables)
                maps.append(f_hat)
            return maps

    def inputs(self, f_hat: Tensor, scale: int) -> Tensor:
        """A map (B, K, C, P, P) as a generator sees it before predicting scale number `scale`: (B, p p, K C)."""
        small = shrink(f_hat.flatten(1, 2), self.scales[min(scale, len(self.scales) - 1)])
        return small.flatten(2).transpose(1, 2)

    # -- usage ----------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _count(self, codes: Tensor) -> None:
        """Move the running mean of hits per code: the very first row as it is, then decay 0.9, from 100 rows on 0.99."""
        scales = len(self.scales)
        which = torch.arange(self.branches, device=codes.device)
        places = (which * scales + self.level[:, None]) * self.vocab + codes  # (B, L, K)
        hits = torch.zeros(self.branches * scales * self.vocab, device=codes.device)
        hits.scatter_add_(0, places.flatten(), torch.ones_like(places, dtype=hits.dtype).flatten())
        hits = sum_over_ranks(hits).view(self.branches, scales, self.vocab)
        for branch, hit in zip(self.quantizes, hits):
            number = branch.updates + torch.arange(scales, device=codes.device)
            weight = torch.where(number == 0, 1.0, torch.where(number < 100, 0.1, 0.01))[:, None]  # (S, 1)
            branch.ema_vocab_hit_SV.mul_(1 - weight).add_(weight * hit)
            branch.updates.add_(scales)

    @torch.no_grad()
    def usage(self, batch: int) -> Tensor:
        """Share of codes in use, in percent, (K, S), when `batch` pictures (of all ranks) make up one update."""
        enough = batch * self.side**2 / self.vocab * self.USED_SHARE
        hits = torch.stack([branch.ema_vocab_hit_SV for branch in self.quantizes])  # (K, S, V)
        return 100.0 * (hits >= enough).float().mean(-1)
