"""WebDataset tar shards as a random-access source.

Every shard is indexed once: where each picture starts, how long it is, its key and its label. The index is kept in
`<shard>.index.npz` next to the shard, or in the cache folder when that place is read-only, and is made again when size
or modification time of the shard differ. Pictures are then read by offset, so order and resume do not depend on shards.

Members: `<key>.<jpg|jpeg|png|webp>` with `<key>.cls` (ASCII class index; also cls.txt, label.txt, class_id.txt) else a
`<key>.json` with the index under one of LABEL_KEYS; the key ends at the first dot of the file name, as WebDataset defines
it, and may have a name before the extension (`<key>.image.png`). Other members are ignored. Where labels are missing, even for some pictures only,
there are none; `unlabelled` then names the first such picture, for what needs labels (data.base.require_labels).
Shards behind http://, https:// and hf:// are streamed instead (data/stream.py).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from core.errors import UserError
from core.files import replacing
from data.base import MAX_CLASSES, ListedSource, PackedStrings

T = TypeVar("T")
PICTURES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "cls.txt", "label.txt", "class_id.txt", "class.txt", "json")
LABEL_KEYS = ("label", "cls", "class", "class_id", "class_index")  # of a .json, the first that is there
MAX_JSON = 1 << 20  # bytes
INDEX_VERSION = 3
MAX_SHARDS = 100_000
MAX_OPEN_SHARDS = 64  # below the usual limit of 1024 descriptors, with room for several sources


# ---------------------------------------------------------------------------------------------------------------------
# Which shards
# ---------------------------------------------------------------------------------------------------------------------
def expand_braces(pattern: str) -> list[str]:
    """ "a-{00..02}.tar" -> three names; "{x,y}" lists alternatives. Several groups multiply."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
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
    found: dict[str, None] = {}
    missing = []
    for name in expand_braces(os.path.expanduser(pattern)):
        name = os.path.join(glob.escape(name), "*.tar") if os.path.isdir(name) else name
        names = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else [name]
        names = [n for n in names if os.path.isfile(n)]
        found.update(dict.fromkeys(names))
        if not names:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"wds://{pattern}: no shard called {', '.join(missing[:3])}{more}. Check the folder and the range."
        )
    return [Path(name) for name in found]


# ---------------------------------------------------------------------------------------------------------------------
# The index of one shard
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class ShardIndex:
    """Pictures of one shard in file order; label -1 marks a picture without one."""

    keys: PackedStrings
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray


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


def choose_picture(found: list[tuple[str, T]], where: str) -> T:
    """Of the (member's name, content) that one key has: the one without a name before its extension, else the only one."""
    plain = [pair for pair in found if split_name(pair[0])[1] in PICTURES]
    chosen = plain or found
    if len(chosen) > 1:
        raise UserError(
            f"{where}: two pictures have one key, {chosen[0][0]} and {chosen[1][0]}. Keys, which end at the "
            "first dot, must be unique within a shard."
        )
    return chosen[0][1]


def parse_label(data: bytes, where: str) -> int | None:
    """The class index in a label's member; None for a .json without one."""
    text = data.strip()
    if where.lower().endswith(".json"):
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no JSON ({error}). Pack the shard again.") from None
        given = [content[key] for key in LABEL_KEYS if key in content] if isinstance(content, dict) else []
        if not given or given[0] is None:
            return None
        text = str(given[0]).encode() if type(given[0]) in (int, str) else data
    if not re.fullmatch(rb"[0-9]{1,9}", text) or int(text) >= MAX_CLASSES:
        raise UserError(
            f"{where} holds {text[:60]!r}; expected a class index from 0 to {MAX_CLASSES - 1} in ASCII digits."
        )
    return int(text)


def scan_shard(path: Path) -> ShardIndex:
    """Read all headers of a shard."""
    found: dict[str, list[tuple[str, tuple[int, int]]]] = {}  # key -> its pictures
    labels: dict[str, int] = {}
    told: dict[str, tuple[bytes, str]] = {}  # what a .json says counts where there is no .cls
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep every header in memory
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                key, extension = split_name(member.name)
                if is_picture(extension):
                    found.setdefault(key, []).append((member.name, (member.offset_data, member.size)))
                elif extension in LABELS:
                    data = tar.extractfile(member).read(MAX_JSON if extension == "json" else 64)
                    if extension == "json":
                        told[key] = data, member.name
                    else:
                        labels[key] = parse_label(data, f"{path}: {member.name}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as an uncompressed tar file ({error}). Copy or pack it again."
        ) from error
    pictures = {key: choose_picture(members, str(path)) for key, members in found.items()}
    for key, (data, name) in told.items():
        if key not in labels and (label := parse_label(data, f"{path}: {name}")) is not None:
            labels[key] = label
    for key in labels:
        if key not in pictures:
            raise UserError(
                f"{path}: {key} has a label but no picture (.{', .'.join(PICTURES)}). Pack the shard again."
            )
    spans = np.array(list(pictures.values()), dtype=np.int64).reshape(-1, 2)
    keys = PackedStrings(key.encode("utf-8", "surrogateescape") for key in pictures)
    return ShardIndex(keys, spans[:, 0], spans[:, 1], np.array([labels.get(k, -1) for k in pictures], dtype=np.int64))


def _index_places(path: Path) -> list[Path]:
    """Where the index of a shard may lie, best place first."""
    name = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=12).hexdigest()
    cache = os.environ.get("TESSERA_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tessera"
    )
    return [path.with_name(path.name + ".index.npz"), Path(cache, "shards", f"{name}.index.npz")]


def _load_index(place: Path, stamp: np.ndarray) -> ShardIndex | None:
    """A stored index if it is there, whole, and made from the shard as it is now."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            keys = PackedStrings.from_arrays(stored["blob"], stored["ends"])
            return ShardIndex(keys, stored["offsets"], stored["sizes"], stored["labels"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _save_index(place: Path, stamp: np.ndarray, index: ShardIndex) -> bool:
    """Write atomically, so that ranks indexing the same shard at once do not disturb each other."""
    try:
        with replacing(place, sync=False) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                stamp=stamp,
                blob=index.keys.blob,
                ends=index.keys.ends,
                offsets=index.offsets,
                sizes=index.sizes,
                labels=index.labels,
            )
        return True
    except (OSError, UserError):
        return False


def shard_index(path: Path, keep: bool = True) -> ShardIndex:
    """The index of a shard, from its file if that is valid. keep=False neither looks for the file nor writes it."""
    status = path.stat()
    stamp = np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)
    places = _index_places(path) if keep else []
    for place in places:
        if (stored := _load_index(place, stamp)) is not None:
            return stored
    index = scan_shard(path)
    for place in places:
        if _save_index(place, stamp, index):
            break
    return index


# ---------------------------------------------------------------------------------------------------------------------
# The source
# ---------------------------------------------------------------------------------------------------------------------
class ShardSource(ListedSource):
    """All pictures of the shards, in shard order.

    Args:
        shards: tar files.
        class_names: names by label; None numbers the classes.
        keep_index: False for small shards that are not worth an index file.

    Attributes:
        unlabelled: which picture lacks its label while others have theirs; None where all or none have one.
    """

    unlabelled: str | None = None

    def __init__(self, shards: list[Path], class_names: list[str] | None = None, keep_index: bool = True):
        indices = [shard_index(path, keep_index) for path in shards]
        blob = np.concatenate([i.keys.blob for i in indices])
        starts = np.cumsum([0] + [i.keys.blob.size for i in indices])
        ends = np.concatenate([i.keys.ends + start for i, start in zip(indices, starts)])
        labels = np.concatenate([i.labels for i in indices])
        names = f"{shards[0]}" + (f" to {shards[-1]}" if len(shards) > 1 else "")
        if not len(labels):
            raise UserError(f"{names}: no pictures found. Expected members <key>.jpg, .jpeg, .png or .webp.")
        keys = PackedStrings.from_arrays(blob, ends)
        missing = np.flatnonzero(labels < 0)
        if 0 < len(missing) < len(labels):
            first = int(missing[0])
            shard = shards[int(np.searchsorted(np.cumsum([len(i.labels) for i in indices]), first, side="right"))]
            self.unlabelled = (
                f"{names}: {len(missing)} of {len(labels)} pictures have no label (.cls or .json), the first is "
                f"{keys[first].decode('utf-8', 'replace')} in {shard}."
            )
            class_names = None
        sizes = np.concatenate([i.sizes for i in indices])
        super().__init__(keys, None if len(missing) else labels, class_names, sizes)
        self.shards = shards
        self.offsets = np.concatenate([i.offsets for i in indices])
        self.shard_ends = np.cumsum([len(i.labels) for i in indices])
        self._files: OrderedDict[int, int] = OrderedDict()  # shard number -> descriptor, least recently used first

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]

    def read(self, index: int) -> bytes:
        shard = int(np.searchsorted(self.shard_ends, index, side="right"))
        size = int(self.sizes[index])
        # pread has no file position, so descriptors inherited by forked workers do not disturb each other.
        data = os.pread(self._descriptor(shard), size, int(self.offsets[index]))
        if len(data) < size:
            raise OSError(f"{self.shards[shard]} ends early: it changed after it was indexed")
        return data

    def __getstate__(self) -> dict:
        """Descriptors mean nothing to a spawned worker."""
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self):
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)
