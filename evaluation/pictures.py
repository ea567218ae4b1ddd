"""Sets of uint8 pictures with random access: .npz files of ADM's evaluator and arrays in memory.

All answer `len(set)` and `set.read(start, stop)` -> (n, 3, H, W) uint8, so a long evaluation can be cut into pieces,
shared between ranks and continued. An .npz is mapped from disk, whatever its size; nothing in it is ever unpickled.
Folders of pictures become such a set in scripts/picture_sets.py, through the decoder of the data package.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from core.errors import UserError
from core.files import explain_os_errors, sha256_file


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
        raise UserError(f"{name}: pictures must be uint8 (0 to 255), these are {pictures.dtype}. Convert them "
                        "knowingly, with core.images.to_uint8, and write the file again.")
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


class NpzFile:
    """An .npz file whose arrays are read one at a time: mapped where they lie uncompressed, else loaded.

    Use as a context manager. Arrays of Python objects are refused, since reading those runs code.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with explain_os_errors(self.path):
            try:
                self.zip = zipfile.ZipFile(self.path)
            except zipfile.BadZipFile as error:
                raise self._damaged(error) from error
        self.names = [name.removesuffix(".npy") for name in self.zip.namelist() if name.endswith(".npy")]

    def __enter__(self) -> "NpzFile":
        return self

    def __exit__(self, *_) -> None:
        self.zip.close()

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: not a whole .npz file ({error}). Copy or download it again.")

    def load(self, name: str) -> np.ndarray:
        """A copy in memory."""
        try:
            with self.zip.open(f"{name}.npy") as member:
                return npy.read_array(member, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            if "pickle" in str(error) or "Object" in str(error):
                raise UserError(f"{self.path}: {name} holds Python objects; reading them would run code. "
                                "Save it as a plain array.") from error
            raise self._damaged(error) from error

    def map(self, name: str) -> np.ndarray:
        """Read-only and mapped from disk if the array lies there as numpy needs it, else loaded whole."""
        info = self.zip.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return self.load(name)
        with explain_os_errors(self.path), open(self.path, "rb") as file:
            file.seek(info.header_offset)
            local = file.read(30)  # the local header may be longer than the central one
            if len(local) < 30:
                raise self._damaged(EOFError("it ends early"))
            name_length, extra_length = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
            file.seek(info.header_offset + 30 + name_length + extra_length)
            try:
                version = npy.read_magic(file)
                readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
                if version not in readers:
                    return self.load(name)
                shape, fortran, dtype = readers[version](file)
            except ValueError as error:
                raise self._damaged(error) from error
            offset = file.tell()
        if fortran or dtype.hasobject or 0 in shape:
            return self.load(name)
        if offset + int(np.prod(shape)) * dtype.itemsize > self.path.stat().st_size:
            raise self._damaged(EOFError(f"{name} ends early"))
        return np.memmap(self.path, dtype, "r", offset, shape)
