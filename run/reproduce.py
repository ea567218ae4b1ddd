"""Measure again what was published: the table configs/reproduce.toml, run through the evaluation programs.

Each row is one call of run_eval_tokenizer.sh or run_eval_generator.sh, which use all GPUs and go on where they were killed;
a row whose numbers are there is not measured again.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError, nearest
from core.files import read_json
from core.weights import released
from core.weights.released import Released
from evaluation.protocols import IS_VARIANTS, get
from evaluation.report import Report
from run.download import fetch
from run.load import guide_of, load_config

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "configs" / "reproduce.toml"
WHOLE = 50000  # pictures behind every published number
# How far another run of the same thing may fall: other seeds, kernels and order of labels move FID by a few hundredths.
TOLERANCE = {"fid": 0.05, "rfid": 0.02, "psnr": 0.05, "is": 4.0}
CAUSES = (
    "Usual causes: another reference (training statistics for rFID, or the other way round), another crop of the originals, "
    "PNGs written by truncation or rounding, guidance that is not the published one, labels drawn instead of 50 per class, "
    "bf16 where fp32 was published (docs/evaluation.md)."
)


@dataclass(frozen=True)
class Row:
    """A published measurement; the fields are explained in configs/reproduce.toml."""

    name: str
    file: str
    published: dict[str, float]
    source: str
    settings: tuple[str, ...] = ()
    note: str = ""

    @property
    def is_tokenizer(self) -> bool:
        return "rfid" in self.published

    @property
    def entry(self) -> Released:
        return next(file for file in released.table() if file.name == self.file)

    def files(self) -> list[Released]:
        """What has to be here: the file, what its recipe names beside it, and the reference of its protocol."""
        names = {self.file}
        if self.entry.recipe:
            config = load_config(str(ROOT / self.entry.recipe), [*self.entry.settings, *self.settings])
            protocol = get(config.eval.protocol, "reconstruction" if self.is_tokenizer else "generation")
            reference = protocol.reconstruction_reference if self.is_tokenizer else protocol.reference[:1]
            beside = [] if self.is_tokenizer else [config.tokenizer.get("weights"), guide_of(config.sample)]
            names |= {Path(name).name for name in (*reference, *beside) if name}
        return [file for file in released.table() if file.name in names]

    def command(self, num: int, out: Path, more: Sequence[str] = ()) -> list[str]:
        program = "run_eval_tokenizer.sh" if self.is_tokenizer else "run_eval_generator.sh"
        return ["bash", program, str(self.entry.place), *self.settings, *more, "--num", str(num), "--out", str(out)]


def rows(words: list[str]) -> list[Row]:
    """Of these systems, files or names; all without words. UserError for a word that is none."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    every = [Row(name, **{**row, "settings": tuple(row.get("settings", ()))}) for name, row in table.items()]
    chosen = []
    for word in words:
        found = [row for row in every if word in (row.name, row.file) or word.lower() == row.entry.system]
        if not found:
            known = {name for row in every for name in (row.name, row.file, row.entry.system)}
            raise UserError(
                f'"{word}" is neither a system, a released file nor a row of {TABLE.name}.{nearest(word, known)}'
            )
        chosen += found
    return [row for row in every if row in chosen] if words else every


def listing(chosen: list[Row]) -> str:
    """A line for each row; nothing is downloaded."""
    return "\n".join(
        f"{row.entry.system:<12} {row.name:<24} {numbers(row.published):<36} "
        f"{'here' if row.entry.found() else '':<5} {' '.join(row.settings):<36} {row.source}"
        + (f"; {row.note}" if row.note else "")
        for row in chosen
    )


def numbers(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def verdict(metric: str, published: float, measured: float | None, num: int) -> str:
    """What a measured value says about a published one."""
    if measured is None:
        return "not measured"
    if num < WHOLE:
        return f"not comparable: {num:,} pictures instead of {WHOLE:,}"
    return "within another run" if abs(measured - published) <= TOLERANCE[metric] else "differs"


def measured_in(folder: Path) -> dict[str, float]:
    """Numbers of a finished evaluation; {} where there is none."""
    file = folder / "metrics.json"
    if not file.is_file():
        return {}
    return {name: entry["value"] for name, entry in read_json(file)["metrics"].items()}


def value_of(metric: str, found: dict[str, float]) -> float | None:
    """The number behind fid_50k, is_torch_fidelity_50k ..."""
    variants = "|".join(filter(None, ("pytorch_fid", *IS_VARIANTS.values())))
    names = [name for name in found if re.fullmatch(rf"{metric}(_({variants}))?(_\d+k?)?", name)]
    return found[names[0]] if names else None


def reproduce(chosen: list[Row], num: int, folder: Path, more: Sequence[str] = ()) -> int:
    """Fetch, measure, print and write the page after every row; how many rows failed.

    more: settings of every row, key=value.
    """
    failed = 0
    for number, row in enumerate(chosen, 1):
        out = folder / f"{row.name}_{num}"
        if not measured_in(out):
            print(f"[{number} of {len(chosen)}] {row.name}: published {numbers(row.published)}", flush=True)
            for file in row.files():
                if not file.found():
                    print(fetch(file), flush=True)
            code = subprocess.run(row.command(num, out, more), cwd=ROOT).returncode
            if code in (75, 130):
                raise SystemExit(75)  # stopped: the same command goes on
            failed += code != 0
        write_page(chosen, num, folder)
    for line in results(chosen, num, folder):
        print(" | ".join(map(str, line)))
    print(f"{CAUSES}\nlook at {folder / 'report.html'}")
    return failed


def results(chosen: list[Row], num: int, folder: Path) -> list[list[str]]:
    """(name, metric, published, measured, difference, verdict) of every number."""
    lines = []
    for row in chosen:
        found = measured_in(folder / f"{row.name}_{num}")
        for metric, published in row.published.items():
            value = value_of(metric, found)
            shown = ("", "") if value is None else (f"{value:.4g}", f"{value - published:+.3f}")
            lines.append([row.name, metric, f"{published:g}", *shown, verdict(metric, published, value, num)])
    return lines


def write_page(chosen: list[Row], num: int, folder: Path) -> None:
    page = Report("Published numbers, measured again", f"{num:,} pictures")
    page.add_table("Numbers", ["", "metric", "published", "measured", "difference", ""], results(chosen, num, folder))
    page.add_text("Where they differ", CAUSES)
    page.add_table(
        "How",
        ["", "source", "command"],
        [[row.name, row.source, " ".join(row.command(num, folder / f"{row.name}_{num}"))] for row in chosen],
    )
    page.write(folder / "report.html")
