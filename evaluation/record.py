"""What an evaluation leaves behind: a table on the terminal, one JSON, one page.

The JSON answers every question that a reader of the number may have: what was measured on how many pictures, by which
protocol, against which file, from which weights, with which labels, seed, rounding, precision and versions, and how
long each part took.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.files import explain_os_errors, write_atomic
from evaluation.environment import environment
from evaluation.measure import Result
from evaluation.protocols import meaning_of
from evaluation.report import Report
from evaluation.scores import Score


def table(result: Result) -> str:
    """Aligned lines, one per number, each with its protocol and reference."""
    rows = [(s.name, _value(s), s.protocol, s.reference or "-") for s in result.scores]
    widths = [max(len(row[i]) for row in rows) for i in range(4)] if rows else [0] * 4
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip()
        for row in [("metric".ljust(widths[0]), "value", "protocol", "reference"), *rows]
    ]
    notes = {s.note: s.name for s in result.scores if s.note}
    lines += [f"note ({name}): {note}" for note, name in notes.items()]
    lines += [f"left out: {name} ({reason})" for name, reason in result.left_out.items()]
    return "\n".join(lines)


def _value(score: Score) -> str:
    is_distance = "fid" in score.name or score.name.startswith(("fd_", "rfd_", "pfd_"))
    shown = max(score.value, 0.0) if is_distance else score.value
    text = f"{shown:.4f}"
    if score.std is not None:
        text += f" +- {score.std:.4f}"
    if score.interval is not None:
        text += f" [{score.interval[0]:.4f}, {score.interval[1]:.4f}]"
    return text


def facts(world_device: torch.device, **given: Any) -> dict[str, Any]:
    """Context of a record: what was given, and the precision that features and metrics ran in."""
    precision = {
        "features": given.pop("feature_dtype", "float32"),
        "tf32": False,
        "metrics": "float64",
        "device": world_device.type,
    }
    return {**given, "precision": precision}


def write(folder: str | Path, result: Result, context: dict[str, Any]) -> Path:
    """metrics.json in `folder`; returns its path."""
    folder = Path(folder)
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    scores = {
        s.name: {k: v for k, v in asdict(s).items() if k != "name" and v not in (None, "")} for s in result.scores
    }
    context = {
        **context,
        "scores": scores,
        "left_out": result.left_out,
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
    }
    path = folder / "metrics.json"
    write_metrics(path, result.values(), context)
    return path


def page(
    folder: str | Path,
    title: str,
    result: Result,
    context: dict[str, Any],
    pictures: list[tuple[str, Tensor, str]],
    tables: list[tuple[str, list[str], list[list[Any]]]] = (),
) -> Path:
    """report.html in `folder`: numbers, pictures, tables, and what the numbers depend on. Opens without a network."""
    report = Report(title, f"{context.get('count', 0):,} pictures, protocol {context.get('protocol', '')}")
    for s in result.scores:
        meaning = meaning_of(s.name)
        beside = f"{s.interval[0]:.3f} to {s.interval[1]:.3f}" if s.interval else ""
        against = f" Against {s.reference}." if s.reference else ""
        report.add_tile(s.name, f"{s.value:.4g}", f"{meaning.sentence}{against}".strip(), beside)
    for name, picture, caption in pictures:
        report.add_image(name, picture, caption)
    report.add_table(
        "Numbers",
        ["metric", "value", "pictures", "protocol", "reference", "note"],
        [[s.name, f"{s.value:.6g}", s.count, s.protocol, s.reference, s.note] for s in result.scores],
    )
    for name, headers, rows in tables:
        report.add_table(name, headers, rows)
    if result.left_out:
        report.add_table("Left out", ["metric", "why"], [[k, v] for k, v in result.left_out.items()])
    flat = {k: v for k, v in context.items() if not isinstance(v, (dict, list))}
    report.add_table("Measured with", ["", ""], [[k, str(v)] for k, v in flat.items()])
    path = Path(folder) / "report.html"
    report.write(path)
    return path


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null, and a run that wrote one still has a readable file."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_metrics(path: str | Path, metrics: dict[str, Any], context: dict[str, Any]) -> None:
    """Write `metrics` (plain numbers, text, lists, dicts) atomically.

    Args:
        context: what the numbers depend on: "count" of pictures, "net" name, "reference_fingerprint", "seed" and
            whatever else matters. The four named ones are always in the file, null when not given. Versions and
            processors are added here.
    """
    context = {"count": None, "net": None, "reference_fingerprint": None, "seed": None} | context
    entries: dict[str, Any] = {}
    for name, value in metrics.items():
        plain_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        entries[name] = {"value": value} | asdict(meaning_of(name)) if plain_number else {"value": value}
    record = _finite({"metrics": entries, "context": context, "environment": environment()})
    write_atomic(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
