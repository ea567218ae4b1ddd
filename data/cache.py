"""Tensors computed once from every view of every picture, kept in memory-mapped files: teacher features and latents.

A cache is a folder: one `<name>.npy` of shape (samples, views, ...) per tensor, `labels.npy` and `description.json`.
The description says what the cache was made from (source, transform, producer); opening it for anything else is
refused with a list of what differs. It is built under a temporary name and renamed when complete.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.specs import DataSource
from data.loader import ordered_batches, part
from data.transforms import Transform

FORMAT = 1
Producer = Callable[[Tensor], dict[str, Tensor]]


class FeatureCache:
    """A finished cache.

    Args:
        path: its folder.
        source, transform, fingerprint: what it must have been made from; None leaves that unchecked.
    """

    def __init__(self, path: str | Path, source: DataSource | None = None, transform: Transform | None = None,
                 fingerprint: str | None = None):
        self.path = Path(path)
        try:
            self.description = json.loads((self.path / "description.json").read_text())
            if (found := self.description["format"]) != FORMAT:
                raise UserError(f"{path} has cache format {found}, this code reads {FORMAT}. Build it again.")
            self.samples, self.views = self.description["samples"], self.description["views"]
            self.arrays: dict[str, dict] = self.description["arrays"]
            self.source_fingerprint: str = self.description["source"]
            self._labels = np.load(self.path / "labels.npy", allow_pickle=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a complete cache ({type(error).__name__}: {error}). "
                            "Delete it and build it again.") from error
        self._maps: dict[str, np.ndarray] = {}
        self.check(source, transform, fingerprint)
        for name in self.arrays:
            self._map(name)

    def __len__(self) -> int:
        return self.samples

    def check(self, source: DataSource | None = None, transform: Transform | None = None,
              fingerprint: str | None = None) -> None:
        """UserError with every difference to what is given; None is not compared."""
        found = self.description
        wrong = []
        if source is not None and found["source"] != source.fingerprint():
            wrong.append(f"the list of pictures ({found['samples']} in the cache, {len(source)} now)")
        if transform is not None:
            now = transform.describe()
            wrong += [f"{k} ({found['transform'].get(k)} in the cache, {v} now)" for k, v in now.items()
                      if found["transform"].get(k) != v]
        if fingerprint is not None and found["producer"] != fingerprint:
            wrong.append(f"what made it ({found['producer']} in the cache, {fingerprint} now)")
        if wrong:
            raise UserError(f"cache {self.path} was made from something else: {'; '.join(wrong)}. "
                            "Delete the folder or choose another, and build it again.")

    def _map(self, name: str) -> np.ndarray:
        """The memory map of one array, opened once per process."""
        if name not in self._maps:
            path = self.path / f"{name}.npy"
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read ({error}). Delete {self.path} and build it again.") from error
            if list(array.shape) != [self.samples, self.views, *self.arrays[name]["shape"]]:
                raise UserError(f"{path} has shape {array.shape}, not what its description says. Build it again.")
            self._maps[name] = array
        return self._maps[name]

    def __getstate__(self) -> dict:
        """A memory map would be pickled with all of its contents."""
        return {**self.__dict__, "_maps": {}}

    def get(self, indices: Sequence[int], views: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of (index, view) pairs, name -> (B, ...). Floats come in their stored type, integers as int64."""
        result = {}
        for name in self.arrays:
            values = self._map(name)[np.asarray(indices), np.asarray(views)]
            result[name] = torch.from_numpy(values if values.dtype.kind == "f" else values.astype(np.int64))
        return result

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        """(B,) int64."""
        return torch.from_numpy(self._labels[np.asarray(indices)].astype(np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------
def _storage_type(tensor: Tensor, wanted: str | None) -> np.dtype:
    """How a tensor is stored unless told: floats as they are (bf16 as fp32, which numpy lacks), integers as int32."""
    if wanted is not None:
        return np.dtype(wanted)
    if tensor.is_floating_point():
        return np.dtype("float16" if tensor.dtype == torch.float16 else "float32")
    return np.dtype("int32")


def _convert(name: str, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """The tensor in its storage type; UserError if values do not fit."""
    tensor = tensor.detach().cpu()
    values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            stored = values.astype(dtype)
        fits = np.isfinite(stored).all()
    else:
        limits = np.iinfo(dtype)
        stored = values.astype(dtype)
        fits = values.min() >= limits.min and values.max() <= limits.max
    if not fits:
        wider = "float32" if dtype.kind == "f" else "int32"
        raise UserError(f"cache array {name}: values from {values.min()} to {values.max()} do not fit {dtype}. "
                        f"Store it as {wider}, or check the network that made it.")
    return stored


class _Writer:
    """The arrays of a cache under construction. `create` on one rank, then every rank writes its own rows.

    Rows go through ordinary writes, not a memory map: a full disk is then an error and not a bus error, and ranks on
    several machines do not write each other's pages back.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def create(self, samples: int, arrays: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        needed = samples * sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in arrays.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(f"the cache needs {needed / 1e9:.1f} GB in {self.folder.parent}, "
                            f"where {free / 1e9:.1f} GB are free. Make room or choose another folder.")
        for name, (shape, dtype) in arrays.items():
            np.lib.format.open_memmap(self._file(name), mode="w+", dtype=dtype, shape=(samples, *shape)).flush()

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        target = np.load(self._file(name), mmap_mode="r")
        if rows.dtype != target.dtype or rows.shape[1:] != target.shape[1:]:
            raise ValueError(f"{name}: rows {rows.dtype} {rows.shape[1:]}, file {target.dtype} {target.shape[1:]}")
        with open(self._file(name), "r+b") as file:
            file.seek(target.offset + start * rows[0].nbytes)
            file.write(np.ascontiguousarray(rows).data)


def _claim(folder: Path) -> None:
    """Make the temporary folder, removing what a killed build left. A build that is still alive here is respected."""
    owner = folder / "owner"
    try:
        host, pid = owner.read_text().split()
        if host == os.uname().nodename and int(pid) != os.getpid():
            os.kill(int(pid), 0)
            raise UserError(f"{folder} is being built by process {pid}. Wait for it, or delete the folder.")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        pass  # no folder, no owner, or a dead one
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    owner.write_text(f"{os.uname().nodename} {os.getpid()}")


def build(path: str | Path, source: DataSource, transform: Transform, producer: Producer, fingerprint: str,
          batch: int = 64, progress: Callable[[int, int], None] | None = None, storage: dict[str, str] | None = None,
          rank: int = 0, world: int = 1, barrier: Callable[[], None] | None = None, workers: int = 0,
          on_corrupt: str = "replace") -> FeatureCache:
    """Make a cache, or open the one at `path` if it was made from the same things.

    Args:
        path: folder of the cache.
        transform: must have views ("center", "ten").
        producer: (B, 3, H, W) uint8 images on the CPU -> name -> (B, ...).
        fingerprint: names the producer and its weights.
        batch: pictures per call of the producer (all views of a picture go together).
        progress: called with (pictures done, pictures in all) of this rank.
        storage: name -> numpy type ("float16", "uint16" ...); see `_storage_type` for the rest.
        rank, world, barrier: every rank computes a contiguous part; `barrier` waits for all of them.
    """
    path = Path(path)
    if path.exists():
        return FeatureCache(path, source, transform, fingerprint)
    barrier = barrier or (lambda: None)
    transform.view_of((0, 0))  # refuses transforms without views
    views, samples, storage = transform.views, len(source), storage or {}
    folder = path.with_name(f".{path.name}.building")
    mine = part(samples, rank, world)
    batches = ordered_batches(source, transform, batch, rank, world, workers, on_corrupt, all_views=True)
    writer, done, arrays, created = _Writer(folder), 0, {}, False
    try:
        if rank == 0:
            _claim(folder)
            created = True
        for images in batches:
            outputs = producer(images.images)
            count = len(images) // views
            rows = {}
            for name, tensor in outputs.items():
                dtype = _storage_type(tensor, storage.get(name))
                rows[name] = _convert(name, tensor, dtype).reshape(count, views, *tensor.shape[1:])
            if not arrays:  # the first batch tells the shapes
                arrays = {name: (value.shape[1:], value.dtype) for name, value in rows.items()}
                if rank == 0:
                    writer.create(samples, {**arrays, "labels": ((), np.dtype(np.int64))})
                barrier()
            for name, value in rows.items():
                writer.write(name, mine.start + done, value)
            writer.write("labels", mine.start + done, images.labels[::views].numpy())
            done += count
            if progress:
                progress(done, len(mine))
        if not len(mine):
            barrier()  # the one that waits for the files, which this rank has nothing to write to
        barrier()
        if rank == 0:
            listed = {name: {"shape": list(shape[1:]), "dtype": dtype.name} for name, (shape, dtype) in arrays.items()}
            _finish(folder, path, {"format": FORMAT, "samples": samples, "views": views, "arrays": listed,
                                   "source": source.fingerprint(), "transform": transform.describe(),
                                   "producer": fingerprint})
        barrier()
    except BaseException:
        if created:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return FeatureCache(path, source, transform, fingerprint)


def _finish(folder: Path, path: Path, description: dict[str, Any]) -> None:
    """Write the description last, make everything durable, and give the folder its name."""
    (folder / "description.json").write_text(json.dumps(description, indent=2))
    (folder / "owner").unlink()
    for file in folder.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    os.rename(folder, path)
