"""Hugging Face datasets: datasets://NAME, for a name on the hub, a folder written by save_to_disk, or a folder of files.

    datasets://ORG/NAME                      downloaded once, then random access: order and resume are exact
    datasets://ORG/NAME?streaming=1          nothing is kept: order and resume are not exact (see data/base.py)
    datasets://FOLDER?column=img&label=none  a column that is not found by itself; no labels
    datasets://ORG/NAME?name=CONFIG          one of several configurations

Where the split "val" is asked for, "validation" will do.

The column of pictures is the first of type Image, else one called like a picture; any mode becomes RGB. Labels are
optional: a column of class labels, of whole numbers or of words.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError, nearest
from core.files import expanded
from core.specs import DataSource
from data.base import ListedSource, PackedStrings, Record, StreamSource, read_class_names, stream_options

PICTURES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
VALIDATION = {"val": "validation"}  # as nearly every set on the hub calls it
LABELS = ("label", "labels", "cls", "class", "class_id", "fine_label")


def _load(path: str, split: str, options: dict[str, str], streaming: bool) -> tuple[Any, str]:
    """(a datasets.Dataset or IterableDataset of one split, its name there: "validation" stands for "val")"""
    try:
        import datasets
    except ImportError:
        raise UserError(f"datasets://{path} needs the package datasets: pip install datasets") from None
    datasets.disable_progress_bars()
    folder = expanded(path)
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))  # by save_to_disk
    other = VALIDATION.get(split)
    try:
        if not saved:
            where = str(folder) if folder.is_dir() else path
            unknown = None
            for there in filter(None, (split, other)):
                try:
                    return datasets.load_dataset(
                        where, options.get("name"), split=there, streaming=streaming, revision=options.get("revision")
                    ), there
                except ValueError as error:  # no such split
                    unknown = unknown or error
            assert unknown is not None
            raise unknown
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many libraries
        raise UserError(
            f"datasets://{path}, split {split}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300].rstrip('.')}. Check the name, the split and the network."
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded and other in loaded:
            split = other
        if split not in loaded:
            raise UserError(f'datasets://{path} has no split "{split}".{nearest(split, loaded)}')
        loaded = loaded[split]
    return loaded.to_iterable_dataset() if streaming else loaded, split


def _columns(path: str, features: dict[str, Any], options: dict[str, str]) -> tuple[str, str | None]:
    """(column of pictures, column of labels or None)"""
    import datasets

    def chosen(option: str, candidates: list[str]) -> str | None:
        if (wanted := options.get(option)) is not None and wanted != "none":
            if wanted not in features:
                raise UserError(f'datasets://{path} has no column "{wanted}".{nearest(wanted, features)}')
            return wanted
        return candidates[0] if candidates and wanted is None else None

    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    column = chosen("column", pictures + [name for name in PICTURES if name in features])
    if column is None:
        raise UserError(f"datasets://{path}: no column of pictures among {', '.join(features)}. Set ?column=NAME.")
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    return column, chosen("label", classes + [name for name in LABELS if name in features])


def _bytes(value: Any, key: str) -> bytes:
    """The undecoded picture of a cell. OSError if there is none."""
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        return Path(value["path"]).read_bytes()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, (bytes, bytearray)):
        raise OSError(f"{key} is {type(value).__name__}, expected a picture")
    return bytes(data)


class HuggingFaceSource(ListedSource):
    """A map-style dataset; `column` gives undecoded pictures."""

    def __init__(
        self, dataset: Any, column: str, keys: PackedStrings, labels: np.ndarray | None, class_names: list[str] | None
    ):
        super().__init__(keys, labels, class_names)
        self.dataset, self.column = dataset, column

    def read(self, index: int) -> bytes:
        return _bytes(self.dataset[int(index)][self.column], self.key(index))


class HuggingFaceStream(StreamSource):
    """A streamed dataset; its shards come in another order in each pass.

    It is read by the main process: the library's reading threads were seen to hang in loader workers.
    """

    one_process = True

    def __init__(self, name: str, samples: int, class_names: list[str], dataset: Any, column: str, label: str | None):
        super().__init__(name, samples, class_names)
        self.dataset, self.column, self.label = dataset, column, label

    def count_shards(self) -> int:
        return self.dataset.num_shards

    def shard(self, number: int) -> Iterator[Record]:
        # In batches: the iterator over single rows would split them over the loader's workers once more.
        place = 0
        for rows in self.dataset.shard(self.count_shards(), number).iter(batch_size=16):
            labels = rows[self.label] if self.label else [0] * len(rows[self.column])
            for value, label in zip(rows[self.column], labels, strict=True):
                key, place = f"{self.name}, shard {number}, picture {place}", place + 1
                try:
                    data = _bytes(value, key)
                except OSError:
                    data = b""  # reported as unreadable
                yield data, int(label), key


def _labels(cells: list[Any], where: str, column: str) -> tuple[np.ndarray, list[str] | None]:
    """(class numbers, the words that they stand for or None) of a column; UserError for labels of another form."""
    kinds = {type(cell) for cell in cells}  # may be lists, or missing
    if kinds == {str}:
        words, labels = np.unique(np.array(cells), return_inverse=True)
        return labels, words.tolist()
    if kinds != {int} or min(cells) < 0:
        raise UserError(
            f"{where}: column {column} holds labels that are missing, several for a picture, or "
            "no class numbers. Set ?label=NAME, or ?label=none."
        )
    return np.array(cells), None


def open_datasets(path: str, split: str | None, options: dict[str, str]) -> DataSource:
    """The opener of datasets://PATH."""
    where, streaming, split = f"datasets://{path}", options.get("streaming", "0"), split or "train"
    if streaming not in ("0", "1"):
        raise UserError(f"{where}: streaming={streaming} must be 0 or 1.")
    dataset, there = _load(path, split, options, streaming == "1")
    import datasets

    if dataset.features is None:
        raise UserError(f"{where} does not say what its columns are, so it cannot be streamed. Leave out streaming=1.")
    column, label = _columns(path, dataset.features, options)
    kind = dataset.features.get(label) if label else None
    if isinstance(dataset.features[column], datasets.Image):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    others = [name for name in dataset.features if name not in (column, label)]
    left_out = (f"the column{'s' * (len(others) > 1)} {', '.join(others)}",) if others else ()
    names = list(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    if "classes" in options:
        names = read_class_names(options["classes"])
    if streaming == "1":
        splits = dataset.info.splits or {}
        count = getattr(splits.get(there), "num_examples", None) or None
        samples, numbered = stream_options(where, options, count)
        if label and names is None and "num_classes" not in options:
            raise UserError(f"{where}: streamed labels need ?num_classes=N or ?classes=FILE; ?label=none drops them.")
        source = HuggingFaceStream(where, samples, names or numbered, dataset, column, label)
        source.left_out = left_out
        return source
    for key in ("samples", "num_classes"):
        if key in options:
            raise UserError(f"{where}: {key} is for streaming=1. Leave it out.")
    if not len(dataset):
        raise UserError(f"{where}, split {split}: no pictures.")
    keys = PackedStrings(f"{Path(path).name}/{split}/{i}".encode() for i in range(len(dataset)))
    labels = words = None
    if label:
        labels, words = _labels(list(dataset.with_format(None)[label][:]), where, label)
    source = HuggingFaceSource(dataset, column, keys, labels, (names or words) if label else None)
    source.left_out = left_out
    return source
