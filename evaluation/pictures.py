"""Sets of uint8 pictures with random access: .npz files of ADM's evaluator and arrays in memory.

All answer `len(set)` and `set.read(start, stop)` -> (n, 3, H, W) uint8, so a long evaluation can be cut into pieces,
shared between ranks and continued. An .npz is mapped from disk, whatever its size; nothing in it is ever unpickled.
Folders of pictures become such a set in evaluation/picture_sets.py, through the decoder of the data package.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from core.arrays import NpzFile
from core.errors import UserError
from core.files import sha256_file


class Pictures(Protocol):
    """What every set of pictures offers."""

    name: str  # for messages and records

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """Pictures start ... stop - 1, (n, 3, H, W) uint8."""

    def expect(self, ranges: list[range]) -> None:
        """What will be read, in this order: a set that decodes may start at once."""

    def fingerprint(self) -> str:
        """Changes when the pictures change."""


def check_pictures(pictures: np.ndarray, name: str) -> None:
    """UserError unless it is (N, H, W, 3) uint8."""
    shape = " x ".join(map(str, pictures.shape))
    if pictures.ndim != 4 or pictures.shape[3] != 3:
        shape = shape or "a single number"
        raise UserError(f"{name}: pictures must be an array of N x H x W x 3, this one is {shape}.")
    if pictures.dtype != np.uint8:
        raise UserError(
            f"{name}: pictures must be uint8 (0 to 255), these are {pictures.dtype}. Convert them "
            "knowingly, with core.images.to_uint8, and write the file again."
        )
    if len(pictures) == 0:
        raise UserError(f"{name} holds no pictures.")


class ArrayPictures:
    """Pictures in memory.

    Args:
        pictures: (N, 3, H, W) uint8 tensor, or (N, H, W, 3) uint8 array.
    """

    def __init__(self, pictures: Tensor | np.ndarray, name: str = "array"):
        if isinstance(pictures, Tensor):
            pictures = pictures.permute(0, 2, 3, 1).cpu().numpy() if pictures.ndim == 4 else pictures.cpu().numpy()
        check_pictures(pictures, name)
        self.pictures, self.name = pictures, name

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)"""
        return self.pictures.shape[1:3]

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, start: int, stop: int) -> Tensor:
        piece = np.ascontiguousarray(self.pictures[start:stop].transpose(0, 3, 1, 2))
        return torch.from_numpy(piece)

    def expect(self, ranges: list[range]) -> None:
        """Nothing is decoded here."""

    def fingerprint(self) -> str:
        return f"{zlib.crc32(np.ascontiguousarray(self.pictures).data):08x}-{len(self)}"


class NpzPictures(ArrayPictures):
    """`arr_0` of an .npz file, mapped from disk."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with NpzFile(self.path) as file:
            if "arr_0" not in file.names:
                held = ", ".join(file.names) or "nothing"
                raise UserError(f'{path} has no pictures: an array "arr_0" was expected, it holds {held}.')
            super().__init__(file.map("arr_0"), str(path))

    def fingerprint(self) -> str:
        return sha256_file(self.path)[:16]
