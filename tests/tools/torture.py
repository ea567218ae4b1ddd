#!/usr/bin/env python3
"""Proof by violence that a run can be interrupted anywhere and continued exactly. CPU, minutes.

    python -m tests.tools.torture --kills 40          SIGKILL at random moments, and inside saves and evaluations
    python -m tests.tools.torture --stops 20          SIGTERM, SIGINT and SIGUSR1 at random moments
    python -m tests.tools.torture --ranks 4           two ranks, of which one is killed or (trainings) stopped
    python -m tests.tools.torture --regroup 4         programs killed on one rank go on with two, and the other way round
    python -m tests.tools.torture --mutations 30      checkpoint files truncated, emptied, one bit flipped, deleted
    python -m tests.tools.torture --layouts           ranks, accumulation and loader workers change nothing
    python -m tests.tools.torture rectok sample --kills 10 --stops 10 --seed 1

NAME: a system, whose tokenizer and generator are trained, or a program; default: everything. Counts are of each training
and program. After kills, stops and damage the final weights, averages, optimiser moments, metrics and files must equal
those of an uninterrupted run bit for bit. Prints one row per training and program with the places that the interruptions
fell on; exits with 0 only if every score is full.

Programs run in children of a fork server that has imported everything, which saves seconds per restart; the first
interruption of each hits the real command line.
"""

import argparse
import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.tools.arena import PATIENCE, PERIODS, PRELOADED, Arena, Runs, Score, differences, read_metrics, read_result
from tests.tools.jobs import PROGRAMS, SYSTEMS, Workshop

__all__ = ["PERIODS", "Arena", "differences", "read_metrics", "read_result"]

NO_GAN = ["discriminator=null", "objective.weights.gan=0"]
# Places that random moments would seldom fall on, of trainings and of the others.
AIMS = {True: ("save", "evaluation", "preview"), False: ("pieces", "report", "work", "statistics")}
KILL, STOPS = (signal.SIGKILL,), (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GO_ON = "run the same command again to continue"
# The handlers of Python or of the system answer a signal that comes before ours are there.
BEFORE = {number: {-number, 128 + number} for number in STOPS}
Say = Callable[[str], None]


# ---------------------------------------------------------------------------------------------------------------------
# Kills and stops
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Attempt:
    """One start of a run that is to be interrupted."""

    runs: Runs
    name: str
    through_command_line: bool = False

    def __post_init__(self):
        log = self.runs.log(self.name)
        self._said = log.stat().st_size if log.exists() else 0
        start = self.runs.start_command_line if self.through_command_line else self.runs.start
        self.process = start(self.name)

    def code(self) -> int | None:
        """How it ended; None while it lives."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Or until it has ended; at most so long."""
        deadline = time.monotonic() + seconds
        while not condition() and self.code() is None and time.monotonic() < deadline:
            time.sleep(0.0005)

    def interrupt(self, number: int) -> tuple[int, float]:
        """Send a signal; (exit code, seconds until the end)."""
        began = time.monotonic()
        if self.code() is None:
            os.kill(self.process.pid, number)
        self.join(PATIENCE)
        return self.code() if self.code() is not None else self._give_up(), time.monotonic() - began

    def join(self, seconds: float) -> None:
        if not isinstance(self.process, subprocess.Popen):
            self.process.join(seconds)
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def _give_up(self) -> int:
        self.process.kill()
        self.join(PATIENCE)
        raise TimeoutError(f"it does not end, {self.runs.where(self.name)}")

    def said(self) -> str:
        """What it printed."""
        return self.runs.log(self.name).read_bytes()[self._said :].decode(errors="replace")

    def problem(self, number: int, code: int) -> str:
        """What is wrong with how it ended; "" where nothing is."""
        if code == 0 or (self.through_command_line and code in BEFORE.get(number, ())):
            return ""
        said = self.said()
        expected = -number if number == signal.SIGKILL else 75
        # decoding processes of one that was killed may say that they lost it
        if code != expected or (number != signal.SIGKILL and "Traceback" in said):
            return f"{signal.Signals(number).name} ended with {code}: ...{said[-600:]}"
        if number != signal.SIGKILL and said.count(GO_ON) != 1:
            return f"{signal.Signals(number).name} is answered with {said[-300:]!r}"
        return ""


def interrupt(
    runs: Runs, count: int, numbers: tuple[int, ...] = KILL, seed: int = 0, say: Say = lambda _: None
) -> Score:
    """Send `count` signals altogether. A run that ends is compared, and the next signals hit a new one."""
    rng = random.Random(f"{seed} {runs.title}")
    kind = "kills" if numbers == KILL else "stops"
    (reference, seconds), score = runs.reference(), Score(f"{runs.title} {kind}")
    round_number = 0
    while score.total < count:
        name, here = f"{kind}_{round_number}", 0
        round_number += 1
        problems, finished = [], False
        while score.total + here < count and not finished and not problems:
            through_command_line = score.total + here == 0
            number = rng.choice(numbers)
            attempt = Attempt(runs, name, through_command_line)
            aims = AIMS[isinstance(runs, Arena)]
            aim = rng.choice(aims) if rng.random() < 0.5 and not through_command_line else "anywhere"
            if aim == "anywhere":
                attempt.join(rng.uniform(0.0, 0.9 * seconds) + (rng.uniform(0.3, 4.0) if through_command_line else 0))
            else:
                attempt.wait_until(lambda: runs.where(name) == aim, seconds)
                attempt.join(rng.uniform(0.0, 0.05 if isinstance(runs, Arena) else 0.3 * seconds))
            attempt.wait_until(lambda: through_command_line or runs.hears(name), PATIENCE)
            before = runs.where(name)  # where a polite stop is no more when it has ended
            try:
                code, took = attempt.interrupt(number)
            except TimeoutError as hanging:
                problems.append(str(hanging))
                break
            # A kill may have come behind the last file, of which no program can tell that it was the last.
            done = code == 2 and numbers == KILL and here > 0 and "is there already" in attempt.said()
            finished = code == 0 or done
            if not done and (problem := attempt.problem(number, code)):
                problems.append(problem)
            if not finished:
                here += 1
                where = "command line" if through_command_line else runs.where(name) if numbers == KILL else before
                score.where[where] += 1
                if number != signal.SIGKILL:
                    score.longest = max(score.longest, took)
                say(f"  {runs.title}: {signal.Signals(number).name} {score.total + here} in {where}, {took:.1f} s")
        if not problems and not finished and (code := runs.run(name)):
            problems.append(f"exit code {code}: {runs.tail(name)}")
        if not problems:
            problems += differences(reference, runs.result(name))
        score.total += max(here, len(problems) > 0)
        score.passed += here if not problems else 0
        if problems:
            score.problems.append(f"{name}, {here} interruptions: {len(problems)} problems, first {problems[:3]}")
            say(f"  {score.problems[-1]}")
        else:
            _forget(runs, name)
    return score


def survive_kills(arena: Arena, kills: int, seed: int = 0, say: Say = lambda _: None) -> Score:
    """Kill trainings so often."""
    return interrupt(arena, kills, KILL, seed, say)


def _forget(runs: Runs, name: str) -> None:
    """Free the disk."""
    for path in runs.folder.glob(f"{name}.*"):
        path.unlink()
    shutil.rmtree(runs.place(name))


# ---------------------------------------------------------------------------------------------------------------------
# Lost ranks
# ---------------------------------------------------------------------------------------------------------------------
PLAIN = ["train.eval_every=never", "train.preview_every=never", "train.rank_timeout=0.1"]


def unequal_pairs(reference: dict[str, object], other: dict[str, object]) -> list[str]:
    """What differs between two runs on two ranks. An interval of the log that was cut is averaged over ranks in two parts,
    which rounds otherwise; nothing is computed from it."""

    def rounds(key: str) -> bool:
        pair = [result.get(key) for result in (reference, other)]
        return key.startswith("metrics of step") and None not in pair and worst_difference(*([p] for p in pair)) <= 1

    return [key for key in differences(reference, other) if not rounds(key)]


def lose_ranks(runs: Runs, count: int, seed: int = 0, say: Say = lambda _: None) -> Score:
    """Kill one of two ranks, or stop it for good: the other ends with 1 and names it, and two new ones go on.

    Programs wait for a rank that is at work for as long as it lives, so only trainings are stopped, inside a step.
    """
    rng = random.Random(f"{seed} {runs.title}")
    more = PLAIN if isinstance(runs, Arena) else []
    runs.words("pair")  # makes what the runs need
    started = time.monotonic()
    if any(codes := runs.run_ranks("pair", 2, *more)):
        raise RuntimeError(f"two ranks ended with {codes}:\n{runs.tail('pair')}")
    seconds = time.monotonic() - started
    reference, score = runs.result("pair"), Score(f"{runs.title} lost ranks")
    for number in range(count):
        name, victim = f"lost_{number}", rng.randrange(2)
        hangs = isinstance(runs, Arena) and number % 2 == 1
        processes = runs.start_ranks(name, 2, *more)
        deadline = time.monotonic() + seconds
        ready = {"step", "save"} if hangs else {"step", "save", "pieces", "between", "report", "evaluation"}
        while runs.where(name, victim) not in ready and time.monotonic() < deadline and processes[victim].is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.3 * seconds))
        where, alive = runs.where(name, victim), all(p.is_alive() for p in processes)
        if alive:
            os.kill(processes[victim].pid, signal.SIGSTOP if hangs else signal.SIGKILL)
        other = processes[1 - victim]
        other.join(PATIENCE / 3)
        title = f"rank {victim} {'stopped' if hangs else 'killed'} in {where}"
        problems, said = [], runs.said(name)
        if other.exitcode is None:
            problems.append(f"{title}: the other one hangs in {runs.where(name, 1 - victim)}")
        elif alive and other.exitcode == 1 and f"rank {victim}" not in said:
            problems.append(f"{title}: the message does not name it: {said[-600:]}")
        elif alive and other.exitcode not in (0, 1):
            problems.append(f"{title}: the other one ended with {other.exitcode}: {runs.tail(name)}")
        if "Traceback" in said:
            problems.append(f"{title}: {said[-1500:]}")
        for process in processes:
            process.kill()
            process.join()
        if any(codes := runs.run_ranks(name, 2, *more)):
            problems.append(f"{title}: two new ones ended with {codes}: {runs.tail(name)}")
        else:
            problems += [f"{title}: {found}" for found in unequal_pairs(reference, runs.result(name))[:3]]
        score.count(not problems, f"{name}: {problems[:3]}")
        score.where[f"{'stopped' if hangs else 'killed'} in {where}" if alive else "too late"] += 1
        say(f"  {runs.title}: {title}, the other one ended with {other.exitcode} {problems[:1]}")
        if not problems:
            _forget(runs, name)
    return score


def change_ranks(runs: Runs, count: int, seed: int = 0, say: Say = lambda _: None) -> Score:
    """Kill a program on one rank and go on with two, and the other way round: the bits of one that was not interrupted."""
    rng = random.Random(f"{seed} {runs.title}")
    (reference, seconds), score = runs.reference(), Score(f"{runs.title} other ranks")
    for number in range(count):
        name, before = f"regrouped_{number}", number % 2 + 1
        processes = runs.start_ranks(name, before) if before > 1 else [runs.start(name)]
        deadline = time.monotonic() + PATIENCE
        while runs.where(name) not in ("pieces", "work") and processes[0].is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.4 * seconds))
        where = runs.where(name) if processes[0].is_alive() else "too late"
        for process in processes:
            process.kill()
            process.join()
        codes = runs.run_ranks(name, 2) if before == 1 else [runs.run(name)]
        title = f"{before} to {3 - before} ranks, killed in {where}"
        problems = [f"{codes}: {runs.tail(name)}"] if any(codes) else differences(reference, runs.result(name))
        score.count(not problems, f"{name}, {title}: {problems[:3]}")
        score.where[where] += 1
        say(f"  {runs.title}: {title} {problems[:1]}")
        if not problems:
            _forget(runs, name)
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


def chosen(cases: list, limit: int | None, rng: random.Random) -> list:
    """`limit` of them at random, all of them so often as it takes; None: all once."""
    return cases if limit is None else cases * (limit // len(cases)) + rng.sample(cases, limit % len(cases))


def survive_mutations(arena: Arena, limit: int | None = None, seed: int = 0, say: Say = lambda _: None) -> Score:
    """Damage one file of the newest checkpoint at a time: the one before is used and the run ends as if nothing was.

    Args:
        limit: try so many, chosen at random; more than there are: some again, at other places of the file. None: all once.
    """
    rng = random.Random(seed)
    if arena.run("whole", "train.keep_checkpoints=100"):
        raise RuntimeError(f"the uninterrupted run failed:\n{arena.tail('whole')}")
    whole = arena.folder / "whole"
    reference = read_result(whole)
    *_, earlier, newest, last = sorted(p.name for p in (whole / "checkpoints").glob("step_*"))
    cases = [(file.name, kind) for file in sorted((whole / "checkpoints" / newest).iterdir()) for kind in DAMAGE]
    cases = chosen(cases, limit, rng)
    score = Score(f"{arena.title} mutations")
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
NORM_RELATIVE = 1e-4  # gradients sum many terms of both signs, and lose digits where those cancel
SIGNED, SIGNED_ABSOLUTE = ("gan", "logits_real", "logits_fake"), 1e-5  # means of logits of size 1, which cross 0


def _batches(spy: Path) -> list[str]:
    """What all ranks were given, in the order of positions."""
    lines = [line for path in spy.parent.glob(f"{spy.name}.*") for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: [int(number) for number in line.split()[:2]])


def worst_difference(reference: list[dict], other: list[dict]) -> float:
    """Largest |a - b| / tolerance over all metrics: at most 1 means within it."""
    if [r.keys() for r in reference] != [r.keys() for r in other]:
        return float("inf")

    def tolerance(name: str, value: float) -> float:
        relative = NORM_RELATIVE if name.startswith("grad_norm") else RELATIVE
        return (SIGNED_ABSOLUTE if name in SIGNED else ABSOLUTE) + abs(value) * relative

    return max(abs(a[k] - b[k]) / tolerance(k, a[k]) for a, b in zip(reference, other) for k in a)


def compare_layouts(arena: Arena, layouts: list[Layout] = LAYOUTS, say: Say = lambda _: None) -> Score:
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


def run_all(options: argparse.Namespace, folder: Path) -> list[Score]:
    """What the command line asks for; scores are printed as they come."""
    workshop, scores = Workshop(folder), []
    say = functools.partial(print, flush=True) if options.verbose else lambda _: None
    systems = [name for name in options.names if name in SYSTEMS]

    def score(work: Callable[..., Score], *words: object) -> None:
        scores.append(work(*words, options.seed, say))
        print(scores[-1], flush=True)

    for name in options.names:
        for runs in workshop.jobs(name):
            if options.kills:
                score(interrupt, runs, options.kills, KILL)
            if options.stops:
                score(interrupt, runs, options.stops, STOPS)
            if options.ranks and runs.takes_ranks:
                score(lose_ranks, runs, options.ranks)
            if options.regroup and runs.takes_ranks and not isinstance(runs, Arena):
                score(change_ranks, runs, options.regroup)
            if options.mutations is not None and isinstance(runs, Arena):
                score(survive_mutations, runs, options.mutations or None)
    if options.layouts:
        for name in systems:
            scores.append(compare_layouts(Arena(f"configs/toy/{SYSTEMS[name][0]}.yaml", folder / "layouts"), say=print))
            print(scores[-1], flush=True)
    return scores


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join([*SYSTEMS, *PROGRAMS])}")
    parser.add_argument("--kills", type=int, default=0, metavar="N")
    parser.add_argument("--stops", type=int, default=0, metavar="N")
    parser.add_argument("--ranks", type=int, default=0, metavar="N")
    parser.add_argument("--regroup", type=int, default=0, metavar="N")
    parser.add_argument("--mutations", type=int, nargs="?", const=0, metavar="N", help="chosen at random; default: all")
    parser.add_argument("--layouts", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--verbose", action="store_true", help="a line per interruption")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there, and leave what differed")
    options = parser.parse_args(arguments)
    counts = (options.kills, options.stops, options.ranks, options.regroup)
    if not (any(counts) or options.mutations is not None or options.layouts):
        parser.error("nothing to do: give --kills N, --stops N, --ranks N, --regroup N, --mutations or --layouts")
    if unknown := sorted(set(options.names) - SYSTEMS.keys() - PROGRAMS.keys()):
        parser.error(f"no system or program is called {' or '.join(unknown)}")
    if options.keep and options.keep.exists():
        parser.error(f"{options.keep} is there already")
    PRELOADED.append("tests.tools.preloaded")
    options.names = options.names or [*SYSTEMS, *PROGRAMS]
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torture-")))
        scores = run_all(options, folder.resolve())
    return 0 if all(score.full for score in scores) else 1


if __name__ == "__main__":
    sys.exit(main())
