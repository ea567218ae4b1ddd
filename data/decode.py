"""From the bytes of one picture to 8-bit RGB.

A picture that cannot be decoded raises `UnreadablePicture`, which the loader may replace. Any input becomes RGB:

- transparent pictures (alpha channel, transparent palette entry or colour) are composed on white;
- CMYK, grey, palette and 16-bit pictures are converted; of an animation the first frame is taken;
- EXIF orientation is NOT applied: the ImageNet pipelines that published numbers come from ignore it too;
- truncated files are errors, never half-grey pictures.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

# Pillow knows formats that run other programs (EPS starts Ghostscript): only these are ever opened.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Resizing the short side of a 1 x 50000 strip to 256 would need gigabytes.
MAX_ASPECT = 100


class UnreadablePicture(Exception):
    """`key` names the picture, `reason` says why it could not be read."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` as 8-bit RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        sixteen = image.mode != "I" or values.max(initial=0) > 255  # mode "I" holds 8-bit files too
        image = Image.fromarray((values >> 8 if sixteen else values).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def decode_rgb(data: bytes, key: str) -> Image.Image:
    """Decode one picture to RGB; UnreadablePicture if that is impossible for whatever reason."""
    if not data:
        raise UnreadablePicture(key, "the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ValueError(f"{width} x {height} is too narrow (limit 1:{MAX_ASPECT})")
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError as error:  # its own text names a buffer
        raise UnreadablePicture(key, "this is not a picture of a kind that is known") from error
    except Exception as error:  # decoders raise almost anything on damaged input
        raise UnreadablePicture(key, f"{type(error).__name__}: {error}") from error
