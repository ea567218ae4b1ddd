"""WebDataset tar shards: on a disk with random access, behind http://, https:// and hf:// as a stream.

Members: `<key>.<jpg|jpeg|png|webp>` with `<key>.cls` (ASCII class index; also cls.txt, label.txt, class_id.txt) else a
`<key>.json` with the index under one of LABEL_KEYS; the key ends at the first dot of the file name, as WebDataset
defines it, and may have a name before the extension (`<key>.image.png`). Other members are ignored.

On a disk every shard is indexed once: where each picture starts, how long it is, its key and its label. The index is
kept in `<shard>.index.npz` next to the shard, or in the cache folder when that place is read-only, and is made again
when size or modification time of the shard differ. Pictures are then read by offset, so order and resume do not depend
on shards. Where labels are missing, even for some pictures only, there are none; `unlabelled` then names the first such
picture, for what needs labels (data.checks.require_labels).
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import itertools
import json
import os
import posixpath
import re
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np

from core.errors import UserError
from core.files import refuse_text, replacing
from data.base import MAX_CLASSES, LeftOut, ListedSource, PackedStrings, Record, StreamSource, stream_options

PICTURES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "cls.txt", "label.txt", "class_id.txt", "class.txt", "json")  # the first that a key has counts
LONELY = ".json without a picture"
CUT = "shard(s) that may have been cut, as the mark of a tar's end is missing"
LABEL_KEYS = ("label", "cls", "class", "class_id", "class_index")  # of a .json, the first that is there
MAX_LABEL = 1 << 20  # bytes
MAX_SHARDS = 100_000
MAX_OPEN_SHARDS = 64  # below the usual limit of 1024 descriptors, with room for several sources
ATTEMPTS = 4  # to read a remote shard
TIMEOUT = 60.0  # seconds without an answer
Content = TypeVar("Content")  # of a picture: where it lies in the shard, or its bytes


# ---------------------------------------------------------------------------------------------------------------------
# Which shards
# ---------------------------------------------------------------------------------------------------------------------
def expand_braces(pattern: str) -> list[str]:
    """ "a-{00..02}.tar" -> three names; "{x,y}" lists alternatives. Several groups multiply."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first or last - first >= MAX_SHARDS:
            raise UserError(f"{pattern}: {{{match[1]}}} must count upwards over at most {MAX_SHARDS} shards.")
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        choices = [f"{i:0{width}d}" for i in range(first, last + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise UserError(f"{pattern}: {{{match[1]}}} is neither a range {{0000..0012}} nor a list {{a,b}}.")
    tails = expand_braces(pattern[match.end() :])
    if len(choices) * len(tails) > MAX_SHARDS:
        raise UserError(f"{pattern} stands for more than {MAX_SHARDS} shards.")
    return [pattern[: match.start()] + choice + tail for choice in choices for tail in tails]


def find_shards(pattern: str) -> list[Path]:
    """Existing shards that `pattern` names, without repeats: in brace order, sorted inside a glob or a folder."""
    shards: dict[str, None] = {}
    missing = []
    for name in expand_braces(os.path.expanduser(pattern)):
        name = os.path.join(glob.escape(name), "*.tar") if os.path.isdir(name) else name
        names = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        names = [n for n in names if os.path.isfile(n)]
        shards.update(dict.fromkeys(names))
        if not names:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"wds://{pattern}: no shard called {', '.join(missing[:3])}{more}. Check the folder and the range."
        )
    return [Path(name) for name in shards]


def absent(shards: Sequence[Path]) -> list[str]:
    """Names that are missing between those of shards that are numbered: lost ones, which a folder does not tell of."""
    numbered: dict[tuple[str, str], dict[int, str]] = {}
    for shard in shards:
        if name := re.fullmatch(r"(.*?)([0-9]+)(\D*)", str(shard)):
            numbered.setdefault((name[1], name[3]), {})[int(name[2])] = name[2]
    names = []
    for (before, behind), digits in numbered.items():
        width = len(digits[min(digits)])
        gaps = (n for n in range(min(digits), max(digits)) if n not in digits)
        names += [f"{before}{n:0{width}d}{behind}" for n in itertools.islice(gaps, MAX_SHARDS)]
    return names


def hub_shards(pattern: str) -> list[str]:
    """hf:// addresses for a pattern such as datasets/ORG/REPO/train-*.tar; private ones use the token of the login."""
    from huggingface_hub import HfFileSystem

    names: list[str] = []
    system = HfFileSystem()
    for name in expand_braces(pattern):
        try:
            listed = system.ls(posixpath.dirname(name), detail=False)
        except Exception as error:  # of many libraries, all of which mean: it is not there or may not be read
            raise UserError(
                f"hf://{pattern} cannot be listed ({type(error).__name__}: {str(error)[:200]}). Check the "
                "name, the network, and for private data that you are logged in (hf auth login)."
            ) from None
        names += sorted(fnmatch.filter(listed, name))
    if not names:
        raise UserError(f"hf://{pattern} matches no file. Check the pattern.")
    return [f"hf://{name}" for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# What a shard holds
# ---------------------------------------------------------------------------------------------------------------------
def split_name(member: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member's name."""
    folder, name = os.path.split(member)
    stem, _, extension = name.partition(".")
    extension = extension.lower()
    last = extension.rpartition(".")[2]
    return os.path.join(folder, stem), last if last in ("cls", "json") else extension


def is_picture(extension: str) -> bool:
    """Also of "image.png"."""
    return extension.rpartition(".")[2] in PICTURES


class Header(tarfile.TarInfo):
    """Of a member. tarfile takes anything that is none for the end of a shard; here only what ends a tar is its end.

    Where the file ends without one, `ends_early` is set on the TarFile.
    """

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # pyright: ignore[reportAttributeAccessIssue]
            if tar.offset == 0:
                raise
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from None
        except tarfile.EmptyHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            tar.ends_early = True
            raise


def ends_early(tar: tarfile.TarFile) -> bool:
    """Whether a shard that was read to its end has no mark of it: it may have been cut there, or its writer killed."""
    return getattr(tar, "ends_early", False)


def members(tar: tarfile.TarFile, left_out: LeftOut | None = None) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, extension, member) of every picture and label in a shard, in file order; `left_out` is told of the others."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # tarfile would keep every header in memory
        key, extension = split_name(member.name)
        hidden = os.path.basename(member.name).startswith(".")  # ._k.jpg, as some systems add to archives
        known = not hidden and (is_picture(extension) or extension in LABELS)
        if member.isreg() and not member.issparse() and known:
            yield key, extension, member
        elif left_out is not None and member.isreg() and not known:
            left_out.add_file(member.name)
        elif left_out is not None and not member.isdir():
            left_out.add("link(s) or sparse member(s)", member.name)


@dataclass(slots=True)
class Entry(Generic[Content]):
    """What belongs to one key: pictures as (member's name, content), labels as extension -> (member's name, bytes)."""

    shard: str
    key: str
    pictures: list[tuple[str, Content]] = field(default_factory=list)
    labels: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def add_label(self, extension: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self.labels[extension] = member.name, tar.extractfile(member).read(MAX_LABEL)

    def picture(self) -> Content:
        """The one without a name before its extension, else the only one."""
        plain = [picture for picture in self.pictures if split_name(picture[0])[1] in PICTURES]
        first, *others = plain or self.pictures
        if others:
            raise UserError(
                f"{self.shard}: two pictures have one key, {first[0]} and {others[0][0]}. Keys, which end at the "
                "first dot, must be unique within a shard."
            )
        return first[1]

    def label(self) -> int | None:
        """The class index; None without one. What a .json says counts where there is nothing else."""
        extension = next((e for e in LABELS if e in self.labels), None)
        if extension is None:
            return None
        name, data = self.labels[extension]
        return parse_label(data, f"{self.shard}: {name}")


def parse_label(data: bytes, where: str) -> int | None:
    """The class index in a label's member; None for a .json without one."""
    text = data.strip()
    if where.lower().endswith(".json"):
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no JSON ({error}). Pack the shard again.") from None
        values = [content[key] for key in LABEL_KEYS if key in content] if isinstance(content, dict) else []
        if not values or values[0] is None:
            return None
        text = str(values[0]).encode() if type(values[0]) in (int, str) else data
    if not re.fullmatch(rb"[0-9]{1,9}", text) or int(text) >= MAX_CLASSES:
        raise UserError(
            f"{where} holds {text[:60].decode(errors='replace')!r}; expected a class index from 0 to {MAX_CLASSES - 1} in ASCII digits."
        )
    return int(text)


# ---------------------------------------------------------------------------------------------------------------------
# Shards on a disk
# ---------------------------------------------------------------------------------------------------------------------
# Pictures of one shard in file order: blob and lengths of their keys, offsets and sizes of their bytes, labels (-1: none);
# and what is left out, rows of (kind, how many, the first)
Index = dict[str, np.ndarray]
ARRAYS = ("blob", "lengths", "offsets", "sizes", "labels", "left_out")
INDEX_VERSION = 6


def scan_shard(path: Path) -> Index:
    """Read all headers of a shard."""
    entries: dict[str, Entry[tuple[int, int]]] = {}
    left_out = LeftOut()
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:", tarinfo=Header) as tar:
            for key, extension, member in members(tar, left_out):
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                entry = entries.setdefault(key, Entry(str(path), key))
                if is_picture(extension):
                    entry.pictures.append((member.name, (member.offset_data, member.size)))
                else:
                    entry.add_label(extension, tar, member)
            if ends_early(tar):
                left_out.add(CUT, str(path))
    except (tarfile.TarError, EOFError, OSError) as error:
        refuse_text(path)
        raise UserError(
            f"{path} cannot be read as an uncompressed tar file ({error}). Copy or pack it again."
        ) from error
    labels = {key: label for key, entry in entries.items() if (label := entry.label()) is not None}
    if bare := [key for key in labels if not entries[key].pictures]:
        raise UserError(
            f"{path}: {bare[0]} has a label but no picture (.{', .'.join(PICTURES)}). Pack the shard again."
        )
    for entry in entries.values():
        if not entry.pictures:
            left_out.add(LONELY, entry.labels["json"][0])
    pictured = [entry for entry in entries.values() if entry.pictures]
    pictured.sort(key=lambda entry: entry.pictures[0][1])  # labels may lie in another order
    for entry in pictured:
        if entry.key not in labels and "json" in entry.labels:
            left_out.add(f".json without {', '.join(LABEL_KEYS[:-1])} or {LABEL_KEYS[-1]}", entry.labels["json"][0])
    offsets, sizes = np.array([entry.picture() for entry in pictured], dtype=np.int64).reshape(-1, 2).T
    keys = [entry.key.encode("utf-8", "surrogateescape") for entry in pictured]
    return {
        "blob": np.frombuffer(b"".join(keys), dtype=np.uint8),
        "lengths": np.array([len(key) for key in keys], dtype=np.int64),
        "offsets": offsets,
        "sizes": sizes,
        "labels": np.array([labels.get(entry.key, -1) for entry in pictured], dtype=np.int64),
        "left_out": np.array([(kind, n, first) for kind, (n, first) in left_out.kinds.items()], dtype=str).reshape(
            -1, 3
        ),
    }


def _index_places(path: Path) -> list[Path]:
    """Where the index of a shard may lie, best place first."""
    name = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=12).hexdigest()
    cache = os.environ.get("TESSERA_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tessera"
    )
    return [path.with_name(path.name + ".index.npz"), Path(cache, "shards", f"{name}.index.npz")]


def shard_index(path: Path, keep: bool = True) -> Index:
    """The index of a shard, from its file if that is whole and made from the shard as it is now.

    Args:
        keep: False neither looks for the file nor writes it.
    """
    status = path.stat()
    stamp = np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)
    places = _index_places(path) if keep else []
    for place in places:
        damaged = contextlib.suppress(OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile)
        with damaged, np.load(place, allow_pickle=False) as stored:
            if np.array_equal(stored["stamp"], stamp):
                return {name: stored[name] for name in ARRAYS}
    index = scan_shard(path)
    for place in places:
        with contextlib.suppress(OSError, UserError):  # then the next place
            # atomic: ranks that index one shard at once do not disturb each other
            with replacing(place, sync=False) as temporary, open(temporary, "wb") as file:
                np.savez(file, stamp=stamp, **index)
            break
    return index


class ShardSource(ListedSource):
    """All pictures of the shards, in shard order.

    Args:
        shards: tar files.
        class_names: names by label; None numbers the classes.
        keep_index: False for small shards that are not worth an index file.
    """

    def __init__(self, shards: list[Path], class_names: list[str] | None = None, keep_index: bool = True):
        indices = [shard_index(path, keep_index) for path in shards]
        index = {name: np.concatenate([part[name] for part in indices]) for name in ARRAYS}
        self.shards, self.offsets = shards, index["offsets"]
        self.shard_ends = np.cumsum([len(part["labels"]) for part in indices])
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, least recently used first
        labels, keys = index["labels"], PackedStrings.from_arrays(index["blob"], np.cumsum(index["lengths"]))
        names = f"{shards[0]}" + (f" to {shards[-1]}" if len(shards) > 1 else "")
        if not len(labels):
            raise UserError(f"{names}: no pictures found. Expected members <key>.jpg, .jpeg, .png or .webp.")
        missing = np.flatnonzero(labels < 0)
        if 0 < len(missing) < len(labels):
            first = int(missing[0])
            self.unlabelled = (
                f"{names}: {len(missing)} of {len(labels)} pictures have no label (.cls or .json), the first is "
                f"{keys[first].decode('utf-8', 'replace')} in {shards[self._shard_of(first)]}."
            )
            class_names = None
        super().__init__(keys, None if len(missing) else labels, class_names, index["sizes"])
        left_out = LeftOut()
        for kind, count, name in index["left_out"].tolist():
            left_out.add(kind, name, int(count))
        self.left_out = left_out.describe()

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self.shard_ends, index, side="right"))

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def read(self, index: int) -> bytes:
        shard, size = self._shard_of(index), int(self.sizes[index])
        # pread has no file position, so descriptors inherited by forked workers do not disturb each other.
        data = os.pread(self._descriptor(shard), size, int(self.offsets[index]))
        if len(data) < size:
            raise OSError(f"{self.shards[shard]} ends early: it changed after it was indexed")
        return data

    def __getstate__(self) -> dict[str, Any]:
        """Descriptors mean nothing to a spawned worker."""
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self):
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Shards over the network
# ---------------------------------------------------------------------------------------------------------------------
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
        url, delivered, cut = self.urls[number], 0, -1
        for attempt in range(ATTEMPTS):
            left_out = LeftOut()
            try:
                for record in itertools.islice(self._records(url, left_out), delivered, None):
                    delivered += 1
                    yield record
                if CUT in left_out.kinds and delivered > cut and attempt < ATTEMPTS - 1:
                    cut = delivered
                    raise EOFError("it ends without the mark of its end")
                if left_out.kinds:
                    self._unread[number] = left_out.kinds
                return
            except (OSError, tarfile.TarError, EOFError) as error:
                hopeless = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404)
                if hopeless or attempt == ATTEMPTS - 1:
                    raise UserError(
                        f"{url} cannot be read ({type(error).__name__}: {str(error)[:200]}). "
                        "Check the address and the network."
                    ) from None
                time.sleep(2.0**attempt - 0.9)

    def _records(self, url: str, left_out: LeftOut) -> Iterator[Record]:
        """Records of a shard from its start. Members of one key lie side by side, or are several entries."""
        with open_url(url) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=Header) as tar:
            for key, group in itertools.groupby(members(tar, left_out), key=lambda member: member[0]):
                entry: Entry[bytes] = Entry(url, key)
                for _, extension, member in group:
                    if is_picture(extension):
                        entry.pictures.append((member.name, tar.extractfile(member).read()))
                    else:
                        entry.add_label(extension, tar, member)
                if entry.pictures:
                    yield entry.picture(), self._label(entry, left_out), f"{url}: {key}"
                elif entry.labels.keys() - {"json"}:
                    raise UserError(f"{url}: {key} has a label but no picture. Pack the shard again.")
                elif entry.labels:
                    left_out.add(LONELY, entry.labels["json"][0])
            if ends_early(tar):
                left_out.add(CUT, url)

    def _label(self, entry: Entry[bytes], left_out: LeftOut) -> int:
        if self.num_classes == 1:
            for name, _ in entry.labels.values():
                left_out.add("label(s), as there is one class (num_classes=N or classes=FILE for more)", name)
            return 0
        label = entry.label()
        if label is None:
            raise UserError(
                f"{entry.shard}: {entry.key} has no label (.cls or .json). Label all pictures, or leave out num_classes."
            )
        return label


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
