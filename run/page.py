"""The page of a run: report.html in its folder, written while it trains and once more at its end.

It is made of what lies in the folder (config.yaml, about.json, environment.json, metrics.jsonl, log.txt, samples/), so that
`bash run_report.sh RUN [RUN ...]` makes it again at any time, or puts several runs beside each other.
"""

from __future__ import annotations

import fnmatch
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch import Tensor

from core.config import flatten, to_plain
from core.errors import UserError
from core.files import read_json
from core.schema import RunConfig
from core.specs import Chart, Task
from core.train.log import clock
from core.train.run import ABOUT, read_metrics
from core.train.trainer import PREVIEW_COLUMNS, PREVIEW_IMAGES
from evaluation.protocols import meaning_of
from evaluation.report import Frame, Report, Series, format_number
from run.load import load_config

PAGE = "report.html"
POINTS = 100  # of a curve at most; records between are averaged
FRAMES = 12  # previews on a page at most, spread over the run
CELL = 160  # pixels of a side of their pictures at most
RECENT = 10  # records that the speed of now is the mean of
PAUSE = 20.0  # seconds between two writings while a run is alive
SPEED = (  # what the trainer itself logs
    Chart("learning rate", ("lr", "lr/*")),
    Chart("gradient norm", ("grad_norm/*",)),
    Chart("images per second", ("images_per_second",)),
    Chart("share of the GPU's peak (MFU), %", ("mfu",)),
    Chart("most memory so far, GiB", ("peak_memory_gib",)),
)
NOT_DRAWN = {"step", "images_seen", "epoch"}


def changes(config: RunConfig, recipe: str | None) -> dict[str, Any]:
    """What about.json says of the file that a config was made from: its path and [key, value there, value here]."""
    if recipe is None:
        return {}
    try:
        before = flatten(to_plain(load_config(recipe, [])))
    except UserError:  # it lacks what the overrides gave
        return {}
    now = flatten(to_plain(config))
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return {"recipe": recipe, "changes": [[key, before.get(key), now.get(key)] for key in differing]}


def facts(task: Task) -> dict[str, Any]:
    """What about.json says of how a run is shown."""
    return {"charts": [asdict(chart) for chart in task.charts()], "preview": task.preview_groups(PREVIEW_IMAGES)}


# ---------------------------------------------------------------------------------------------------------------------
# What a folder tells
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """A run as its folder tells of it; what is missing there is empty."""

    path: Path
    config: dict[str, Any]
    about: dict[str, Any]
    environment: dict[str, str]
    records: list[dict[str, Any]]
    warnings: list[str]
    previews: list[tuple[int, Path]] = field(default_factory=list)  # (step, grid)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Records of training steps."""
        return [r for r in self.records if "images_per_second" in r]

    @property
    def images_seen(self) -> int:
        return self.steps[-1]["images_seen"] if self.steps else 0

    @property
    def is_finished(self) -> bool:
        return bool(self.steps) and self.images_seen >= self.about.get("total_images", float("inf"))

    @property
    def speed(self) -> float:
        """Pictures per second of late; 0 before anything is known."""
        rates = [r["images_per_second"] for r in self.steps[-RECENT:] if r["images_per_second"]]
        return sum(rates) / len(rates) if rates else 0.0

    @property
    def seconds_done(self) -> float:
        """Spent on training steps, over all parts of the run."""
        total, before = 0.0, 0
        for record in self.steps:
            if record["images_per_second"]:
                total += (record["images_seen"] - before) / record["images_per_second"]
            before = record["images_seen"]
        return total

    @property
    def seconds_left(self) -> float:
        left = self.about.get("total_images", 0) - self.images_seen
        return left / self.speed if self.speed else float("nan")

    @property
    def charts(self) -> list[Chart]:
        """What the task declared, what the trainer logs, and whatever else is there."""
        declared = [Chart(c["title"], tuple(c["names"]), c["live"]) for c in self.about.get("charts", ())]
        known = [*declared, *SPEED]
        patterns = [name for chart in known for name in chart.names]
        others = [
            name
            for name in self.names()
            if name not in NOT_DRAWN
            and not name.startswith("eval/")
            and not any(fnmatch.fnmatchcase(name, p) for p in patterns)
        ]
        return [*declared, *([Chart("also logged", tuple(others))] if others else []), *SPEED]

    def names(self) -> list[str]:
        return list(dict.fromkeys(key for record in self.records for key in record))

    def curves(self, chart: Chart) -> Series:
        """The lines of a chart, averaged to about POINTS points; what was never logged is left out."""
        logged = self.names()
        names = [n for pattern in chart.names for n in logged if fnmatch.fnmatchcase(n, pattern)]
        return {name: points for name in dict.fromkeys(names) if (points := self.line(name))}

    def line(self, name: str) -> list[tuple[float, float]]:
        """(images seen, value) of one number."""
        points = [(r["images_seen"], r[name]) for r in self.records if r.get(name) is not None]
        bundle = 1 if name.startswith("eval/") else max(1, len(points) // POINTS)
        groups = [points[i : i + bundle] for i in range(0, len(points), bundle)]
        return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]

    def metrics(self) -> dict[str, tuple[int, float]]:
        """Online metric -> (step, value) where it was measured last."""
        return {
            name.removeprefix("eval/"): (record["step"], value)
            for record in self.records
            for name, value in record.items()
            if name.startswith("eval/") and value is not None
        }

    def frames(self, limit: int = FRAMES) -> list[Frame]:
        """The previews, spread over the run, each cut into its pictures."""
        places = sorted({round(i) for i in np.linspace(0, len(self.previews) - 1, limit)}) if self.previews else []
        groups = self.about.get("preview") or []
        return [Frame(f"step {step:,}", _cut(path, groups)) for step, path in (self.previews[i] for i in places)]


def _cut(path: Path, groups: list[tuple[str, list[int]]]) -> list[tuple[str, list[Image.Image]]]:
    """(caption, its pictures) of a grid that core.images.grid made with its padding of 2."""
    with Image.open(path) as opened:
        grid = opened.convert("RGB")
    side = (grid.width - 2) // PREVIEW_COLUMNS - 2
    if side < 1:
        return [(path.stem, [grid])]

    def cell(i: int) -> Image.Image:
        left, top = (2 + (i % PREVIEW_COLUMNS) * (side + 2), 2 + (i // PREVIEW_COLUMNS) * (side + 2))
        picture = grid.crop((left, top, left + side, top + side))
        return picture if side <= CELL else picture.resize((CELL, CELL), Image.Resampling.LANCZOS)

    whole = (grid.height - 2) // (side + 2) * PREVIEW_COLUMNS
    return [(caption, [cell(i) for i in places]) for caption, places in groups if max(places) < whole]


def read_run(folder: str | Path) -> Run:
    """UserError where there is no run in `folder`."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not the folder of a run: there is no config.yaml in it.")

    metrics, log = folder / "metrics.jsonl", folder / "log.txt"
    warnings = [
        line for line in (log.read_text(errors="replace").splitlines() if log.is_file() else ()) if "warning:" in line
    ]
    grids = sorted((folder / "samples").glob("step_*.png"))
    return Run(
        folder,
        yaml.safe_load((folder / "config.yaml").read_text()),
        read_json(folder / ABOUT, {}),
        read_json(folder / "environment.json", {}),
        read_metrics(metrics) if metrics.is_file() else [],
        warnings,
        [(int(path.stem.removeprefix("step_")), path) for path in grids],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------
def page_of(run: Run) -> Report:
    """The page of one run."""
    total = run.about.get("total_images", 0)
    state = "finished" if run.is_finished else f"{100 * run.images_seen / total:.0f} % done" if total else "just begun"
    about = [run.about.get("summary", ""), f"{state}; written {time.strftime('%Y-%m-%d %H:%M')}"]
    page = Report(run.name, ". ".join(text for text in about if text))
    page.reloads = not run.is_finished
    _add_tiles(page, run)
    if frames := run.frames():
        page.add_frames(
            "Previews", frames, "What the averaged weights make of the same pictures or draws, through the run."
        )
    for chart in run.charts:
        if lines := run.curves(chart):
            page.add_curves(chart.title, lines, log=None, xlabel="images")
    _add_metrics(page, [run])
    if run.warnings:
        page.add_table("Warnings", ["of the log, newest last"], [[line] for line in run.warnings[-20:]])
    if recipe := run.about.get("recipe"):
        changes = [[key, str(before), str(now)] for key, before, now in run.about["changes"]]
        page.add_table(f"Changes to {recipe}", ["setting", "recipe", "this run"], changes or [["none", "", ""]])
    page.add_config(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
    return page.add_environment(run.environment)


def _add_tiles(page: Report, run: Run) -> None:
    total, last = run.about.get("total_images", 0), run.steps[-1] if run.steps else {}
    steps = total // max(1, run.config["train"]["global_batch"])
    page.add_tile("step", f"{last.get('step', 0):,}", f"of {steps:,}; {run.images_seen:,} images seen")
    for chart in run.charts:
        if chart.live and (line := run.line(chart.names[0])):
            page.add_tile(chart.title, line[-1][1], f"{chart.names[0]}, mean of the last records")
    page.add_tile("images per second", run.speed or None, "training steps alone, of late")
    page.add_tile("done", clock(run.seconds_done), "hours:minutes:seconds of training steps")
    page.add_tile("left", clock(run.seconds_left), "at this speed")
    if last.get("mfu") is not None:
        page.add_tile("MFU", f"{last['mfu']:.1f} %", "of the GPUs' peak in bf16, frozen networks counted")
    if last.get("peak_memory_gib") is not None:
        page.add_tile("memory", f"{last['peak_memory_gib']:.2f} GiB", "most at once, of the main process")


def _add_metrics(page: Report, runs: Sequence[Run]) -> None:
    """Tables and curves of what was measured while training."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics()))
    for name in names:
        lines = {_called(run, runs): line for run in runs if len(line := run.line(f"eval/{name}")) > 1}
        if lines:
            page.add_curves(name, lines, log=None, xlabel="images")
    if names:
        rows = [
            [name, *(_measured(run, name) for run in runs), meaning_of(name).sentence or "measured while training"]
            for name in names
        ]
        page.add_table("Measured while training", ["metric", *(_called(run, runs) for run in runs), ""], rows)


def _measured(run: Run, name: str) -> str:
    step, value = run.metrics().get(name, (0, float("nan")))
    return f"{format_number(value)} at step {step:,}" if value == value else ""


def _called(run: Run, runs: Sequence[Run]) -> str:
    """A run's name, or its path where another has the same."""
    return str(run.path) if sum(other.name == run.name for other in runs) > 1 else run.name


def comparison(runs: Sequence[Run]) -> Report:
    """Several runs on one page."""
    called = [_called(run, runs) for run in runs]
    page = Report("Runs side by side", ", ".join(called))
    rows = [
        [
            name,
            f"{run.steps[-1]['step']:,}" if run.steps else "0",
            f"{run.images_seen:,}",
            format_number(run.speed),
            clock(run.seconds_done),
            "-" if run.is_finished else clock(run.seconds_left),
        ]
        for name, run in zip(called, runs)
    ]
    page.add_table("Progress", ["run", "step", "images", "img/s", "done", "left"], rows)
    for name, run in zip(called, runs):
        if frames := run.frames():
            page.add_frames(f"Previews of {name}", frames)
    _add_metrics(page, runs)
    for title in dict.fromkeys(chart.title for run in runs for chart in run.charts):
        lines: dict[str, Series] = {}
        for name, run in zip(called, runs):
            for chart in run.charts:
                for logged, line in run.curves(chart).items() if chart.title == title else ():
                    lines.setdefault(logged, {})[name] = line
        for logged, series in lines.items():
            page.add_curves(
                title if len(lines) == 1 or logged == title else f"{title}: {logged}", series, log=None, xlabel="images"
            )
    settings = [flatten(run.config) for run in runs]
    keys = sorted({key for s in settings for key in s} - {"name", "work_dir"})
    differing = [
        [key, *(str(s.get(key, "")) for s in settings)] for key in keys if len({str(s.get(key)) for s in settings}) > 1
    ]
    page.add_table("Settings that differ", ["setting", *called], differing or [["none", *("" for _ in runs)]])
    return page


def write(folders: Sequence[str | Path], place: Path | None = None) -> Path:
    """Write the page of one run, into its folder, or of several; returns where it is."""
    runs = [read_run(folder) for folder in folders]
    page = page_of(runs[0]) if len(runs) == 1 else comparison(runs)
    place = place or (runs[0].path / PAGE if len(runs) == 1 else runs[0].path.parent / "comparison.html")
    page.write(place)
    return place


class PageWriter:
    """Keeps the page of a living run up to date, from a thread of its own; a core.train.log.Sink.

    Whatever goes wrong is said once in the log, and neither ends nor holds up the run.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]):
        self.folder, self.log = folder, log
        self._thread: threading.Thread | None = None
        self._written, self._failed = float("-inf"), False

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        """New numbers are worth a page every PAUSE seconds, measured ones at once."""
        if any(name.startswith("eval/") for name in numbers) or time.monotonic() - self._written > PAUSE:
            self.begin()

    def picture(self, grid: Tensor, step: int) -> None:
        self.begin()

    def begin(self) -> None:
        """Start writing, unless that is going on."""
        if self._thread is None or not self._thread.is_alive():
            self._written = time.monotonic()
            self._thread = threading.Thread(target=self._write, name="page writer", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """The last page, which has everything."""
        if self._thread is not None:
            self._thread.join()
        self._write()

    def _write(self) -> None:
        try:
            write([self.folder])
        except Exception as error:
            if not self._failed:
                self._failed = True
                self._say(f"warning: {self.folder / PAGE} could not be written ({type(error).__name__}: {error})")

    def _say(self, message: str) -> None:
        try:
            self.log(message)
        except UserError as error:  # the disk that has no room for the page has none for log.txt
            print(f"{message} ({error})", flush=True)
