"""From a PIL picture to a square uint8 tensor. One pure function per crop: randomness comes in as numbers in [0, 1).

`Transform` is the part a config talks to. Its draws are a function of (seed, position) alone, and crops with few
outcomes number them ("views"), so that anything computed from a picture can be stored per view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.errors import UserError, nearest
from core.rng import uniform_scalar

RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
}


# ---------------------------------------------------------------------------------------------------------------------
# Crops
# ---------------------------------------------------------------------------------------------------------------------
def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _pick(number: float, low: int, high: int) -> int:
    """The integer in [low, high] that a number in [0, 1) stands for."""
    return low + int(number * (high - low + 1))


def adm_resize(image: Image.Image, short_side: int) -> Image.Image:
    """Resize as ADM (Dhariwal & Nichol 2021) does: halve with a box filter while possible, then bicubic."""
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image.resize(adm_size(image.size, short_side), Image.Resampling.BICUBIC)


def adm_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height) of what `adm_resize` makes of a picture of `size`."""
    while min(size) >= 2 * short_side:
        size = size[0] // 2, size[1] // 2
    scale = short_side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: what FID references of ImageNet are made with."""
    image = adm_resize(image, size)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop(
    image: Image.Image, size: int, numbers: tuple[float, float, float], scale: tuple[float, float] = (0.8, 1.0)
) -> Image.Image:
    """ADM's random crop: the crop is a random share (`scale`) of a randomly resized short side.

    numbers: choose the short side, the top and the left edge. Scale (0.8, 1.0) at 256 draws a short side from 256 to
    320: the crop that FQGAN, D-AR and ImageFolder train with.
    """
    image = adm_resize(image, _pick(numbers[0], math.ceil(size / scale[1]), math.ceil(size / scale[0])))
    top = _pick(numbers[1], 0, image.height - size)
    left = _pick(numbers[2], 0, image.width - size)
    return _crop(image, left, top, size)


def random_resized_crop(
    image: Image.Image,
    size: int,
    numbers: tuple[float, float, float, float],
    scale: tuple[float, float] = (0.8, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A box with a random share of the area and a random aspect ratio, resized to a square.

    numbers: choose the area, the aspect ratio (log-uniform), the top and the left edge. A box that does not fit is cut
    to the picture instead of being drawn again, so the number of draws is fixed.
    """
    area = image.width * image.height * (scale[0] + (scale[1] - scale[0]) * numbers[0])
    aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * numbers[1])
    width = min(max(1, round(math.sqrt(area * aspect))), image.width)
    height = min(max(1, round(math.sqrt(area / aspect))), image.height)
    top = _pick(numbers[2], 0, image.height - height)
    left = _pick(numbers[3], 0, image.width - width)
    return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)


def ten_crop(image: Image.Image, size: int, view: int, crop_range: float = 1.1) -> Image.Image:
    """View 0-9 of an ADM crop of size * crop_range: corners (row by row) and centre, then those of its mirror image.

    The mirror is taken before cropping and the centre offset rounds half to even, as torchvision's TenCrop does: with
    an odd margin view 9 is not the mirror of view 4.
    """
    image = center_crop(image, int(size * crop_range))
    if view >= 5:
        image = mirror(image)
    margin = image.width - size
    center = round(margin / 2)
    left, top = ((0, 0), (margin, 0), (0, margin), (margin, margin), (center, center))[view % 5]
    return _crop(image, left, top, size)


def resize_crop(
    image: Image.Image,
    size: int,
    short_side: int,
    resample: str = "bicubic",
    numbers: tuple[float, float] | None = None,
) -> Image.Image:
    """torchvision's Resize(short_side) with CenterCrop(size), or RandomCrop(size) when given `numbers` (top, left)."""
    scale = short_side / min(image.size)
    width, height = (short_side if x == min(image.size) else int(x * scale) for x in image.size)
    image = image.resize((width, height), RESAMPLE[resample])
    if numbers is None:
        return _crop(image, round((width - size) / 2), round((height - size) / 2), size)
    return _crop(image, _pick(numbers[1], 0, width - size), _pick(numbers[0], 0, height - size), size)


def mirror(image: Image.Image) -> Image.Image:
    """Horizontal flip."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# What a config chooses
# ---------------------------------------------------------------------------------------------------------------------
CROPS = ("center", "random", "random_resized", "ten", "resize_center", "resize_random")


@dataclass(frozen=True)
class Transform:
    """Crop, perhaps mirror, make a tensor.

    Args:
        image_size: width and height of the result.
        crop: "center" (ADM), "random" (ADM), "random_resized", "ten" (corners and centre, with mirrors),
            "resize_center" or "resize_random" (plain resize to `short_side` first).
        flip: mirror half of the pictures. "ten" contains mirrors already.
        scale: share of the short side that "random" keeps, share of the area that "random_resized" keeps.
        ratio: aspect ratios of "random_resized".
        crop_range: how much larger than the crops the picture of "ten" is.
        short_side: of the "resize_" crops; None means image_size.
        resample: filter of the "resize_" crops: "bicubic", "lanczos" or "bilinear".
    """

    image_size: int = 256
    crop: str = "center"
    flip: bool = False
    scale: tuple[float, float] = (0.8, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_range: float = 1.1
    short_side: int | None = None
    resample: str = "bicubic"

    def __post_init__(self):
        object.__setattr__(self, "scale", tuple(self.scale))  # YAML gives lists
        object.__setattr__(self, "ratio", tuple(self.ratio))
        if self.image_size < 1:
            raise UserError(f"image_size = {self.image_size} must be at least 1.")
        if self.crop not in CROPS:
            raise UserError(f'unknown crop "{self.crop}".{nearest(self.crop, CROPS)}')
        if self.crop == "ten" and self.flip:
            raise UserError('crop "ten" contains mirror images already: set flip: false.')
        if self.resample not in RESAMPLE:
            raise UserError(f'unknown resample "{self.resample}".{nearest(self.resample, RESAMPLE)}')
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale = {list(self.scale)} must be two rising numbers in (0, 1].")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ratio = {list(self.ratio)} must be two rising positive numbers.")
        if self.crop_range < 1:
            raise UserError(f"crop_range = {self.crop_range} must be at least 1.")
        if self.short_side is not None and self.short_side < self.image_size:
            raise UserError(f"short_side = {self.short_side} must be at least image_size = {self.image_size}.")

    @property
    def views(self) -> int | None:
        """How many different results one picture has; None when they cannot be listed."""
        if self.crop == "ten":
            return 10
        return 1 + self.flip if self.crop in ("center", "resize_center") else None

    def describe(self) -> dict[str, int | str | bool | float]:
        """What decides the views, for comparing with what a cache was made from."""
        names = {"ten": ("crop_range",), "resize_center": ("short_side", "resample")}.get(self.crop, ())
        return {name: getattr(self, name) for name in ("image_size", "crop", "flip", *names)}

    def view_of(self, key: tuple[int, ...]) -> int:
        """The view that __call__ with this key returns. Only for transforms with `views`."""
        if self.views is None:
            raise UserError(
                f'crop "{self.crop}" has no fixed views. '
                'Stored features and latents need "center", "resize_center" or "ten".'
            )
        return int(self.views * uniform_scalar(*key, "view")) if self.views > 1 else 0

    def apply_view(self, image: Image.Image, view: int) -> Tensor:
        """View number `view` of a picture, (3, image_size, image_size) uint8."""
        if self.crop == "ten":
            return to_tensor(ten_crop(image, self.image_size, view, self.crop_range))
        if self.crop == "center":
            image = center_crop(image, self.image_size)
        else:
            image = resize_crop(image, self.image_size, self.short_side or self.image_size, self.resample)
        return to_tensor(mirror(image) if view == 1 else image)

    def __call__(self, image: Image.Image, key: tuple[int, ...]) -> Tensor:
        """(3, image_size, image_size) uint8, a function of the picture and of `key` = (seed, position)."""
        if self.views is not None:
            return self.apply_view(image, self.view_of(key))

        def draw(*names: str) -> tuple[float, ...]:
            return tuple(uniform_scalar(*key, name) for name in names)

        size = self.image_size
        if self.crop == "random":
            image = random_crop(image, size, draw("short_side", "top", "left"), self.scale)
        elif self.crop == "random_resized":
            image = random_resized_crop(image, size, draw("area", "aspect", "top", "left"), self.scale, self.ratio)
        else:
            image = resize_crop(image, size, self.short_side or size, self.resample, draw("top", "left"))
        flipped = self.flip and draw("flip")[0] < 0.5
        return to_tensor(mirror(image) if flipped else image)
