"""Batches in an order that is a pure function of (seed, position in the run).

Position p of a run is picture permutation(N, seed, p // N)[p % N]. Rank r of W reads the r-th contiguous part of each
global batch. So a resumed run, another number of workers, ranks or micro-batches sees the same samples, and the only
state to save is how many images were seen.

A picture that cannot be read is replaced by the next readable one (or ends the run, as `on_corrupt` says): also a
function of the data alone, so caches built from the same source hold the same replacements.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from core import dist
from core.errors import UserError, lost_worker, nearest
from core.files import human_bytes
from core.rng import permutation
from core.signals import undivided
from core.specs import Batch, DataSource, Kinds, Sample
from data.base import LeftOut
from data.decode import UnreadablePicture
from data.transforms import Transform

if TYPE_CHECKING:  # caches are built with this module
    from data.cache import FeatureCache
    from data.token_files import MomentFiles

MAX_REPLACED_IN_A_ROW = 100
MAX_NAMES = 20
PREFETCH = 2  # batches of each worker that may wait, in SHARED_MEMORY
SHARED_MEMORY = "/dev/shm"
ENOUGH = 10_000  # pictures that a share is judged by
POLICIES = ("replace", "raise")

Entry = tuple[int, int, int | None]  # position in the run, index in the source, view (None: the transform draws it)


def part(count: int, rank: int, world: int) -> range:
    """The contiguous part of range(count) that belongs to `rank`; sizes differ by one at most, the first are larger."""
    size, extra = divmod(count, world)
    start = rank * size + min(rank, extra)
    return range(start, start + size + (rank < extra))


def split(batch: Batch, count: int) -> list[Batch]:
    """`batch` cut into `count` micro-batches of equal size, in order. What was replaced or not read stays with the first."""
    if len(batch) % count:
        raise UserError(f"a batch of {len(batch)} cannot be cut into {count} equal micro-batches.")
    size = len(batch) // count
    first, *others = (batch.map(lambda tensor, i=i: tensor[i * size : (i + 1) * size]) for i in range(count))
    return [first] + [dataclasses.replace(other, replaced={}, unread={}) for other in others]


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


class Replaced:
    """The pictures that ranks met and could not read, each counted once however often it comes and whoever meets it.

    Args:
        pictures: how many there are for all ranks.
        limit: the share of them that may be missing; above it the run stops.
        ranks: how many processes read, about equally many pictures each.
        topic: tells what is being read from what else these ranks read.
    """

    def __init__(self, pictures: int, limit: float = 1.0, ranks: int = 1, topic: str = "pictures"):
        self.pictures, self.limit, self.ranks, self.topic = pictures, limit, ranks, f"unreadable {topic}"
        self.read = 0
        self.reasons: dict[str, str] = {}  # by key, of this rank

    def __len__(self) -> int:
        peers = dist.peers()
        return len(self.reasons) if peers is None else peers.count_once(self.topic)

    def add(self, reasons: dict[str, str], read: int) -> None:
        """Note what became of the next `read` pictures of this rank."""
        self.read += read * self.ranks
        peers = dist.peers()
        for key in reasons.keys() - self.reasons.keys() if peers is not None else ():
            peers.count_once(self.topic, key)
        self.reasons |= reasons
        judged = min(self.pictures, max(self.read, ENOUGH))
        if reasons and len(self) > self.limit * judged:
            raise UserError(
                f"{len(self)} of the {min(self.read, self.pictures):,} pictures read so far cannot be read, more than "
                f"data.max_corrupt={self.limit} of them ({self.names(3)}). Repair or remove them, or raise that setting."
            )

    def names(self, count: int = MAX_NAMES) -> str:
        """The first `count` with their reasons."""
        first = [f"{key}: {reason}" for key, reason in itertools.islice(self.reasons.items(), count)]
        return "; ".join(first + ["..."] * (len(self) > len(first)))


@dataclass(eq=False)
class _Reader:
    """What runs in the workers: a list of entries -> a batch. DataLoader calls `__getitems__`."""

    source: DataSource | None
    transform: Transform
    seed: int = 0
    on_corrupt: str = "replace"
    features: FeatureCache | None = None
    stored: FeatureCache | MomentFiles | None = None

    def __post_init__(self):
        if self.on_corrupt not in POLICIES:
            raise UserError(f'unknown on_corrupt "{self.on_corrupt}".{nearest(self.on_corrupt, POLICIES)}')

    def bytes_each(self) -> int:
        """Of one picture in a batch, with what is cached of it."""
        shapes = [
            (array["shape"], np.dtype(array["dtype"]).itemsize)
            for cache in (self.features, self.stored)
            if cache is not None
            for array in cache.arrays.values()
        ]
        size = 0 if self.stored is not None else self.transform.image_size
        return 3 * size * size + sum(math.prod(shape) * itemsize for shape, itemsize in shapes)

    def __getitems__(self, entries: list[Entry]) -> Batch | str:
        try:
            batch = self._read(entries)
        except UserError as error:  # DataLoader would wrap it into a traceback
            return str(error)
        if get_worker_info() is None:
            return batch
        try:  # here, for what fails in the thread that hands batches over is lost, and the main process waits for ever
            return batch.map(Tensor.share_memory_)
        except RuntimeError as error:
            return (
                f"a process that decodes pictures got no shared memory for a batch ({error}). Set workers=0 (data.workers, "
                "--workers), or raise the limit of this machine or job (docker run --shm-size, ulimit -f)."
            )

    def _read(self, entries: list[Entry]) -> Batch:
        positions, indices, _ = zip(*entries)
        places = torch.tensor(positions, dtype=torch.int64)
        if self.features is not None or self.stored is not None:
            views = [self.transform.view_of((self.seed, position)) for position in positions]
        features = {} if self.features is None else self.features.get(indices, views)
        if self.stored is not None:
            (stored,) = self.stored.get(indices, views).values()
            return Batch(self.stored.labels_of(indices), places, stored=stored, features=features)
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
        batch = Batch(torch.tensor(labels, dtype=torch.int64), places, images, features=features, replaced=replaced)
        return dataclasses.replace(batch, unread=self.source.unread())


def _same(batch: Batch | str) -> Batch | str:
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
    sys.excepthook = _say_unless_hung_up
    for number in _HELD - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


def _say_unless_hung_up(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """What a worker prints of an error in the thread through which it hands over memory, the only one that is not passed
    on: nothing where the main process, which was stopped, took no more of it."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _require_shared_memory(reader: _Reader, entries: int, workers: int) -> None:
    """UserError where the batches that wait for the main process do not fit into /dev/shm: it would wait for ever.

    Args:
        entries: of a batch.
    """
    if sys.platform != "linux" or not os.path.isdir(SHARED_MEMORY):
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # ranks that share it, as torchrun and accelerate say
    needed = here * workers * PREFETCH * entries * reader.bytes_each()
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        fitting = int(workers * free / needed)
        raise UserError(
            f"{SHARED_MEMORY} has {human_bytes(free)} free, and {workers} decoding processes"
            f"{f' on each of {here} ranks' if here > 1 else ''} hand over batches there that take {human_bytes(needed)}. "
            f"Set workers={fitting} (data.workers={fitting} or --workers {fitting}), or give the container more: docker run "
            f"--shm-size={-(-needed // 2**30) + 1}g"
        )


def _who_hung_up() -> UserError | None:
    """Why a decoding process let go of its end of a pipe; None where it is still there.

    The pipe of a process breaks a moment before the system reports its end, which torch's signal handler then raises.
    """
    try:
        time.sleep(5)
    except RuntimeError as error:
        return lost_worker(error)
    return None


@contextlib.contextmanager
def _any_number_of_workers() -> Iterator[None]:
    """Without torch's warning of more workers than cores: the default is so on a small machine, and none is lost by it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


def _run(reader: _Reader, order: Iterable[list[Entry]], workers: int, pin: bool = False) -> Iterator[Batch]:
    """Batches for the lists of entries in `order`, in that order, read by `workers` processes (0: by this one)."""
    start_method = (reader.source and reader.source.start_method) or ("fork" if sys.platform == "linux" else "spawn")
    context = multiprocessing.get_context(start_method)
    closing = context.Event()
    options: dict[str, Any] = {}
    if workers:
        order = iter(order)
        first = list(itertools.islice(order, 1))
        order = itertools.chain(first, order)
        _require_shared_memory(reader, len(first[0]) if first else 0, workers)
        worker_start = functools.partial(_prepare_worker, closing)
        options = {"multiprocessing_context": context, "worker_init_fn": worker_start, "prefetch_factor": PREFETCH}
    # DataLoader draws a seed for its workers: from a generator of its own, so that torch's global one is left alone.
    with _any_number_of_workers():
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
    try:
        # half an iterator leaves workers behind, for which the end of this process would wait
        with undivided(), _any_number_of_workers():
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
            try:
                batches = iter(loader)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for batch in batches:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch
    except RuntimeError as error:
        raise lost_worker(error) or error from error
    except (ConnectionError, EOFError) as error:
        raise _who_hung_up() or error from error
    finally:
        if not closing.is_set():  # at exit it is, and setting it again would need modules that are gone
            closing.set()
        atexit.unregister(closing.set)


@dataclass(eq=False)
class Loader:
    """This rank's part of an endless run."""

    source: DataSource | None  # the pictures; may be None when `stored` is given
    transform: Transform
    seed: int  # of the run; keys order and augmentation
    global_batch: int  # images per step over all ranks
    rank: int = 0  # this process ...
    world: int = 1  # ... of so many
    workers: int = 0  # processes that decode; 0 decodes in this one
    on_corrupt: str = "replace"  # unreadable pictures by the next readable one; or "raise"
    max_corrupt: float = 1.0  # the share of them above which the run stops
    pin: bool = False  # put batches into pinned memory when there is a GPU
    features: FeatureCache | None = None  # cached teacher features; handed out as Batch.features
    stored: FeatureCache | MomentFiles | None = (
        None  # cached latents; handed out as Batch.stored, and no picture is read
    )
    tell: Callable[[str], None] | None = None  # is told of each kind of thing that a stream holds and that is not read

    def __post_init__(self):
        if self.global_batch < 1 or self.global_batch % self.world:
            raise UserError(f"global batch {self.global_batch} must be a positive multiple of {self.world} ranks.")
        if self.workers < 0:
            raise UserError(f"workers = {self.workers} must be 0 or more.")
        if self.source is None and self.stored is None:
            raise UserError("a loader needs pictures or stored latents, and got neither.")
        for cache in (self.features, self.stored):
            if cache is not None:
                cache.check(self.source, self.transform)
        if self.stored is not None and len(self.stored.arrays) != 1:
            names = ", ".join(self.stored.arrays)
            raise UserError(f"{self.stored.path} holds {names}; stored latents must be a single array.")
        self._reader = _Reader(self.source, self.transform, self.seed, self.on_corrupt, self.features, self.stored)
        self.images_per_epoch = len(self.stored if self.source is None else self.source)
        self.replaced = Replaced(self.images_per_epoch, self.max_corrupt, self.world, "of the training")
        self.unread: dict[int, Kinds] = {}

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
        workers = self.workers
        if self.source is not None:
            self.source.start_at(self.seed, images_seen, self.rank, self.world)
            workers = 0 if self.source.one_process else workers
        for batch in _run(self._reader, self.order(images_seen), workers, self.pin):
            self.replaced.add(batch.replaced, len(batch))
            if batch.unread:
                self._note(batch.unread)
            yield batch

    def _note(self, unread: dict[int, Kinds]) -> None:
        known = {kind for kinds in self.unread.values() for kind in kinds}
        self.unread |= unread
        for kind, (_, first) in (item for kinds in unread.values() for item in kinds.items()):
            if kind not in known and self.tell is not None:
                self.tell(f"not read: {kind} ({first}); counted at the end")
            known.add(kind)

    def left_out(self) -> tuple[str, ...]:
        """What this rank found in a stream and did not read, counted and named."""
        total = LeftOut()
        for kinds in self.unread.values():
            for kind, (count, first) in kinds.items():
                total.add(kind, first, count)
        return total.describe()


def listed_batches(
    source: DataSource,
    transform: Transform,
    batches: Iterable[Sequence[int]],
    workers: int = 0,
    on_corrupt: str = "raise",
    views: Sequence[int | None] = (None,),
) -> Iterator[Batch]:
    """One batch for each list of indices in `batches`, of whatever lengths, in that order. Positions are indices.

    Args:
        views: of every picture, in a row; None: the one that the transform draws.
    """
    reader = _Reader(source, transform, 0, on_corrupt)
    order = ([(int(i), int(i), view) for i in indices for view in views] for indices in batches)
    return _run(reader, order, 0 if source.inexact else workers)  # a stream gives each process others


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
