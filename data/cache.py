"""Tensors computed once from every view of every picture, kept in memory-mapped files: features, latents and tokens.

A cache is a folder: one `<name>.npy` of shape (samples, views, ...) per tensor, `labels.npy`, `chunks.npy` (a digest of
every CHUNK samples) and `description.json`. The description says what the cache was made from (source, transform,
producer); opening it for anything else is refused with a list of what differs.

It is built under a temporary name and renamed when complete. Chunks that are done are recorded, so a build that was
killed goes on where it stopped, on any number of ranks. Opening reads the description alone: the arrays are mapped, and
the processes of a machine share one copy of them in the page cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.files import fsync_file, require_space, write_json
from core.specs import DataSource
from data.base import require_order
from data.loader import listed_batches, part
from data.transforms import Transform

FORMAT = 2
CHUNK = 256  # samples; what a killed build computes again at most, and the unit that is spread over ranks
FLUSH_SECONDS = 10.0  # between two records of what is done
DIGEST = 16  # bytes
LABELS = "labels"
Producer = Callable[[Tensor], dict[str, Tensor]]


class FeatureCache:
    """A finished cache.

    Args:
        path: its folder.
        source, transform, fingerprint: what it must have been made from; None leaves that unchecked.
    """

    def __init__(
        self,
        path: str | Path,
        source: DataSource | None = None,
        transform: Transform | None = None,
        fingerprint: str | None = None,
    ):
        self.path = Path(path)
        try:
            self.description = json.loads((self.path / "description.json").read_text())
            if (found := self.description["format"]) != FORMAT:
                raise UserError(f"{path} has cache format {found}, this code reads {FORMAT}. Build it again.")
            self.samples, self.views = self.description["samples"], self.description["views"]
            self.arrays: dict[str, dict] = self.description["arrays"]
            self.source_fingerprint: str = self.description["source"]
            self.content: str = self.description["content"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a complete cache ({type(error).__name__}: {error}). Delete it and build it again."
            ) from error
        self._maps: dict[str, np.ndarray] = {}
        self.check(source, transform, fingerprint)
        for name in (*self.arrays, LABELS):
            self.rows(name)

    def __len__(self) -> int:
        return self.samples

    def check(
        self, source: DataSource | None = None, transform: Transform | None = None, fingerprint: str | None = None
    ) -> None:
        """UserError with every difference to what is given; None is not compared."""
        found = self.description
        wrong = []
        if source is not None and found["source"] != source.fingerprint():
            wrong.append(f"the list of pictures ({found['samples']} in the cache, {len(source)} now)")
        if transform is not None:
            now = transform.describe()
            wrong += [
                f"{k} ({found['transform'].get(k)} in the cache, {v} now)"
                for k, v in now.items()
                if found["transform"].get(k) != v
            ]
        if fingerprint is not None and found["producer"] != fingerprint:
            wrong.append(f"what made it ({found['producer']} in the cache, {fingerprint} now)")
        if wrong:
            raise UserError(
                f"cache {self.path} was made from something else: {'; '.join(wrong)}. "
                "Delete the folder or choose another, and build it again."
            )

    def rows(self, name: str) -> np.ndarray:
        """The memory map of one array, (samples, views, ...), opened once per process; "labels" is (samples,)."""
        if name not in self._maps:
            path = self.path / f"{name}.npy"
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read ({error}). Delete {self.path} and build it again.") from error
            expected = [self.samples] if name == LABELS else [self.samples, self.views, *self.arrays[name]["shape"]]
            if list(array.shape) != expected:
                raise UserError(
                    f"{path} has shape {list(array.shape)}, its description says {expected}. Build it again."
                )
            self._maps[name] = array
        return self._maps[name]

    def __getstate__(self) -> dict:
        """A memory map would be pickled with all of its contents."""
        return {**self.__dict__, "_maps": {}}

    def get(self, indices: Sequence[int], views: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of (index, view) pairs, name -> (B, ...). Floats come in their stored type, integers as int64."""
        result = {}
        for name in self.arrays:
            values = self.rows(name)[np.asarray(indices), np.asarray(views)]
            result[name] = torch.from_numpy(values if values.dtype.kind == "f" else values.astype(np.int64))
        return result

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        """(B,) int64."""
        return torch.from_numpy(self.rows(LABELS)[np.asarray(indices)].astype(np.int64))

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Read everything and compare it with the recorded digests; UserError that names the first damaged samples."""
        chunk = self.description["chunk"]
        try:
            recorded = np.load(self.path / "chunks.npy", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / 'chunks.npy'} cannot be read ({error}). Build the cache again.") from error
        if _hash(recorded) != self.content:
            raise UserError(f"{self.path / 'chunks.npy'} is not the one its description names. Build the cache again.")
        for i, start in enumerate(range(0, self.samples, chunk)):
            stop = min(start + chunk, self.samples)
            digests = {
                name: hashlib.blake2b(np.ascontiguousarray(self.rows(name)[start:stop]).data, digest_size=DIGEST)
                for name in (*self.arrays, LABELS)
            }
            if _combine(digests) != recorded[i].tobytes():
                raise UserError(
                    f"{self.path}: samples {start} to {stop - 1} are not what was written. "
                    "The files are damaged: build the cache again."
                )
            if progress:
                progress(stop)


def _hash(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=DIGEST).hexdigest()


def _combine(digests: dict[str, Any]) -> bytes:
    """One digest of a chunk from those of its arrays."""
    total = hashlib.blake2b(digest_size=DIGEST)
    for name in sorted(digests):
        total.update(f"{name}\x1f".encode() + digests[name].digest())
    return total.digest()


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
        raise UserError(
            f"cache array {name}: values from {values.min()} to {values.max()} do not fit {dtype}. "
            f"Store it as {wider}, or check the network that made it."
        )
    return stored


def _claim(folder: Path, plan: dict[str, Any], chunks: int) -> None:
    """Make the temporary folder, or take over the one of a killed build of the same cache."""
    owner = folder / "owner"
    try:
        host, pid = owner.read_text().split()
        if host == os.uname().nodename and int(pid) != os.getpid():
            os.kill(int(pid), 0)
            raise UserError(f"{folder} is being built by process {pid}. Wait for it, or delete the folder.")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        pass  # no folder, no owner, or a dead one
    try:
        found = json.loads((folder / "plan.json").read_text())
        differing = [
            f"{key} ({found.get(key)} there, {value} now)" for key, value in plan.items() if found.get(key) != value
        ]
    except (OSError, ValueError, AttributeError):  # it died before it had a plan
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        np.save(folder / "chunks.npy", np.zeros((chunks, DIGEST), dtype=np.uint8))
        write_json(folder / "plan.json", plan)
    else:
        if differing:
            raise UserError(
                f"{folder} is an unfinished build of something else: {'; '.join(differing)}. "
                "Delete it, or choose another folder."
            )
    owner.write_text(f"{os.uname().nodename} {os.getpid()}")


class Builder:
    """A cache under construction, by one rank or several, in as many attempts as it takes.

        builder = Builder(...)
        for start, stop in builder.spans(64):
            builder.write(start, {name: rows (stop - start, views, ...)}, labels)
        builder.finish()

    Rows go through ordinary writes, not a memory map: a full disk is then an error and not a bus error, and ranks on
    several machines do not write each other's pages back.

    Args:
        path: folder of the finished cache; must not exist.
        samples, views: how many.
        source, transform, producer: fingerprint of the pictures, Transform.describe(), fingerprint of the network.
        facts: anything JSON that belongs into the description.
        rank, world, barrier: every rank makes its own Builder and computes its own chunks; `barrier` waits for all.
        chunk: samples per chunk.
    """

    def __init__(
        self,
        path: str | Path,
        samples: int,
        views: int,
        source: str,
        transform: dict[str, Any],
        producer: str,
        facts: dict[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
        barrier: Callable[[], None] | None = None,
        chunk: int = CHUNK,
    ):
        self.path, self.samples, self.views, self.chunk, self.rank = Path(path), samples, views, chunk, rank
        self.folder = self.path.with_name(f".{self.path.name}.building")
        self.barrier = barrier or (lambda: None)
        if self.path.exists():
            raise UserError(f"{path} exists. Delete it or choose another folder.")
        self.plan = {
            "format": FORMAT,
            "samples": samples,
            "views": views,
            "chunk": chunk,
            "source": source,
            "transform": transform,
            "producer": producer,
            "facts": facts or {},
        }
        if rank == 0:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            _claim(self.folder, self.plan, -(-samples // chunk))
        self.barrier()
        left = np.flatnonzero(~np.load(self._file("chunks")).any(axis=1))
        share = part(len(left), rank, world)
        self.mine = left[share.start : share.stop].tolist()
        try:
            self.arrays: dict[str, dict] = json.loads((self.folder / "arrays.json").read_text())
        except FileNotFoundError:
            self.arrays = {}  # the first rows tell
        self.barrier()  # nobody writes before all have read
        self._agreed = bool(self.arrays)
        self._digests: dict[str, Any] = {}
        self._done: list[tuple[int, bytes]] = []
        self._flushed = time.monotonic()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def __len__(self) -> int:
        """Samples that this rank has to compute."""
        return sum(min(self.chunk, self.samples - c * self.chunk) for c in self.mine)

    def spans(self, batch: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of the samples this rank has to compute, at most `batch` at a time, never across chunks."""
        for c in self.mine:
            end = min((c + 1) * self.chunk, self.samples)
            for start in range(c * self.chunk, end, batch):
                yield start, min(start + batch, end)

    def _create(self, arrays: dict[str, np.ndarray]) -> None:
        """Make the files, once the first rows have told types and shapes."""
        self.arrays = {name: {"shape": list(rows.shape[2:]), "dtype": rows.dtype.name} for name, rows in arrays.items()}
        self._agreed = True
        if self.rank == 0:
            shapes = {name: ((self.samples, self.views, *rows.shape[2:]), rows.dtype) for name, rows in arrays.items()}
            shapes[LABELS] = ((self.samples,), np.dtype(np.int32))
            require_space(self.folder, sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values()))
            for name, (shape, dtype) in shapes.items():
                np.lib.format.open_memmap(self._file(name), mode="w+", dtype=dtype, shape=shape).flush()
            write_json(self.folder / "arrays.json", self.arrays)
        self.barrier()

    def write(self, start: int, arrays: dict[str, np.ndarray], labels: np.ndarray) -> None:
        """Samples from `start` on, in the order of `spans`: name -> (count, views, ...), and (count,) labels."""
        if not self._agreed:
            self._create(arrays)
        c = start // self.chunk
        for name, rows in {**arrays, LABELS: labels.astype(np.int32)}.items():
            target = np.load(self._file(name), mmap_mode="r")
            if rows.dtype != target.dtype or rows.shape[1:] != target.shape[1:]:
                raise ValueError(f"{name}: rows {rows.dtype} {rows.shape[1:]}, file {target.dtype} {target.shape[1:]}")
            rows = np.ascontiguousarray(rows)
            with open(self._file(name), "r+b") as file:
                file.seek(target.offset + start * rows[0].nbytes)
                file.write(rows.data)
            if start == c * self.chunk:
                self._digests[name] = hashlib.blake2b(digest_size=DIGEST)
            self._digests[name].update(rows.data)
        if start + len(labels) == min((c + 1) * self.chunk, self.samples):
            self._done.append((c, _combine(self._digests)))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Record what is done, after it has reached the disk."""
        if self._done:
            for name in (*self.arrays, LABELS):
                fsync_file(self._file(name))
            offset = np.load(self._file("chunks"), mmap_mode="r").offset
            with open(self._file("chunks"), "r+b") as file:
                for c, digest in self._done:
                    file.seek(offset + c * DIGEST)
                    file.write(digest)
            fsync_file(self._file("chunks"))
        self._done, self._flushed = [], time.monotonic()

    def abandon(self) -> None:
        """After an error: record what is done; when that is nothing at all, leave nothing behind."""
        if self.arrays:
            self.flush()
        elif self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self) -> None:
        """Give the folder its name, once every rank is here."""
        if not self._agreed:
            self.barrier()  # the one that waits for the files, which this rank has nothing to write to
        self.flush()
        self.barrier()
        if self.rank == 0:
            chunks = np.load(self._file("chunks"))
            if not chunks.any(axis=1).all():
                raise RuntimeError(f"{self.folder}: chunk {int(np.argmin(chunks.any(axis=1)))} was never written")
            arrays = json.loads((self.folder / "arrays.json").read_text())
            write_json(self.folder / "description.json", {**self.plan, "arrays": arrays, "content": _hash(chunks)})
            for name in ("owner", "plan.json", "arrays.json"):
                (self.folder / name).unlink()
            os.rename(self.folder, self.path)
        self.barrier()


def build(
    path: str | Path,
    source: DataSource,
    transform: Transform,
    producer: Producer,
    fingerprint: str,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
    storage: dict[str, str] | None = None,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] | None = None,
    workers: int = 0,
    on_corrupt: str = "replace",
    facts: dict[str, Any] | None = None,
    chunk: int = CHUNK,
    replaced: dict[str, str] | None = None,
) -> FeatureCache:
    """Make a cache, or open the one at `path` if it was made from the same things.

    Args:
        path: folder of the cache.
        transform: must have views ("center", "ten").
        producer: (B, 3, H, W) uint8 images on the CPU -> name -> (B, ...).
        fingerprint: names the producer and its weights.
        batch: pictures per call of the producer (all views of a picture go together), rounded down so that it divides
            `chunk`: batches, and with them rounding errors, are then the same on any number of ranks.
        progress: called with (pictures done, pictures in all) of this rank and attempt.
        storage: name -> numpy type ("float16", "uint16" ...); see `_storage_type` for the rest.
        rank, world, barrier: every rank computes its part; `barrier` waits for all of them.
        facts: anything JSON that belongs into the description.
        replaced: filled with the keys of pictures that could not be read by this rank.
    """
    path = Path(path)
    if path.exists():
        return FeatureCache(path, source, transform, fingerprint)
    transform.view_of((0, 0))  # refuses transforms without views
    require_order(source, "nothing can be stored of them (data.cache_latents, data.cache_features, tokens)")
    views, storage = transform.views, storage or {}
    batch = next(size for size in range(min(batch, chunk), 0, -1) if chunk % size == 0)
    builder = Builder(
        path,
        len(source),
        views,
        source.fingerprint(),
        transform.describe(),
        fingerprint,
        facts,
        rank,
        world,
        barrier,
        chunk,
    )
    spans = [range(start, stop) for start, stop in builder.spans(batch)]
    read = listed_batches(source, transform, spans, workers, on_corrupt, views=range(views))
    done, total = 0, sum(map(len, spans))
    try:
        for span, images in zip(spans, read):
            rows = {}
            for name, tensor in producer(images.images).items():
                dtype = _storage_type(tensor, storage.get(name))
                rows[name] = _convert(name, tensor, dtype).reshape(len(span), views, *tensor.shape[1:])
            builder.write(span.start, rows, images.labels[::views].numpy())
            done += len(span)
            if replaced is not None:
                replaced.update(dict.fromkeys(images.replaced, ""))
            if progress:
                progress(done, total)
    except BaseException:
        builder.abandon()
        raise
    builder.finish()
    return FeatureCache(path, source, transform, fingerprint)
