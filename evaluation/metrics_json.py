"""The numbers of a run as JSON, each with its unit and its meaning, beside what is needed to judge them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.environment import environment


@dataclass(frozen=True)
class Meaning:
    """What a number says: `better` is "lower", "higher" or "" when neither is."""

    title: str
    unit: str
    better: str
    sentence: str


# The longest prefix of a metric's name counts. What follows it (network and tap) is put after the title.
_MEANINGS = {
    "psnr": Meaning("PSNR", "dB", "higher", "Pixel error of reconstructions, averaged per picture."),
    "ssim_gauss": Meaning("SSIM", "", "higher", "Structural likeness of reconstructions, at most 1 (Gaussian window)."),
    "reconstruction_frechet_": Meaning(
        "Reconstruction Frechet", "", "lower", "Feature distance between reconstructions and their originals. Not FID."
    ),
    "frechet_": Meaning("Frechet", "", "lower", "Feature distance of samples to real training pictures. Not FID."),
    "class_accuracy": Meaning("Class accuracy", "share", "higher", "Samples recognised as the class asked for."),
    "neighbour_similarity": Meaning(
        "Neighbour similarity", "cosine", "", "To the nearest training picture, mean. Far above real means copying."
    ),
    "num_": Meaning("Number of", "pictures", "", "How many pictures the numbers are made of."),
}


def describe(name: str) -> Meaning:
    """Title, unit, direction and one line of meaning for a metric's name.

    "real_" before a name says: the same measurement on real held-out pictures, what perfect samples would score.
    """
    if name.startswith("real_"):
        of = describe(name.removeprefix("real_"))
        return Meaning(f"{of.title}, real", of.unit, "", "The same measurement on real held-out pictures.")
    known = max((prefix for prefix in _MEANINGS if name.startswith(prefix)), key=len, default=None)
    if known is None:
        return Meaning(name.replace("_", " "), "", "", "")
    meaning = _MEANINGS[known]
    return replace(meaning, title=f"{meaning.title} {name.removeprefix(known)}".strip())


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
        entries[name] = {"value": value} | asdict(describe(name)) if plain_number else {"value": value}
    record = _finite({"metrics": entries, "context": context, "environment": environment()})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
