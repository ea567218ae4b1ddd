"""From what a user names to a set of pictures to evaluate: an .npz, a folder of pictures, or any data URL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from core.errors import UserError
from core.rng import hash64
from core.specs import DataSource
from data.base import UnreadablePicture, require_order
from data.loader import listed_batches
from data.sources import loose_pictures, open_source
from data.transforms import Transform, to_tensor
from evaluation.pictures import NpzPictures, Pictures

THREADS = 8


class SourcePictures:
    """Pictures of a data source, cropped as ADM does, decoded ahead by worker processes.

    Args:
        image_size: side of the crop.
        workers: processes; they read ahead once `expect` says what comes.
        rows: which pictures, None for all.
    """

    def __init__(
        self,
        source: DataSource,
        image_size: int,
        workers: int = 0,
        rows: Sequence[int] | None = None,
        name: str = "pictures",
    ):
        require_order(source, "no number measured on them could be had again")
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
        return listed_batches(self.source, self.transform, wanted, workers)

    def labelled(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(pictures, labels)"""
        if self._expected and self._expected[0] == range(start, stop):
            self._expected.pop(0)
            batch = next(self._ahead)
        else:
            batch = next(self._batches([range(start, stop)], 0))
        return batch.images, batch.labels

    def read(self, start: int, stop: int) -> Tensor:
        return self.labelled(start, stop)[0]

    def fingerprint(self) -> str:
        rows = "" if isinstance(self.rows, range) and len(self.rows) == len(self.source) else str(list(self.rows))
        return f"{hash64(self.source.fingerprint(), repr(self.transform.describe()), rows):016x}"


class FolderPictures:
    """Pictures as they are: all of one size. Grey, CMYK, 16-bit and transparent ones become RGB (data/base.py)."""

    def __init__(self, source: DataSource, name: str):
        require_order(source, "no number measured on them could be had again")
        self.source, self.name = source, name
        self.pool = ThreadPoolExecutor(THREADS)
        self.size = tuple(self._read(0).shape[1:])

    def __len__(self) -> int:
        return len(self.source)

    def _read(self, index: int) -> Tensor:
        try:
            return to_tensor(self.source[index].image)
        except UnreadablePicture as error:
            raise UserError(
                f"{self.name}: {error.key} cannot be read ({error.reason}). Repair or remove it."
            ) from error

    def read(self, start: int, stop: int) -> Tensor:
        images = list(self.pool.map(self._read, range(start, stop)))
        for index, image in enumerate(images, start):
            if tuple(image.shape[1:]) != self.size:
                found, expected = ("x".join(map(str, s)) for s in (image.shape[1:], self.size))
                raise UserError(
                    f"{self.name}: {self.source[index].key} is {found}, the first picture is {expected}. Make them "
                    "equal first; run_eval_tokenizer.sh --original and run_make_reference.sh crop them with --size N."
                )
        return torch.stack(images)

    def expect(self, ranges: list[range]) -> None:
        """Threads decode what is read."""

    def fingerprint(self) -> str:
        return self.source.fingerprint()


def open_any(reference: str, size: int | None = None, workers: int = 0, split: str = "val") -> Pictures:
    """Pictures to evaluate.

    Args:
        reference: .npz with arr_0, a folder of pictures (directly inside, or one folder per class), or a data URL.
        size: crop to this side; None takes pictures as they are.
        split: of sources that have several.
    """
    path = Path(reference).expanduser()
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
    # samples may have folders beside them (previews); a data URL goes by its class folders
    loose = loose_pictures(path) if path.is_dir() else None
    source = loose or open_source(reference, split)
    return FolderPictures(source, reference) if size is None else SourcePictures(source, size, workers, name=reference)


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


def first(pictures: Pictures, count: int | None) -> Pictures:
    """The first `count` pictures of a set; all of them where that is 0, None or no fewer."""
    return pictures if not count or count >= len(pictures) else First(pictures, count)


class First:
    """The first `count` pictures of a set."""

    def __init__(self, pictures: Pictures, count: int):
        self.pictures, self.count, self.name, self.size = pictures, count, pictures.name, pictures.size
        self.source = getattr(pictures, "source", None)

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Tensor:
        return self.pictures.read(start, stop)

    def expect(self, ranges: list[range]) -> None:
        self.pictures.expect(ranges)

    def fingerprint(self) -> str:
        return f"{self.pictures.fingerprint()}-{self.count}"
