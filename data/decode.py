"""From the bytes of one picture to 8-bit RGB.

A picture that cannot be decoded raises `UnreadablePicture`, which the loader may replace. Any input becomes RGB:

- transparent pictures (alpha channel, transparent palette entry or colour) are composed on white;
- CMYK, grey, palette and 16-bit pictures are converted; of an animation the first frame is taken;
- floats and 16-bit pictures that use a sixteenth of their range or less are refused: they would turn black;
- EXIF orientation is applied only when asked for: the pipelines that published numbers come from ignore it;
- truncated files are errors, never half-grey pictures.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from core.errors import UserError
from core.files import text_instead

# Pillow knows formats that run other programs (EPS starts Ghostscript): only these are ever opened.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
# Resizing the short side of a 1 x 50000 strip to 256 would need gigabytes. Longer than the first a picture of a set is a mistake.
MAX_ASPECT, MAX_ASPECT_OF_ONE = 100, 1000
# Of a JPEG: a bit for every 16 x 16 pixels. Damaged headers claim more, and the decoder would fill it up with grey.
JPEG_PIXELS_PER_BYTE = 8 * 16 * 16
ORIENTATION = 0x0112  # the EXIF tag


class UnreadablePicture(Exception):
    """`key` names the picture, `reason` says why it could not be read; `is_of_no_kind`: it is no picture that is known."""

    def __init__(self, key: str, reason: str, is_of_no_kind: bool = False):
        super().__init__(key, reason)
        self.key, self.reason, self.is_of_no_kind = key, reason, is_of_no_kind

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class _Unsuitable(Exception):
    """A picture that decodes, but not to what it shows."""


def _grey(image: Image.Image) -> Image.Image:
    """8-bit grey from integers of 16 or more bits; Pillow's own conversion clips at 255 instead of scaling."""
    values = np.asarray(image).astype(np.int64)
    low, high = values.min(), values.max()
    if low < 0 or high >= 1 << 16:
        raise _Unsuitable(f"values from {low} to {high} are not those of an 8 or 16-bit picture; save it as one")
    if image.mode == "I" and high < 256:  # mode "I" holds 8-bit files too
        return Image.fromarray(values.astype(np.uint8))
    if 0 < high < 1 << 12:
        raise _Unsuitable(
            f"its 16-bit values end at {high}, so it would turn black; stretch them to 65535, or save 8 bits"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` as 8-bit RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise _Unsuitable(
            "floating-point values have no known range, so it could turn black; save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        image = _grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def decode_named(data: bytes, name: str, upright: bool = False) -> Image.Image:
    """`decode_rgb` of a picture that a user chose, which may be narrower than those of a set; UserError where it cannot be
    read."""
    try:
        return decode_rgb(data, name, upright, MAX_ASPECT_OF_ONE)
    except UnreadablePicture as error:
        known = " Give a JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF or PPM picture." if error.is_of_no_kind else ""
        raise UserError(f"{error}.{known}") from error


def decode_rgb(data: bytes, key: str, upright: bool = False, aspect: int = MAX_ASPECT) -> Image.Image:
    """Decode one picture to RGB; UnreadablePicture if that is impossible for whatever reason.

    Args:
        upright: turn it as its EXIF orientation says.
        aspect: how many times longer than wide it may be, or wider than long.
    """
    if not data:
        raise UnreadablePicture(key, "the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if max(width, height) > aspect * min(width, height):
                raise _Unsuitable(f"{width} x {height} is too narrow (limit 1:{aspect})")
            if image.format == "JPEG" and width * height > JPEG_PIXELS_PER_BYTE * len(data):
                raise _Unsuitable(f"its {len(data):,} bytes cannot hold the {width} x {height} pixels that it claims")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image) if upright else image)
    except UnidentifiedImageError as error:  # its own text names a buffer
        reason = text_instead(data) or "this is not a picture of a kind that is known"
        raise UnreadablePicture(key, reason, is_of_no_kind=True) from error
    except _Unsuitable as error:
        raise UnreadablePicture(key, str(error)) from error
    except Exception as error:  # decoders raise almost anything on damaged input
        raise UnreadablePicture(key, f"{type(error).__name__}: {error}") from error


def is_turned(data: bytes) -> bool:
    """Whether a picture carries an EXIF orientation other than upright."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # decode_rgb will tell
        return False
