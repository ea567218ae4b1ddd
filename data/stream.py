"""Sources without random access: shards on a web server or the Hugging Face hub, streamed as they are read.

Their order is NOT a function of (seed, position) alone: it also depends on how many processes read, and pictures pass
through a shuffle buffer. A resumed run goes on at the next shard. `inexact` says so in the log; copy the shards to a
disk and name them with wds:// to have an exact order.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import posixpath
import re
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import BinaryIO

from torch.utils.data import get_worker_info

from core.errors import UserError
from core.rng import permutation, uniform_scalar
from core.specs import Sample
from data.base import MAX_CLASSES, decode_rgb, read_class_names
from data.wds import LABELS, choose_picture, expand_braces, is_picture, parse_label, split_name

BUFFER = 1000  # pictures that a process shuffles, still compressed
ATTEMPTS = 4  # to read a shard
TIMEOUT = 60.0  # seconds without an answer
Record = tuple[bytes, int, str]  # picture, label, key


class StreamSource:
    """Pictures in whatever order they arrive; `source[index]` is the next one of this process, whatever the index.

    Args:
        name: for messages and the fingerprint.
        samples: pictures per epoch.
        class_names: names by label.
    """

    inexact = (
        "data is streamed: the order depends on the number of processes, a resumed run goes on at another place "
        "of the stream and may repeat or skip pictures"
    )

    one_process = False  # whether it cannot be read by workers
    start_method: str | None = None  # of workers, where it matters

    def __init__(self, name: str, samples: int, class_names: list[str]):
        self.name, self.samples, self.class_names, self.num_classes = name, samples, class_names, len(class_names)
        self._iterator: Iterator[Record] | None = None
        self.start_at(0, 0, 0, 1)

    def start_at(self, seed: int, images_seen: int, rank: int, world: int) -> None:
        """Where the run is; called before its first batch."""
        self.seed, self.images_seen, self.rank, self.world = seed, images_seen, rank, world
        self._process = -1

    def __len__(self) -> int:
        return self.samples

    def fingerprint(self) -> str:
        return hashlib.blake2b(f"stream {self.name} {self.samples}".encode(), digest_size=16).hexdigest()

    def count_shards(self) -> int:
        """How many parts the stream has."""
        raise NotImplementedError

    def shard(self, number: int) -> Iterator[Record]:
        """Records of one part."""
        raise NotImplementedError

    def records(self, reader: int, readers: int) -> Iterator[Record]:
        """Endless records of one of `readers` readers, which share shards, or pictures where shards are few."""
        epoch, seen = divmod(self.images_seen, self.samples)
        shards = self.count_shards()
        by_shard = shards >= readers
        skipped = int(seen / self.samples * shards)
        number = 0
        while True:
            found = False
            for place, shard in enumerate(permutation(shards, self.seed, "shards", epoch)[skipped:].tolist()):
                if by_shard and place % readers != reader:
                    continue
                for record in self.shard(shard):
                    found, number = True, number + 1
                    if by_shard or number % readers == reader:
                        yield record
            if not found and not skipped:
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
        return Sample(decode_rgb(data, key), label, key)

    def __getstate__(self) -> dict:
        """An open stream cannot be sent to a spawned worker."""
        return {**self.__dict__, "_iterator": None, "_process": -1}


def stream_options(url: str, options: dict[str, str], samples: int | None = None) -> tuple[int, list[str]]:
    """(pictures per epoch, class names) from `samples`, `num_classes` and `classes` of a URL."""
    numbers = {}
    for key, limit in (("samples", 10**11), ("num_classes", MAX_CLASSES)):
        if key in options:
            if not re.fullmatch(r"[0-9]{1,12}", options[key]) or not 1 <= int(options[key]) <= limit:
                raise UserError(f"{url}: {key}={options[key]} must be a whole number from 1 to {limit}.")
            numbers[key] = int(options[key])
    samples = numbers.get("samples", samples)
    if samples is None:
        raise UserError(
            f"{url}: a stream does not know how many pictures it has. Add ?samples=N, the size of an epoch."
        )
    if "classes" in options:
        return samples, read_class_names(options["classes"])
    return samples, [str(i) for i in range(numbers["num_classes"])] if "num_classes" in numbers else ["unlabelled"]


# ---------------------------------------------------------------------------------------------------------------------
# Tar shards over the network
# ---------------------------------------------------------------------------------------------------------------------
def hub_shards(pattern: str) -> list[str]:
    """hf:// addresses for a pattern such as datasets/ORG/REPO/train-*.tar; private ones use the token of the login."""
    from huggingface_hub import HfFileSystem

    found: list[str] = []
    system = HfFileSystem()
    for name in expand_braces(pattern):
        try:
            listed = sorted(p for p in system.ls(posixpath.dirname(name), detail=False) if fnmatch.fnmatch(p, name))
        except Exception as error:  # of many libraries, all of which mean: it is not there or may not be read
            raise UserError(
                f"hf://{pattern} cannot be listed ({type(error).__name__}: {str(error)[:200]}). Check the "
                "name, the network, and for private data that you are logged in (hf auth login)."
            ) from None
        found += listed
    if not found:
        raise UserError(f"hf://{pattern} matches no file. Check the pattern.")
    return [f"hf://{name}" for name in found]


def open_url(url: str) -> BinaryIO:
    """A remote file, read from its start."""
    if url.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return HfFileSystem().open(url.removeprefix("hf://"), "rb", block_size=1 << 22)
    return urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "tessera"}), timeout=TIMEOUT)


class RemoteShards(StreamSource):
    """WebDataset shards behind http://, https:// or hf://.

    Args:
        urls: of the shards.
        samples, class_names: see StreamSource; a single class takes pictures without labels.
    """

    def __init__(self, name: str, urls: list[str], samples: int, class_names: list[str]):
        super().__init__(name, samples, class_names)
        self.urls = urls
        if urls[0].startswith("hf://"):
            self.start_method = "spawn"  # connections of the hub's client do not survive a fork

    def count_shards(self) -> int:
        return len(self.urls)

    def shard(self, number: int) -> Iterator[Record]:
        """Records of one shard; a broken connection is taken up again where it broke."""
        url, given = self.urls[number], 0
        for attempt in range(ATTEMPTS):
            try:
                for number, record in enumerate(self._members(url)):
                    if number >= given:
                        given += 1
                        yield record
                return
            except (OSError, tarfile.TarError, EOFError) as error:
                if attempt == ATTEMPTS - 1 or (
                    isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404)
                ):
                    raise UserError(
                        f"{url} cannot be read ({type(error).__name__}: {str(error)[:200]}). "
                        "Check the address and the network."
                    ) from None
                time.sleep(2.0**attempt - 0.9)

    def _members(self, url: str) -> Iterator[Record]:
        key: str | None = None
        pictures: list[tuple[str, bytes]] = []
        labels: dict[
            str, tuple[bytes, str]
        ] = {}  # extension -> (content, where); a .json counts where there is no .cls

        def finished() -> Iterator[Record]:
            where, label = f"{url}: {key}", 0
            if not pictures and labels.keys() - {"json"}:
                raise UserError(f"{where} has a label but no picture. Pack the shard again.")
            if pictures and self.num_classes > 1:
                told = sorted(labels, key=lambda extension: extension == "json")
                label = parse_label(*labels[told[0]]) if told else None
                if label is None:
                    raise UserError(
                        f"{where} has no label (.cls or .json). Label all pictures, or leave out num_classes."
                    )
            if pictures:
                yield choose_picture(pictures, url), label, where

        with open_url(url) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                this, extension = split_name(member.name)
                if not member.isreg() or not (is_picture(extension) or extension in LABELS):
                    continue
                if this != key:
                    yield from finished()
                    key, pictures, labels = this, [], {}
                data = tar.extractfile(member).read()
                if is_picture(extension):
                    pictures.append((member.name, data))
                else:
                    labels[extension] = data, f"{url}: {member.name}"
        yield from finished()


def open_remote_shards(pattern: str, options: dict[str, str]) -> RemoteShards:
    """wds://https://..., wds://hf://datasets/ORG/REPO/train-*.tar"""
    scheme = pattern.partition("://")[0]
    if scheme not in ("http", "https", "hf"):
        raise UserError(
            f"wds://{pattern}: {scheme}:// cannot be streamed; http://, https:// and hf:// can. "
            "Copy or mount the shards and give their path."
        )
    samples, class_names = stream_options(f"wds://{pattern}", options)
    urls = hub_shards(pattern.removeprefix("hf://")) if scheme == "hf" else expand_braces(pattern)
    return RemoteShards(f"wds://{pattern}", urls, samples, class_names)
