"""Our programs in children that start within a second, and what they leave behind that must not depend on interruptions."""

from __future__ import annotations

import functools
import importlib
import json
import mmap
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Periods that do not divide each other: checkpoints then hold half-filled averages of the log.
PERIODS = ["train.device=cpu", "train.log_every=3step", "train.checkpoint_every=4step", "train.preview_every=never"]
CLOCKS = (
    "images_per_second",
    "peak_memory_gib",
    "mfu",
)  # metrics that measure time or memory: no two runs agree on them
PRELOADED = ["run.train", "torch._dynamo", "omegaconf", "safetensors.torch"]  # before the first child is started
PATIENCE = 300.0  # seconds before a child counts as hung

# What a moment is called: the first of these that the program is inside.
PLACES = (
    ("save", "core.train.checkpoint", "CheckpointStore._write"),
    ("evaluation", "core.train.trainer", "Trainer._evaluate"),
    ("preview", "core.train.trainer", "Trainer.preview"),
    ("step", "core.train.trainer", "Trainer.train_step"),
    ("pieces", "core.chunks", "Chunks.run"),
    ("statistics", "run.latent_stats", "measure"),
    ("report", "run.measurement", "Measurement.write"),
    ("report", "run.quickstart", "report"),
    ("work", "run.reconstruct", "reconstruct"),
    ("work", "run.convert", "Conversion.run"),
    ("work", "run.linear_probe", "linear_probe"),
)
_READY, _BEGUN, _LENGTH = 61, 62, 64  # of the file that tells the place


# ---------------------------------------------------------------------------------------------------------------------
# In a child
# ---------------------------------------------------------------------------------------------------------------------
def fork_server():
    """A multiprocessing context whose children start with torch imported and no thread alive."""
    os.environ.update(OMP_NUM_THREADS="1", TESSERA_OFFLINE="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _child(
    program: str, words: list[str], folder: str, log: str, environment: dict[str, str], spy: str | None, place: str
) -> None:
    """One rank of a program, as `python -m scripts.PROGRAM WORDS` in `folder` would run it, with its output in `log`."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(folder)
    import torch

    from core import cli

    torch.set_num_threads(1)
    _mark_places(place)
    if spy:
        _record_batches(Path(spy))
    sys.argv = [str(ROOT / "scripts" / f"{program}.py"), *words]
    cli.run(importlib.import_module(f"scripts.{program}").main)


def _mark_places(path: str) -> None:
    """Let the file at `path` say, while this process lives and after it was killed, what it is inside."""
    from core.signals import StopRequest

    handle = os.open(path, os.O_RDWR)
    told = mmap.mmap(handle, _LENGTH)
    os.close(handle)

    def marked(call: Callable, index: int) -> Callable:
        @functools.wraps(call)
        def inside(*words, **options):
            told[_BEGUN] = 1
            told[index] += 1
            try:
                return call(*words, **options)
            finally:
                told[index] -= 1

        return inside

    enter = StopRequest.__enter__

    def ready(self: StopRequest) -> StopRequest:
        try:
            return enter(self)
        finally:
            told[_READY] = 1

    StopRequest.__enter__ = ready
    for index, (_, module, name) in enumerate(PLACES):
        if module.startswith("run.") and module not in sys.modules:
            continue  # of another program, or too dear to import where nobody asks for places
        owner: Any = importlib.import_module(module)
        *outer, last = name.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, last, marked(getattr(owner, last), index))


def _record_batches(path: Path) -> None:
    """Write what every step is given: step, position, label and checksum of each picture."""
    from core.train.trainer import Trainer

    original = Trainer.train_step

    def train_step(self, batch):
        with path.open("a") as file:
            for position, label, image in zip(batch.positions.tolist(), batch.labels.tolist(), batch.images):
                file.write(f"{self.step} {position} {label} {zlib.crc32(image.numpy().tobytes()):08x}\n")
        return original(self, batch)

    Trainer.train_step = train_step


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Runs(ABC):
    """One command, run again and again under different names.

    Args:
        folder: where all of it takes place; made if missing.
    """

    folder: Path
    title = ""
    program = ""
    takes_ranks = True

    def __post_init__(self):
        self.context = fork_server()
        self._reference: tuple[dict[str, object], float] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def words(self, name: str, *more: str) -> list[str]:
        """Of the command line of the run called `name`."""

    @abstractmethod
    def result(self, name: str) -> dict[str, object]:
        """All that must not depend on interruptions."""

    def place(self, name: str) -> Path:
        """Where programs that know no other folder write."""
        return self.folder / name

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start(
        self, name: str, *more: str, environment: dict[str, str] | None = None, spy: Path | None = None, rank: int = 0
    ):
        """Begin or continue a run in a child."""
        told = self._told(name, rank)
        told.write_bytes(bytes(_LENGTH))
        self.place(name).mkdir(exist_ok=True)
        target = (self.program, self.words(name, *more), str(self.place(name)), str(self.log(name)), environment or {})
        process = self.context.Process(target=_child, args=(*target, spy and str(spy), str(told)))
        process.start()
        return process

    def start_command_line(self, name: str, *more: str) -> subprocess.Popen:
        """The same with an interpreter of its own."""
        self._told(name, 0).write_bytes(bytes(_LENGTH))
        self.place(name).mkdir(exist_ok=True)
        command = [sys.executable, "-m", f"scripts.{self.program}", *self.words(name, *more)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.log(name).open("ab") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=self.place(name), env=environment
            )

    def run(self, name: str, *more: str, **options) -> int:
        """To its end; the exit code."""
        process = self.start(name, *more, **options)
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{name} hangs; see {self.log(name)}")
        return process.exitcode

    def reference(self) -> tuple[dict[str, object], float]:
        """(result, seconds) of an uninterrupted run, which is made once."""
        if self._reference is None:
            server = self.context.Process(target=int)  # which imports
            server.start()
            server.join()
            self.words("reference")  # makes what the runs need
            began = time.monotonic()
            if self.run("reference"):
                raise RuntimeError(f"the uninterrupted run failed:\n{self.tail('reference')}")
            self._reference = self.result("reference"), time.monotonic() - began
        return self._reference

    def start_ranks(self, name: str, ranks: int, *more: str, spy: Path | None = None) -> list:
        """The same on several gloo ranks, which report as under scripts/launch.sh."""
        with socket.socket() as probe:  # a free port
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for left in (self.exit_file(name), self.exit_file(name).with_suffix(".exit.claimed")):
            left.unlink(missing_ok=True)
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shared["TESSERA_EXIT_FILE"] = str(self.exit_file(name))
        return [
            self.start(
                name,
                *more,
                spy=spy and spy.with_suffix(f".{rank}"),
                environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                rank=rank,
            )
            for rank in range(ranks)
        ]

    def run_ranks(self, name: str, ranks: int, *more: str, spy: Path | None = None) -> list[int]:
        """To their ends; the exit codes."""
        processes = self.start_ranks(name, ranks, *more, spy=spy)
        for process in processes:
            process.join(PATIENCE)
            if process.exitcode is None:
                process.kill()
        return [process.exitcode for process in processes]

    def exit_file(self, name: str) -> Path:
        """Where ranks write with what code the launcher is to end."""
        return self.folder / f"{name}.exit"

    def said(self, name: str) -> str:
        """All that its ranks printed, and what the launcher would print at the end."""
        files = [path for path in (self.log(name), self.exit_file(name)) if path.is_file()]
        return "\n".join(path.read_text(errors="replace") for path in files)

    def tail(self, name: str) -> str:
        """The end of a run's output, for messages."""
        return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-8:])

    def _told(self, name: str, rank: int) -> Path:
        return self.folder / f"{name}.{rank}.place"

    def hears(self, name: str) -> bool:
        """Whether a run has put its handlers of signals in place."""
        return self._told(name, 0).read_bytes()[_READY] > 0

    def where(self, name: str, rank: int = 0) -> str:
        """What a run is inside, or was when it was killed: the first of PLACES, "start-up", or "between"."""
        told = self._told(name, rank).read_bytes()
        inside = next((title for index, (title, _, _) in enumerate(PLACES) if told[index]), None)
        return inside or ("between" if told[_BEGUN] else "start-up")


@dataclass
class Arena(Runs):
    """Trainings of one config.

    Args:
        config: YAML of a toy run.
        overrides: what they have in common.
    """

    overrides: list[str] = field(default_factory=lambda: list(PERIODS))
    title: str = "training"
    program = "train"

    def __init__(self, config: str, folder: Path, overrides: list[str] | None = None, title: str = "training"):
        self.config, self.title = str(ROOT / config), title
        self.overrides = list(PERIODS) if overrides is None else overrides
        super().__init__(folder)

    def words(self, name: str, *more: str) -> list[str]:
        cache = f"data.cache_dir={self.folder / 'cache'}"
        return [self.config, *self.overrides, f"name={name}", f"work_dir={self.folder}", cache, *more]

    def result(self, name: str) -> dict[str, object]:
        run = self.folder / name
        result = read_result(run)
        result |= {f"preview {path.name}": path.read_bytes() for path in sorted(run.glob("samples/*.png"))}
        left = [path.relative_to(run) for path in run.rglob(".*") if not _TEMPORARY.fullmatch(path.name)]
        return result | {f"left behind {path}": True for path in left}


@dataclass
class Program(Runs):
    """Runs of a program that writes into one folder.

    Args:
        command: folder -> words of the command line.
    """

    command: Callable[[Path], list[object]] = list
    program: str = ""
    title: str = ""
    takes_ranks: bool = True

    def words(self, name: str, *more: str) -> list[str]:
        return [*map(str, self.command(self.place(name))), *more]

    def result(self, name: str) -> dict[str, object]:
        return contents(self.place(name))


# ---------------------------------------------------------------------------------------------------------------------
# What a run left behind
# ---------------------------------------------------------------------------------------------------------------------
def read_metrics(run: Path) -> list[dict]:
    """metrics.jsonl without what clocks decide."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def read_result(run: Path) -> dict[str, object]:
    """Everything that must not depend on interruptions: the last checkpoint, tensor by tensor as bytes, and metrics."""
    from safetensors.torch import load_file

    from core.train.checkpoint import CheckpointStore, find_damage

    store = CheckpointStore(run / "checkpoints")
    checkpoint = store.latest(clean=False)
    if checkpoint is None or find_damage(checkpoint.path):
        return {"checkpoint": None}
    result: dict[str, object] = {
        f"state {k}": checkpoint.state[k]
        for k in ("step", "images_seen", "optimizers", "averages", "ema", "data_fingerprint")
    }
    for file in sorted(checkpoint.path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            result[f"{file.name} {name}"] = (str(tensor.dtype), tuple(tensor.shape), tensor.numpy().tobytes())
    for record in read_metrics(run):
        kind = "evaluation" if any(key.startswith("eval/") for key in record) else "metrics"
        result[f"{kind} of step {record['step']}"] = record
    result["metrics lines"] = len(read_metrics(run))
    return result


# Files that tell of time, machine and attempts, and what names the attempt's folder.
_TOLD = re.compile(r"(log\.txt|command\.txt|environment\.json|report\.html|seconds\.json|state\.json|manifest\.json)")
_TEMPORARY = re.compile(r"\..*\.tmp-\d+-\d+")  # what SIGKILL leaves of core.files.replacing; nothing reads it
_CLOCK = re.compile(r"second|environment|memory")


def contents(folder: Path) -> dict[str, object]:
    """Every file that a program made, JSON without what clocks and attempts decide."""
    made: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or _TOLD.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name):
            continue
        made[str(path.relative_to(folder))] = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".yaml"):
            text = path.read_text().replace(str(folder), "FOLDER")
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            made[str(path.relative_to(folder))] = (
                text if path.suffix == ".yaml" else [_timeless(json.loads(line)) for line in lines]
            )
    return made


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not _CLOCK.search(k) and k not in CLOCKS}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def differences(reference: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of what is not bit-equal."""
    return [key for key in sorted(reference.keys() | other.keys()) if reference.get(key) != other.get(key)]


@dataclass
class Score:
    """`passed` of `total`, where the interruptions fell, and what went wrong."""

    title: str
    passed: int = 0
    total: int = 0
    problems: list[str] = field(default_factory=list)
    where: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0  # seconds from a signal to the end

    @property
    def full(self) -> bool:
        return self.passed == self.total and not self.problems

    def count(self, passed: bool, problem: str) -> None:
        self.total += 1
        self.passed += passed
        if not passed:
            self.problems.append(problem)

    def __str__(self) -> str:
        row = f"{self.title:34} {self.passed}/{self.total}"
        if self.where:
            row += "   " + ", ".join(f"{place} {count}" for place, count in self.where.most_common())
        if self.longest:
            row += f"   longest {self.longest:.1f} s"
        return "\n".join([row, *(f"  {p}" for p in self.problems)])
