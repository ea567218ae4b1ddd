"""Texts and faces in reconstructions, scored as TokBench does (Wu et al. 2025): can they still be read and recognised?

    T-ACC   share of the texts that are read right in the reconstruction
    T-NED   mean of 1 - edit distance / length of the longer text: 1 is right, 0 has nothing in common
    F-Sim   mean cosine between the embeddings of a face in the original and in the reconstruction

Both are looked for in the originals, as the tokenizer gets them; texts are instead where a list says (`listed_texts`). What
is right is what the list says, or else what the same reader reads in the original. Case and spaces do not count.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from data.transforms import adm_size
from evaluation.intervals import bootstrap_percentile

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Picture = np.ndarray  # (H, W, 3) uint8, RGB
SIZES = {  # height of an instance by the picture's: below this it is ...
    "text": {"small": 0.05, "medium": 0.1, "large": float("inf")},
    "faces": {"small": 0.15, "medium": 0.3, "large": float("inf")},
}
ILLEGIBLE = "###"  # what ICDAR's lists write for a text that nobody can read


@dataclass(frozen=True)
class Face:
    """Where a face is: its box, and (P, 2) landmarks in pixels, as many as its finder gives."""

    box: Box
    points: np.ndarray


class Recogniser(ABC):
    """What other packages bring to find something in pictures."""

    name: str  # for people
    suffix: str  # of the metrics' names; "" for TokBench's own
    modules: tuple[str, ...]  # that have to be installed
    install: str  # words behind "pip install"

    @abstractmethod
    def __init__(self, device: torch.device): ...


class TextReader(Recogniser):
    """Finds and reads texts."""

    @abstractmethod
    def find(self, picture: Picture) -> list[Box]:
        """Where texts are."""

    @abstractmethod
    def read(self, crops: list[Picture]) -> list[str]:
        """What each of them says."""


class FaceNet(Recogniser):
    """Finds and recognises faces."""

    @abstractmethod
    def find(self, picture: Picture) -> list[Face]:
        """Where faces are."""

    @abstractmethod
    def embed(self, picture: Picture, faces: list[Face]) -> np.ndarray:
        """(faces, D) embeddings."""


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------
def plain(text: str) -> str:
    """Without case and spaces."""
    return "".join(text.casefold().split())


def edit_distance(a: str, b: str) -> int:
    """Characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def likeness(truth: str, read: str) -> float:
    """1 - edit distance / length of the longer one."""
    truth, read = plain(truth), plain(read)
    return 1 - edit_distance(truth, read) / max(len(truth), len(read), 1)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) of the rows of two (n, D)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


@dataclass(frozen=True)
class Values:
    """A metric of instances.

    Args:
        values: (n,).
        pictures: (n,) numbers of the pictures that they are in.
        sizes: (n,) their heights by the picture's.
    """

    values: Tensor
    pictures: Tensor
    sizes: Tensor

    def where(self, chosen: Tensor) -> Values:
        return Values(self.values[chosen], self.pictures[chosen], self.sizes[chosen])

    def minus(self, other: Values) -> Values:
        """Of the same instances."""
        return Values(self.values - other.values, self.pictures, self.sizes)

    def mean(self) -> float:
        return float(self.values.mean())

    def interval(self, replicates: int = 1000) -> tuple[float, float]:
        """95 %: pictures are drawn again, each with all of its instances, which are not independent of each other."""
        names, place = torch.unique(self.pictures, return_inverse=True)
        if len(names) < 2:
            return self.mean(), self.mean()
        sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, place, self.values)
        counts = torch.bincount(place, minlength=len(names))
        return bootstrap_percentile(lambda rows: float(sums[rows].sum() / counts[rows].sum()), len(names), replicates)


def by_size(kind: str, of: Values) -> dict[str, Values]:
    """Those of each class of sizes that has any."""
    parts, low = {}, 0.0
    for name, high in SIZES[kind].items():
        chosen = (of.sizes >= low) & (of.sizes < high)
        if chosen.any():
            parts[name] = of.where(chosen)
        low = high
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# What is found in pictures
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TextRow:
    """One text: where, what is right, and what was read."""

    picture: int
    box: Box
    truth: str
    original: str
    recon: str


@dataclass(frozen=True)
class FaceRow:
    """One face: where, and the cosine of its two embeddings."""

    picture: int
    box: Box
    cosine: float


Row = TextRow | FaceRow
Texts = Callable[[int], list[tuple[Box, str]]]  # number of a picture -> its listed texts, in pixels of the crop


def cut(picture: Picture, box: Box) -> Picture:
    """The part inside `box`, at least one pixel."""
    height, width = picture.shape[:2]
    left, top = (min(max(0, int(x)), limit - 1) for x, limit in zip(box[:2], (width, height)))
    right, bottom = (int(np.ceil(x)) for x in box[2:])
    return np.ascontiguousarray(picture[top : max(bottom, top + 1), left : max(right, left + 1)])


def text_rows(reader: TextReader, number: int, original: Picture, recon: Picture, listed: Texts | None) -> list[Row]:
    """The texts of one picture; without a list those in which the reader reads something."""
    if listed is not None:
        boxes, truths = [box for box, _ in listed(number)], [truth for _, truth in listed(number)]
    else:
        boxes, truths = reader.find(original), None
    read = [reader.read([cut(side, box) for box in boxes]) if boxes else [] for side in (original, recon)]
    rows = zip(boxes, truths or read[0], *read)
    return [TextRow(number, box, truth, a, b) for box, truth, a, b in rows if plain(truth)]


def face_rows(net: FaceNet, number: int, original: Picture, recon: Picture) -> list[Row]:
    """The faces of one picture. Embeddings of both sides are taken at the original's landmarks, as TokBench does."""
    if not (faces := net.find(original)):
        return []
    likeness = cosine(net.embed(original, faces), net.embed(recon, faces))
    return [FaceRow(number, face.box, float(value)) for face, value in zip(faces, likeness)]


def sizes_of(rows: Iterable[Row], side: int) -> Tensor:
    return torch.tensor([(row.box[3] - row.box[1]) / side for row in rows], dtype=torch.float64)


def text_metrics(rows: list[TextRow], side: int, of_originals: bool = False) -> dict[str, Values]:
    """t_acc and t_ned of reconstructions of `side` pixels, or of the originals: how well the reader reads at all."""
    values = torch.tensor(
        [likeness(row.truth, row.original if of_originals else row.recon) for row in rows], dtype=torch.float64
    )
    pictures, sizes = torch.tensor([row.picture for row in rows]), sizes_of(rows, side)
    return {"t_acc": Values((values == 1).double(), pictures, sizes), "t_ned": Values(values, pictures, sizes)}


def face_metrics(rows: list[FaceRow], side: int) -> dict[str, Values]:
    """f_sim."""
    values = torch.tensor([row.cosine for row in rows], dtype=torch.float64)
    return {"f_sim": Values(values, torch.tensor([row.picture for row in rows]), sizes_of(rows, side))}


# ---------------------------------------------------------------------------------------------------------------------
# Lists of texts
# ---------------------------------------------------------------------------------------------------------------------
def listed_texts(path: Path) -> dict[str, list[tuple[Box, str]]]:
    """From a list of JSON lines: file -> [(box, what it says), ...], in pixels of the file.

    A line is {"file": "signs/01.jpg", "texts": [{"box": [left, top, right, bottom], "says": "STOP"}]}; a box may also be the
    corners [[x, y], ...] of a polygon, which count as its bounding box. Texts that say "###" are not scored.
    """
    found: dict[str, list[tuple[Box, str]]] = defaultdict(list)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this list of texts cannot be read ({error}).") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            for text in entry["texts"]:
                if text["says"].strip() != ILLEGIBLE:
                    found[entry["file"].strip("/")].append((bounds(text["box"]), text["says"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path}, line {number}: expected {{"file": "a.jpg", "texts": [{{"box": [left, top, right, bottom], '
                f'"says": "STOP"}}]}}, found {line.strip()[:80]}'
            ) from error
    if not found:
        raise UserError(f"{path} lists no texts.")
    return dict(found)


def bounds(box: list[Any]) -> Box:
    """Of four numbers, or of corners; ValueError for anything else."""
    corners = np.asarray(box, dtype=np.float64)
    if corners.shape == (4,):
        corners = corners.reshape(2, 2)
    if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 2 or not np.isfinite(corners).all():
        raise ValueError(box)
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    if left == right or top == bottom:
        raise ValueError(box)
    return float(left), float(top), float(right), float(bottom)


def in_crop(box: Box, size: tuple[int, int], side: int) -> Box | None:
    """Where a box of a picture of `size` (width, height) is in ADM's centre crop; None where it is not whole there."""
    resized = adm_size(size, side)
    margins = [(length - side) // 2 for length in resized]
    moved = [x * resized[i % 2] / size[i % 2] - margins[i % 2] for i, x in enumerate(box)]
    if min(moved[:2]) < 0 or max(moved[2:]) > side:
        return None
    return moved[0], moved[1], moved[2], moved[3]
