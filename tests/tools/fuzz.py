"""Random edits of the toy configs: each is checked, and whatever the check accepts is trained, previewed and evaluated.

    python -m tests.tools.fuzz [--edits 200] [--seed 0] [--first 0] [--out FOLDER]
    python -m tests.tools.fuzz --lines 1000                                            command lines: tests/tools/lines.py
    python -m tests.tools.fuzz --edits 0 --minutes 10        as many as there are in 10 minutes; or --lines 0 --minutes 10

An edit sets, removes or misspells one or two keys: those of the file, all others that a config knows, and the constructor
arguments of what it names. It may end in two ways: refused by --check in one sentence, or run for two steps. A traceback, a
run that dies after the check was content, a sentence that speaks of Python's inside, and a program that does not end are
findings: they are printed with the edit, and the exit code is 1. So is a config that is refused as it stands. Refusals that
only the rehearsed step made are counted by themselves and shown: they may hide a fault of ours. Edit number N of a seed is always the same one: --first N --edits 1 repeats it. SIGTERM and Ctrl-C end it
with the counts so far and code 75.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.tools.forked import start, warm_up

ROOT = Path(__file__).resolve().parents[2]
TOKENIZERS = {"toy_rectok_tokenizer": "rectok_tokenizer", "toy_fqgan_tokenizer": "fqgan_tokenizer"}
TOKENIZERS |= {"toy_dar_tokenizer": "dar_tokenizer", "toy_imagefolder_tokenizer": "imagefolder_tokenizer"}
TOKENIZERS |= {"toy_vqgan_plus_tokenizer": "vqgan_plus_tokenizer"}
VALUES: list[Any] = [None, True, False, -1, 0, 1, 2, 3, 7, 1000, 10**9, -0.5, 0.5, 1.0, 1e-30, 1e30]
VALUES += [
    float("nan"),
    float("inf"),
    "",
    "x",
    "auto",
    "none",
    "1step",
    "3ep",
    "0ep",
    "007",
    "1:30",
    "maybe",
    "${seed}",
    "é",
]
VALUES += [[], [0], [1, 2], [2, 1], [0.5, 0.5], [1, "a"], [[]], {}, {"name": "x"}, {"a": 1}]
SHORT = {  # what makes a run short; an edit of the same key wins
    "train.duration": "2step",
    "train.preview_every": "2step",
    "train.checkpoint_every": "2step",
    "train.eval_every": "2step",
    "eval.network": "lite0",
    "eval.num_images": 4,
    "eval.batch": 4,
    "data.val_url": "synthetic://?size=32&classes=4&count=8",
}
FINE = {"refused", "refused by the rehearsed step", "ran", "answered"}
REHEARSED = re.compile(r"a step of \S+ would fail")
INSIDE = re.compile(
    r"object has no attribute|'NoneType'|<class '|<function |<bound method|object at 0x|unexpected keyword|positional argument"
    r"|\bb'|codec can't|not subscriptable|not iterable|not callable|unhashable|unsupported operand|index out of range|invalid literal for"
    r"|(Key|Type|Attribute|Index|Assertion|Recursion|Unicode\w+)Error"
)
CHECK_SECONDS, RUN_SECONDS = 10, 90  # of processor time; a process that sleeps for ten times as long hangs as well


@dataclass
class Trials:
    """Which numbers are tried, and what came of them so far.

    Attributes:
        count: 0 for as many as there are in the minutes.
        minutes: from the first one on; None for as long as it takes.
        counts: of each verdict.
    """

    count: int
    minutes: float | None = None
    seed: int = 0
    first: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def numbers(self) -> Iterator[int]:
        until = time.monotonic() + 60 * self.minutes if self.minutes is not None else float("inf")
        for number in range(self.first, self.first + self.count) if self.count else itertools.count(self.first):
            if time.monotonic() >= until:
                return
            yield number

    def note(self, number: int, what: str, result: str, said: str) -> None:
        """Count a verdict; a finding is printed."""
        self.counts[result] += 1
        if result not in FINE:
            print(f"--- {number}: {what}: {result}\n{said}", flush=True)
        elif result not in ("refused", "ran", "answered"):
            print(f"    {number}: {what}: {said.strip()}", flush=True)

    def __str__(self) -> str:
        counted = ", ".join(f"{count} {result}" for result, count in self.counts.most_common())
        return f"{self.counts.total()} from number {self.first} of seed {self.seed} on: {counted or 'none'}"

    @property
    def findings(self) -> bool:
        return bool(set(self.counts) - FINE)


def known_keys(config: dict[str, Any]) -> list[str]:
    """Dotted keys of a config's schema and of the constructors that it names."""
    from core.config import keys_of
    from core.schema import RunConfig
    from run.load import REGISTRIES

    keys = list(keys_of(RunConfig))
    for section in ("tokenizer", "generator", "objective", "discriminator"):
        part = config.get(section) or {}
        name = part.get("name") or (section == "objective" and next(iter(REGISTRIES[section].entries)))
        if name in REGISTRIES[section].entries:
            arguments = inspect.signature(REGISTRIES[section].get(name)).parameters
            keys += [f"{section}.{argument}" for argument in arguments]
    return sorted(set(keys) | set(paths(config)))


def paths(table: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in table.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += paths(value, f"{prefix}{key}.")
    return keys


def put(table: dict[str, Any], path: str, value: Any) -> None:
    *outer, last = path.split(".")
    for key in outer:
        if not isinstance(table.get(key), dict):
            table[key] = {}
        table = table[key]
    table[last] = value


def remove(table: dict[str, Any], path: str) -> None:
    *outer, last = path.split(".")
    for key in outer:
        table = table.get(key) if isinstance(table, dict) else None
    if isinstance(table, dict):
        table.pop(last, None)


def value_at(table: Any, path: str) -> Any:
    for key in path.split("."):
        table = table.get(key) if isinstance(table, dict) else None
    return table


def near(value: Any) -> list[Any]:
    """What somebody may well try in its place."""
    if isinstance(value, bool) or value is None:
        return [True, False, 1, "true"]
    if isinstance(value, int | float):
        return [value + 1, value - 1, value * 2, value / 2, -value, 0, 1, str(value), [value]]
    if isinstance(value, list):
        return [value[:-1], value + value, value[::-1], [*value, "x"], value[0] if value else 0, [0 for _ in value]]
    if isinstance(value, str):
        return [value + "x", value[:-1], value.upper(), value.replace("step", "ep"), [value], 0]
    return [{}, [], "x", None]


def edit(config: dict[str, Any], chance: random.Random, keys: list[str]) -> tuple[dict[str, Any], list[str]]:
    """A changed copy, and what was changed in words."""
    changed, words = copy.deepcopy(config), []
    for _ in range(chance.choice((1, 1, 2))):
        path = chance.choice(keys)
        kind = chance.random()
        if kind < 0.08:
            remove(changed, path)
            words.append(f"without {path}")
        elif kind < 0.14:
            at = chance.randrange(len(path))
            put(changed, path[:at] + path[at + 1 :] or "a", 1)
            words.append(f"{path} misspelt")
        else:
            value = chance.choice(VALUES if kind < 0.6 else near(value_at(config, path)))
            put(changed, path, value)
            words.append(f"{path}={value!r}")
    return changed, words


def refusal(said: str) -> tuple[str, str]:
    """The verdict on what was said with exit code 2."""
    if "error: " not in said:
        return "refused without a sentence", said
    if REHEARSED.search(said):
        return "refused by the rehearsed step", said
    return ("speaks of Python's inside", said) if INSIDE.search(said) else ("refused", said)


def verdict(path: Path, changed: dict[str, Any], folder: Path) -> tuple[str, str]:
    """("refused" | "ran" | a finding, what was printed)."""
    here = set(paths(changed))
    short = [f"{key}={value}" for key, value in SHORT.items() if key not in here or key == "train.duration"]
    code, said = start("scripts.train", [str(path), *short, "--check"], folder, CHECK_SECONDS)
    if "Traceback" in said:
        return "traceback in --check", said
    if code == 2:
        return refusal(said)
    if code != 0:
        return f"--check ended with {code}", said
    code, said = start("scripts.train", [str(path), *short], folder, RUN_SECONDS)
    if "Traceback" in said:
        return "traceback after --check was content", said
    if code == 2 and "not finite" in said:
        return "ran", said  # a rate of 1e30 is a choice; what it leads to is told in a sentence
    return ("ran", said) if code == 0 else (f"ended with {code} after --check was content", said)


def make_tokenizers(out: Path) -> None:
    """The runs that the toy generators name, a step long."""
    for name, config in TOKENIZERS.items():
        if not (out / "work_dirs" / name).exists():
            toy = [f"{ROOT}/configs/toy/{config}.yaml", "train.duration=1step", "train.preview_every=never"]
            code, said = start("scripts.train", toy, out, RUN_SECONDS)
            assert code == 0, said


def run(trials: Trials, out: Path) -> None:
    """Try the edits; findings are printed as they come."""
    warm_up()
    make_tokenizers(out)
    configs = sorted((ROOT / "configs" / "toy").glob("*.yaml"))
    for path in configs:
        name = f"{path.stem}_as_it_stands"  # its own: the toys' tokenizers are what the generators of edits have learnt
        plain, place = {**yaml.safe_load(path.read_text()), "name": name}, out / f"{name}.yaml"
        place.write_text(yaml.safe_dump(plain, sort_keys=False))
        shutil.rmtree(out / "work_dirs" / name, ignore_errors=True)
        result, said = verdict(place, plain, out)
        if result != "ran":
            trials.note(trials.first, f"{path.stem} as it stands", f"not run, but {result}", said[-1500:])
    keys = {path: known_keys(yaml.safe_load(path.read_text())) for path in configs}
    for number in trials.numbers():
        chance = random.Random(f"{trials.seed} {number}")
        path = chance.choice(configs)
        changed, words = edit(yaml.safe_load(path.read_text()), chance, keys[path])
        place = out / f"edit_{number}.yaml"
        if changed.get("name") == yaml.safe_load(path.read_text())["name"]:
            changed["name"] = f"edit_{number}"
        place.write_text(yaml.safe_dump(changed, sort_keys=False, allow_unicode=True))
        result, said = verdict(place, changed, out)
        trials.note(number, f"{path.stem} with {', '.join(words)}", result, said[-1500:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--lines", type=int, help="so many command lines instead of edits")
    parser.add_argument("--minutes", type=float, help="end after so many, whatever is done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the files here")
    options = parser.parse_args()
    count = options.edits if options.lines is None else options.lines
    if count < 1 and options.minutes is None:
        parser.error("no end: give a number of --edits or --lines, or --minutes")
    trials, stopped = Trials(count, options.minutes, options.seed, options.first), False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if options.lines is None:
                run(trials, folder.resolve())
            else:
                from tests.tools import lines

                lines.run(trials, folder.resolve())
        except KeyboardInterrupt:
            stopped = True
            print(f"stopped; --first {trials.first + trials.counts.total()} goes on", flush=True)
    print(trials, flush=True)
    return 1 if trials.findings else 75 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
