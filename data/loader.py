"""Batches in an order that is a pure function of (seed, position in the run).

Position p of a run is picture permutation(N, seed, p // N)[p % N]. Rank r of W reads the r-th contiguous part of each
global batch. So a resumed run, another number of workers, ranks or micro-batches sees the same samples, and the only
state to save is how many images were seen.

A picture that cannot be read is replaced by the next readable one (or ends the run, as `on_corrupt` says): also a
function of the data alone, so caches built from the same source hold the same replacements.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from core.errors import UserError, nearest
from core.rng import permutation
from core.specs import Batch, DataSource, Sample
from data.base import UnreadablePicture
from data.transforms import Transform

if TYPE_CHECKING:  # caches are built with this module
    from data.cache import FeatureCache

MAX_REPLACED_IN_A_ROW = 100
MAX_NAMES = 20
POLICIES = ("replace", "raise")

Entry = tuple[int, int, int | None]  # position in the run, index in the source, view (None: the transform draws it)


def part(count: int, rank: int, world: int) -> range:
    """The contiguous part of range(count) that belongs to `rank`; sizes differ by one at most, the first are larger."""
    size, extra = divmod(count, world)
    start = rank * size + min(rank, extra)
    return range(start, start + size + (rank < extra))


def split(batch: Batch, count: int) -> list[Batch]:
    """`batch` cut into `count` micro-batches of equal size, in order. Replaced keys stay with the first."""
    if len(batch) % count:
        raise UserError(f"a batch of {len(batch)} cannot be cut into {count} equal micro-batches.")
    size = len(batch) // count

    def cut(tensor: Tensor | None, i: int) -> Tensor | None:
        return None if tensor is None else tensor[i * size : (i + 1) * size]

    return [
        Batch(
            cut(batch.labels, i),
            cut(batch.positions, i),
            cut(batch.images, i),
            cut(batch.stored, i),
            {k: cut(v, i) for k, v in batch.features.items()},
            batch.replaced if i == 0 else [],
        )
        for i in range(count)
    ]


def read_or_replace(source: DataSource, index: int, on_corrupt: str) -> tuple[Sample, dict[str, str]]:
    """Sample `index`, or the next readable one; with the reason for every key that could not be read."""
    replaced: dict[str, str] = {}
    for offset in range(min(MAX_REPLACED_IN_A_ROW, len(source))):
        try:
            return source[(index + offset) % len(source)], replaced
        except UnreadablePicture as error:
            if on_corrupt == "raise":
                raise UserError(
                    f"{error.key} cannot be read ({error.reason}). Repair or remove it; trainings with "
                    "data.on_corrupt=replace take the next picture instead."
                ) from error
            replaced[error.key] = error.reason
    key, reason = next(iter(replaced.items()))
    raise UserError(
        f"{len(replaced)} pictures in a row cannot be read, the first is {key}: {reason}. "
        "Check that the data is complete and still mounted."
    )


class _Reader:
    """What runs in the workers: a list of entries -> the tensors of a batch. DataLoader calls `__getitems__`."""

    def __init__(
        self,
        source: DataSource | None,
        transform: Transform,
        seed: int = 0,
        on_corrupt: str = "replace",
        features: FeatureCache | None = None,
        stored: FeatureCache | None = None,
    ):
        self.source, self.transform, self.seed, self.on_corrupt = source, transform, seed, on_corrupt
        self.features, self.stored = features, stored

    def __getitems__(self, entries: list[Entry]) -> dict[str, Any]:
        try:
            return self._read(entries)
        except UserError as error:  # DataLoader would wrap it into a traceback
            return {"error": str(error)}

    def _read(self, entries: list[Entry]) -> dict[str, Any]:
        positions, indices = [e[0] for e in entries], [e[1] for e in entries]
        result: dict[str, Any] = {"positions": torch.tensor(positions, dtype=torch.int64)}
        if self.features is not None or self.stored is not None:
            views = [self.transform.view_of((self.seed, p)) for p in positions]
        if self.features is not None:
            result["features"] = self.features.get(indices, views)
        if self.stored is not None:
            (result["stored"],) = self.stored.get(indices, views).values()
            result["labels"] = self.stored.labels_of(indices)
            return result
        size = self.transform.image_size
        images = torch.empty(len(entries), 3, size, size, dtype=torch.uint8)
        labels, replaced, last = [], {}, None
        for i, (position, index, view) in enumerate(entries):
            if index != last:  # neighbours may be views of one picture
                sample, reasons = read_or_replace(self.source, index, self.on_corrupt)
                replaced |= reasons
                last = index
            labels.append(sample.label)
            if view is None:
                images[i] = self.transform(sample.image, (self.seed, position))
            else:
                images[i] = self.transform.apply_view(sample.image, view)
        return result | {"images": images, "labels": torch.tensor(labels, dtype=torch.int64), "replaced": replaced}


def _same(batch: dict[str, Any]) -> dict[str, Any]:
    """The collate function: readers return whole batches."""
    return batch


# Signals that mean "stop", for the main process alone. Workers start with them blocked, until they know what to do.
_HELD = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def _prepare_worker(closing, worker: int) -> None:
    """Leave signals to the main process.

    Ctrl-C and a scheduler's SIGTERM reach the whole process group; a worker that dies of them takes the main process
    down before it has saved. Only once the main process is closing does SIGTERM end a worker.
    """
    torch.set_num_threads(1)
    for number in _HELD - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


def _run(
    reader: _Reader, order: Iterable[list[Entry]], workers: int, pin: bool, prefetch: int, start_method: str | None
) -> Iterator[tuple[Batch, dict[str, str]]]:
    """Batches for the lists of entries in `order`, in that order, read by `workers` processes (0: by this one)."""
    options: dict[str, Any] = {}
    context = multiprocessing.get_context(start_method or ("fork" if sys.platform == "linux" else "spawn"))
    closing = context.Event()
    if workers:
        options = {
            "prefetch_factor": prefetch,
            "multiprocessing_context": context,
            "worker_init_fn": functools.partial(_prepare_worker, closing),
        }
    # DataLoader draws a seed for its workers: from a generator of its own, so that torch's global one is left alone.
    loader = DataLoader(
        reader,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_same,
        pin_memory=pin and torch.cuda.is_available(),
        generator=torch.Generator(),
        **options,
    )
    atexit.register(closing.set)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        items = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        for item in items:
            if "error" in item:
                raise UserError(item["error"])
            replaced = item.get("replaced", {})
            yield (
                Batch(
                    item["labels"],
                    item["positions"],
                    item.get("images"),
                    item.get("stored"),
                    item.get("features", {}),
                    list(replaced),
                ),
                replaced,
            )
    finally:
        if not closing.is_set():  # at exit it is, and setting it again would need modules that are gone
            closing.set()
        atexit.unregister(closing.set)


def _check_policy(on_corrupt: str) -> None:
    if on_corrupt not in POLICIES:
        raise UserError(f'unknown on_corrupt "{on_corrupt}".{nearest(on_corrupt, POLICIES)}')


class Loader:
    """This rank's part of an endless run.

    Args:
        source: the pictures; may be None when `stored` is given.
        transform: crop and flip.
        seed: of the run; keys order and augmentation.
        global_batch: images per step over all ranks.
        rank, world: this process and how many there are.
        micro_batches: parts the trainer cuts a rank's batch into, see `split`; only checked here.
        workers: processes that decode; 0 decodes in this one.
        on_corrupt: "replace" unreadable pictures by the next readable one, or "raise".
        pin: put batches into pinned memory when there is a GPU.
        features: cached teacher features; handed out as Batch.features.
        stored: cached latents; handed out as Batch.stored, and no picture is read.
        prefetch: batches that every worker keeps ready.
        start_method: of the workers, None means fork on Linux.
    """

    def __init__(
        self,
        source: DataSource | None,
        transform: Transform,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        micro_batches: int = 1,
        workers: int = 0,
        on_corrupt: str = "replace",
        pin: bool = False,
        features: FeatureCache | None = None,
        stored: FeatureCache | None = None,
        prefetch: int = 2,
        start_method: str | None = None,
    ):
        _check_policy(on_corrupt)
        if global_batch < 1 or global_batch % (world * micro_batches):
            raise UserError(
                f"global batch {global_batch} must be a positive multiple of {world * micro_batches} "
                f"({world} ranks x {micro_batches} micro-batches)."
            )
        if workers < 0:
            raise UserError(f"workers = {workers} must be 0 or more.")
        if source is None and stored is None:
            raise UserError("a loader needs pictures or stored latents, and got neither.")
        for cache in (features, stored):
            if cache is not None:
                cache.check(source, transform)
        if stored is not None and len(stored.arrays) != 1:
            raise UserError(f"{stored.path} holds {', '.join(stored.arrays)}; stored latents must be a single array.")
        self.source, self.seed, self.global_batch, self.rank, self.world = source, seed, global_batch, rank, world
        self.images_per_epoch = len(source) if source is not None else len(stored)
        self.replaced_count = 0
        self.replaced_names: dict[str, str] = {}  # key -> reason, the first few
        self._reader = _Reader(source, transform, seed, on_corrupt, features, stored)
        if hasattr(source, "start_at"):
            start_method = start_method or source.start_method
            workers = 0 if source.one_process else workers
        self._options = {"workers": workers, "pin": pin, "prefetch": prefetch, "start_method": start_method}

    def fingerprint(self) -> str:
        """Of the list of samples: resuming with another one must be refused."""
        return self.source.fingerprint() if self.source is not None else self._reader.stored.source_fingerprint

    def order(self, images_seen: int) -> Iterator[list[Entry]]:
        """Entries of this rank's batches, from position `images_seen` of the run on, forever."""
        count = self.global_batch // self.world
        epoch, indices = -1, None
        start = images_seen + self.rank * count
        while True:
            entries = []
            for position in range(start, start + count):
                if position // self.images_per_epoch != epoch:
                    epoch = position // self.images_per_epoch
                    indices = permutation(self.images_per_epoch, self.seed, epoch)
                entries.append((position, int(indices[position % self.images_per_epoch]), None))
            yield entries
            start += self.global_batch

    def batches(self, images_seen: int = 0) -> Iterator[Batch]:
        """This rank's batches from `images_seen` on (any number, normally a multiple of the global batch), forever."""
        if hasattr(self.source, "start_at"):  # a stream, see data/stream.py
            self.source.start_at(self.seed, images_seen, self.rank, self.world)
        for batch, replaced in _run(self._reader, self.order(images_seen), **self._options):
            self.replaced_count += len(replaced)
            for key, reason in replaced.items():
                if len(self.replaced_names) < MAX_NAMES:
                    self.replaced_names.setdefault(key, reason)
            yield batch


def listed_batches(
    source: DataSource,
    transform: Transform,
    batches: Iterable[Sequence[int]],
    workers: int = 0,
    on_corrupt: str = "raise",
    views: Sequence[int | None] = (None,),
    pin: bool = False,
    prefetch: int = 2,
    start_method: str | None = None,
) -> Iterator[Batch]:
    """One batch for each list of indices in `batches`, of whatever lengths, in that order. Positions are indices.

    Args:
        views: of every picture, in a row; None: the one that the transform draws.
    """
    _check_policy(on_corrupt)
    if hasattr(source, "start_at"):  # a stream gives each process other pictures
        workers = 0
    order = ([(int(i), int(i), view) for i in indices for view in views] for indices in batches)
    for result, _ in _run(_Reader(source, transform, 0, on_corrupt), order, workers, pin, prefetch, start_method):
        yield result


def ordered_batches(
    source: DataSource,
    transform: Transform,
    batch: int,
    rank: int = 0,
    world: int = 1,
    all_views: bool = False,
    chosen: Sequence[int] | None = None,
    **options: Any,
) -> Iterator[Batch]:
    """One pass over this rank's contiguous `part` of the source in index order: evaluation, statistics, caching.

    Positions are indices in the source. The last batch may be smaller.

    Args:
        all_views: every picture appears transform.views times in a row (`batch` still counts pictures).
        chosen: the indices to visit, in this order; None means all.
        options: of `listed_batches`.
    """
    if all_views:
        transform.view_of((0, 0))  # refuses transforms without views
        options["views"] = range(transform.views)
    chosen = range(len(source)) if chosen is None else chosen
    mine = part(len(chosen), rank, world)
    indices = chosen[mine.start : mine.stop]
    return listed_batches(source, transform, (indices[i : i + batch] for i in range(0, len(indices), batch)), **options)
