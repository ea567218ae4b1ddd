"""Sets of uint8 pictures with random access: .npz files of ADM's evaluator, arrays in memory, folders and data sources;
and what writes pictures.

All sets answer `len(set)` and `set.read(start, stop)` -> (n, 3, H, W) uint8, so a long evaluation can be cut into
pieces, shared between ranks and continued. An .npz is mapped from disk, whatever its size; nothing in it is ever
unpickled. `open_any` makes a set of whatever a user names.

Writers store pictures while the next ones are sampled: PNG files by several threads, or one .npz with `arr_0`. Pictures
carry their index, so any rank may write any of them in any order, and a continued job writes what is missing.
"""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from core.arrays import NpzFile
from core.chunks import shared_array
from core.errors import UserError
from core.files import expanded, explain_os_errors, replacing, require_space, sha256_file
from core.images import save_png
from core.rng import hash64
from core.specs import DataSource
from data.base import LeftOut
from data.checks import require_order
from data.decode import UnreadablePicture
from data.loader import listed_batches
from data.sources import loose_pictures, open_source
from data.transforms import Transform, to_tensor


class Pictures(ABC):
    """What every set of pictures offers."""

    name: str  # for messages and records
    size: tuple[int, int]  # (H, W)
    source: DataSource | None = None  # where the pictures are from, if that lists their classes
    rows: Sequence[int] | None = None  # which of the source's, in this order; None: all

    @abstractmethod
    def __len__(self) -> int:
        """How many."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Pictures start ... stop - 1, (n, 3, H, W) uint8."""

    def expect(self, ranges: list[range]) -> None:
        """What will be read, in this order: a set that decodes may start at once."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the list of pictures changes, or the array that holds them."""

    def labels(self) -> Tensor | None:
        """(N,) int64 classes, where there are several and they are known without reading a picture."""
        if self.source is None or self.source.labels is None or self.source.num_classes < 2:
            return None
        labels = torch.from_numpy(self.source.labels.astype(np.int64))
        return labels if self.rows is None else labels[list(self.rows)]

    def file_sizes(self) -> str | None:
        """DataSource.file_sizes, where pictures are files of a source."""
        return self.source.file_sizes() if self.source is not None else None


def in_short(names: Sequence[str], most: int = 8) -> str:
    """ "a, b, c and 200 more", for messages."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def pieces(indices: range) -> list[range]:
    """`indices` in parts that fit into memory as pictures."""
    return [range(i, min(i + READ, indices.stop)) for i in range(indices.start, indices.stop, READ)]


def check_pictures(pictures: np.ndarray, name: str) -> None:
    """UserError unless it is (N, H, W, 3) uint8."""
    shape = " x ".join(map(str, pictures.shape))
    if pictures.ndim != 4 or pictures.shape[3] != 3:
        channels_first = pictures.ndim == 4 and pictures.shape[1] == 3
        advice = " Its channels come first: write pictures.transpose(0, 2, 3, 1)." if channels_first else ""
        shape = shape or "a single number"
        raise UserError(f"{name}: pictures must be an array of N x H x W x 3, this one is {shape}.{advice}")
    if pictures.dtype != np.uint8:
        raise UserError(
            f"{name}: pictures must be uint8 (0 to 255), these are {pictures.dtype}. Convert them "
            "knowingly, with core.images.to_uint8, and write the file again."
        )
    if len(pictures) == 0:
        raise UserError(f"{name} holds no pictures.")


class ArrayPictures(Pictures):
    """Pictures in memory.

    Args:
        pictures: (N, 3, H, W) uint8 tensor, or (N, H, W, 3) uint8 array.
    """

    def __init__(self, pictures: Tensor | np.ndarray, name: str = "array"):
        if isinstance(pictures, Tensor):
            pictures = pictures.permute(0, 2, 3, 1).cpu().numpy() if pictures.ndim == 4 else pictures.cpu().numpy()
        check_pictures(pictures, name)
        self.pictures, self.name, self.size = pictures, name, pictures.shape[1:3]

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, start: int, stop: int) -> Tensor:
        piece = np.ascontiguousarray(self.pictures[start:stop].transpose(0, 3, 1, 2))
        return torch.from_numpy(piece)

    def fingerprint(self) -> str:
        return f"{zlib.crc32(np.ascontiguousarray(self.pictures).data):08x}-{len(self)}"


class NpzPictures(ArrayPictures):
    """`arr_0` of an .npz file, mapped from disk."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with NpzFile(self.path) as file:
            if "arr_0" not in file.names:
                held = in_short(file.names) or "nothing"
                raise UserError(f'{path} has no pictures: an array "arr_0" was expected, it holds {held}.')
            super().__init__(file.map("arr_0"), str(path))
            # ADM's programs put the classes beside the pictures
            classes = file.load("arr_1") if "arr_1" in file.names else None
        fits = classes is not None and classes.dtype.kind in "iu" and classes.shape == (len(self),)
        self.classes = torch.from_numpy(classes.astype(np.int64)) if fits else None

    def labels(self) -> Tensor | None:
        return self.classes

    def fingerprint(self) -> str:
        return sha256_file(self.path)[:16]


# ---------------------------------------------------------------------------------------------------------------------
# From what a user names
# ---------------------------------------------------------------------------------------------------------------------

THREADS = 8
READ = 256  # pictures of a source decoded at a time


class SourcePictures(Pictures):
    """Pictures of a data source, cropped as ADM does, decoded ahead by worker processes.

    Args:
        image_size: side of the crop.
        workers: processes; they read ahead once `expect` says what comes.
        rows: which pictures, None for all.
        on_corrupt: of pictures that cannot be read: "raise", or "replace" by the next ones, as a training does; each is told.
    """

    source: DataSource

    def __init__(
        self,
        source: DataSource,
        image_size: int,
        workers: int = 0,
        rows: Sequence[int] | None = None,
        name: str = "pictures",
        on_corrupt: str = "raise",
    ):
        require_order(source, "no number measured on them could be had again")
        self.on_corrupt, self._replaced = on_corrupt, set[str]()
        self.source, self.transform, self.workers, self.name = source, Transform(image_size=image_size), workers, name
        self.rows = range(len(source)) if rows is None else rows
        self.size = (image_size, image_size)
        self._ahead: Iterator | None = None
        self._expected: list[range] = []

    def __len__(self) -> int:
        return len(self.rows)

    def expect(self, ranges: list[range]) -> None:
        """Start reading these, of whatever lengths, in this order."""
        if self.workers and ranges:
            self._expected = list(ranges)
            self._ahead = self._batches(self._expected.copy(), self.workers)

    def _batches(self, ranges: list[range], workers: int) -> Iterator:
        wanted = ([self.rows[i] for i in indices] for indices in ranges)
        return listed_batches(self.source, self.transform, wanted, workers, self.on_corrupt)

    def labelled(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(pictures, labels)"""
        if self._expected and self._expected[0] == range(start, stop):
            self._expected.pop(0)
            batch = next(self._ahead)
        else:
            batch = next(self._batches([range(start, stop)], 0))
        for key in batch.replaced.keys() - self._replaced:
            print(
                f"warning: {key} of the {self.name} cannot be read and is replaced ({batch.replaced[key]})", flush=True
            )
            self._replaced.add(key)
        return batch.images, batch.labels

    def read(self, start: int, stop: int) -> Tensor:
        return self.labelled(start, stop)[0]

    def fingerprint(self) -> str:
        rows = "" if isinstance(self.rows, range) and len(self.rows) == len(self.source) else str(list(self.rows))
        return f"{hash64(self.source.fingerprint(), repr(self.transform.describe()), rows):016x}"


class FolderPictures(Pictures):
    """Pictures as they are: all of one size. Grey, CMYK, 16-bit and transparent ones become RGB (data/decode.py)."""

    def __init__(self, source: DataSource, name: str):
        require_order(source, "no number measured on them could be had again")
        self.source, self.name, self.rows = source, name, range(len(source))
        self.pool = ThreadPoolExecutor(THREADS)
        self.size = tuple(self._read(0).shape[1:])

    def __len__(self) -> int:
        return len(self.source)

    def _read(self, index: int) -> Tensor:
        try:
            return to_tensor(self.source[self.rows[index]].image)
        except UnreadablePicture as error:
            raise UserError(
                f"{self.name}: {error.key} cannot be read ({error.reason}). Repair or remove it."
            ) from error

    def read(self, start: int, stop: int) -> Tensor:
        images = list(self.pool.map(self._read, range(start, stop)))
        for index, image in enumerate(images, start):
            if tuple(image.shape[1:]) != self.size:
                shape, expected = ("x".join(map(str, s)) for s in (image.shape[1:], self.size))
                raise UserError(
                    f"{self.name}: {self.source[self.rows[index]].key} is {shape}, the first picture is {expected}. Make them "
                    "equal first; run_eval_tokenizer.sh --original and run_make_reference.sh crop them with --size N."
                )
        return torch.stack(images)

    def fingerprint(self) -> str:
        if isinstance(self.rows, range):
            return self.source.fingerprint()
        return f"{hash64(self.source.fingerprint(), str(list(self.rows))):016x}"


def open_any(reference: str, size: int | None = None, workers: int = 0, split: str = "val") -> Pictures:
    """Pictures to evaluate.

    Args:
        reference: .npz with arr_0, a folder of pictures (directly inside, or one folder per class), or a data URL.
        size: crop to this side; None takes pictures as they are.
        split: of sources that have several.
    """
    path = expanded(reference)
    if reference.endswith(".npz"):
        pictures = NpzPictures(path)
        if size is not None and pictures.size != (size, size):
            raise UserError(
                f"{reference} holds pictures of {pictures.size[0]} x {pictures.size[1]}; {size} x {size} was asked for."
            )
        return pictures
    if "://" not in reference and not path.exists():
        raise UserError(
            f"{reference}: no such file or folder. Give an .npz, a folder of pictures or a URL such as "
            "folder://data/imagenet/val."
        )
    if path.is_file() and path.suffix not in (".tar", ".txt"):
        raise UserError(
            f"{reference}: pictures are read from an .npz (np.savez(OUT, arr_0=pictures)), a folder, a .tar or a .txt list."
        )
    source = _beside_no_classes(path) or open_source(reference, split)
    return FolderPictures(source, reference) if size is None else SourcePictures(source, size, workers, name=reference)


def _beside_no_classes(path: Path) -> DataSource | None:
    """The pictures directly in a folder, whatever folders are beside them (previews); a data URL goes by its classes."""
    left_out = LeftOut()
    loose = loose_pictures(path, left_out) if path.is_dir() else None
    if loose is not None and not (path / "sample.json").is_file():
        for folder in sorted(entry.name for entry in path.iterdir() if entry.is_dir()):
            left_out.add("folder(s) beside the pictures", folder)
        loose.left_out = left_out.describe()
    return loose


def same_pictures(first: Pictures, second: Pictures) -> None:
    """UserError unless both have as many pictures of the same size."""
    if len(first) != len(second):
        raise UserError(
            f"{first.name} has {len(first)} pictures and {second.name} has {len(second)}: each reconstruction "
            "needs its original, in the same order."
        )
    if first.size != second.size:
        raise UserError(
            f"{first.name} has pictures of {first.size[0]} x {first.size[1]}, {second.name} of "
            f"{second.size[0]} x {second.size[1]}. Give --size N to crop both as ADM does."
        )


def first_pictures(pictures: Pictures, count: int | None) -> Pictures:
    """The first `count` pictures of a set; all of them where that is 0, None or no fewer."""
    return pictures if not count or count >= len(pictures) else First(pictures, count)


class First(Pictures):
    """The first `count` pictures of a set."""

    def __init__(self, pictures: Pictures, count: int):
        self.pictures, self.count, self.name, self.size = pictures, count, pictures.name, pictures.size
        self.source = pictures.source

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Tensor:
        return self.pictures.read(start, stop)

    def expect(self, ranges: list[range]) -> None:
        self.pictures.expect(ranges)

    def labels(self) -> Tensor | None:
        labels = self.pictures.labels()
        return None if labels is None else labels[: self.count]

    def fingerprint(self) -> str:
        return f"{self.pictures.fingerprint()}-{self.count}"


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class PngWriter:
    """<folder>/000000.png and so on, by `threads` threads. Use as a context manager; leaving it waits for the rest.

    Args:
        unfinished: where the pictures lie until `finish` makes the folder of it; None: in the folder from the start.
    """

    def __init__(self, folder: str | Path, threads: int = 8, unfinished: str | Path | None = None):
        self.final = Path(folder)
        self.folder = Path(unfinished or folder)
        with explain_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.pool = ThreadPoolExecutor(threads)
        self.pending: list[Future] = []

    def write(self, start: int, images: Tensor) -> None:
        """Queue (B, 3, H, W) uint8 pictures with the indices start, start + 1, ..."""
        images = images.cpu()
        self.pending += [
            self.pool.submit(save_png, image, self.folder / f"{start + i:06d}.png") for i, image in enumerate(images)
        ]

    def flush(self) -> None:
        """Wait until everything queued is on disk; raises what a thread met."""
        pending, self.pending = self.pending, []
        with explain_os_errors(self.folder):
            for future in pending:
                future.result()

    def has(self, indices: range) -> bool:
        """Whether an earlier part of the job wrote all of these."""
        return all((self.folder / f"{i:06d}.png").is_file() for i in indices)

    def finish(self) -> None:
        """Put the pictures where they belong; to be called once, after all ranks have flushed."""
        if self.folder != self.final:
            with explain_os_errors(self.final):
                if self.final.exists():
                    shutil.rmtree(self.final)
                os.replace(self.folder, self.final)

    def __enter__(self) -> PngWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)


class NpzWriter:
    """One .npz with `arr_0` (count, H, W, 3) uint8, as ADM's evaluator reads it.

    Every rank fills its rows of <path>.partial, a plain .npy mapped into memory; `finish`, on one rank, puts it into
    the zip piece by piece. Memory stays at one batch whatever the count.

    Args:
        unfinished: folder of the .partial file, on the same disk; None: beside the .npz.
    """

    def __init__(self, path: str | Path, count: int, size: tuple[int, int], unfinished: str | Path | None = None):
        self.path, self.shape = Path(path), (count, *size, 3)
        if self.path.suffix != ".npz":
            raise UserError(f"{path}: choose a name that ends in .npz.")
        self.partial = Path(unfinished or self.path.parent) / f"{self.path.name}.partial"
        with explain_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            if not self.partial.exists():
                require_space(self.path.parent, 2 * int(np.prod(self.shape)))
            self.fresh = shared_array(self.partial, self.shape, np.uint8)
            self.rows = npy.open_memmap(self.partial, "r+")

    def has(self, indices: range) -> bool:
        """Whether an earlier part of the job kept its rows; which of them are written, that job knows."""
        return not self.fresh

    def write(self, start: int, images: Tensor) -> None:
        """(B, 3, H, W) uint8 pictures with the indices start, start + 1, ..."""
        self.rows[start : start + len(images)] = images.permute(0, 2, 3, 1).cpu().numpy()

    def flush(self) -> None:
        self.rows.flush()

    def finish(self) -> None:
        """Make the .npz; to be called once, after all ranks have flushed."""
        with (
            replacing(self.path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
            open(self.partial, "rb") as source,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            shutil.copyfileobj(source, member, 1 << 22)
        self.partial.unlink(missing_ok=True)

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(self, *_) -> None:
        self.flush()
        del self.rows
