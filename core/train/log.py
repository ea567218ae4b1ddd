"""Metrics on their way out: device sums -> metrics.jsonl, sinks and one live progress line. Never waits for a GPU."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from core.dist import World
from core.errors import UserError, brief
from core.files import is_copied, write_atomic
from core.schema import LogConfig
from core.train.run import RunFolder


class Averages:
    """Running sums of named scalars, kept on the device until someone asks.

    Names appear in the order in which they are first added, which is the same on every rank.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self, device: torch.device) -> Tensor:
        """(names,) on `device`."""
        return torch.stack([(self.sums[n] / self.counts[n]).to(device, non_blocking=True) for n in self.sums])

    def reset(self) -> None:
        self.sums.clear()
        self.counts.clear()


@dataclass
class _Pending:
    """A record whose numbers are still being copied from the device."""

    record: dict[str, Any]
    names: list[str]
    values: Tensor  # (names,) on the host, pinned when it comes from a GPU
    copied: torch.cuda.Event | None


class Sink(Protocol):
    """Where numbers and pictures of a run go."""

    def __call__(self, numbers: Mapping[str, float], step: int) -> None: ...

    def picture(self, grid: Tensor, step: int) -> None:
        """(3, H, W) uint8 on the CPU: the preview of a step."""
        ...

    def close(self) -> None: ...


class RunLog:
    """Turns device means into records one interval late, so that the copy never stalls a step.

    Args:
        total_images: of the whole run.
        resolved: its config, for sinks.
        step: that the run is at; what sinks hold of later ones is from before a kill.
        live: names of the numbers on the live line.
        sinks: besides those of `config`.
    """

    def __init__(
        self,
        run: RunFolder,
        config: LogConfig,
        world: World,
        total_images: int,
        resolved: dict[str, Any],
        *,
        step: int = 0,
        live: Sequence[str] = (),
        sinks: Sequence[Sink] = (),
    ):
        self.run, self.world, self.total_images, self.live = run, world, total_images, live
        self.pending: _Pending | None = None
        self.latest: dict[str, Any] = {}  # the last record
        self.refused: set[tuple[str, str]] = set()  # (sink, what it does not take), told already
        self.sinks = [*_open_sinks(run, config, resolved, step), *sinks] if world.is_main else []
        self.line = ProgressLine(total_images, label=run.path.name) if world.is_main else None

    def submit(self, record: dict[str, Any], averages: Averages, extra: dict[str, Tensor | float]) -> None:
        """Queue one record: `record` is host data, `averages` and `extra` are on the device. Writes the one before."""
        averages.add(extra)
        names, device_values = list(averages.sums), self.world.mean(averages.means(self.world.device))
        averages.reset()
        self.flush()
        if device_values.is_cuda:
            host = torch.empty(device_values.shape, dtype=device_values.dtype, pin_memory=True)
            host.copy_(device_values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self.pending = _Pending(record, names, host, copied)
        else:
            self.pending = _Pending(record, names, device_values, None)
            self.flush()

    def flush(self) -> None:
        """Write the queued record."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        if pending.copied is not None:
            pending.copied.synchronize()  # recorded an interval ago: already done
        self.latest = {**pending.record, **dict(zip(pending.names, pending.values.tolist()))}
        self.write(self.latest)

    def write(self, record: dict[str, Any]) -> None:
        """One finished record to every sink. It has `step` and `images_seen`."""
        if not self.world.is_main:
            return
        self.run.write_metrics(
            {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in record.items()}
        )
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
        self._tell("numbers", lambda sink: sink(numbers, int(record["step"])))

    def picture(self, grid: Tensor | None, step: int) -> None:
        """A preview, (3, H, W) uint8, to every sink."""
        if grid is not None:
            self._tell("previews", lambda sink: sink.picture(grid, step))

    def _tell(self, what: str, tell: Callable[[Sink], None]) -> None:
        """Every sink. What one of them cannot do, hours into a run, does not end it: the folder holds all of it."""
        for sink in self.sinks:
            name = type(sink).__name__.strip("_")
            try:
                tell(sink)
            except Exception as error:  # any of the sink's library
                if (name, what) not in self.refused:
                    self.refused.add((name, what))
                    self.run.log(f"warning: {name} does not take {what} ({brief(error)})")

    def show(self, done: int, step: int) -> None:
        """The live line after `done` pictures."""
        if self.line is None:
            return
        figures = [(name, name, "") for name in self.live]
        figures += [("lr", "lr", ""), ("mfu", "MFU", " %"), ("peak_memory_gib", "memory", " GiB")]
        values = {name: self.latest.get(name) for name, _, _ in figures}  # None before the first record
        shown = [f"{title} {values[name]:.3g}{unit}" for name, title, unit in figures if values[name] is not None]
        self.line.update(done, "  ".join([f"step {step:,}", *shown]))

    def close(self) -> None:
        self.flush()
        if self.line:
            self.line.close()
        self._tell("the end of the run", lambda sink: sink.close())


NEEDS = {
    "wandb": "log.wandb=true needs the package wandb: pip install wandb",
    "tensorboard": "log.tensorboard=true needs the package tensorboard: pip install tensorboard",
    "trackio": "log.trackio=true needs the package trackio: pip install trackio==0.43.0, then pip install -r requirements.txt "
    "once more (trackio brings an older Pillow, whose crops differ by a grey level)",
}
LOGIN = "Log in with `wandb login`, check log.wandb_project and log.wandb_entity, set WANDB_MODE=offline, or leave out log.wandb."


def sink_problems(config: LogConfig) -> list[str]:
    """What can be told before a run of why it cannot log as it is asked to: packages, and a login."""
    wanted = [name for name in NEEDS if getattr(config, name)]
    problems = [NEEDS[name] for name in wanted if not _installed(name)]
    if "wandb" in wanted and _installed("wandb") and not sys.stdin.isatty() and _no_wandb_login():
        problems.append(f"log.wandb=true, and no login of Weights & Biases is known here. {LOGIN}")
    return problems


def _installed(name: str) -> bool:
    return sys.modules.get(name) is not None or importlib.util.find_spec(name) is not None


def _no_wandb_login() -> bool:
    """Whether wandb.init will certainly find no key; in doubt it is left to tell itself."""
    import requests
    import wandb

    try:
        settings = wandb.setup().settings
        known = settings.mode != "online" or settings.api_key or settings.identity_token_file
        return not known and requests.utils.get_netrc_auth(settings.base_url) is None
    except Exception:  # of other versions of the library
        return False


class _Session:
    """A session of wandb's or of trackio's, which is called the same way."""

    library: Any
    session: Any

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        self.session.log(dict(numbers), step=step)

    def picture(self, grid: Tensor, step: int) -> None:
        self.session.log({"preview": self.library.Image(grid.permute(1, 2, 0).numpy())}, step=step)

    def close(self) -> None:
        self.session.finish()


class _Wandb(_Session):
    def __init__(self, run: RunFolder, config: LogConfig, resolved: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError(NEEDS["wandb"]) from None
        self.library = wandb
        try:
            self.session = wandb.init(
                project=config.wandb_project,
                entity=config.wandb_entity,
                name=run.path.name,
                id=_session_id(run.path),
                dir=str(run.path),
                config=resolved,
                resume="allow",
            )
        except Exception as error:  # any of the library's, of its service or of the network
            raise UserError(
                f"log.wandb=true, and Weights & Biases does not take the run ({brief(error)}). {LOGIN}"
            ) from error


def _session_id(folder: Path) -> str:
    """Of the session of a run folder, noted in it with the folder: two folders of one name are two sessions, and so is a copy,
    while a moved one stays itself."""
    plain = re.sub(r"[/\\#?%:]", "-", folder.name)  # which an id may not hold
    place = folder / "wandb_id.txt"
    known, _, noted = place.read_text().strip().partition("\n") if place.is_file() else ("", "", "")
    if known and not is_copied(place, noted):
        begun = known
    else:
        # an earlier version took the name alone
        begun = plain if not place.is_file() and (folder / "wandb").is_dir() else f"{plain}-{uuid.uuid4().hex[:8]}"
    write_atomic(place, f"{begun}\n{folder.resolve()}\n")
    return begun


class _Tensorboard:
    def __init__(self, run: RunFolder, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(NEEDS["tensorboard"]) from None
        # what was written of later steps, before a kill, is written again
        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1 if step else None)

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, grid: Tensor, step: int) -> None:
        self.writer.add_image("preview", grid, step)

    def close(self) -> None:
        self.writer.close()


class _Trackio(_Session):
    def __init__(self, run: RunFolder, config: LogConfig, resolved: dict[str, Any]):
        try:
            import trackio  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(NEEDS["trackio"]) from None
        self.library = trackio
        self.session = trackio.init(
            project=config.trackio_project, name=run.path.name, config=resolved, resume="allow", embed=False
        )


def _open_sinks(run: RunFolder, config: LogConfig, resolved: dict[str, Any], step: int) -> list[Sink]:
    sinks: list[Sink] = []
    if config.wandb:
        sinks.append(_Wandb(run, config, resolved))
    if config.tensorboard:
        sinks.append(_Tensorboard(run, step))
    if config.trackio:
        sinks.append(_Trackio(run, config, resolved))
    return sinks


class ProgressLine:
    """One live line (a bar on a terminal, a plain line every 15 s elsewhere) with speed and time left."""

    PLAIN_SECONDS = 15.0

    def __init__(self, total: int, unit: str = "img", label: str = ""):
        self.total, self.unit, self.label = total, unit, label
        self.last_plain = 0.0
        self.restart(0)
        self.bar = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}")
            )
            self.bar.start()
            self.task = self.bar.add_task(label, total=total, text="")

    def restart(self, done: int) -> None:
        """Count the rate from here: `done` were finished before, by a part of the run that is over."""
        self.started, self.done_at_start = time.monotonic(), done

    def update(self, done: int, text: str = "") -> None:
        """`done` of `total`."""
        now = time.monotonic()
        elapsed = max(now - self.started, 1e-6)
        rate = (done - self.done_at_start) / elapsed
        left = (self.total - done) / rate if rate > 0 else float("nan")
        shown = f"{100 * done / max(1, self.total):3.0f}%  {rate:,.0f} {self.unit}/s  ETA {clock(left)}  {text}"
        if self.bar:
            self.bar.update(self.task, completed=done, text=shown)
        elif now - self.last_plain > self.PLAIN_SECONDS or done >= self.total:
            self.last_plain = now
            print(f"  {self.label} {shown}".rstrip(), flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


@contextmanager
def progress_line(
    world: World, total: int, label: str, unit: str = "img", done: int = 0
) -> Iterator[Callable[[int], None] | None]:
    """A ProgressLine's `update` on the main rank; None on the others, and where there is nothing to do.

    Args:
        done: what an earlier part of the job did; the rate is counted from there.
    """
    line = ProgressLine(total, unit, label) if world.is_main and total > done else None
    try:
        if line:
            line.restart(done)
        yield line.update if line else None
    finally:
        if line:
            line.close()


def clock(seconds: float) -> str:
    """1:02:03 or 2:03; -:-- when unknown."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
