"""One evaluation by a command, whatever it measures: its folder, its files, and what a command line may ask for."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from core import config as config_module
from core.chunks import CONTENT, changed_facts
from core.devices import pictures_at_once
from core.dist import World
from core.errors import UserError
from core.files import read_json
from core.rng import hash64
from core.schema import EvalConfig
from core.train.log import progress_line
from evaluation import measure, networks, references, report
from evaluation.chunks import Work, forget_left
from evaluation.intervals import check_extras
from evaluation.measure import Evaluation, Progress, Result
from evaluation.networks import FeatureNet
from evaluation.pictures import NpzWriter, Pictures, PngWriter
from evaluation.protocols import Protocol

Shown = tuple[str, Path, str]  # (title, file, caption) of a picture in the report
Table = tuple[str, list[str], list[list[Any]]]  # (title, headers, rows)


@dataclass(kw_only=True)
class Measurement(ABC):
    """One evaluation by a command, from what it was asked for to its files. A subclass makes and shows the pictures.

    Args:
        options: of the command line: out, again, write, bootstrap, infinity.
        how: what is measured, and with what.
        title: of the report.
        stem: how the folder's name begins where --out names none.
        image_size: side of the pictures.
        job: facts that decide the result, "count" among them. They stand in metrics.json, and a folder with other
            ones is refused.
        context: what else metrics.json says.
    """

    options: argparse.Namespace
    how: Evaluation
    title: str
    stem: str
    image_size: int
    job: dict[str, Any]
    context: dict[str, Any] = field(default_factory=dict)

    noun = "pictures"  # of the progress line, and of the files of --write
    not_in_chunks = ("bootstrap", "infinity")  # facts that change nothing of what is kept of unfinished work

    @property
    def count(self) -> int:
        """How many pictures."""
        return self.job["count"]

    def prepare(self) -> None:
        """Whatever comes before the pictures. Collective."""

    @abstractmethod
    def measure(self, work: Work, writers: tuple, progress: Progress) -> Result | None:
        """The result, on the main rank. Collective."""

    @abstractmethod
    def shown(self, result: Result, folder: Path) -> list[Shown]:
        """Pictures for the report, written into `folder`; they move beside it."""

    def tables(self, result: Result) -> list[Table]:
        return []

    def run(self) -> int:
        """Measure what was not measured before, and write it. Collective; returns the exit code."""
        world = self.how.world
        folder, is_known = open_folder(self.options.out, self.stem, self.job, self.options.again, world)
        if is_known:
            if world.is_main:
                forget_left(folder / "work")
            return print_stored(folder) if world.is_main else 0
        self.prepare()
        job = {name: fact for name, fact in self.job.items() if name not in self.not_in_chunks}
        unfinished = folder / "work"
        with Work(self.count, world, unfinished, job) as work:
            writer = self.open_writer(folder, work)
            with progress_line(world, self.count, self.noun) as progress, writer or contextlib.nullcontext():
                result = self.measure(work, (writer,) if writer else (), progress)
            if writer:
                world.on_main(writer.finish)
            if result is not None:
                self.write(result, folder, unfinished)
        work.forget()
        return 0

    def open_writer(self, folder: Path, work: Work) -> PngWriter | NpzWriter | None:
        """The writer of --write, or None; finished chunks without their pictures are done again. Collective."""
        kind, world, size = self.options.write, work.world, self.image_size
        if kind is None:
            return None
        assert work.folder is not None
        unfinished = work.folder
        final = folder / (self.noun if kind == "png" else f"{self.noun}.npz")

        def make() -> PngWriter | NpzWriter:
            if kind == "png":
                return PngWriter(final, unfinished=unfinished / self.noun)
            return NpzWriter(final, work.count, (size, size), unfinished)

        def make_first() -> None:
            if final.exists() and not self.options.again and not work.done:
                raise UserError(f"{final} is there already. Choose another --out, or add --again to replace it.")
            writers.append(make())

        writers: list = []
        world.on_main(make_first)  # on the main rank before the others
        writer = writers[0] if writers else make()
        work.keep_only(writer.has)
        return writer

    def write(self, result: Result, folder: Path, unfinished: Path) -> None:
        """Print and write what was found, on the main rank."""
        protocol, net, reference = self.how.protocol, self.how.feature_net, self.how.reference
        made_in = {"pictures": self.job["precision"]} if "precision" in self.job else {}
        context = {
            **self.job,
            **self.context,
            "job": self.job,
            "net": net.name,
            "preprocess": net.facts()["preprocess"],
            "inception_sha256": net.weights_sha256,
            "protocol_settings": asdict(protocol),
            "precision": made_in | report.precision_of(self.how.world.device, protocol.dtype),
        }
        if reference is not None:
            context |= {
                "reference": reference.name,
                "reference_sha256": reference.sha256,
                "reference_facts": asdict(reference.facts),
            }
            context.setdefault("reference_fingerprint", reference.facts.source)
        shown = self.shown(result, unfinished)
        write_result(folder, self.title, result, context, shown, self.tables(result))


def evaluation_of(
    options: argparse.Namespace, settings: EvalConfig, protocol: Protocol, net: FeatureNet, world: World, **more: Any
) -> Evaluation:
    """How a command measures; `more` are fields of Evaluation."""
    extras = {"replicates": options.bootstrap, "infinity": options.infinity}
    return Evaluation(protocol, net, world, pictures_at_once(settings.batch, world.device), **extras, **more)


def write_result(
    folder: Path,
    title: str,
    result: Result,
    context: dict[str, Any],
    shown: Sequence[Shown] = (),
    tables: Sequence[Table] = (),
) -> None:
    """Print and write. Pictures move into the folder; metrics.json, which means "finished", is last."""
    from PIL import Image

    print(report.table(result))
    pictures = [(name, Image.open(path), caption) for name, path, caption in shown if path.is_file()]
    report.write_page(folder, title, result, context, pictures, tables)
    for _, path, _ in shown:
        if path.is_file():
            os.replace(path, folder / path.name)
    report.write_record(folder, result, context)
    print(f"written to {folder}: metrics.json, report.html")


def sizes_of(name: str, pictures: Pictures, world: World) -> dict[str, str]:
    """A job's fact NAME_sizes of pictures that are single files: those that were replaced under the same names are others.
    Collective."""
    sizes = world.on_main(pictures.file_sizes)
    return {f"{name}_sizes": sizes} if sizes else {}


def open_folder(out: str | None, name: str, job: dict[str, Any], again: bool, world: World) -> tuple[Path, bool]:
    """(folder, whether the result is there already). Without `out` the name follows from the job. Collective."""
    named = sorted(item for item in job.items() if not item[0].endswith(CONTENT))
    folder = Path(out or f"work_dirs/eval/{name}-{hash64(repr(named)):016x}"[:200])

    def look() -> bool:
        path = folder / "metrics.json"
        if not path.is_file() or again:
            return False
        before = read_json(path).get("context", {}).get("job") or {}
        changed = changed_facts(before, job)
        if not changed:
            return True
        if all(key.endswith(CONTENT) for key in changed):
            files = ", ".join(key.rpartition("_")[0] for key in changed)
            raise UserError(
                f"{folder} holds the result of other files under the same names ({files}). Add --again to replace it."
            )
        raise UserError(
            f"{folder} holds the result of another evaluation (different: {', '.join(changed)}). Choose another "
            "--out, or add --again to replace it."
        )

    return folder, world.on_main(look)


def print_stored(folder: Path) -> int:
    """Show a result that is there."""
    for name, entry in read_json(folder / "metrics.json")["metrics"].items():
        print(f"{name:<32} {entry['value']}")
    print(f"measured before, in {folder}; --again measures anew")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for
# ---------------------------------------------------------------------------------------------------------------------
# Keys of `eval` that mean nothing to a command -> why; see `eval_settings`.
NO_CLASSES = {"labels": "classes are asked of generators"}
PICTURES_ARE_THERE = {
    "labels": "the pictures are there, and nobody is asked for classes",
    "rounding": "the pictures are there and hold whole numbers",
}


def eval_settings(overrides: list[str], naming: str = "", idle: Mapping[str, str] = {}) -> EvalConfig:
    """The `eval` section from key=value words, where there is no config around it.

    Args:
        naming: how pictures are named there.
        idle: keys without effect -> why; UserError where one of them is set.
    """
    foreign = [o for o in overrides if not o.startswith("eval.")]
    if foreign:
        urls = [o.partition("=")[2] for o in foreign if o.startswith(("data.url=", "data.val_url="))]
        advice = f" Pictures are named without a key: {naming} {urls[-1]}." if naming and urls else ""
        raise UserError(
            f"{' '.join(foreign)}: only eval.* settings mean something here; there is no generator to set up.{advice}"
        )
    stub = config_module.smallest("eval", {"name": "none"}, {"url": "none"})
    settings = config_module.override(lambda: stub, overrides, {}, source="the command line").eval
    for key, why in idle.items():
        if getattr(settings, key) is not None:
            raise UserError(f"eval.{key}={getattr(settings, key)} changes nothing here: {why}. Leave it out.")
    return settings


def enough(wanted: int | None, available: int, name: str, options: argparse.Namespace) -> int:
    """How many pictures to measure (0, None: all); UserError when too few to measure, or for what the options add."""
    count = min(wanted or available, available)
    if count < 2:
        raise UserError(
            f"{name}: {count} picture cannot be measured. A Frechet distance needs at least 2, a published one 50,000."
        )
    check_extras(options.bootstrap, options.infinity, count)
    return count


def check_comparison(
    settings: EvalConfig, protocol: Protocol, size: references.Side, purpose: str, published: bool
) -> bool:
    """Whether there is no file to compare pictures of `size` with; UserError where feature network or reference cannot
    be used. `published`: see `references.choose_reference`. Tells what would be downloaded or left out."""
    net = networks.look_for_net(settings.network, protocol)
    for line in measure.lacking(settings, protocol, purpose):
        _tell(line)
    path = references.choose_reference(settings.reference, protocol, net, size, purpose, published)
    if path is not None:
        reference = references.load(path)
        if net is not None:
            references.check_reference(reference, net, purpose, size, rounding=protocol.original_rounding)
    return path is None and net is not None


@functools.cache  # one line, however many are compared
def _tell(line: str) -> None:
    print(f"not here: {line}")
