"""Measure again what was published: the table configs/reproduce.toml, run through the evaluation programs.

Each row is one call of run_eval_tokenizer.sh or run_eval_generator.sh, which use all GPUs and go on where they were killed;
a row whose numbers are there is not measured again.
"""

from __future__ import annotations

import math
import re
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from core.chunks import enter
from core.errors import UserError, nearest
from core.files import ROOT, human_bytes, read_json
from core.lock import Lock
from core.schema import RunConfig
from core.weights import released
from core.weights.released import Released
from evaluation.protocols import IS_VARIANTS, get
from evaluation.report import Report
from generator.settings import guide_of
from run.download import fetch
from run.estimate import TFLOPS, evaluation_flops
from run.load import load_config, random_task, untrained_tokenizer

TABLE = ROOT / "configs" / "reproduce.toml"
WHOLE = 50000  # pictures behind every published number
OF_RECONSTRUCTIONS = {"rfid", "ris", "psnr", "ssim", "codebook_usage"}
DRAWN = math.sqrt(2)  # both numbers are of samples, and each falls somewhere else
CAUSES = (
    "Usual causes: another reference (training statistics for rFID, or the other way round), another crop of the originals, "
    "PNGs written by truncation or rounding, guidance that is not the published one, labels drawn instead of 50 per class, "
    "bf16 where fp32 was published (docs/evaluation.md)."
)


@dataclass(frozen=True)
class Row:
    """A published measurement; the fields are explained in configs/reproduce.toml."""

    name: str
    published: dict[str, str]
    source: str
    file: str = ""
    recipe: str = ""
    system: str = ""
    settings: tuple[str, ...] = ()
    limits: dict[str, float] = field(default_factory=dict)
    note: str = ""
    missing: str = ""

    @property
    def is_tokenizer(self) -> bool:
        return bool(OF_RECONSTRUCTIONS & self.published.keys())

    @property
    def draws(self) -> bool:
        """Whether another run is another draw of samples."""
        return not self.is_tokenizer and not self.limits

    @property
    def entry(self) -> Released | None:
        return next((file for file in released.table() if file.name == self.file), None)

    @property
    def group(self) -> str:
        """The system that it belongs to."""
        return self.entry.system if self.entry else self.system or Path(self.recipe).parent.name

    @property
    def target(self) -> str:
        return str(self.entry.place) if self.entry else self.recipe

    def config(self) -> RunConfig | None:
        """What its file or recipe is measured with; None where a file has no recipe."""
        changes = [word for word in self.settings if not word.startswith("--")]
        if self.entry is None:
            return load_config(str(ROOT / self.recipe), changes)
        if self.entry.recipe is None:
            return None
        return load_config(str(ROOT / self.entry.recipe), [*self.entry.settings, *changes])

    def files(self) -> list[Released]:
        """What has to be here: the file, what its recipe names beside it, and the reference of its protocol."""
        names = {self.file, *(word.partition("eval.reference=")[2] for word in self.settings)}
        if config := self.config():
            protocol = get(config.eval.protocol, "reconstruction" if self.is_tokenizer else "generation")
            reference = protocol.reconstruction_reference if self.is_tokenizer else protocol.reference[:1]
            beside = [] if self.is_tokenizer else [config.tokenizer.get("weights"), guide_of(config.sample)]
            names |= {Path(name).name for name in (*reference, *beside) if name}
        return [file for file in released.table() if file.name in names]

    def command(self, num: int, out: Path, more: Sequence[str] = (), bootstrap: int = 50) -> list[str]:
        program = "run_eval_tokenizer.sh" if self.is_tokenizer else "run_eval_generator.sh"
        extra = ["--bootstrap", str(bootstrap)] if self.draws else []
        return ["bash", program, self.target, *self.settings, *more, "--num", str(num), "--out", str(out), *extra]

    def obstacle(self) -> str:
        """Why it cannot be measured here, in a few words; "" where it can."""
        if self.missing or self.file or cast(RunConfig, self.config()).run_dir.exists():
            return self.missing
        return f"never released; run_train_{'tokenizer' if self.is_tokenizer else 'ar'}.sh {self.recipe} trains it"

    def hours(self, num: int) -> float:
        """On one GPU of the speed that --dry-run of a training assumes. Nothing is downloaded."""
        if self.target.endswith(".npz"):
            return 0.0  # pictures that are there
        config, meta = self.config(), torch.device("meta")
        if self.is_tokenizer:
            section = {"weights": self.file} if self.file else cast(RunConfig, config).tokenizer
            with meta:
                task = untrained_tokenizer(section).module
            precision = "bf16" if "--precision=bf16" in self.settings else "fp32"
        else:
            config = cast(RunConfig, config)
            guide = guide_of(config.sample)
            recipe = guide and cast(Released, released.find(guide)).recipe
            task = random_task(config, meta, load_config(str(ROOT / recipe), []) if recipe else None)
            precision = config.train.precision
        return evaluation_flops(task) * num / (TFLOPS[precision] * 1e12) / 3600


def rows(words: list[str]) -> list[Row]:
    """Of these systems, files or names; all without words. UserError for a word that is none."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    every = [
        Row(name, **{**row, "settings": tuple(row.get("settings", ()))})
        for name, row in table.items()
        if name != "arithmetic"
    ]
    chosen = []
    for word in words:
        matching = [row for row in every if word in (row.name, row.file) or word.lower() == row.group]
        if not matching:
            known = {name for row in every for name in (row.name, row.file, row.group) if name}
            raise UserError(
                f'"{word}" is neither a system, a released file nor a row of {TABLE.name}.{nearest(word, known)}'
            )
        chosen += matching
    return [row for row in every if row in chosen] if words else every


def listing(chosen: list[Row]) -> str:
    """A line for each row; nothing is downloaded."""
    lines = []
    for row in chosen:
        state = row.obstacle() or ("here" if row.file and row.entry and row.entry.found() else "")
        words = [*row.settings, row.source, *filter(None, [row.note, state])]
        lines.append(f"{row.group:<12} {row.name:<32} {numbers(row.published):<40} {'; '.join(words)}")
    return "\n".join(lines)


def plan(chosen: list[Row], num: int, gpus: int) -> None:
    """Print what would be fetched and how long each row would take: no download, no network."""
    total, absent = 0.0, {}
    print(f"{'':<32} GPU hours")
    for row in chosen:
        if why := row.obstacle():
            print(f"{row.name:<32} not measured: {why}", flush=True)
            continue
        hours, lacking = row.hours(num), [file for file in row.files() if not file.found()]
        total += hours
        absent |= {file.name: file for file in lacking}
        print(
            f"{row.name:<32} {hours:9.2f} {'  to fetch: ' if lacking else ''}{', '.join(f.name for f in lacking)}",
            flush=True,
        )
    size = sum(file.bytes or file.at_least for file in absent.values())
    print(
        f"{len(absent)} files to fetch, at least {human_bytes(size)}. About {total:.1f} GPU hours for {num:,} pictures a row, "
        f"{total / gpus:.1f} on {gpus} GPU(s), at {TFLOPS['bf16']:g} TFLOP/s in bf16 and {TFLOPS['fp32']:g} in fp32, which is "
        "assumed and not measured. Models that draw one code after another wait for memory too, and may take a few times as long."
    )


def numbers(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


# ---------------------------------------------------------------------------------------------------------------------
# What a number says
# ---------------------------------------------------------------------------------------------------------------------
def allowed(row: Row, metric: str, entry: dict[str, Any]) -> tuple[float | None, str]:
    """(how far another run of the same thing may fall from the published value, where that is known from).

    Args:
        entry: the metric's entry in metrics.json.
    """
    digits = row.published[metric].partition(".")[2]
    printed = 0.5 * 10.0 ** -len(digits)
    if metric in row.limits:
        return row.limits[metric], f"as {row.source} and ports of it agree"
    if not row.draws:
        arithmetic = tomllib.loads(TABLE.read_text(encoding="utf-8"))["arithmetic"]
        return arithmetic["limits"][metric] + printed, "the same pictures, other arithmetic"
    if not entry.get("interval"):
        return None, "no interval was measured"
    low, high = entry["interval"]
    return DRAWN * (high - low) / 2 + printed, "two draws of samples, 95 %, from the bootstrap of ours"


def verdict(
    row: Row, metric: str, name: str, entry: dict[str, Any] | None, num: int, left_out: dict[str, str] | None = None
) -> tuple[str, str]:
    """(what a measured value says about the published one, why).

    Args:
        name, entry: of the measured value, see `value_of`.
        left_out: of the evaluation, metric -> why it has no value.
    """
    if entry is None:
        return "not measured", row.obstacle() or (left_out or {}).get(
            {"rfid": "fid", "ris": "is"}.get(metric, metric), ""
        )
    if not _is(metric, name):
        return "not comparable", "a stand-in measured it: Inception is not here"
    if num < WHOLE:
        return "not comparable", f"{num:,} pictures instead of {WHOLE:,}"
    limit, why = allowed(row, metric, entry)
    if limit is None:
        return "not comparable", why
    inside = abs(entry["value"] - float(row.published[metric])) <= limit
    return ("within another run" if inside else "differs"), f"+-{limit:.2g}: {why}"


def measured_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Entries of a finished evaluation; {} where there is none."""
    return read_json(folder / "metrics.json", {}).get("metrics", {})


def value_of(metric: str, entries: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any] | None]:
    """(name, entry) behind fid_50k, is_torch_fidelity_50k ...; of a stand-in's measurement where there is none."""
    exact = [name for name in entries if _is(metric, name)]
    distances = {"fid": r"fd_(?!.*spatial)", "rfid": r"rfd_(?!.*spatial)", "sfid": "fd_.*spatial"}
    names = exact or [name for name in entries if re.match(distances.get(metric, f"{metric}_"), name)]
    return (names[0], entries[names[0]]) if names else ("", None)


def _is(metric: str, name: str) -> bool:
    variants = "|".join(filter(None, ("pytorch_fid", "adm_fp16", "llamagen", *IS_VARIANTS.values())))
    return re.fullmatch(rf"{metric}(_({variants}))?(_\d+k?)?", name) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------
def reproduce(chosen: list[Row], num: int, folder: Path, more: Sequence[str] = (), bootstrap: int = 50) -> int:
    """Fetch, measure, print and write the page after every row; how many rows failed.

    Args:
        more: settings of every row, key=value.
        bootstrap: replicates behind the intervals of samples.
    """
    lock, failed = Lock(folder), []
    lock.take()
    for number, row in enumerate(chosen, 1):
        out = folder / f"{row.name}_{num}"
        claim(row, out, num, more, bootstrap)
        if not measured_in(out) and not row.obstacle():
            print(f"[{number} of {len(chosen)}] {row.name}: published {numbers(row.published)}", flush=True)
            code = _measure(row, row.command(num, out, more, bootstrap))
            if code in (75, 130):
                raise SystemExit(75)  # stopped: the same command goes on
            failed += [row.name] if code else []
        write_page(chosen, num, folder)
    for line in results(chosen, num, folder):
        print(" | ".join(line))
    if failed:
        print(f"not measured, see above: {', '.join(failed)}")
    print(f"{CAUSES}\nlook at {folder / 'report.html'}")
    lock.release()
    return len(failed)


def claim(row: Row, out: Path, num: int, more: Sequence[str], bootstrap: int) -> None:
    """UserError where `out` holds, or has begun, what other settings or another file give."""
    record = out / "asked.json"
    if row.obstacle() or (measured_in(out) and not record.is_file()):  # by a version that noted nothing
        return
    target = Path(row.target)
    facts = {"command": row.command(num, Path("OUT"), more, bootstrap), "target": row.target}
    if target.is_file():
        facts["target_sizes"] = target.stat().st_size
    enter(record, facts, "what another command gave", "Choose another --out.")


def _measure(row: Row, command: list[str]) -> int:
    """The exit code of its evaluation; 2 where a file of it cannot be had."""
    try:
        for file in row.files():
            if not file.found():
                print(fetch(file), flush=True)
    except UserError as error:
        print(f"{row.name}: {error}", flush=True)
        return 2
    return attend(command, cwd=ROOT)


def attend(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> int:
    """Run it and wait; its exit code. A signal that ends this program is handed on, so that launchers end their ranks."""
    process = subprocess.Popen(command, cwd=cwd, env=environment)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def results(chosen: list[Row], num: int, folder: Path) -> list[list[str]]:
    """(name, metric, published, measured, difference, verdict, why) of every number."""
    lines = []
    for row in chosen:
        record = read_json(folder / f"{row.name}_{num}" / "metrics.json", {})
        left_out = record.get("context", {}).get("left_out", {})
        for metric, published in row.published.items():
            name, entry = value_of(metric, record.get("metrics", {}))
            value = None if entry is None else float(entry["value"])
            shown = ("", "") if value is None else (f"{value:.4g}", f"{value - float(published):+.3f}")
            lines.append([row.name, metric, published, *shown, *verdict(row, metric, name, entry, num, left_out)])
    return lines


def write_page(chosen: list[Row], num: int, folder: Path) -> None:
    page = Report("Published numbers, measured again", f"{num:,} pictures")
    titles = ["", "metric", "published", "measured", "difference", "verdict", "why"]
    page.add_table("Numbers", titles, results(chosen, num, folder))
    page.add_text("Where they differ", CAUSES)
    page.add_table(
        "How",
        ["", "source", "command"],
        [
            [row.name, row.source, row.obstacle() or " ".join(row.command(num, folder / f"{row.name}_{num}"))]
            for row in chosen
        ],
    )
    page.write(folder / "report.html")
