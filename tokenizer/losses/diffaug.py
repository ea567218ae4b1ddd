"""DiffAugment (Zhao et al. 2020): the same kinds of random change for real and false pictures, before a discriminator.

Every draw is an argument, so that the result does not depend on the rank layout. Order: blur, translation, colour,
cutout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core.limits import Share
from core.rng import Draws
from core.schema import Duration
from core.specs import Progress

NUMBERS = 7  # draws per picture


def blur(images: Tensor, amount: float) -> Tensor:
    """Gaussian blur with sigma = sqrt(H / 2) amount; nothing where that reaches less than one pixel."""
    sigma = math.sqrt(images.shape[-2] / 2) * amount
    radius = math.floor(3 * sigma)
    if radius < 1:
        return images
    offset = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp2(-((offset / sigma) ** 2))  # parity: a power of two, not of e
    kernel = (kernel / kernel.sum()).to(images.dtype)
    channels = images.shape[1]
    images = F.pad(images, (radius,) * 4, mode="reflect")
    images = F.conv2d(images, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(images, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def translate(images: Tensor, u_rows: Tensor, u_columns: Tensor, share: float = 0.125) -> Tensor:
    """Shift by up to `share` of each side, zeros coming in. The draws are (B,) uniform."""
    for u, dim in ((u_rows, 2), (u_columns, 3)):
        size = images.shape[dim]
        most = round(share * size)
        shift = (u * (2 * most + 1)).floor().long() - most  # (B,)
        place = torch.arange(size, device=images.device) + shift[:, None]  # (B, size)
        inside, place = (place >= 0) & (place < size), place.clamp(0, size - 1)
        # gather and not images[...]: the backward of an index is not the same from run to run
        shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        images = images.gather(dim, place.view(shape).expand_as(images)) * inside.view(shape)
    return images


def jitter(images: Tensor, u_brightness: Tensor, u_saturation: Tensor, u_contrast: Tensor) -> Tensor:
    """Brightness, then saturation, then contrast. The draws are (B,) uniform."""
    brightness, saturation, contrast = (u.view(-1, 1, 1, 1) for u in (u_brightness, u_saturation, u_contrast))
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    level = images.mean((1, 2, 3), keepdim=True)
    return (images - level) * (contrast + 0.5) + level


def cut_out(images: Tensor, u_row: Tensor, u_column: Tensor, share: float) -> Tensor:
    """A box of `share` of each side, somewhere, set to zero; part of it may lie outside. The draws are (B,) uniform."""
    covered = []
    for u, size in ((u_row, images.shape[-2]), (u_column, images.shape[-1])):
        box = round(share * size)
        first = (u * (size + 1 - box % 2)).floor().long() - box // 2  # (B,)
        place = torch.arange(size, device=images.device)
        covered.append((place >= first[:, None]) & (place < first[:, None] + box))  # (B, size)
    hole = covered[0][:, :, None] & covered[1][:, None]
    return images * (~hole[:, None])


def augment(
    images: Tensor,
    switches: Sequence[float],
    numbers: Tensor,
    *,
    probability: float = 1.0,
    cutout: float = 0.2,
    blur_amount: float = 0.0,
) -> Tensor:
    """
    Args:
        images: (B, 3, H, W) in [-1, 1].
        switches: three uniform numbers: translation, colour and cutout happen to the whole batch where they are
            <= probability.
        numbers: (7, B) uniform: rows, columns, brightness, saturation, contrast, row and column of the cutout.
        cutout: side of the box; 0 for none.
        blur_amount: 0 or less for none. parity: does not depend on the switches.
    """
    if blur_amount > 0:
        images = blur(images, blur_amount)
    if switches[0] <= probability:
        images = translate(images, numbers[0], numbers[1])
    if switches[1] <= probability:
        images = jitter(images, *numbers[2:5])
    if switches[2] <= probability and cutout > 0:
        images = cut_out(images, numbers[5], numbers[6], cutout)
    return images


@dataclass
class DiffAugment:
    """How an objective augments what its discriminator sees.

    Attributes:
        probability, cutout: see `augment`.
        fade: how long after the start of the discriminator pictures are still blurred, less and less; "never": no blur
            at all, not even before. Until the start they are blurred in full.
    """

    probability: Share = 1.0
    cutout: Share = 0.2
    fade: Duration = Duration("0step")

    def blur_amount(self, since_start: int, progress: Progress) -> float:
        """`since_start`: pictures since the discriminator began, negative before."""
        if self.fade == "never":
            return 0.0
        if since_start < 0:
            return 1.0
        length = self.fade.images(progress.images_per_epoch, progress.global_batch)
        return max(0.0, 1.0 - since_start / length) if length else 0.0

    def __call__(self, images: Tensor, draws: Draws, blur_amount: float) -> Tensor:
        switches = [draws.shared_uniform(f"augment {what}") for what in ("translation", "colour", "cutout")]
        numbers = draws.uniform("augment", (NUMBERS,)).t()
        return augment(
            images, switches, numbers, probability=self.probability, cutout=self.cutout, blur_amount=blur_amount
        )
