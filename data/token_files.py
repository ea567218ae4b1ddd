"""Token files of other code bases, into a token store and out of it.

    numbered   FQGAN and LlamaGen: NAME_codes/<i>_<branch>.npy, int64 (1, views, length), NAME_labels/<i>.npy, (1,)
    jsonl      reAR and RAR: one {"class_id": c, "tokens": [...]} per line, the views of a picture in adjacent lines;
               ranks wrote it one after another (data/pairing.py finds out which line is which picture)
    moments    RecTok (--use_cached_tokens): <root>/<path of the picture>.npz with the posterior's `moments` and, of the
               mirror image, `moments_flip`, (N, 2C) each; a run reads one of them per picture, nothing is imported

Importing is a conversion that is done once: rows go straight into the memory-mapped store, so memory does not grow with
the number of lines, a killed conversion goes on, and ranks share the work. Every row is checked; a bad one is reported
with its file or line number.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.arrays import NpzFile, read_npy
from core.chunks import ALONE, Chunks, enter
from core.dist import World
from core.errors import UserError, nearest, plainly
from core.files import expanded, explain_os_errors, refuse_text, replacing
from core.specs import Codes, DataSource, MultiScale
from data.base import MAX_CLASSES, FileSource
from data.cache import Builder, Rows
from data.tokens import TokenStore, check_codes, rows_of, shape_of
from data.transforms import Transform

CodeSpec = Codes | MultiScale
Progress = Callable[[int], None]
MAX_DUPLICATES = 1024  # samples that a distributed sampler may have appended to fill up its last batch
PIECE = 1 << 22  # bytes
ROWS = 64  # samples at once
MOMENTS = ("moments", "moments_flip")  # by view
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
            raise UserError(
                f"{folder}: expected one folder called like imagenet256_codes in it, found "
                f"{', '.join(c.name for c in candidates) or 'none'}. Give the folder that holds it."
            )
        self.codes = candidates[0]
        self.labels = self.codes.with_name(f"{self.codes.name.removesuffix('_codes')}_labels")
        if not self.labels.is_dir():
            raise UserError(f"{self.labels}: there is no such folder, which should hold <i>.npy with the labels.")
        numbers = np.array(
            [int(e.name[:-4]) for e in os.scandir(self.labels) if re.fullmatch(r"\d+\.npy", e.name)], dtype=np.int64
        )
        if not len(numbers):
            raise UserError(f"{self.labels}: no labels. Expected 0.npy, 1.npy ...")
        missing = np.setdiff1d(np.arange(numbers.max() + 1), numbers)
        if len(missing):
            raise UserError(
                f"{self.labels}: {len(missing)} of {numbers.max() + 1} labels are missing, the first is "
                f"{missing[0]}.npy. Extract the codes of those pictures again."
            )
        self.suffixes = self._suffixes()
        self.views = self._load(self.codes / f"0{self.suffixes[0]}.npy").shape[1]
        self.samples = len(numbers) - self._duplicates(len(numbers))

    def _suffixes(self) -> list[str]:
        present = sorted(p.name[1:-4] for p in self.codes.glob("0*.npy") if re.fullmatch(r"0(_\w+)?\.npy", p.name))
        wanted = [f"_{name}" for name in self.spec.names] if isinstance(self.spec, Codes) and self.spec.names else None
        if present == [""] and self.spec.branches == 1:
            return present
        if wanted is None or sorted(wanted) != present:
            expected = ", ".join(f"0{s}.npy" for s in wanted or [""])
            raise UserError(
                f"{self.codes}: picture 0 has {', '.join(f'0{s}.npy' for s in present) or 'no files'}, this "
                f"tokenizer ({self.spec}) has {expected}. Give the config of the tokenizer that made them."
            )
        return wanted

    def _load(self, path: Path) -> np.ndarray:
        array = read_npy(path)
        if array.dtype.kind not in "iu":
            raise UserError(f"{path} holds {array.dtype}, expected integers. Extract it again.")
        return array

    def row(self, index: int) -> tuple[np.ndarray, int]:
        """(views, length, branches) and the label of entry `index`."""
        length, _ = shape_of(self.spec)
        branches = []
        for suffix in self.suffixes:
            path = self.codes / f"{index}{suffix}.npy"
            array = self._load(path)
            if array.shape != (1, self.views, length):
                raise UserError(f"{path} has shape {list(array.shape)}, expected [1, {self.views}, {length}].")
            branches.append(array[0])
        codes = np.stack(branches, axis=-1)
        check_codes(self.spec, codes, self.where(index))
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

    def where(self, index: int) -> str:
        """What to look at when entry `index` is wrong."""
        return str(self.codes / f"{index}*.npy")


def export_numbered(
    store: TokenStore, folder: str | Path, world: World = ALONE, progress: Progress | None = None
) -> Path:
    """Write a store as numbered files; a killed export goes on. Returns the folder of the codes. Collective."""
    names = [f"_{name}" for name in store.spec.names] if isinstance(store.spec, Codes) and store.spec.names else [""]
    if len(names) != shape_of(store.spec)[1]:
        raise UserError(f"{store.path} holds {store.spec} without branch names, which the files are named after.")
    marker = Path(folder) / MARKER
    codes, labels = (marker.with_name(f"imagenet{store.transform.image_size}_{kind}") for kind in ("codes", "labels"))
    rows, classes = store.rows("codes"), store.rows("labels")
    written: set[str] = set()  # files of labels, on the main rank

    def claim() -> None:
        if not marker.is_file() and codes.exists():
            raise UserError(f"{codes} exists and was not written from this store. Choose another folder.")
        facts = {"content": store.content, "tokenizer": store.tokenizer}
        enter(marker, facts, "codes of another store", "Choose another folder.")
        for place in (codes, labels):
            place.mkdir(parents=True, exist_ok=True)
        written.update(os.listdir(labels))

    def share(mine: list[int]) -> None:
        for index in mine:
            for branch, suffix in enumerate(names):
                np.save(codes / f"{index}{suffix}.npy", rows[index][None, :, :, branch].astype(np.int64))
            with replacing(labels / f"{index}.npy", sync=False) as temporary, open(temporary, "wb") as file:
                np.save(file, classes[index : index + 1].astype(np.int64))  # last: it tells that the others are whole
            chunks.advance(1)

    world.on_main(claim)
    chunks = Chunks(len(store), 1, world, lambda index: f"{index}.npy" in written)
    chunks.run(share, progress)
    return codes


# ---------------------------------------------------------------------------------------------------------------------
# One JSON object per line (reAR and RAR: maskgitvq.jsonl)
# ---------------------------------------------------------------------------------------------------------------------
class JsonLines:
    """A .jsonl file of tokens, or several of them as one. Opening counts the lines and notes where every entry starts.

    Args:
        path: the file, or a folder of the ranks' files, which follow each other in the order of their numbers.
        spec: of the tokenizer that the tokens belong to.
        views: adjacent lines that are views of one picture.
        progress: called with the bytes read.
    """

    def __init__(self, path: str | Path, spec: CodeSpec, views: int, progress: Progress | None = None):
        self.path, self.spec, self.views = Path(path), spec, views
        self.files = [self.path] if self.path.is_file() else rank_files(self.path)
        self.spans: list[np.ndarray] = []  # of each file: where its entries start, and its end
        read = 0  # bytes of the files before
        for file in self.files:
            refuse_text(file)
            with explain_os_errors(file):
                self.spans.append(self._scan(file, read, progress))
            read += file.stat().st_size
        self.firsts = np.cumsum([0] + [len(starts) - 1 for starts in self.spans])  # entry that each file begins with
        self.samples = int(self.firsts[-1])

    def _scan(self, path: Path, before: int, progress: Progress | None) -> np.ndarray:
        """Where the entries of one file start, and its end."""
        ends, offset = [np.zeros(0, dtype=np.int64)], 0  # of lines
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                ends.append(np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == ord("\n")) + (offset + 1))
                offset += len(piece)
                if progress:
                    progress(before + offset)
        lines = np.concatenate(ends)
        if offset and offset not in lines[-1:]:  # no newline at the end
            lines = np.append(lines, offset)
        if not len(lines):
            raise UserError(f'{path} is empty. Expected lines like {{"class_id": 0, "tokens": [...]}}.')
        if len(lines) % self.views:
            raise UserError(
                f"{path} has {len(lines)} lines, which is not a multiple of the {self.views} views of a picture. "
                "Is the file complete? Set data.crop=ten for ten views, data.flip=true for two."
            )
        return np.concatenate([[0], lines[self.views - 1 :: self.views]])

    def _place(self, index: int) -> tuple[Path, int, int, int]:
        """(file, number of its line before entry `index`, first byte, end)"""
        number = int(np.searchsorted(self.firsts, index, side="right")) - 1
        entry = index - int(self.firsts[number])
        return self.files[number], entry * self.views, *map(int, self.spans[number][entry : entry + 2])

    def where(self, index: int) -> str:
        """What to look at when entry `index` is wrong."""
        path, line, *_ = self._place(index)
        return f"{path} lines {line + 1} to {line + self.views}" if self.views > 1 else f"{path} line {line + 1}"

    def _parse(self, line: bytes, where: str) -> tuple[np.ndarray, int]:
        """(length, branches) and the class of one line."""
        try:
            entry = json.loads(line)
            label, codes = entry["class_id"], np.array(entry["tokens"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f'{where} is not {{"class_id": int, "tokens": [ints]}} ({plainly(error)}): '
                f"{line[:60].decode(errors='replace')!r}. Repair or remove it."
            ) from None
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise UserError(f"{where}: class_id {label!r} is not a class from 0 to {MAX_CLASSES - 1}.")
        if codes.dtype.kind != "i" or codes.size != np.prod(shape_of(self.spec)):
            raise UserError(f"{where}: {codes.size} tokens of type {codes.dtype}; the tokenizer makes {self.spec}.")
        codes = codes.reshape(shape_of(self.spec))
        check_codes(self.spec, codes, where)
        return codes, label

    def row(self, index: int) -> tuple[np.ndarray, int]:
        """(views, length, branches) and the label of entry `index`."""
        path, number, start, stop = self._place(index)
        with explain_os_errors(path), open(path, "rb") as file:
            file.seek(start)
            text = file.read(stop - start)
        lines = [
            self._parse(line, f"{path} line {number + i}")
            for i, line in enumerate(text.removesuffix(b"\n").split(b"\n"), start=1)
        ]
        if len({label for _, label in lines}) > 1:
            raise UserError(
                f"{self.where(index)} should be {self.views} views of one picture but have classes "
                f"{sorted({c for _, c in lines})}. Set data.crop=ten for ten views, data.flip=true for two, "
                "data.flip=false for one."
            )
        return np.stack([codes for codes, _ in lines]), lines[0][1]


def rank_files(folder: Path) -> list[Path]:
    """The .jsonl files of a folder, in the order of the numbers in their names."""
    files = sorted(
        folder.glob("*.jsonl"), key=lambda p: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", p.name)]
    )
    if not files:
        raise UserError(
            f"{folder}: no tokens. Expected a .jsonl file, one for each rank, or a folder imagenet256_codes."
        )
    return files


def export_jsonl(store: TokenStore, path: str | Path, progress: Progress | None = None) -> None:
    """Write a store as lines, the views of a picture one after another; several branches as one list per place."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists. Delete it or choose another name.")
    codes, labels = store.rows("codes"), store.rows("labels")
    with replacing(path) as temporary, open(temporary, "w", encoding="ascii") as file:
        for index in range(len(store)):
            label = int(labels[index])
            for view in codes[index]:
                listed = view[:, 0].tolist() if view.shape[1] == 1 else view.tolist()
                file.write(json.dumps({"class_id": label, "tokens": listed}) + "\n")
            if progress:
                progress(index + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Either of them
# ---------------------------------------------------------------------------------------------------------------------
TokenFiles = NumberedFiles | JsonLines


def open_import(path: str | Path, spec: CodeSpec, views: int, progress: Progress | None = None) -> TokenFiles:
    """The token files at `path`: a folder of numbered .npy files, a .jsonl file or a folder of these."""
    path = expanded(path)
    if not path.exists():
        known = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"there is no {path}.{nearest(path.name, known)}")
    if path.is_dir() and not any(path.glob("*.jsonl")):
        return NumberedFiles(path, spec)
    return JsonLines(path, spec, views, progress)


def copy_to(
    files: TokenFiles,
    target: Builder,
    places: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make a store from token files. Collective.

    Args:
        places: entry of each picture; None: they are as the store has them.
        labels: of the pictures, which the entries must have too; None: those of the entries are taken.
        progress: see Builder.fill.
    """
    classes = len(target.plan["facts"]["classes"])

    def checked(index: int) -> tuple[np.ndarray, int]:
        entry = index if places is None else int(places[index])
        codes, label = files.row(entry)
        if not 0 <= label < classes:
            raise UserError(
                f"{files.where(entry)}: class {label} does not exist, there are {classes} (0 to {classes - 1})."
            )
        if labels is not None and label != labels[index]:
            raise UserError(
                f"{files.where(entry)}: class {label}, but its picture, number {index}, has class "
                f"{labels[index]}. The classes of the pictures are in another order: give their names in "
                "the order of the tokens with ?classes=FILE."
            )
        return codes, label

    def make(spans: list[range]) -> Iterator[Rows]:
        for span in spans:
            codes, classes_of = zip(*(checked(index) for index in span))
            yield rows_of(np.stack(codes), span.start, files.spec), np.array(classes_of)

    target.fill(ROWS, make, progress)


# ---------------------------------------------------------------------------------------------------------------------
# Moments of RecTok's latents, read where they lie
# ---------------------------------------------------------------------------------------------------------------------
class MomentFiles:
    """What data.cache.FeatureCache is to a loader, from one file per picture.

    Args:
        root: folder of the .npz files, in the layout of the pictures.
        source: the pictures, by files: their paths name the .npz files.
        shape: (N, 2C) that the tokenizer's moments have.
    """

    def __init__(self, root: str | Path, source: DataSource, shape: tuple[int, int]):
        self.arrays = {"latents": {}}
        if not isinstance(source, FileSource):
            raise UserError("data.moments names .npz files after picture files: data.url must be folder:// or list://.")
        self.path, self.source, self.shape = expanded(root), source, shape
        self._read(0, 0)  # a wrong folder or tokenizer is found before training

    def __len__(self) -> int:
        return len(self.source)

    def check(self, source: object, transform: Transform) -> None:
        """UserError unless views are the picture and its mirror image."""
        if transform.crop != "center":
            raise UserError(f"data.moments holds centre crops and their mirror images, data.crop is {transform.crop}.")

    def _read(self, index: int, view: int) -> np.ndarray:
        path = self.path / (os.fsdecode(self.source.packed_keys[index]) + ".npz")
        with NpzFile(path) as file:
            moments = file.load(MOMENTS[view])
        if moments.shape != self.shape or moments.dtype.kind != "f" or not np.isfinite(moments).all():
            raise UserError(
                f"{path}: {MOMENTS[view]} is {moments.dtype} {list(moments.shape)} or not finite, this tokenizer's "
                f"moments are floats {list(self.shape)}. Use moments of this tokenizer."
            )
        return moments.astype(np.float32)

    def get(self, indices: Sequence[int], views: Sequence[int]) -> dict[str, Tensor]:
        """{"latents": (B, N, 2C) fp32} of (index, view) pairs."""
        rows = [self._read(index, view) for index, view in zip(indices, views)]
        return {"latents": torch.from_numpy(np.stack(rows))}

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        """(B,) int64."""
        return torch.from_numpy(self.source.labels[np.asarray(indices)].astype(np.int64))
