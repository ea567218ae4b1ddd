"""From the bytes of one picture to a `Sample`: robust decoding, and the part that every listed source shares.

A picture that cannot be decoded raises `UnreadablePicture`, which the loader may replace; mistakes of the user raise
`UserError`. Any input becomes 8-bit RGB:

- transparent pictures (alpha channel, transparent palette entry or colour) are composed on white;
- CMYK, grey, palette and 16-bit pictures are converted; of an animation the first frame is taken;
- EXIF orientation is NOT applied: the ImageNet pipelines that published numbers come from ignore it too;
- truncated files are errors, never half-grey pictures.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from core.errors import UserError
from core.specs import Sample

# Pillow knows formats that run other programs (EPS starts Ghostscript): only these are ever opened.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Resizing the short side of a 1 x 50000 strip to 256 would need gigabytes.
MAX_ASPECT = 100
MAX_CLASSES = 1_000_000


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


class PackedStrings:
    """A read-only list of byte strings in two arrays.

    A million Python strings would be copied into every loader worker, because reading one touches its reference count.
    """

    def __init__(self, strings: Iterable[bytes]):
        strings = list(strings)
        self.ends = np.cumsum([len(s) for s in strings], dtype=np.int64)
        self.blob = np.frombuffer(b"".join(strings), dtype=np.uint8)

    @classmethod
    def from_arrays(cls, blob: np.ndarray, ends: np.ndarray) -> PackedStrings:
        packed = cls.__new__(cls)
        packed.blob, packed.ends = blob, ends
        return packed

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index > 0 else 0
        return self.blob[start : self.ends[index]].tobytes()


def require_labels(source: object) -> None:
    """UserError where some pictures of a source have labels and others have not; where none has, there is one class."""
    if missing := getattr(source, "unlabelled", None):
        raise UserError(f"{missing} Label all of them or none: only a tokenizer trains without.")


def require_order(source: object, purpose: str) -> None:
    """UserError for a stream, whose picture number i is another one each time and on each process."""
    if hasattr(source, "inexact"):
        raise UserError(
            f"{source.name}: streamed pictures have no fixed order, so {purpose}. Copy them to a disk, and name "
            "the folder or the shards."
        )


def remarks(source: object) -> list[str]:
    """What a training of a generator should tell about the classes of its pictures, where they look like a mistake."""
    names, labels = source.class_names, getattr(source, "labels", None)
    if names == ["unlabelled"]:
        return ["the pictures have no labels: all of them are one class"]
    if labels is None:
        return []
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if not len(empty):
        return []
    asked = "; are the labels counted from 1?" if empty.tolist() == [0] else ""
    shown = ", ".join(names[i] for i in empty[:5]) + (" ..." if len(empty) > 5 else "")
    return [f"{len(empty)} of {len(names)} classes have no picture ({shown}){asked}"]


class ListedSource:
    """A data source whose samples are listed up front; subclasses implement `read`.

    Args:
        keys: one byte string per sample.
        labels: (N,) integers, or None for pictures without labels (all get label 0).
        class_names: names by label; None numbers the classes.
        sizes: (N,) bytes per picture where they are known at no cost; part of the fingerprint.
    """

    def __init__(
        self,
        keys: PackedStrings,
        labels: np.ndarray | None,
        class_names: list[str] | None = None,
        sizes: np.ndarray | None = None,
    ):
        self.packed_keys, self.sizes = keys, sizes
        self.labels = np.zeros(len(keys), dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
        if class_names is None:
            class_names = ["unlabelled"] if labels is None else [str(i) for i in range(int(self.labels.max()) + 1)]
        self.class_names, self.num_classes = class_names, len(class_names)
        if self.labels.max() >= self.num_classes:
            raise UserError(
                f"label {self.labels.max()} of {self.key(int(self.labels.argmax()))} has no name: "
                f"{self.num_classes} classes are listed. Complete the file of class names."
            )
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.packed_keys)

    def key(self, index: int) -> str:
        """Name of a sample, safe to print."""
        return self.packed_keys[index].decode("utf-8", "replace")

    def read(self, index: int) -> bytes:
        """The undecoded picture. OSError if it cannot be read."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = self.key(index)
        try:
            data = self.read(index)
        except OSError as error:
            raise UnreadablePicture(key, error.strerror or str(error)) from error
        return Sample(decode_rgb(data, key), int(self.labels[index]), key)

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            sizes = np.zeros(0, dtype=np.int64) if self.sizes is None else self.sizes
            for part in (self.packed_keys.blob, self.packed_keys.ends, self.labels, sizes):
                digest.update(f"{part.nbytes};".encode())
                digest.update(np.ascontiguousarray(part).data)
            digest.update("\n".join(self.class_names).encode("utf-8", "replace"))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


class FileSource(ListedSource):
    """Pictures in single files below `root`; keys are their paths relative to it."""

    def __init__(
        self,
        root: Path,
        keys: PackedStrings,
        labels: np.ndarray | None,
        class_names: list[str] | None = None,
        sizes: np.ndarray | None = None,
    ):
        super().__init__(keys, labels, class_names, sizes)
        self.root = root

    def read(self, index: int) -> bytes:
        return (self.root / os.fsdecode(self.packed_keys[index])).read_bytes()


def read_class_names(path: str | Path) -> list[str]:
    """Class names, one per line."""
    path = Path(path).expanduser()
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"class names {path} cannot be read ({error}). Give a text file with one name per line."
        ) from error
    while names and not names[-1].strip():
        names.pop()
    if not names:
        raise UserError(f"class names {path} is empty. Give a text file with one name per line.")
    return names
