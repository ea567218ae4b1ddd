"""Reading .npy and .npz files of others: nothing in them is unpickled, and no header makes us allocate what is not there.

A header is text that anybody may have written. Each array is read only after its shape and type were found to fit into
the bytes that the file has for it; everything that is wrong with a file is one sentence.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from core.errors import UserError
from core.files import explain_os_errors, refuse_text

_MAX_DEFLATED = 1100  # bytes that one byte of a zip file can stand for: 1032, and a little for short members
Header = tuple[tuple[int, ...], bool, np.dtype, int]  # shape, Fortran order, type, bytes before the data


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Garbage makes zipfile and numpy fail in any way; whatever it is, the file is at fault."""
    try:
        with explain_os_errors(path):
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: not a whole {path.suffix or 'numpy'} file ({str(error)[:120] or type(error).__name__}). "
            "Copy or download it again."
        ) from error


def _read_header(file: IO[bytes], path: Path, name: str, size: int) -> Header:
    """Of an array that starts at the position of `file` and has `size` bytes with its header."""
    first = file.tell()
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0  # 3.0 is 2.0 in UTF-8
    shape, fortran, dtype = read(file)
    start = file.tell() - first
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects; reading them would run code. Save it as a plain array.")
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize > size - start:
        raise ValueError(f"{name} of shape {shape} does not fit into its {size} bytes")
    return shape, fortran, dtype, start


def read_npy(path: str | Path) -> np.ndarray:
    """The array of a .npy file. UserError for files that are damaged or hold objects."""
    path = Path(path)
    refuse_text(path)
    with _naming_damage(path), open(path, "rb") as file:
        _read_header(file, path, "the array", path.stat().st_size)
        file.seek(0)
        return npy.read_array(file, allow_pickle=False)


class NpzFile:
    """An .npz file whose arrays are read one at a time: mapped where they lie uncompressed, else loaded.

    Use as a context manager. `names` are those of its arrays. UserError for files that are damaged or hold objects.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        refuse_text(self.path)
        with _naming_damage(self.path):
            self.zip = zipfile.ZipFile(self.path)
        self.names = [name.removesuffix(".npy") for name in self.zip.namelist() if name.endswith(".npy")]

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, *_) -> None:
        self.zip.close()

    def _header(self, name: str) -> Header:
        if name not in self.names:
            raise UserError(f"{self.path} has no array {name}; it holds {', '.join(self.names) or 'none'}.")
        info = self.zip.getinfo(f"{name}.npy")
        with _naming_damage(self.path), self.zip.open(info) as member:
            if info.file_size > info.compress_size * _MAX_DEFLATED:
                raise ValueError(f"{name} claims {info.file_size} bytes and has {info.compress_size}")
            return _read_header(member, self.path, name, info.file_size)

    def load(self, name: str) -> np.ndarray:
        """A copy in memory."""
        self._header(name)
        with _naming_damage(self.path), self.zip.open(f"{name}.npy") as member:
            return npy.read_array(member, allow_pickle=False)

    def map(self, name: str) -> np.ndarray:
        """Read-only and mapped from disk if the array lies there as numpy needs it, else loaded whole."""
        shape, fortran, dtype, start = self._header(name)
        info = self.zip.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED or fortran or 0 in shape:
            return self.load(name)
        with _naming_damage(self.path), open(self.path, "rb") as file:
            file.seek(info.header_offset + 26)  # the local header may be longer than the central one
            lengths = file.read(4)
            offset = info.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2)) + start
            return np.memmap(self.path, dtype, "r", offset, shape)
