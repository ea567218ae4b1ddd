"""Writes generated pictures while the next ones are sampled: PNG files by several threads, or one .npz with `arr_0`.

Pictures carry their index, so any rank may write any of them in any order, and a continued job writes what is missing.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from torch import Tensor

from core.errors import UserError
from core.files import explain_os_errors, fsync_file, require_space
from core.images import save_png


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
        needed = int(np.prod(self.shape))
        with explain_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.fresh = not self.partial.exists()
            if self.fresh:
                require_space(self.path.parent, 2 * needed)
                temporary = self.partial.with_name(f".{self.partial.name}.{os.getpid()}.tmp")
                np.lib.format.open_memmap(temporary, "w+", np.uint8, self.shape).flush()
                try:
                    os.link(temporary, self.partial)  # the first rank to come makes it
                except FileExistsError:
                    pass
                temporary.unlink()
            self.rows = npy.open_memmap(self.partial, "r+")
        if self.rows.shape != self.shape:
            raise UserError(f"{self.partial} was begun for {self.rows.shape} pictures, now {self.shape}. Delete it.")

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
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with explain_os_errors(self.path):
            try:
                with (
                    zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
                    open(self.partial, "rb") as source,
                    archive.open("arr_0.npy", "w", force_zip64=True) as member,
                ):
                    shutil.copyfileobj(source, member, 1 << 22)
                fsync_file(temporary)
                os.replace(temporary, self.path)
            finally:
                temporary.unlink(missing_ok=True)
            self.partial.unlink(missing_ok=True)

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(self, *_) -> None:
        self.flush()
        del self.rows
