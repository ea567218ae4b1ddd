#!/usr/bin/env python3
"""Proof by violence that a run can be interrupted anywhere and continued exactly. CPU, minutes.

    python -m tests.tools.torture --kills 20          SIGKILL at random moments, some of them inside a checkpoint save
    python -m tests.tools.torture --mutations         every checkpoint file truncated, emptied, one bit flipped, deleted
    python -m tests.tools.torture --layouts           ranks, accumulation and loader workers change nothing
    python -m tests.tools.torture --kills 20 --mutations --layouts --seed 1 --config configs/toy/rectok_generator.yaml

After kills and damage the final weights, averages, optimiser moments and metrics must equal those of an uninterrupted
run bit for bit. Prints one score line per part; exits with 0 only if every score is full.

Trainings run in children of a fork server that has imported everything, which saves seconds per restart; the first kill
hits the real command line.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TOY = "configs/toy/rectok_tokenizer.yaml"
# Periods that do not divide each other: checkpoints then hold half-filled averages of the log.
PERIODS = ["train.device=cpu", "train.log_every=3step", "train.checkpoint_every=4step", "train.preview_every=never"]
NO_GAN = ["discriminator=null", "objective.weights.gan=0"]
CLOCKS = ("images_per_second", "peak_memory_gib")  # metrics that measure time or memory: no two runs agree on them
SAVE_SECONDS = 0.05  # about how long a toy checkpoint takes: kills aimed at a save land within
PATIENCE = 120.0  # seconds before a child counts as hung


# ---------------------------------------------------------------------------------------------------------------------
# Runs in child processes
# ---------------------------------------------------------------------------------------------------------------------
def fork_server():
    """A multiprocessing context whose children start with torch imported and no thread alive."""
    os.environ.update(OMP_NUM_THREADS="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run.train", "torch._dynamo", "omegaconf", "safetensors.torch"])
    return context


def _child(config: str, overrides: list[str], log: str, environment: dict[str, str], spy: str | None) -> None:
    """One rank of a training, as scripts/train.py would run it, with its output in `log`."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    import torch

    from core import cli
    from run.load import load_config
    from run.train import train

    torch.set_num_threads(1)
    if spy:
        _record_batches(Path(spy))
    cli.run(lambda _: train(load_config(config, overrides)))


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


ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Arena:
    """Where runs of one config take place.

    Args:
        config: YAML of a toy run.
        folder: work folder of all its runs.
        overrides: what they have in common.
    """

    config: str
    folder: Path
    overrides: list[str] = field(default_factory=lambda: list(PERIODS))

    def __post_init__(self):
        self.context = fork_server()

    def arguments(self, name: str, *more: str) -> list[str]:
        """Overrides of the run called `name`."""
        return [
            *self.overrides,
            f"name={name}",
            f"work_dir={self.folder}",
            f"data.cache_dir={self.folder / 'cache'}",
            *more,
        ]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start(self, name: str, *more: str, environment: dict[str, str] | None = None, spy: Path | None = None):
        """Begin or continue a run in a child."""
        target = (self.config, self.arguments(name, *more), str(self.log(name)), environment or {}, spy and str(spy))
        process = self.context.Process(target=_child, args=target)
        process.start()
        return process

    def start_command_line(self, name: str, *more: str) -> subprocess.Popen:
        """The same through `python -m scripts.train`."""
        command = [sys.executable, "-m", "scripts.train", self.config, *self.arguments(name, *more)]
        with self.log(name).open("ab") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)

    def run(self, name: str, *more: str, **options) -> int:
        """To its end; the exit code."""
        process = self.start(name, *more, **options)
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{name} hangs; see {self.log(name)}")
        return process.exitcode

    def run_ranks(self, name: str, ranks: int, *more: str, spy: Path | None = None) -> list[int]:
        """The same on several gloo ranks; their exit codes."""
        with socket.socket() as probe:  # a free port
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = [
            self.start(
                name,
                *more,
                spy=spy and spy.with_suffix(f".{rank}"),
                environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.join(PATIENCE)
            if process.exitcode is None:
                process.kill()
        return [process.exitcode for process in processes]

    def tail(self, name: str) -> str:
        """The end of a run's output, for messages."""
        return "\n".join(self.log(name).read_text(errors="replace").splitlines()[-8:])


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
        result[f"metrics of step {record['step']}"] = record
    result["metrics lines"] = len(read_metrics(run))
    return result


def differences(reference: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of what is not bit-equal."""
    return [key for key in sorted(reference.keys() | other.keys()) if reference.get(key) != other.get(key)]


@dataclass
class Score:
    """`passed` of `total`, and what went wrong."""

    title: str
    passed: int = 0
    total: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.passed == self.total and not self.problems

    def count(self, passed: bool, problem: str) -> None:
        self.total += 1
        self.passed += passed
        if not passed:
            self.problems.append(problem)

    def __str__(self) -> str:
        return "\n".join([f"{self.title} {self.passed}/{self.total}", *(f"  {p}" for p in self.problems)])


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------
def _writers_folder(run: Path) -> bool:
    """Whether a checkpoint is being written right now."""
    try:
        return any(entry.name.startswith(".tmp-step") for entry in os.scandir(run / "checkpoints"))
    except FileNotFoundError:
        return False


def _wait_for(condition: Callable[[], bool], alive: Callable[[], bool]) -> None:
    """Until the condition holds or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition() and alive() and time.monotonic() < deadline:
        time.sleep(0.0003)


def survive_kills(arena: Arena, kills: int, seed: int = 0, say: Callable[[str], None] = lambda _: None) -> Score:
    """Kill runs `kills` times altogether. A run that ends is compared, and the next kills hit a new one."""
    rng = random.Random(seed)
    arena.run("warm_up")
    started = time.monotonic()
    if arena.run("reference"):
        raise RuntimeError(f"the uninterrupted run failed:\n{arena.tail('reference')}")
    seconds = time.monotonic() - started
    reference = read_result(arena.folder / "reference")
    score = Score("kills survived")
    done, round_number = 0, 0
    while done < kills:
        name = f"killed_{round_number}"
        round_number += 1
        run, here, finished = arena.folder / name, 0, False
        while done < kills and not finished:
            through_command_line = done == 0
            in_save = not through_command_line and rng.random() < 0.4
            if through_command_line:
                process = arena.start_command_line(name)
                alive, wait = (lambda p=process: p.poll() is None), process.wait
                _wait_for((run / "metrics.jsonl").is_file, alive)
                time.sleep(rng.uniform(0.0, 0.1))
            else:
                process = arena.start(name)
                alive, wait = process.is_alive, process.join
                if in_save:
                    _wait_for(lambda: _writers_folder(run), alive)
                    time.sleep(rng.uniform(0.0, SAVE_SECONDS))
                else:
                    time.sleep(rng.uniform(0.0, 0.9 * seconds))
            process.kill()
            wait()
            code = process.returncode if through_command_line else process.exitcode
            if code == -9:
                done, here = done + 1, here + 1
                say(
                    f"  kill {done} {'inside a save' if in_save else 'anywhere'}: "
                    f"{', '.join(sorted(p.name for p in run.glob('checkpoints/*step*'))) or 'nothing saved yet'}"
                )
            elif code == 0:
                finished = True
            else:
                raise RuntimeError(f"{name} ended with {code} instead of being killed:\n{arena.tail(name)}")
        code = 0 if finished else arena.run(name)
        found = [f"exit code {code}"] if code else differences(reference, read_result(run))
        found += [f"left behind {p.name}" for p in run.glob("checkpoints/.*")]
        score.total += here
        score.passed += here if not found else 0
        if found:
            score.problems.append(f"{name}, killed {here} times: {len(found)} differences, first {found[:3]}")
    return score


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------
def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(1, path.stat().st_size))


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": _truncate,
    "emptied": lambda path, rng: os.truncate(path, 0),
    "one bit flipped": _flip,
    "deleted": lambda path, rng: path.unlink(),
}


def survive_mutations(
    arena: Arena, limit: int | None = None, seed: int = 0, say: Callable[[str], None] = lambda _: None
) -> Score:
    """Damage one file of the newest checkpoint at a time: the one before is used and the run ends as if nothing was.

    Args:
        limit: try so many, chosen at random. None: all.
    """
    rng = random.Random(seed)
    if arena.run("whole", "train.keep_checkpoints=100"):
        raise RuntimeError(f"the uninterrupted run failed:\n{arena.tail('whole')}")
    whole = arena.folder / "whole"
    reference = read_result(whole)
    *_, earlier, newest, last = sorted(p.name for p in (whole / "checkpoints").glob("step_*"))
    cases = [(file.name, kind) for file in sorted((whole / "checkpoints" / newest).iterdir()) for kind in DAMAGE]
    if limit is not None:
        cases = rng.sample(cases, limit)
    score = Score("mutations survived")
    for number, (file, kind) in enumerate(cases):
        name = f"mutated_{number}"
        run = arena.folder / name
        _copy_unfinished(whole, run, last)
        DAMAGE[kind](run / "checkpoints" / newest / file, rng)
        code = arena.run(name, "train.keep_checkpoints=100")
        log = (run / "log.txt").read_text()
        found = [f"exit code {code}"] if code else differences(reference, read_result(run))
        if f"{newest}/{file}" not in log.replace(os.sep, "/"):
            found.append("the damaged file is not named in the log")
        if f"{earlier} (step" not in log:
            found.append("the checkpoint before was not used")
        score.count(not found, f"{file} {kind}: {found[:3]}")
        say(f"  {file} {kind}: {'as if nothing was' if not found else found[:3]}")
        shutil.rmtree(run)
    _copy_unfinished(whole, arena.folder / "hopeless", last)
    for path in (arena.folder / "hopeless" / "checkpoints").glob("step_*"):
        (path / "manifest.json").unlink()
    code = arena.run("hopeless")
    score.count(code == 2 and "none is whole" in arena.tail("hopeless"), f"all manifests deleted: exit code {code}")
    return score


def _copy_unfinished(whole: Path, run: Path, last: str) -> None:
    """A finished run as it stood before its last checkpoint."""
    shutil.copytree(whole, run, symlinks=True, ignore=shutil.ignore_patterns(last, "latest"))
    # The copy has another name, which is part of the configuration.
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"name: {whole.name}\n", f"name: {run.name}\n", 1))
    (run / "log.txt").unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layout:
    title: str
    ranks: int
    overrides: tuple[str, ...]
    exact: bool = False  # bit-equal to one rank without workers, or within tolerance of it
    gan: bool = True  # the discriminator's batch statistics are those of a micro-batch: no accumulation with it


LAYOUTS = [
    Layout("2 ranks", 2, ()),
    Layout("accumulation 2", 1, ("train.micro_batch=4",), gan=False),
    Layout("2 ranks, accumulation 2", 2, ("train.micro_batch=2",), gan=False),
    Layout("1 worker", 1, ("data.workers=1",), exact=True),
    Layout("3 workers", 1, ("data.workers=3",), exact=True),
]
# Of losses. Sums of other parts round differently; AdamW divides gradients by their own size, so what was rounding of a
# gradient near 0 is 1e-6 of a loss after one step, on some processors more. A wrong layout shows from 1e-3 on.
RELATIVE, ABSOLUTE = 1e-5, 1e-7
NORM_RELATIVE = 3e-5  # gradients sum many terms of both signs, and lose digits where those cancel


def _batches(spy: Path) -> list[str]:
    """What all ranks were given, in the order of positions."""
    lines = [line for path in spy.parent.glob(f"{spy.name}.*") for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: [int(number) for number in line.split()[:2]])


def worst_difference(reference: list[dict], other: list[dict]) -> float:
    """Largest |a - b| / tolerance over all metrics: at most 1 means within it."""
    if [r.keys() for r in reference] != [r.keys() for r in other]:
        return float("inf")
    return max(
        abs(a[k] - b[k]) / (ABSOLUTE + abs(a[k]) * (NORM_RELATIVE if k.startswith("grad_norm") else RELATIVE))
        for a, b in zip(reference, other)
        for k in a
    )


def compare_layouts(
    arena: Arena, layouts: list[Layout] = LAYOUTS, say: Callable[[str], None] = lambda _: None
) -> Score:
    """The same run on other ranks, micro-batches and workers: same pictures, same losses."""
    spies = arena.folder / "batches"
    spies.mkdir(exist_ok=True)

    def run(name: str, layout: Layout) -> str:
        """Its end if it went wrong."""
        overrides = ["train.log_every=1step", *([] if layout.gan else NO_GAN), *layout.overrides]
        codes = arena.run_ranks(name, layout.ranks, *overrides, spy=spies / name)
        return f"exit codes {codes}\n{arena.tail(name)}" if any(codes) else ""

    score = Score("layouts agree")
    rows = [("layout", "pictures", "losses / tolerance", "weights")]
    for gan in sorted({layout.gan for layout in layouts}):
        if problem := run(f"alone_{gan}", Layout("one rank", 1, (), gan=gan)):
            raise RuntimeError(problem)
    for number, layout in enumerate(layouts):
        name, alone = f"layout_{number}", f"alone_{layout.gan}"
        if problem := run(name, layout):
            score.count(False, f"{layout.title}: {problem}")
            continue
        expected = _batches(spies / alone)
        same_pictures = _batches(spies / name) == expected and len(expected) > 0
        worst = worst_difference(read_metrics(arena.folder / alone), read_metrics(arena.folder / name))
        unequal = differences(read_result(arena.folder / alone), read_result(arena.folder / name))
        passed = same_pictures and (not unequal if layout.exact else worst <= 1)
        rows.append(
            (layout.title, "same" if same_pictures else "DIFFER", f"{worst:.2f}", "differ" if unequal else "bit-equal")
        )
        score.count(passed, f"{layout.title}: {', '.join(rows[-1][1:])}")
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return score


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="how many")
    parser.add_argument("--mutations", action="store_true", help="damage checkpoint files")
    parser.add_argument("--layouts", action="store_true", help="ranks, accumulation, workers")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--config", default=TOY, help="a run of seconds")
    options = parser.parse_args(arguments)
    if not (options.kills or options.mutations or options.layouts):
        parser.error("nothing to do: give --kills N, --mutations or --layouts")
    scores = []
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        arena = Arena(options.config, Path(folder))
        if options.kills:
            scores.append(survive_kills(arena, options.kills, options.seed, print))
        if options.mutations:
            scores.append(survive_mutations(arena, None, options.seed, print))
        if options.layouts:
            scores.append(compare_layouts(arena, say=print))
    print(*scores, sep="\n")
    return 0 if all(score.full for score in scores) else 1


if __name__ == "__main__":
    sys.exit(main())
