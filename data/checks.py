"""What is asked of a data source before it is used, and what is told about it: labels, classes, order, what is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from core.errors import UserError
from core.specs import DataSource
from data.base import ListedSource, StreamSource

SHOWN = 5  # names in a message


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def require_labels(source: DataSource) -> None:
    """UserError where some pictures of a source have labels and others have not, or labels that are no class of it."""
    if source.unlabelled:
        raise UserError(f"{source.unlabelled} Label all of them or none: only a tokenizer trains without.")
    if source.labels is None:
        return
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= source.num_classes))
    if len(wrong):
        raise UserError(
            f"label {source.labels[wrong[0]]} of picture {wrong[0]} is none of the {source.num_classes} classes of the "
            "data. Label it from 0 on, and make its tokens again."
        )


def require_classes(source: DataSource, num_classes: int | None, url: str) -> None:
    """UserError where a source has more classes than a generator of `num_classes` (None: as many as the data)."""
    if num_classes is not None and source.num_classes > num_classes:
        first = source.labels is not None and not np.any(source.labels == 0)
        advice = "Count the labels from 0" if first else f"Set generator.num_classes={source.num_classes}"
        raise UserError(
            f"generator.num_classes={num_classes}: {url} has {source.num_classes} classes, labels 0 to "
            f"{source.num_classes - 1}{', and none is 0: they are counted from 1' if first else ''}. {advice}."
        )


def require_same_classes(names: list[str], others: list[str], which: str) -> None:
    """UserError where label numbers mean one class in `names`, those of the training, and another in `others`.

    Classes that only have numbers may be any others; two lists of numbers have to agree as well.
    """
    plain = [str(i) for i in range(len(names))]
    numbered = [all(name.isdigit() for name in side) for side in (names, others)]
    if names == others or (plain in (names, others) and len(names) == len(others) and not all(numbered)):
        return
    if len(names) != len(others):
        missing, more = [n for n in names if n not in others], [n for n in others if n not in names]
        shown = f"without {_first(missing)}" if missing else f"also {_first(more)}"
        detail = f"{len(names)} classes are trained and {which} has {len(others)} ({shown})"
    else:
        number = next(i for i, (one, other) in enumerate(zip(names, others)) if one != other)
        detail = f"class {number} is {names[number]} in the training data and {others[number]} in {which}"
    raise UserError(f"{detail}, so label numbers mean different classes. Name the classes of both with ?classes=FILE.")


def require_order(source: DataSource, purpose: str) -> None:
    """UserError for a stream, whose picture number i is another one each time and on each process."""
    if isinstance(source, StreamSource):
        raise UserError(
            f"{source.name}: streamed pictures have no fixed order, so {purpose}. Copy them to a disk, and name "
            "the folder or the shards."
        )


def remarks(source: DataSource) -> list[str]:
    """What a training of a generator should tell about the classes of its pictures, where they look like a mistake."""
    names, labels = source.class_names, source.labels
    if names == ["unlabelled"]:
        return ["the pictures have no labels: all of them are one class"]
    if labels is None:
        return []
    empty = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
    if not len(empty):
        return []
    asked = "; are the labels counted from 1?" if empty.tolist() == [0] else ""
    shown = _first([names[i] for i in empty])
    return [f"{len(empty)} of {len(names)} classes have no picture ({shown}){asked}"]


def say_left_out(say: Callable[[str], Any], source: DataSource | None, name: str) -> None:
    """Tell what is not read of a source that the user calls `name`, if anything."""
    if source is not None and (line := left_out(source)):
        say(f"{name}: {line}")


def left_out(source: DataSource) -> str | None:
    """One line about what of the data is not used, or not as it is meant; None where there is nothing to tell."""
    lines = []
    if source.left_out:
        lines.append(f"not read: {'; '.join(source.left_out)}")
    if isinstance(source, ListedSource):
        turned, seen = source.count_turned()
        if turned:
            used = "applied" if source.upright else "not applied, as in the original programs (data.exif=true does)"
            lines.append(f"{turned} of {seen} pictures looked at carry an EXIF orientation, which is {used}")
    return "; ".join(lines) or None
