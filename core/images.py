"""Pixel conventions, in one place: networks see [-1, 1], files hold uint8, losses and metrics use [0, 1]."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from core.errors import UserError
from core.files import replacing

ROUNDINGS = ("truncate", "nearest", "plus128")


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0..255 -> fp32 [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_unit_range(images: Tensor, clamp: bool = False) -> Tensor:
    """[-1, 1] -> [0, 1] in the input's dtype; clamped on request."""
    images = images * 0.5 + 0.5
    return images.clamp(0, 1) if clamp else images


def to_uint8(images: Tensor, rounding: str = "truncate") -> Tensor:
    """[-1, 1] -> uint8 0..255, clamped first.

    rounding "truncate" is trunc(255 x) of RecTok, reAR and ImageFolder's samples, half a level darker on average;
    "nearest" rounds half to even; "plus128" is trunc(127.5 y + 128) of FQGAN and D-AR, "nearest" up to ties.
    The product is taken in the input's dtype: bf16 in, bf16 product (RecTok's published numbers do that).
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f'rounding is one of {", ".join(ROUNDINGS)}, not "{rounding}"')
    if rounding == "plus128":
        return (127.5 * images + 128.0).clamp(0, 255).to(torch.uint8)
    scaled = to_unit_range(images, clamp=True) * 255.0
    return (scaled.round() if rounding == "nearest" else scaled).to(torch.uint8)


def through_model_range(images: Tensor, rounding: str) -> Tensor:
    """What is left of uint8 pictures that went through [-1, 1] and back: "truncate" lowers 63 of 256 levels by one."""
    return to_uint8(images.float() / 255.0 * 2.0 - 1.0, rounding)


def finite_uint8(images: Tensor, rounding: str, numbers: Sequence[int] | Tensor) -> Tensor:
    """`to_uint8`, which would make an inconspicuous black or white of NaN and infinity: these are a UserError here.

    Waits for the device: for finished pictures, that are about to be copied from it.

    Args:
        numbers: of the pictures, for the message.
    """
    if not images.isfinite().all():
        raise UserError(
            f"a picture between {int(numbers[0])} and {int(numbers[-1])} has pixels that are not finite. The weights or "
            "the precision are at fault; nothing was kept of these pictures."
        )
    return to_uint8(images, rounding)


def grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """(B, 3, H, W) uint8 -> one (3, H', W') uint8 picture, row by row on white. columns None: about square."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = images.new_full(
        (channels, rows * (height + padding) + padding, columns * (width + padding) + padding), 255
    )
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + padding) + padding, (i % columns) * (width + padding) + padding
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def save_png(image: Tensor, path: str | Path) -> None:
    """Write one (3, H, W) uint8 picture atomically."""
    with replacing(path, sync=False) as temporary:
        temporary.write_bytes(png(image))


def png(image: Tensor) -> bytes:
    """The file that `save_png` writes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
