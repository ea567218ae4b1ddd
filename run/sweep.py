"""What run_sweep.sh does: the best sampling settings of a generator, from the command line to a page.

The grid of all values is searched by successive halving (evaluation/halving.py) on shared noise: picture i of every
setting has the same label and the same draws. Pictures become features in chunks that are kept, so a killed sweep goes on
and ends with the same result.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from core import config as config_module
from core.chunks import CONTENT, enter
from core.config import to_plain
from core.dist import World
from core.errors import UserError
from core.files import clear_folder, read_json, write_atomic, write_json
from core.lock import locked
from core.rng import hash64
from core.train.log import progress_line
from evaluation.chunks import Work
from evaluation.halving import Rung, climb, cost, plan
from evaluation.measure import Evaluation
from evaluation.report import NUM_COLOURS, Report, environment, with_interval, write_csv, write_metrics
from evaluation.scores import Score
from generator.task import GeneratorTask
from run.evaluate_generator import SAMPLES, Drawing, FirstSamples, check_generated, drawing
from run.load import REGISTRIES, random_task
from run.measurement import enough
from run.target import Sampler, Target, open_generator, read_target
from run.weights import Source

KEYS = {  # option -> key of the config
    "scale": "sample.scale",
    "interval": "sample.interval",
    "schedule": "sample.schedule",
    "power": "sample.power",
    "temperature": "sample.temperature",
    "top_k": "sample.top_k",
    "top_p": "sample.top_p",
    "steps": "sample.steps",
    "ema": "generator.use_ema",  # or a file: generator.weights
}
USUAL = {"scale": "1:8"}  # what is tried where nothing was named
GUIDANCE_ONLY = ("sample.interval", "sample.schedule", "sample.power")
BY = {"fid": ("fid", "fd_"), "is": ("is_",)}  # beginnings of the names of scores
PLAN = "sweep.json"  # what a folder is about
SHOWN = 6  # settings with pictures on the page
MOST = 500  # settings of a grid


# ---------------------------------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Setting:
    """One place of the grid: keys of the config with their values, as text."""

    values: tuple[tuple[str, str], ...]

    @property
    def words(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.values]

    @property
    def weights(self) -> tuple[str, ...]:
        """Words about the networks; the others are about sampling."""
        return tuple(word for word in self.words if not word.startswith("sample."))

    @property
    def tuning(self) -> list[str]:
        return [word for word in self.words if word.startswith("sample.")]

    @property
    def name(self) -> str:
        """For people: "scale 2, interval [0, 0.5]"."""
        return ", ".join(f"{key.split('.')[-1]} {value}" for key, value in self.values)

    @property
    def folder(self) -> str:
        return f"{hash64(' '.join(self.words)):016x}"


def values_of(option: str, text: str) -> list[str]:
    """The values of one option: "1:8", "1:8:0.5", "1,2,[3,2]"; of intervals "0:1,0.1:0.9"; words."""
    values: list[str] = []
    flag = f"--{option.replace('_', '-')}"
    for part in re.findall(r"\[[^\]]*\]|[^,]+", text):
        ends = part.strip().split(":") if option != "ema" and "[" not in part else [part.strip()]
        try:
            if option == "interval":
                low, high = map(float, ends)
                values.append(f"[{low:g},{high:g}]")
            elif len(ends) == 1:
                values.append(ends[0])
            else:
                low, high, step = map(float, ends if len(ends) == 3 else [*ends, "1"])
                if step <= 0 or high < low or (len(ends) == 2 and high - low < 1):
                    raise ValueError
                if not (high - low) / step < MOST:  # infinity, too
                    raise UserError(f"{flag} {text}: {part} stands for more than {MOST:,} values.")
                values += [f"{low + i * step:g}" for i in range(int((high - low) / step + 1e-9) + 1)]
        except ValueError:
            example = (
                "0:1,0.1:0.9" if option == "interval" else "1,2.5,4, or FROM:TO or FROM:TO:STEP, as 1:8 or 0.8:1.2:0.1"
            )
            raise UserError(f"{flag} {text}: {part} cannot be read; give values such as {example}.") from None
    if not values:
        raise UserError(f"{flag}: give at least one value.")
    return values


def grid(axes: dict[str, str]) -> list[Setting]:
    """All combinations, each once: where guidance is off, how it would be scheduled does not count.

    Args:
        axes: option -> text of its values.
    """
    columns = []
    for option, text in (axes or USUAL).items():
        values = values_of(option, text)
        files = option == "ema" and not {*values} <= {"true", "false"}
        key = "generator.weights" if files else KEYS[option]
        columns.append([(key, value) for value in values])
    settings = [Setting(_told(dict(chosen))) for chosen in itertools.product(*columns)]
    settings = list(dict.fromkeys(settings))
    if len(settings) > MOST:
        raise UserError(f"the grid has {len(settings):,} settings; {MOST} are allowed. Give fewer or wider steps.")
    return settings


def _told(chosen: dict[str, str]) -> tuple[tuple[str, str], ...]:
    schedule = chosen.get("sample.schedule", "constant")
    if chosen.get("sample.scale") in ("1", "1.0") and schedule != "linear":
        chosen = {key: value for key, value in chosen.items() if key not in GUIDANCE_ONLY}
    if schedule != "cosine" and "sample.schedule" in chosen:
        chosen.pop("sample.power", None)
    return tuple(chosen.items())


def check(target: Target, settings: list[Setting]) -> None:
    """UserError for a value that this generator cannot take. Networks are laid out and none is loaded."""
    task = random_task(target.config, torch.device("meta"), sources=target.sources)
    assert isinstance(task, GeneratorTask)
    for setting in settings:
        task.tuned(_with(target.config, setting.tuning).sample)


def _with(config: Any, words: list[str]) -> Any:
    return config_module.override(lambda: to_plain(config), words, REGISTRIES, "the grid")


# ---------------------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Trial:
    """What one setting gave on its first `count` pictures."""

    setting: Setting
    count: int
    scores: list[Score]

    def score(self, by: str) -> Score | None:
        return next((s for s in self.scores if s.name.startswith(BY[by])), None)


@dataclass
class Sweep:
    """A grid on its way. Methods are collective.

    Args:
        open_with: words about the networks -> the generator.
        options: of the command line: by, bootstrap, out ...
    """

    open_with: Callable[[tuple[str, ...]], Sampler]
    options: argparse.Namespace
    settings: list[Setting]
    ladder: list[Rung]
    folder: Path
    world: World
    samplers: dict[tuple[str, ...], Sampler] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)  # in the order of measuring, on the main rank
    drawn: Drawing | None = None

    def contents(self) -> str:
        """A digest of what all settings have in common: networks, labels, reference."""
        facts = [self._drawing(sampler).facts(sampler) for sampler in map(self._opened, self._networks())]
        kept = [
            {
                key: fact[key]
                for key in sorted(fact)
                if key.endswith(("_fingerprint", *CONTENT)) or key in ("seed", "precision")
            }
            for fact in facts
        ]
        for i, (words, fact) in enumerate(zip(self._networks(), kept)):
            if fact in kept[:i]:
                other = self._networks()[kept.index(fact)]
                raise UserError(
                    f"{' '.join(words)} and {' '.join(other)} are the same weights, so there is nothing to compare: "
                    f"{self.options.target} holds one set of them. Leave out one of the two."
                )
        return hashlib.sha256(repr(kept).encode()).hexdigest()

    def run(self) -> list[Setting]:
        """Measure; the settings of the last rung, the best first."""
        with locked(self.folder, self.world):
            return climb(self.settings, self.ladder, self.measure)

    def measure(self, setting: Setting, count: int) -> float:
        """What settings are compared by, lower is better."""
        place = self.folder / "work" / setting.folder
        noted = place / f"scores_{count}.json"
        scores = self.world.on_main(lambda: read_json(noted, None))
        if scores is None:
            scores = self._scores(setting, count, place, noted)
        trial = Trial(setting, count, [Score(**score) for score in scores])
        self.trials.append(trial)
        score = trial.score(self.options.by)
        if score is None:
            raise UserError(
                f"--by {self.options.by}: this protocol has no such number; it gives {', '.join(s.name for s in trial.scores)}."
            )
        if self.world.is_main:
            print(f"{count:>6} pictures  {score.name} {score.value:.4f}  {setting.name}", flush=True)
        return -score.value if self.options.by == "is" else score.value

    def _scores(self, setting: Setting, count: int, place: Path, noted: Path) -> list[dict[str, Any]]:
        features = self._features(setting, count, place)

        def judge() -> list[dict[str, Any]]:
            assert self.drawn is not None and features is not None
            how: Evaluation = replace(self.drawn.how, labels=self.drawn.labels[:count])
            wanted = tuple(name for name in how.protocol.generation if name in BY)
            protocol = replace(how.protocol, generation=wanted)
            scores = [
                vars(score) for score in how.finished(*how.compare(features, None, "generation", protocol)).scores
            ]
            write_json(noted, scores)
            return scores

        return self.world.on_main(judge)

    def _features(self, setting: Setting, count: int, place: Path) -> dict[str, Tensor] | None:
        """Of the first `count` pictures, on the main rank, drawn where an earlier rung did not."""
        sampler = self._opened(setting.weights).tuned(setting.tuning)
        drawn = self._drawing(sampler)
        produce = drawn.produce(sampler)
        job = drawn.facts(sampler) | {"count": count}
        parts, start = [], 0
        for rung in self.ladder:
            if rung.pictures > count:
                break
            first, number = start, rung.pictures - start
            work = Work(number, self.world, place / f"{first}-{rung.pictures}", {**job, "count": number})
            writers = (FirstSamples(place / "samples.png"),) if first == 0 else ()
            with work, progress_line(self.world, number, setting.name, done=work.items(work.done)) as progress:
                parts.append(
                    drawn.how.features_of_samples(
                        lambda r, first=first: produce(range(first + r.start, first + r.stop)), work, writers, progress
                    )
                )
                work.lock.release()
            start = rung.pictures
        if not self.world.is_main:
            return None
        return {tap: torch.cat([part[tap] for part in parts]) for tap in parts[0]}

    def _networks(self) -> list[tuple[str, ...]]:
        return list(dict.fromkeys(setting.weights for setting in self.settings))

    def _opened(self, weights: tuple[str, ...]) -> Sampler:
        if weights not in self.samplers:
            self.samplers[weights] = self.open_with(weights)
        return self.samplers[weights]

    def _drawing(self, sampler: Sampler) -> Drawing:
        self.drawn = self.drawn or drawing(self.options, sampler, self.world)
        return self.drawn


def sweep(options: argparse.Namespace, overrides: list[str], axes: dict[str, str], world: World) -> int:
    """Search the grid and write the page, the table and the best setting. Collective; returns the exit code."""
    targets, settings, ladder = prepare(options, overrides, axes)
    target = next(iter(targets.values()))
    folder = Path(options.out or f"work_dirs/sweep/{Path(options.target.rstrip('/')).stem}")

    def open_with(words: tuple[str, ...]) -> Sampler:
        return open_generator(targets[words], world, keep=len(targets) > 1)

    search = Sweep(open_with, options, settings, ladder, folder, world)
    facts = {
        "target": target.weights,
        "target_sha256": search.contents(),
        "overrides": overrides,
        "settings": [setting.name for setting in settings],
        "ladder": [[rung.kept, rung.pictures] for rung in ladder],
        "by": options.by,
        "bootstrap": options.bootstrap,
    }
    if options.again:
        world.on_main(lambda: clear_folder(folder, lambda made: (made / PLAN).is_file()))
    advice = "Choose another --out, or add --again to replace it."
    world.on_main(lambda: enter(folder / PLAN, facts, "another sweep", advice))
    share = cost(ladder) / (len(settings) * ladder[-1].pictures)
    if world.is_main:
        steps = ", ".join(f"{rung.kept} x {rung.pictures}" for rung in ladder)
        print(f"{len(settings)} settings: {steps} pictures, {cost(ladder):,} drawn, {share:.0%} of the whole grid")

    best = search.run()
    if world.is_main:
        write(search, best, overrides)
    return 0


def prepare(
    options: argparse.Namespace, overrides: list[str], axes: dict[str, str]
) -> tuple[dict[tuple[str, ...], Target], list[Setting], list[Rung]]:
    """(what is searched, by `Setting.weights`; settings; rungs), checked before any network is loaded."""
    settings = grid(axes)
    checked: dict[tuple[str, ...], Target] = {}
    find = functools.cache(Source)  # all settings are tried on the same weights, also of a living run
    for setting in settings:
        if setting.weights not in checked:
            checked[setting.weights] = read_target(options.target, [*overrides, *setting.weights], find=find)
            same = [other for other in settings if other.weights == setting.weights]
            check(checked[setting.weights], same)
    target = next(iter(checked.values()))
    if options.check:
        check_generated(target)
    wanted = target.config.eval.num_images
    count = enough(wanted, wanted or SAMPLES, "eval.num_images", options)
    return checked, settings, plan(len(settings), count, options.first)


# ---------------------------------------------------------------------------------------------------------------------
# What is left of it
# ---------------------------------------------------------------------------------------------------------------------
def write(search: Sweep, best: list[Setting], overrides: list[str]) -> None:
    """best.yaml, best.txt, sweep.csv, metrics.json and report.html; print where."""
    import yaml

    folder, winner = search.folder, best[0]
    changes = [word for word in overrides if word.startswith(("sample.", "generator."))] + winner.words
    snippet = yaml.safe_dump(config_module.read_overrides(changes), sort_keys=False)
    write_atomic(
        folder / "best.yaml", f"# the best of {len(search.settings)} settings, found by run_sweep.sh\n{snippet}"
    )
    write_atomic(folder / "best.txt", " ".join(changes) + "\n")
    last = {trial.setting: trial for trial in search.trials}
    order = sorted(
        last.values(),
        key=lambda f: (
            -f.count,
            best.index(f.setting) if f.setting in best else len(best),
            _value(f, search.options.by),
        ),
    )
    rows = [
        (trial.setting.name, trial.count, score.name, score.value, *(score.interval or (None, None)))
        for trial in search.trials
        for score in trial.scores
    ]
    write_csv(folder / "sweep.csv", ["setting", "pictures", "metric", "value", "low", "high"], rows)
    drawn, whole = cost(search.ladder), len(search.settings) * search.ladder[-1].pictures
    top = last[winner]
    context = {
        "count": top.count,
        "best": winner.words,
        "drawn": drawn,
        "whole_grid": whole,
        "job": read_json(folder / PLAN),
    }
    write_metrics(folder / "metrics.json", {s.name: s.value for s in top.scores}, context)
    page(search, order, winner, snippet).write(folder / "report.html")
    print(f"the best: {winner.name}\n{snippet.rstrip()}")
    print(
        f"written to {folder}: report.html, sweep.csv, best.yaml; use it: run_sample.sh ... $(cat {folder / 'best.txt'})"
    )


def _decides(trial: Trial, by: str) -> Score:
    score = trial.score(by)
    assert score is not None
    return score


def _value(trial: Trial, by: str) -> float:
    value = _decides(trial, by).value
    return -value if by == "is" else value


def page(search: Sweep, order: list[Trial], winner: Setting, snippet: str) -> Report:
    """The page."""
    drawn, whole = cost(search.ladder), len(search.settings) * search.ladder[-1].pictures
    subtitle = f"{len(search.settings)} settings of {search.options.target}, all with the same noise and labels"
    report = Report("Sampling settings", subtitle)
    report.add_tile("best", winner.name, f"by {_decides(order[0], search.options.by).name}, of all settings")
    for score in order[0].scores:
        beside = f"{score.interval[0]:.3f} to {score.interval[1]:.3f}" if score.interval else ""
        report.add_tile(
            score.name, f"{score.value:.4g}", f"on {order[0].count:,} pictures. {score.note}".strip(), beside
        )
    report.add_tile("pictures drawn", f"{drawn:,}", f"{drawn / whole:.0%} of the {whole:,} of the whole grid")
    first = [trial for trial in search.trials if trial.count == search.ladder[0].pictures]
    for by in BY:
        add_curves(report, first, by)
    both = [(f.score("is"), f.score("fid"), f) for f in first]
    points = sorted((i.value, d.value) for i, d, _ in both if i and d)
    if len(points) > 1:
        report.add_curves(
            "Frechet distance over Inception Score",
            {"settings": points},
            xlabel="Inception Score",
            bars={"settings": []},
        )
    rows = [[t.setting.name, t.count, *(with_interval(s.value, s.interval) for s in t.scores)] for t in order]
    names = [
        re.sub(r"_\w*$", "", s.name) if s.name.startswith("is") else s.name.rsplit("_", 1)[0] for s in order[0].scores
    ]
    report.add_table("All settings", ["setting", "pictures", *names], rows)
    report.add_text(
        "How to read it",
        "Settings that were dropped early were measured on few pictures: compare numbers of equal counts only. Intervals are those of a bootstrap over pictures; as all settings share noise and labels, differences between them are surer than the intervals say.",
    )
    for trial in order[:SHOWN]:
        path = search.folder / "work" / trial.setting.folder / "samples.png"
        if path.is_file():
            report.add_image(
                trial.setting.name, Image.open(path), "The first samples: the same noise and labels everywhere."
            )
    if order[0].score("is") is None:
        report.add_text(
            "Left out", "Inception Score: the feature network here has no class logits (docs/evaluation.md)."
        )
    report.add_config(snippet)
    return report.add_environment(environment())


def add_curves(report: Report, trials: list[Trial], by: str) -> None:
    """A metric of the first rung over the first option with several numbers; a line for each choice of the others."""
    scored = [(dict(f.setting.values), f.score(by)) for f in trials]
    axes = {key: {values[key] for values, _ in scored if key in values} for key in KEYS.values()}
    across = next((key for key, seen in axes.items() if len(seen) > 1 and all(_is_number(v) for v in seen)), None)
    if across is None or any(score is None for _, score in scored):
        return
    lines: dict[str, list[tuple[float, Score]]] = {}
    for values, score in scored:
        assert score is not None
        rest = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in values.items() if key != across)
        if across in values:
            lines.setdefault(rest or score.name, []).append((float(values[across]), score))
    kept = dict(sorted(lines.items(), key=lambda item: min(s.value for _, s in item[1]))[:NUM_COLOURS])
    series = {name: sorted((x, s.value) for x, s in points) for name, points in kept.items()}
    bars = {name: [(x, *s.interval) for x, s in points if s.interval] for name, points in kept.items()}
    title = {"fid": "Frechet distance", "is": "Inception Score"}[by]
    report.add_curves(f"{title}, {trials[0].count:,} pictures", series, None, across.split(".")[-1], bars)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?", text) is not None
