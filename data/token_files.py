"""Token files of other code bases, into a token store and out of it.

    numbered   FQGAN and LlamaGen: NAME_codes/<i>_<branch>.npy, int64 (1, views, length), NAME_labels/<i>.npy, (1,)
    jsonl      reAR and RAR: one {"class_id": c, "tokens": [...]} per line, the views of a picture in adjacent lines

Importing is a conversion that is done once: rows go straight into the memory-mapped store, so memory does not grow with
the number of lines, a killed conversion goes on, and ranks share the work. Every row is checked; a bad one is reported
with its file or line number.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Callable, Iterator

import numpy as np

from core.arrays import read_npy
from core.errors import UserError, nearest
from core.files import explain_os_errors, read_json, write_json
from core.specs import Codes, MultiScale
from data.base import MAX_CLASSES
from data.cache import Builder
from data.loader import part
from data.tokens import TokenStore, check_codes, shape_of, write_codes

CodeSpec = Codes | MultiScale
Progress = Callable[[int], None]
MAX_DUPLICATES = 1024  # samples that a distributed sampler may have appended to fill up its last batch
PIECE = 1 << 22  # bytes
MARKER = "tessera_export.json"


# ---------------------------------------------------------------------------------------------------------------------
# Numbered .npy files (FQGAN, spec section 5.1; LlamaGen without branch names)
# ---------------------------------------------------------------------------------------------------------------------
class NumberedFiles:
    """A folder with NAME_codes/ and NAME_labels/.

    Args:
        folder: the code path, or NAME_codes itself.
        spec: of the tokenizer that the codes belong to; its branch names are the suffixes of the files.
    """

    def __init__(self, folder: str | Path, spec: CodeSpec):
        self.spec, folder = spec, Path(folder)
        candidates = [folder] if folder.name.endswith("_codes") else sorted(folder.glob("*_codes"))
        if len(candidates) != 1 or not candidates[0].is_dir():
            raise UserError(f"{folder}: expected one folder called like imagenet256_codes in it, found "
                            f"{', '.join(c.name for c in candidates) or 'none'}. Give the folder that holds it.")
        self.codes = candidates[0]
        self.labels = self.codes.with_name(f"{self.codes.name.removesuffix('_codes')}_labels")
        if not self.labels.is_dir():
            raise UserError(f"{self.labels}: there is no such folder, which should hold <i>.npy with the labels.")
        numbers = np.array([int(e.name[:-4]) for e in os.scandir(self.labels) if re.fullmatch(r"\d+\.npy", e.name)],
                           dtype=np.int64)
        if not len(numbers):
            raise UserError(f"{self.labels}: no labels. Expected 0.npy, 1.npy ...")
        missing = np.setdiff1d(np.arange(numbers.max() + 1), numbers)
        if len(missing):
            raise UserError(f"{self.labels}: {len(missing)} of {numbers.max() + 1} labels are missing, the first is "
                            f"{missing[0]}.npy. Extract the codes of those pictures again.")
        self.suffixes = self._suffixes()
        self.views = self._load(self.codes / f"0{self.suffixes[0]}.npy").shape[1]
        self.samples = len(numbers) - self._duplicates(len(numbers))

    def _suffixes(self) -> list[str]:
        found = sorted(p.name[1:-4] for p in self.codes.glob("0*.npy") if re.fullmatch(r"0(_\w+)?\.npy", p.name))
        wanted = [f"_{name}" for name in self.spec.names] if isinstance(self.spec, Codes) and self.spec.names else None
        if found == [""] and self.spec.branches == 1:
            return found
        if wanted is None or sorted(wanted) != found:
            expected = ", ".join(f"0{s}.npy" for s in wanted or [""])
            raise UserError(f"{self.codes}: picture 0 has {', '.join(f'0{s}.npy' for s in found) or 'no files'}, this "
                            f"tokenizer ({self.spec}) has {expected}. Give the config of the tokenizer that made them.")
        return wanted

    def _load(self, path: Path) -> np.ndarray:
        array = read_npy(path)
        if array.dtype.kind not in "iu":
            raise UserError(f"{path} holds {array.dtype}, expected integers. Extract it again.")
        return array

    def row(self, index: int) -> tuple[np.ndarray, int]:
        """(views, length, branches) and the label of picture `index`."""
        length, _ = shape_of(self.spec)
        branches = []
        for suffix in self.suffixes:
            path = self.codes / f"{index}{suffix}.npy"
            array = self._load(path)
            if array.shape != (1, self.views, length):
                raise UserError(f"{path} has shape {list(array.shape)}, expected [1, {self.views}, {length}].")
            branches.append(array[0])
        codes = np.stack(branches, axis=-1)
        check_codes(self.spec, codes, str(self.codes / f"{index}*.npy"))
        return codes, int(self._load(self.labels / f"{index}.npy").reshape(-1)[0])

    def _duplicates(self, count: int) -> int:
        """How many of the last samples repeat the first ones, as a sampler does that fills up its last batch."""
        last, label = self.row(count - 1)
        for first in range(min(MAX_DUPLICATES, count // 2)):
            codes, other = self.row(first)
            if other == label and np.array_equal(codes, last):
                tail = range(count - 1 - first, count)
                same = all(np.array_equal(self.row(i)[0], self.row(i - tail.start)[0]) for i in tail)
                return len(tail) if same else 0
        return 0

    def copy_to(self, target: Builder, progress: Progress | None = None) -> None:
        """Write this rank's part of the store."""
        done = 0
        for start, stop in target.spans(64):
            rows = [self.row(i) for i in range(start, stop)]
            _check_labels([label for _, label in rows], target, lambda i: self.labels / f"{start + i}.npy")
            write_codes(target, start, *_stack(rows), self.spec)
            done += stop - start
            if progress:
                progress(done)


def _stack(rows: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Codes and labels of several rows."""
    return np.stack([codes for codes, _ in rows]), np.array([label for _, label in rows])


def _check_labels(labels: list[int], target: Builder, place: Callable[[int], object]) -> None:
    classes = len(target.plan["facts"]["classes"])
    for i, label in enumerate(labels):
        if not 0 <= label < classes:
            raise UserError(f"{place(i)}: class {label} does not exist, there are {classes} (0 to {classes - 1}).")


def export_numbered(store: TokenStore, folder: str | Path, rank: int = 0, world: int = 1,
                    progress: Progress | None = None) -> Path:
    """Write a store as numbered files; a killed export goes on. Returns the folder of the codes."""
    names = [f"_{name}" for name in store.spec.names] if isinstance(store.spec, Codes) and store.spec.names else [""]
    if len(names) != shape_of(store.spec)[1]:
        raise UserError(f"{store.path} holds {store.spec} without branch names, which the files are named after.")
    folder = Path(folder)
    codes, labels = (folder / f"imagenet{store.transform.image_size}_{kind}" for kind in ("codes", "labels"))
    marker = folder / MARKER
    if marker.is_file():
        if (found := read_json(marker)["content"]) != store.content:
            raise UserError(f"{folder} holds codes of another store ({found}). Choose another folder.")
    elif codes.exists():
        raise UserError(f"{codes} exists and was not written from this store. Choose another folder.")
    for made in (codes, labels):
        made.mkdir(parents=True, exist_ok=True)
    write_json(marker, {"content": store.content, "tokenizer": store.tokenizer})
    rows, classes = store.rows("codes"), store.rows("labels")
    mine = part(len(store), rank, world)
    for index in mine:
        done = labels / f"{index}.npy"
        if not done.exists():  # written last
            for branch, suffix in enumerate(names):
                np.save(codes / f"{index}{suffix}.npy", rows[index][None, :, :, branch].astype(np.int64))
            temporary = labels / f".{index}.tmp"
            with open(temporary, "wb") as file:
                np.save(file, classes[index : index + 1].astype(np.int64))
            temporary.replace(done)
        if progress:
            progress(index - mine.start + 1)
    return codes


# ---------------------------------------------------------------------------------------------------------------------
# One JSON object per line (reAR and RAR: maskgitvq.jsonl)
# ---------------------------------------------------------------------------------------------------------------------
class JsonLines:
    """A .jsonl file of tokens. Opening it counts the lines in one pass and notes where every block of them starts.

    Args:
        path: the file.
        spec: of the tokenizer that the tokens belong to.
        views: adjacent lines that are views of one picture.
        chunk: pictures per block.
        progress: called with the bytes read.
    """

    def __init__(self, path: str | Path, spec: CodeSpec, views: int, chunk: int, progress: Progress | None = None):
        self.path, self.spec, self.views, self.chunk = Path(path), spec, views, chunk
        with explain_os_errors(path):
            self.starts, lines = self._count(progress)
        if not lines:
            raise UserError(f"{path} is empty. Expected lines like {{\"class_id\": 0, \"tokens\": [...]}}.")
        if lines % views:
            raise UserError(f"{path} has {lines} lines, which is not a multiple of the {views} views of a picture. "
                            "Is the file complete? Set data.crop=ten for ten views, data.flip=true for two.")
        self.samples = lines // views

    def _count(self, progress: Progress | None) -> tuple[list[int], int]:
        block, starts, lines, offset, last = self.views * self.chunk, [0], 0, 0, b"\n"
        with open(self.path, "rb") as file:
            while piece := file.read(PIECE):
                count = piece.count(b"\n")
                if lines // block != (lines + count) // block:
                    ends = np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == 10)
                    first = block - lines % block  # lines until the next block starts
                    starts += [offset + int(end) + 1 for end in ends[first - 1 :: block]]
                lines, offset, last = lines + count, offset + len(piece), piece[-1:]
                if progress:
                    progress(offset)
        return starts, lines + (last != b"\n")

    def _parse(self, line: bytes, number: int, classes: int) -> tuple[np.ndarray, int]:
        """(length, branches) and the class of one line."""
        where = f"{self.path} line {number}"
        try:
            entry = json.loads(line)
            label, codes = entry["class_id"], np.array(entry["tokens"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{where} is not {{\"class_id\": int, \"tokens\": [ints]}} ({type(error).__name__}: "
                            f"{error}): {line[:60]!r}. Repair or remove it.") from None
        if type(label) is not int or not 0 <= label < classes:
            raise UserError(f"{where}: class_id {label!r} is not a class from 0 to {classes - 1}.")
        if codes.dtype.kind != "i" or codes.size != np.prod(shape_of(self.spec)):
            raise UserError(f"{where}: {codes.size} tokens of type {codes.dtype}; the tokenizer makes {self.spec}.")
        codes = codes.reshape(shape_of(self.spec))
        check_codes(self.spec, codes, where)
        return codes, label

    def _rows(self, start: int, stop: int, classes: int) -> Iterator[tuple[np.ndarray, int]]:
        """(views, length, branches) and the class of pictures start to stop - 1, which lie in one block."""
        block = start // self.chunk
        skipped = (start - block * self.chunk) * self.views
        with open(self.path, "rb") as file:
            file.seek(self.starts[block])
            for _ in range(skipped):
                file.readline()
            number = block * self.chunk * self.views + skipped
            for _ in range(start, stop):
                lines = []
                for _ in range(self.views):
                    number += 1
                    lines.append(self._parse(file.readline(), number, classes))
                if len({label for _, label in lines}) > 1:
                    raise UserError(f"{self.path} lines {number - self.views + 1} to {number} should be {self.views} "
                                    f"views of one picture but have classes {sorted({c for _, c in lines})}. Set "
                                    "data.crop=ten for ten views, data.flip=true for two, data.flip=false for one.")
                yield _stack(lines)[0], lines[0][1]

    def row(self, index: int) -> tuple[np.ndarray, int]:
        """(views, length, branches) and the label of picture `index`."""
        return next(self._rows(index, index + 1, MAX_CLASSES))

    def copy_to(self, target: Builder, progress: Progress | None = None) -> None:
        """Write this rank's part of the store."""
        done, classes = 0, len(target.plan["facts"]["classes"])
        for start, stop in target.spans(target.chunk):
            rows = list(self._rows(start, stop, classes))
            write_codes(target, start, *_stack(rows), self.spec)
            done += stop - start
            if progress:
                progress(done)


def export_jsonl(store: TokenStore, path: str | Path, progress: Progress | None = None) -> None:
    """Write a store as lines, the views of a picture one after another; several branches as one list per place."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists. Delete it or choose another name.")
    codes, labels = store.rows("codes"), store.rows("labels")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with explain_os_errors(path), open(temporary, "w", encoding="ascii") as file:
            for index in range(len(store)):
                label = int(labels[index])
                for view in codes[index]:
                    listed = view[:, 0].tolist() if view.shape[1] == 1 else view.tolist()
                    file.write(json.dumps({"class_id": label, "tokens": listed}) + "\n")
                if progress:
                    progress(index + 1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_import(path: str | Path, spec: CodeSpec, views: int, chunk: int,
                progress: Progress | None = None) -> NumberedFiles | JsonLines:
    """The token files at `path`: a folder of numbered .npy files or a .jsonl file."""
    path = Path(path).expanduser()
    if not path.exists():
        known = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"there is no {path}.{nearest(path.name, known)}")
    if path.is_dir():
        return NumberedFiles(path, spec)
    return JsonLines(path, spec, views, chunk, progress)
