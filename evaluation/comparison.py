"""What is said of several tokenizers side by side: bits per pixel, paired differences, and where they disagree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.specs import Continuous, LatentSpec
from evaluation.images import interval_of
from evaluation.intervals import normal_interval

SAMPLE_BITS = 16  # of a continuous latent's number, as it is stored and sent


def bits_per_pixel(spec: LatentSpec, size: int) -> float:
    """What latents take without a code for them: log2 V of each index; SAMPLE_BITS of each number.

    Args:
        size: pixels of a side of the pictures.
    """
    if isinstance(spec, Continuous):
        return spec.channels * spec.length * SAMPLE_BITS / size**2
    return spec.length * spec.branches * math.log2(spec.vocab) / size**2


def entropy_coded_bits_per_pixel(counts: Tensor, pictures: int, size: int) -> float:
    """What an ideal coder needs that knows how often each code occurs in each branch and scale, and nothing else.

    The frequencies are those of the very pictures (Shannon's entropy, no epsilon): of few pictures too low.

    Args:
        counts: (scales, K, V) over all pictures.
    """
    counts = counts.double()
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return float(-torch.special.xlogy(counts, share).sum() / math.log(2) / pictures / size**2)


@dataclass(frozen=True)
class Difference:
    """Mean difference of two tokenizers over the same pictures, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "no difference to be seen" if self.low <= 0 <= self.high else "higher" if self.mean > 0 else "lower"


def paired_difference(values: Tensor, others: Tensor, replicates: int = 1000) -> Difference:
    """Of `values` minus `others`, (N,) numbers of the same pictures: pictures are drawn again in pairs."""
    difference = values.double() - others.double()
    return Difference(float(difference.mean()), *interval_of(difference, replicates))


def distance_difference(value: float, replicates: list[float], other: float, others: list[float]) -> Difference:
    """Of two Frechet distances over the same pictures, from their bootstrap values (`intervals.resampled`).

    In each replicate both are those of the same pictures, drawn again, so what makes a draw easy or hard for both
    cancels. So does most of the bias of few pictures, but not all of it.
    """
    mean = value - other
    return Difference(mean, *normal_interval(mean, np.array(replicates) - np.array(others)))


def most_disputed(pictures: list[Tensor], share: float = 0.25) -> tuple[float, float]:
    """(top, left) as parts of the side, of the square region where reconstructions differ most from each other.

    Args:
        pictures: (3, H, W) uint8 each, of any square sizes: they are compared at the smallest.
        share: side of the region, as a part of the pictures' side.
    """
    size = min(picture.shape[-1] for picture in pictures)
    same = torch.stack([F.interpolate(p[None].float(), (size, size), mode="area")[0] for p in pictures])
    window = max(1, round(size * share))
    variance = same.var(0, unbiased=False).mean(0)
    sums = F.avg_pool2d(variance[None, None], window, 1)[0, 0]
    place = int(sums.argmax())
    return place // sums.shape[1] / size, place % sums.shape[1] / size


def region(picture: Tensor, place: tuple[float, float], share: float = 0.25, side: int = 160) -> Tensor:
    """(3, side, side) uint8 of a region of (3, H, W), pixels kept sharp."""
    size = picture.shape[-1]
    window = max(1, round(size * share))
    top, left = (min(size - window, round(part * size)) for part in place)
    crop = picture[:, top : top + window, left : left + window]
    return F.interpolate(crop[None].float(), (side, side), mode="nearest")[0].to(torch.uint8)
