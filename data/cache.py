"""Tensors computed once from every view of every picture, kept in memory-mapped files: features, latents and tokens.

A cache is a folder: one `<name>.npy` of shape (samples, views, ...) per tensor, `labels.npy`, `chunks.npy` (a digest of
every CHUNK samples) and `description.json`. The description says what the cache was made from (source, transform,
producer); opening it for anything else is refused with a list of what differs.

It is built under a temporary name and renamed when complete, in chunks that ranks share and that are kept through a
kill (core/chunks.py). Opening reads the description alone: the arrays are mapped, and the processes of a machine share
one copy of them in the page cache.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.chunks import ALONE, Chunks, enter, require_same_job, shared_array, write_rows
from core.dist import World
from core.errors import UserError, plainly
from core.files import explain_os_errors, fsync_file, read_json, require_space, write_json
from core.lock import Lock
from core.specs import DataSource
from data.checks import require_order
from data.loader import Replaced, listed_batches
from data.transforms import Transform

FORMAT = 2
CHUNK = 256  # samples; what a killed build computes again at most, and the unit that is spread over ranks
FLUSH_SECONDS = 3.0  # between two records of what is done
DIGEST = 16  # bytes
LABELS, RECORD = "labels", "chunks"  # names of arrays
DESCRIPTION, ARRAYS = "description.json", "arrays.json"
UNREADABLE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO)
Producer = Callable[[Tensor], dict[str, Tensor]]


def _refuse_unreadable(error: Exception, path: Path) -> None:
    """UserError where a cache may be whole and this process cannot read it: building it again would not help."""
    if isinstance(error, OSError) and error.errno in UNREADABLE:
        with explain_os_errors(path):
            raise error


class FeatureCache:
    """A finished cache.

    Args:
        path: its folder.
        source, transform, fingerprint: what it must have been made from; None leaves that unchecked.
        encoding: of a tokenizer, `core.weights.encoding.encoding_fingerprint`: where the cache has the same one, its
            fingerprint may be another, for what does not encode has no part in it.
    """

    def __init__(
        self,
        path: str | Path,
        source: DataSource | None = None,
        transform: Transform | None = None,
        fingerprint: str | None = None,
        encoding: str | None = None,
    ):
        self.path = Path(path)
        try:
            self.description = json.loads((self.path / DESCRIPTION).read_text())
            if (version := self.description["format"]) != FORMAT:
                raise UserError(f"{path} has cache format {version}, this code reads {FORMAT}. Build it again.")
            self.samples, self.views = self.description["samples"], self.description["views"]
            self.arrays: dict[str, dict] = self.description["arrays"]
            self.source_fingerprint: str = self.description["source"]
            self.content: str = self.description["content"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            _refuse_unreadable(error, self.path)
            raise UserError(
                f"{path} is not a complete cache ({plainly(error)}). Delete it and build it again."
            ) from error
        self._maps: dict[str, np.ndarray] = {}
        self.check(source, transform, fingerprint, encoding)
        for name in (*self.arrays, LABELS):
            self.rows(name)

    def __len__(self) -> int:
        return self.samples

    def is_made_by(self, fingerprint: str, encoding: str | None = None) -> bool:
        """Whether a network with these would make the same; caches of earlier versions note no encoding."""
        noted = self.description.get("encoding")
        return self.description["producer"] == fingerprint or (noted is not None and noted == encoding)

    def check(
        self,
        source: DataSource | None = None,
        transform: Transform | None = None,
        fingerprint: str | None = None,
        encoding: str | None = None,
    ) -> None:
        """UserError with every difference to what is given; None is not compared."""
        made_from, wrong = self.description, []
        if source is not None and made_from["source"] != source.fingerprint():
            wrong.append(f"the list of pictures ({made_from['samples']} in the cache, {len(source)} now)")
        elif source is not None and made_from.get("sizes") not in (None, source.file_sizes()):
            wrong.append("the pictures, of which some have other sizes now")
        for key, now in (transform.describe() if transform is not None else {}).items():
            if (before := made_from["transform"].get(key)) != now:
                wrong.append(f"{key} ({before} in the cache, {now} now)")
        if fingerprint is not None and not self.is_made_by(fingerprint, encoding):
            wrong.append(f"what made it ({made_from['producer']} in the cache, {fingerprint} now)")
        if wrong:
            raise UserError(
                f"cache {self.path} was made from something else: {'; '.join(wrong)}. "
                "Delete the folder or choose another, and build it again."
            )

    def rows(self, name: str) -> np.ndarray:
        """The memory map of one array, (samples, views, ...), opened once per process.

        "labels" is (samples,), "chunks" (chunks, DIGEST) uint8.
        """
        if name not in self._maps:
            path = self.path / f"{name}.npy"
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                _refuse_unreadable(error, path)
                raise UserError(f"{path} cannot be read ({error}). Delete {self.path} and build it again.") from error
            expected = [self.samples]
            if name == RECORD:
                expected = [-(-self.samples // self.description["chunk"]), DIGEST]
            elif name != LABELS:
                expected += [self.views, *self.arrays[name]["shape"]]
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

    def verify(self) -> None:
        """Read everything and compare it with the recorded digests; UserError that names the first damaged samples."""
        recorded, size = self.rows(RECORD), self.description["chunk"]
        if _digest(recorded).hexdigest() != self.content:
            raise UserError(f"{self.path / 'chunks.npy'} is not the one its description names. Build the cache again.")
        for chunk, digest in enumerate(recorded):
            part = slice(chunk * size, min((chunk + 1) * size, self.samples))
            digests = {name: _digest(self.rows(name)[part]) for name in (*self.arrays, LABELS)}
            if _combine(digests) != digest.tobytes():
                raise UserError(
                    f"{self.path}: samples {part.start} to {part.stop - 1} are not what was written. "
                    "The files are damaged: build the cache again."
                )


def _digest(array: np.ndarray):
    """The running hash of an array's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=DIGEST)


def _combine(digests: dict[str, Any]) -> bytes:
    """One digest of a chunk from those of its arrays."""
    total = hashlib.blake2b(digest_size=DIGEST)
    for name in sorted(digests):
        total.update(f"{name}\x1f".encode() + digests[name].digest())
    return total.digest()


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------
def to_storage(name: str, tensor: Tensor, wanted: str | None = None) -> np.ndarray:
    """The tensor in the numpy type `wanted`; UserError if values do not fit.

    None: floats as they are (bf16 as fp32, which numpy lacks), integers as int32.
    """
    values = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().numpy()
    if wanted is None:
        wanted = "int32" if values.dtype.kind != "f" else "float16" if tensor.dtype == torch.float16 else "float32"
    with np.errstate(over="ignore"):
        stored = values.astype(wanted)
    is_float = stored.dtype.kind == "f"
    if not (np.isfinite(stored) if is_float else stored == values).all():
        raise UserError(
            f"cache array {name}: values from {values.min()} to {values.max()} do not fit {stored.dtype}. "
            f"Store it as {'float32' if is_float else 'int32'}, or check the network that made it."
        )
    return stored


@dataclass(frozen=True)
class Plan:
    """What a cache is made from; noted in its folder before anything else.

    Args:
        samples, views: how many.
        source, transform, producer: fingerprint of the pictures, Transform.describe(), fingerprint of the network.
        facts: anything JSON that belongs into the description.
        chunk: samples per chunk; an unfinished build keeps its own.
        sizes: DataSource.file_sizes; a build that was begun without goes on without.
        encoding: see FeatureCache; likewise.
    """

    samples: int
    views: int
    source: str
    transform: dict[str, Any]
    producer: str
    facts: dict[str, Any] = field(default_factory=dict)
    chunk: int = CHUNK
    format: int = FORMAT
    sizes: str | None = None
    encoding: str | None = None


def unfinished(path: Path) -> Path:
    """Where the cache `path` is while it is being built."""
    return path.with_name(f".{path.name}.building")


Rows = tuple[dict[str, np.ndarray], np.ndarray]  # name -> (count, views, ...), and labels (count,)


class Builder(Chunks):
    """A cache under construction, by one rank or several, in as many attempts as it takes.

        Builder(path, plan, world).fill(64, make)

    A chunk is whole once its digest stands in chunks.npy, which is written after its rows have reached the disk.

    Args:
        path: folder of the finished cache; must not exist.
        world: every rank makes its own Builder and computes its own chunks.
    """

    def __init__(self, path: str | Path, plan: Plan, world: World = ALONE):
        self.path = Path(path)
        self.folder = unfinished(self.path)
        self.lock = Lock(self.folder)  # of the main rank, for all of them
        settings = {name: value for name, value in asdict(plan).items() if value is not None}
        require_same_job(world, settings)
        self.plan: dict[str, Any] = world.on_main(lambda: self._enter(settings))
        super().__init__(plan.samples, self.plan["chunk"], world, lambda chunk: self._recorded[chunk].any())
        self._begun = False
        self._digests: dict[str, Any] = {}
        self._unrecorded: list[tuple[int, bytes]] = []
        self._flushed = time.monotonic()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _enter(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Make the temporary folder, or take over the one of a killed build of the same cache. Returns its plan."""
        if self.path.exists():
            raise UserError(f"{self.path} exists. Delete it or choose another folder.")
        self.lock.take()
        try:
            return self._take_over(plan)
        except BaseException:
            self.lock.release()
            raise

    def _take_over(self, plan: dict[str, Any]) -> dict[str, Any]:
        if not (self.folder / ARRAYS).is_file():  # it died before it had written anything
            for left in self.folder.glob("[!.]*"):
                left.unlink()
        advice = "Delete it, or choose another folder."
        sizes, record, ignored = plan.get("sizes"), self.folder / "plan.json", ["chunk", "sizes", "encoding"]
        if "encoding" in plan and record.is_file() and read_json(record).get("encoding") == plan["encoding"]:
            ignored.append("producer")
        plan = enter(record, plan, "an unfinished build of something else", advice, ignored)
        if plan.get("sizes") not in (None, sizes):
            raise UserError(f"{self.folder} holds an unfinished build of pictures with other sizes. {advice}")
        if not self._file(RECORD).is_file():
            np.save(self._file(RECORD), np.zeros((-(-plan["samples"] // plan["chunk"]), DIGEST), dtype=np.uint8))
        self._recorded = np.load(self._file(RECORD))
        return plan

    def fill(
        self,
        batch: int,
        make: Callable[[list[range]], Iterable[Rows]],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute what is missing and give the folder its name. Collective.

        Args:
            batch: samples at once, at most; never across chunks.
            make: the spans of samples that this rank has to compute -> the rows of each, in that order.
            progress: called with (samples done, samples in all) of this attempt, an estimate over all ranks.
        """
        before = self.items(self.done)

        def share(mine: list[int]) -> None:
            spans = [
                range(start, min(start + batch, whole.stop))
                for whole in map(self.indices, mine)
                for start in range(whole.start, whole.stop, batch)
            ]
            try:
                for span, (arrays, labels) in zip(spans, make(spans), strict=True):
                    self.write(span.start, arrays, labels)
                    self.advance(len(span))
            finally:
                self.flush()

        try:
            self.run(share, progress and (lambda done: progress(done - before, self.count - before)))
        except BaseException:
            if self.world.is_main:
                self.lock.release()
                if not (self.folder / ARRAYS).is_file():
                    shutil.rmtree(self.folder, ignore_errors=True)  # nothing to go on from
            raise
        self.world.on_main(self._finish)

    def _begin(self, arrays: dict[str, np.ndarray]) -> None:
        """Make the files, now that the first rows have told types and shapes. Every rank does, see `shared_array`."""
        kinds = {name: {"shape": list(rows.shape[2:]), "dtype": rows.dtype.name} for name, rows in arrays.items()}
        shapes = {name: ((self.count, *rows.shape[1:]), rows.dtype) for name, rows in arrays.items()}
        shapes[LABELS] = ((self.count,), np.dtype(np.int32))
        if not (self.folder / ARRAYS).is_file():
            require_space(self.folder, sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values()))
        for name, (shape, dtype) in shapes.items():
            shared_array(self._file(name), shape, dtype)
        write_json(self.folder / ARRAYS, kinds)
        self._begun = True

    def write(self, start: int, arrays: dict[str, np.ndarray], labels: np.ndarray) -> None:
        """Samples from `start` on, in the order of the spans: name -> (count, views, ...), and (count,) labels."""
        if not self._begun:
            self._begin(arrays)
        chunk = start // self.size
        for name, rows in {**arrays, LABELS: labels.astype(np.int32)}.items():
            rows = np.ascontiguousarray(rows)
            write_rows(self._file(name), start, rows)
            if start == self.indices(chunk).start:
                self._digests[name] = hashlib.blake2b(digest_size=DIGEST)
            self._digests[name].update(rows.data)
        if start + len(labels) == self.indices(chunk).stop:
            self._unrecorded.append((chunk, _combine(self._digests)))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Record what is done, after it has reached the disk."""
        if self._unrecorded:
            for name in self._digests:
                fsync_file(self._file(name))
            for chunk, digest in self._unrecorded:
                write_rows(self._file(RECORD), chunk, np.frombuffer(digest, np.uint8)[None])
            fsync_file(self._file(RECORD))
        self._unrecorded, self._flushed = [], time.monotonic()

    def _finish(self) -> None:
        recorded = np.load(self._file(RECORD))
        if not recorded.any(axis=1).all():
            raise RuntimeError(f"{self.folder}: chunk {int(np.argmin(recorded.any(axis=1)))} was never written")
        arrays = read_json(self.folder / ARRAYS)
        write_json(self.folder / DESCRIPTION, {**self.plan, "arrays": arrays, "content": _digest(recorded).hexdigest()})
        for name in ("plan.json", ARRAYS):
            (self.folder / name).unlink()
        (self.folder / "owner").unlink(missing_ok=True)  # of earlier versions
        self.lock.release()
        os.rename(self.folder, self.path)


@dataclass
class Pass:
    """How the pictures of a cache are gone through.

    Args:
        world: every rank computes its part.
        batch: pictures per call of the producer (all views of a picture go together), rounded down so that it divides
            a chunk: batches, and with them rounding errors, are then the same on any number of ranks.
        workers, on_corrupt: see data.loader.listed_batches.
        progress: see Builder.fill.
        chunk: samples per chunk.
        max_corrupt: the share of pictures that may be unreadable; above it the build stops, and goes on when asked again.
        replaced: what became of the pictures that this rank read.
    """

    world: World = ALONE
    batch: int = 64
    workers: int = 0
    on_corrupt: str = "replace"
    progress: Callable[[int, int], None] | None = None
    chunk: int = CHUNK
    max_corrupt: float = 1.0
    replaced: Replaced | None = None


def build(
    path: str | Path,
    source: DataSource,
    transform: Transform,
    producer: Producer,
    fingerprint: str,
    how: Pass | None = None,
    storage: dict[str, str] | None = None,
    facts: dict[str, Any] | None = None,
    encoding: str | None = None,
) -> FeatureCache:
    """Make a cache, or open the one at `path` if it was made from the same things. Collective.

    Args:
        path: folder of the cache.
        transform: must have views ("center", "ten").
        producer: (B, 3, H, W) uint8 images on the CPU -> name -> (B, ...).
        fingerprint: names the producer and its weights.
        how: None: on one rank, as it stands.
        storage: name -> numpy type ("float16", "uint16" ...); see `to_storage` for the rest.
        facts: anything JSON that belongs into the description.
        encoding: of a tokenizer, see FeatureCache.
    """
    path, how, storage = Path(path), how or Pass(), storage or {}
    if how.world.on_main(path.exists):
        return FeatureCache(path, source, transform, fingerprint, encoding)
    transform.view_of((0, 0))  # refuses transforms without views
    require_order(source, "nothing can be stored of them (data.cache_latents, data.cache_features, tokens)")
    views = transform.views
    plan = Plan(
        len(source),
        views,
        source.fingerprint(),
        transform.describe(),
        fingerprint,
        facts or {},
        how.chunk,
        sizes=how.world.on_main(source.file_sizes),
        encoding=encoding,
    )
    builder = Builder(path, plan, how.world)

    def make(spans: list[range]) -> Iterator[Rows]:
        missing = builder.count - builder.items(builder.done)
        how.replaced = Replaced(missing, how.max_corrupt, how.world.size, f"of {path} at {builder.count - missing}")
        read = listed_batches(source, transform, spans, how.workers, how.on_corrupt, views=range(views))
        for span, images in zip(spans, read, strict=True):
            rows = {
                name: to_storage(name, tensor, storage.get(name)).reshape(len(span), views, *tensor.shape[1:])
                for name, tensor in producer(images.images).items()
            }
            how.replaced.add(images.replaced, len(span))
            yield rows, images.labels[::views].numpy()

    batch = next(size for size in range(min(how.batch, builder.size), 0, -1) if builder.size % size == 0)
    builder.fill(batch, make, how.progress)
    return FeatureCache(path, source, transform, fingerprint, encoding)
