"""Texts and faces in the reconstructions of one tokenizer, and what is said of several (evaluation/instances.py).

They are an extra of run_compare.sh: what is found is kept beside the other numbers of a tokenizer, in the folder of a
killed comparison chunk by chunk, and not measured again as long as the same things decide it.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from core.dist import World
from core.errors import UserError
from core.files import expanded, read_json, sha256_file, write_json
from core.images import grid
from core.rng import hash64
from core.train.log import progress_line
from evaluation.chunks import OWN, Work, forget_left
from evaluation.comparison import Difference
from evaluation.instances import (
    Box,
    FaceNet,
    FaceRow,
    Recogniser,
    Row,
    TextReader,
    TextRow,
    Texts,
    Values,
    by_size,
    face_metrics,
    face_rows,
    in_crop,
    listed_texts,
    text_metrics,
    text_rows,
)
from evaluation.pictures import Pictures
from evaluation.recognisers import FACE_NETS, TEXT_READERS, start
from evaluation.report import NOTHING, Report, with_interval
from run.evaluate import Reconstructions

SHOWN, REGION = 6, 128  # texts and faces each; pixels of a side
KINDS = ("text", "faces")
METRICS = ("t_acc", "t_ned", "f_sim")
BY_SIZE = ("_small", "_medium", "_large")  # ends of the names of scores
NAMES = {"text": "T-ACC, T-NED (TokBench)", "faces": "F-Sim (TokBench)"}

R = TypeVar("R", bound=Recogniser)


@dataclass(frozen=True)
class Instances:
    """The texts and faces of one tokenizer's reconstructions, judged.

    Args:
        recognisers: "text", "faces" -> who recognised them.
        suffixes: of the names of their metrics.
        side: pixels of the pictures.
        count: pictures in which they were looked for.
    """

    recognisers: dict[str, str]
    suffixes: dict[str, str]
    rows: dict[str, list[Any]]  # of TextRow, FaceRow
    side: int
    count: int
    is_listed: bool

    def values(self, kind: str, of_originals: bool = False) -> dict[str, Values]:
        """metric -> of each instance; {} where nothing was found."""
        return self._all_values[kind, of_originals]

    @functools.cached_property
    def _all_values(self) -> dict[tuple[str, bool], dict[str, Values]]:
        texts, faces = (self.rows.get(kind, []) for kind in KINDS)
        found = {
            ("text", False): text_metrics(texts, self.side) if texts else {},
            ("text", True): text_metrics(texts, self.side, of_originals=True) if texts else {},
            ("faces", False): face_metrics(faces, self.side) if faces else {},
            ("faces", True): {},
        }
        return {
            key: {name + self.suffixes[key[0]]: of for name, of in metrics.items()} for key, metrics in found.items()
        }

    def scores(self) -> dict[str, dict[str, Any]]:
        """As a metrics.json has scores: all, and by size."""
        found = {}
        for kind in KINDS:
            for name, of in self.values(kind).items():
                parts = {"": of, **{f"_{size}": part for size, part in by_size(kind, of).items()}}
                found |= {
                    name + size: {"value": part.mean(), "interval": part.interval()} for size, part in parts.items()
                }
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------
def check(options: argparse.Namespace, kind: str) -> None:
    """Find mistakes in what was asked for of tokenizers or generators."""
    if options.text_and_faces < 0:
        raise UserError(f"--text-and-faces {options.text_and_faces}: a number of pictures, or 0 for none.")
    if options.texts is not None:
        if kind == "generator":
            raise UserError(f"--texts {options.texts}: nobody has listed what samples say; it is for tokenizers.")
        listed_texts(expanded(options.texts))
        if options.data and options.data.endswith(".npz"):
            raise UserError(f"--texts {options.texts}: pictures of an .npz have no names to look up in a list.")


def agreed(kinds: tuple[type[R], ...], world: World) -> tuple[R | None, str]:
    """(the recogniser that starts here, the same on all ranks, or why there is none). Collective."""

    def begin() -> tuple[R | None, str]:
        try:
            return start(kinds, world.device), ""
        except UserError as error:
            return None, str(error)

    mine = begin() if world.is_main else None
    world.any(False)  # the main rank first: some fetch their weights
    mine, reason = mine or begin()
    name = mine.name if mine else None
    of_main = world.on_main(lambda: name)
    if world.any(name is None or name != of_main):
        return None, reason or "another one starts on another rank"
    return mine, ""


def measure(
    options: argparse.Namespace, measurement: Reconstructions, folder: Path, world: World
) -> tuple[Instances | None, dict[str, str]]:
    """(texts and faces of a measured tokenizer, what is left out -> why), the former on the main rank. Collective."""
    count = min(options.text_and_faces, measurement.count)
    if not count:
        return None, {", ".join(NAMES.values()): "not asked for (--text-and-faces 0)"}
    (reader, no_reader), (net, no_net) = agreed(TEXT_READERS, world), agreed(FACE_NETS, world)
    left_out = {NAMES[kind]: why for kind, why in (("text", no_reader), ("faces", no_net)) if why}
    if reader is None and net is None:
        return None, left_out
    job = job_of(options, measurement, reader, net, count)
    stem = f"text_and_faces-{hash64(json.dumps(job, sort_keys=True)):016x}"
    path, unfinished = folder / f"{stem}.json", folder / stem
    if options.again or not world.on_main(path.is_file):
        listed = list_of(options, measurement.pictures)
        with Work(count, world, unfinished, job) as work:
            with progress_line(world, count, "pictures with texts and faces") as progress:
                measurement.rebuild.expect([work.indices(chunk) for chunk in work.mine()])
                work.compute(lambda indices: look(measurement, indices, reader, net, listed), progress)
            chunks = [json.loads(bytes(chunk[f"{OWN}rows"].tolist())) for chunk in work.chunks()]
            if world.is_main:
                rows = {kind: [row for chunk in chunks for row in chunk[kind]] for kind in KINDS}
                write_json(path, {"job": job, "rows": rows})
        work.forget()
    elif world.is_main:
        forget_left(unfinished)
    if not world.is_main:
        return None, left_out
    found = read(path, measurement.image_size)
    return found, left_out | {NAMES[kind]: why for kind, why in nothing_of(found, options).items()}


def nothing_of(found: Instances, options: argparse.Namespace) -> dict[str, str]:
    """Why there is none of a kind that was looked for."""
    why = {kind: f"none was found in the first {found.count:,} pictures" for kind in found.rows if not found.rows[kind]}
    if "text" in why and found.is_listed:
        example = next(iter(listed_texts(expanded(options.texts))))
        why["text"] = (
            f"no text of {options.texts} is whole in the first {found.count:,} pictures; a file in it is {example}"
        )
    return why


def job_of(
    options: argparse.Namespace,
    measurement: Reconstructions,
    reader: TextReader | None,
    net: FaceNet | None,
    count: int,
) -> dict[str, Any]:
    """What decides what is found."""
    same = {name: fact for name, fact in measurement.job.items() if name not in measurement.not_in_chunks}
    found_by = {kind: None if it is None else [it.name, it.suffix] for kind, it in (("text", reader), ("faces", net))}
    listed = None if options.texts is None else sha256_file(expanded(options.texts))
    return {**same, "looked_at": count, "recognisers": found_by, "texts": listed}


def list_of(options: argparse.Namespace, pictures: Pictures) -> Texts | None:
    """Number of a picture -> texts that a list says are in it, where one was named."""
    if options.texts is None:
        return None
    listed = listed_texts(expanded(options.texts))
    source, side = pictures.source, pictures.size[0]
    assert source is not None  # `check` has seen to it

    def texts(number: int) -> list[tuple[Box, str]]:
        sample = source[number]
        known = listed.get(sample.key) or listed.get(Path(sample.key).name) or []
        moved = [(in_crop(box, sample.image.size, side), says) for box, says in known]
        return [(box, says) for box, says in moved if box is not None]

    return texts


def look(
    measurement: Reconstructions, indices: range, reader: TextReader | None, net: FaceNet | None, listed: Texts | None
) -> dict[str, Tensor]:
    """A chunk's rows, as JSON in a tensor."""
    rows: dict[str, list[Any]] = {"text": [], "faces": []}
    number = indices.start
    for pair in measurement.rebuild(indices):
        for original, recon in zip(*(side.permute(0, 2, 3, 1).cpu().numpy() for side in (pair.original, pair.recon))):
            original, recon = np.ascontiguousarray(original), np.ascontiguousarray(recon)
            if reader is not None:
                rows["text"] += map(asdict, text_rows(reader, number, original, recon, listed))
            if net is not None:
                rows["faces"] += map(asdict, face_rows(net, number, original, recon))
            number += 1
    return {f"{OWN}rows": torch.tensor(list(json.dumps(rows).encode()), dtype=torch.uint8)}


def read(path: Path, side: int) -> Instances:
    """What was found."""
    record = read_json(path)
    job, rows = record["job"], record["rows"]
    known = {kind: found for kind, found in job["recognisers"].items() if found is not None}
    kinds: dict[str, Callable[..., Row]] = {"text": TextRow, "faces": FaceRow}
    return Instances(
        {kind: name for kind, (name, _) in known.items()},
        {kind: suffix for kind, (_, suffix) in known.items()},
        {kind: [kinds[kind](**{**row, "box": tuple(row["box"])}) for row in rows[kind]] for kind in known},
        side,
        job["looked_at"],
        job["texts"] is not None,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Side by side
# ---------------------------------------------------------------------------------------------------------------------
Found = dict[str, Instances]  # name of a tokenizer -> its texts and faces


def same(kind: str, a: Instances, b: Instances) -> bool:
    """Whether the same instances were found for both; not where their pictures have different sizes."""
    places = [[(row.picture, row.box) for row in of.rows.get(kind, [])] for of in (a, b)]
    return places[0] == places[1]


def differences(of: Instances, base: Instances) -> Iterator[tuple[str, Difference]]:
    """(metric, how `of` differs from `base`) over the same instances; nothing where these are not the same."""
    for kind in KINDS:
        ours, theirs = of.values(kind), base.values(kind)
        for metric in ours.keys() & theirs.keys() if same(kind, of, base) else ():
            difference = ours[metric].minus(theirs[metric])
            yield metric, Difference(difference.mean(), *difference.interval())


def table(found: Found) -> tuple[list[str], list[list[str]]]:
    """(headers, rows): each tokenizer's metrics, over all instances and by their sizes."""
    headers = ["", "metric", "instances", "all", "small", "medium", "large"]
    rows = []
    first = next(iter(found.values()))
    for kind in KINDS:
        sides = [(name, of.values(kind)) for name, of in found.items()]
        if first.is_listed:
            sides.insert(0, ("the originals", first.values(kind, of_originals=True)))
        for name, metrics in sides:
            for metric, values in metrics.items():
                parts = by_size(kind, values)
                cells = [
                    f"{parts[size].mean():.3f} ({len(parts[size].values):,})" if size in parts else NOTHING
                    for size in headers[4:]
                ]
                whole = with_interval(values.mean(), values.interval())
                rows.append([name, metric, f"{len(values.values):,}", whole, *cells])
    return headers, rows


def about(found: Found) -> str:
    """What the numbers mean, and who recognised."""
    first = next(iter(found.values()))
    who = "; ".join(f"{kind}: {first.recognisers[kind]}" for kind in KINDS if kind in first.recognisers)
    truth = (
        "what the list says; the row of the originals is what the reader reaches without a tokenizer"
        if first.is_listed
        else "what the same reader reads in the original"
    )
    return (
        f"Looked for in the first {first.count:,} originals ({who}). T-ACC: share of texts that are read right; T-NED: 1 - edit "
        f"distance by the longer text's length; right is {truth}, case and spaces aside. F-Sim: cosine of a face's embeddings "
        "in original and reconstruction. Small, medium, large: heights below 5 %, below 10 % and above of the picture's for "
        "texts, 15 % and 30 % for faces. Intervals draw pictures again, with all that is in them."
    )


def most_disputed(found: Found, kind: str) -> list[int]:
    """Numbers of the rows in which the tokenizers are furthest apart, then those that all lose most."""
    stacked = torch.stack([list(of.values(kind).values())[-1].values for of in found.values()])  # of T-NED, F-Sim
    worth = stacked.amax(0) - stacked.amin(0) + 1e-3 * (1 - stacked.mean(0))
    return worth.argsort(descending=True, stable=True)[:SHOWN].tolist()


def readings(found: Found, chosen: list[int]) -> list[list[str]]:
    """For each of these texts, what is right and what is read in each reconstruction."""
    first = next(iter(found.values())).rows["text"]
    return [[first[i].truth, *(of.rows["text"][i].recon or NOTHING for of in found.values())] for i in chosen]


def closer(pictures: Tensor, box: Box) -> Tensor:
    """(n, 3, REGION, REGION) uint8: the square around `box` of (n, 3, H, W) uint8 pictures, pixels kept sharp."""
    side = pictures.shape[-1]
    window = min(side, max(8, round(1.2 * max(box[2] - box[0], box[3] - box[1]))))
    left, top = (
        int(min(max(0, round((a + b) / 2 - window / 2)), side - window))
        for a, b in ((box[0], box[2]), (box[1], box[3]))
    )
    part = pictures[..., top : top + window, left : left + window].float()
    return torch.nn.functional.interpolate(part, (REGION, REGION), mode="nearest").to(torch.uint8)


@torch.no_grad()
def picture(found: Found, measurements: list[Reconstructions], kind: str, chosen: list[int]) -> Tensor:
    """A row per instance: the original, then every tokenizer; (3, H, W) uint8."""
    crops = []
    for i in chosen:
        row = next(iter(found.values())).rows[kind][i]
        pairs = [next(iter(m.rebuild(range(row.picture, row.picture + 1)))) for m in measurements]
        crops.append(closer(torch.cat([pairs[0].original, *(pair.recon for pair in pairs)]).cpu(), row.box))
    return grid(torch.cat(crops), columns=1 + len(measurements))


def show(report: Report, found: Found, measurements: list[Reconstructions]) -> None:
    """Numbers, and the instances that the tokenizers disagree most on, where all were looked at alike."""
    if not any(of.rows[kind] for of in found.values() for kind in of.rows):
        return
    report.add_table("Texts and faces", *table(found)).add_text("", about(found))
    first = next(iter(found.values()))
    for kind, title in (("text", "Texts"), ("faces", "Faces")):
        if not first.rows.get(kind) or not all(same(kind, first, of) for of in found.values()):
            continue
        chosen = most_disputed(found, kind)
        caption = "A row each: the original, then " + ", ".join(found) + "."
        report.add_image(title, picture(found, measurements, kind, chosen), caption)
        if kind == "text":
            report.add_table("What is read there", ["right", *found], readings(found, chosen))
