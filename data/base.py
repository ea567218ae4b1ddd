"""What sources share: `ListedSource`, whose pictures are listed up front, and `StreamSource`, which has no fixed order.

Both hand out a `Sample` (8-bit RGB, label, key). A picture that cannot be decoded raises `UnreadablePicture`, which the
loader may replace; mistakes of the user raise `UserError`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from core.errors import UserError
from core.files import expanded
from core.rng import permutation, uniform_scalar
from core.specs import DataSource, Kinds, Sample
from data.decode import UnreadablePicture, decode_rgb, is_turned

MAX_CLASSES = 1_000_000
LOOKED_AT = 64  # pictures whose EXIF orientation is looked at before a run
MEASURED = 1 << 16  # files whose sizes a run records: asking for those of ImageNet would take a minute on a shared disk
AT_ONCE = 16  # questions to a disk, which may be far away
BUFFER = 1000  # pictures of a stream that a process shuffles, still compressed


def whole_number(text: str, option: str, limit: int, where: str) -> int:
    """The number that an option of a URL gives, from 1 to `limit`; UserError for anything else."""
    if not re.fullmatch(r"[0-9]{1,12}", text) or not 1 <= int(text) <= limit:
        raise UserError(f"{where}: {option}={text} must be a whole number from 1 to {limit}.")
    return int(text)


def spread(length: int, count: int) -> list[int]:
    """The numbers of `count` of `length` things, or of all where there are fewer: from the first on, at equal distances."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


class PackedStrings:
    """A read-only list of byte strings in two arrays.

    A million Python strings would be copied into every loader worker, because reading one touches its reference count.
    """

    def __init__(self, strings: Iterable[bytes]):
        strings = list(strings)
        self.ends = np.cumsum([len(s) for s in strings], dtype=np.int64)
        self.blob = np.frombuffer(b"".join(strings), dtype=np.uint8)

    @classmethod
    def from_arrays(cls, blob: np.ndarray, ends: np.ndarray) -> PackedStrings:
        packed = cls.__new__(cls)
        packed.blob, packed.ends = blob, ends
        return packed

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index > 0 else 0
        return self.blob[start : self.ends[index]].tobytes()


class LeftOut:
    """Counts what lies beside the pictures and is not read, by kind, and remembers the first of each."""

    def __init__(self):
        self.kinds: Kinds = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        before, first = self.kinds.get(kind, (0, name.encode("utf-8", "replace").decode()))  # safe to print
        self.kinds[kind] = before + count, first

    def add_file(self, name: str) -> None:
        """Not of hidden files, which systems leave everywhere."""
        base = os.path.basename(name)
        if not base.startswith("."):
            self.add(os.path.splitext(base)[1].lower() or "without extension", name)

    def add_folder(self, name: str) -> None:
        """One that is not looked into; not of hidden ones."""
        if not os.path.basename(name).startswith("."):
            self.add("folder(s)", name)

    def describe(self) -> tuple[str, ...]:
        return tuple(f"{n:,} {kind} ({first}{', ...' if n > 1 else ''})" for kind, (n, first) in self.kinds.items())


# ---------------------------------------------------------------------------------------------------------------------
# Sources with random access
# ---------------------------------------------------------------------------------------------------------------------
class ListedSource(DataSource):
    """A data source whose samples are listed up front; subclasses implement `read`.

    Args:
        keys: one byte string per sample.
        labels: (N,) integers, or None for pictures without labels (all get label 0).
        class_names: names by label; None numbers the classes.
        sizes: (N,) bytes per picture where they are known at no cost; part of the fingerprint.
    """

    def __init__(
        self,
        keys: PackedStrings,
        labels: np.ndarray | None,
        class_names: list[str] | None = None,
        sizes: np.ndarray | None = None,
    ):
        self.packed_keys = keys
        self.sizes = np.zeros(0, dtype=np.int64) if sizes is None else sizes
        self.labels = np.zeros(len(keys), dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
        if class_names is None:
            class_names = ["unlabelled"] if labels is None else [str(i) for i in range(int(self.labels.max()) + 1)]
        self.class_names, self.num_classes = class_names, len(class_names)
        if self.labels.max() >= self.num_classes:
            raise UserError(
                f"label {self.labels.max()} of {self.key(int(self.labels.argmax()))} has no name: "
                f"{self.num_classes} classes are listed. Complete the file of class names."
            )
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.packed_keys)

    def key(self, index: int) -> str:
        """Name of a sample, safe to print."""
        return self.packed_keys[index].decode("utf-8", "replace")

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The undecoded picture. OSError if it cannot be read."""

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = self.key(index)
        try:
            data = self.read(index)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # not the picture's fault
                raise UserError(
                    f"{key} cannot be read: too many files are open. Raise the limit (ulimit -n)."
                ) from error
            raise UnreadablePicture(key, error.strerror or str(error)) from error
        return Sample(decode_rgb(data, key, self.upright), int(self.labels[index]), key)

    def count_turned(self) -> tuple[int, int]:
        """(those with an EXIF orientation, pictures looked at) of a few that are spread over the source."""
        seen, turned = spread(len(self), LOOKED_AT), 0
        for i in seen:
            with contextlib.suppress(OSError):
                turned += is_turned(self.read(i))
        return turned, len(seen)

    def contents(self) -> str:
        """A digest of the bytes of a few pictures that are spread over the source: a resized copy has the same names."""
        digest = hashlib.blake2b(digest_size=16)
        for i in spread(len(self), LOOKED_AT):
            with contextlib.suppress(OSError):
                digest.update(hashlib.blake2b(self.read(i)).digest())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            for array in (self.packed_keys.blob, self.packed_keys.ends, self.labels, self.sizes):
                digest.update(f"{array.nbytes};".encode())
                digest.update(np.ascontiguousarray(array).data)
            digest.update("\n".join(self.class_names).encode("utf-8", "replace") + b"\nupright" * self.upright)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


class FileSource(ListedSource):
    """Pictures in single files below `root`; keys are their paths relative to it."""

    def __init__(
        self,
        root: Path,
        paths: Iterable[str | bytes],
        labels: np.ndarray | None,
        class_names: list[str] | None = None,
        sizes: np.ndarray | None = None,
    ):
        super().__init__(PackedStrings(map(os.fsencode, paths)), labels, class_names, sizes)
        self.root = root
        self._file_sizes: str | None = None

    def read(self, index: int) -> bytes:
        return (self.root / os.fsdecode(self.packed_keys[index])).read_bytes()

    def file_sizes(self) -> str:
        """Of more than MEASURED files, that of so many which are spread over the source; -1 for one that is not there. The
        fingerprint stays what runs and caches without it noted."""
        if self._file_sizes is not None:
            return self._file_sizes
        seen, root = spread(len(self), MEASURED), os.fsencode(self.root)

        def sizes(part: list[int]) -> list[int]:
            return [_bytes_of(os.path.join(root, self.packed_keys[i])) for i in part]

        with ThreadPoolExecutor(AT_ONCE) as threads:
            parts = list(threads.map(sizes, (seen[i : i + 1024] for i in range(0, len(seen), 1024))))
        self._file_sizes = hashlib.blake2b(np.concatenate(parts).astype("<i8").tobytes(), digest_size=16).hexdigest()
        return self._file_sizes


def _bytes_of(path: bytes) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def read_class_names(path: str | Path) -> list[str]:
    """Class names, one per line."""
    path = expanded(path)
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"class names {path} cannot be read ({error}). Give a text file with one name per line."
        ) from error
    while names and not names[-1].strip():
        names.pop()
    if not names:
        raise UserError(f"class names {path} is empty. Give a text file with one name per line.")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Sources without
# ---------------------------------------------------------------------------------------------------------------------
Record = tuple[bytes, int, str]  # undecoded picture, label, key


class StreamSource(DataSource):
    """Pictures in whatever order they arrive; `source[index]` is the next one of this process, whatever the index.

    The order is NOT a function of (seed, position) alone: it also depends on how many processes read, and pictures pass
    through a shuffle buffer. A resumed run goes on at the next part. `inexact` says so in the log.

    Args:
        name: for messages and the fingerprint.
        samples: pictures per epoch.
        class_names: names by label.
    """

    inexact = (
        "data is streamed: the order depends on the number of processes, a resumed run goes on at another place "
        "of the stream and may repeat or skip pictures"
    )

    def __init__(self, name: str, samples: int, class_names: list[str]):
        self.name, self.samples, self.class_names, self.num_classes = name, samples, class_names, len(class_names)
        self._iterator: Iterator[Record] | None = None
        self._unread: dict[int, Kinds] = {}
        self.start_at(0, 0, 0, 1)

    def start_at(self, seed: int, images_seen: int, rank: int, world: int) -> None:
        self.seed, self.images_seen, self.rank, self.world = seed, images_seen, rank, world
        self._process = -1

    def __len__(self) -> int:
        return self.samples

    def fingerprint(self) -> str:
        description = f"stream {self.name} {self.samples}" + " upright" * self.upright
        return hashlib.blake2b(description.encode(), digest_size=16).hexdigest()

    def unread(self) -> dict[int, Kinds]:
        unread, self._unread = self._unread, {}
        return unread

    @abstractmethod
    def count_shards(self) -> int:
        """How many parts the stream has."""

    @abstractmethod
    def shard(self, number: int) -> Iterator[Record]:
        """Records of one part; whoever comes to its end notes in `_unread` what it holds besides."""

    def records(self, reader: int, readers: int) -> Iterator[Record]:
        """Endless records of one of `readers` readers, which share shards, or pictures where shards are few."""
        epoch, seen = divmod(self.images_seen, self.samples)
        shards = self.count_shards()
        by_shard = shards >= readers
        skipped = int(seen / self.samples * shards)
        number = 0
        while True:
            before = number
            for place, shard in enumerate(permutation(shards, self.seed, "shards", epoch)[skipped:].tolist()):
                if by_shard and place % readers != reader:
                    continue
                for record in self.shard(shard):
                    number += 1
                    if by_shard or number % readers == reader:
                        yield record
            if number == before and not skipped:
                raise UserError(
                    f"{self.name}: no pictures in its shards. Check the name, and for tar files that members "
                    "are called <key>.jpg, .png or .webp."
                )
            epoch, skipped = epoch + 1, 0

    def _shuffled(self) -> Iterator[Record]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        reader, readers = self.rank * workers + number, self.world * workers
        buffer: list[Record] = []
        for count, record in enumerate(self.records(reader, readers)):
            buffer.append(record)
            if len(buffer) >= min(BUFFER, max(1, self.samples // readers)):
                chosen = int(len(buffer) * uniform_scalar(self.seed, self.images_seen, "stream", reader, count))
                buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
                yield buffer.pop()

    def __getitem__(self, index: int) -> Sample:
        if self._process != os.getpid():  # also in a worker that inherited an iterator
            self._process, self._iterator = os.getpid(), self._shuffled()
        data, label, key = next(self._iterator)
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"{key} has label {label}, {self.num_classes} classes are known. Give ?num_classes=N or ?classes=FILE."
            )
        return Sample(decode_rgb(data, key, self.upright), label, key)

    def __getstate__(self) -> dict[str, Any]:
        """An open stream cannot be sent to a spawned worker."""
        return {**self.__dict__, "_iterator": None, "_process": -1}


def stream_options(url: str, options: dict[str, str], samples: int | None = None) -> tuple[int, list[str]]:
    """(pictures per epoch, class names) from `samples`, `num_classes` and `classes` of a URL."""
    if "samples" in options:
        samples = whole_number(options["samples"], "samples", 10**11, url)
    if samples is None:
        raise UserError(
            f"{url}: a stream does not know how many pictures it has. Add ?samples=N, the size of an epoch."
        )
    if "classes" in options:
        return samples, read_class_names(options["classes"])
    if "num_classes" in options:
        return samples, [str(i) for i in range(whole_number(options["num_classes"], "num_classes", MAX_CLASSES, url))]
    return samples, ["unlabelled"]
