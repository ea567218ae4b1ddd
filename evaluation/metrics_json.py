"""The numbers of a run as JSON, each with its unit and its meaning, beside what is needed to judge them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from core.files import write_atomic
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
    "fid_": Meaning("FID", "", "lower", "Frechet Inception distance of samples to real pictures."),
    "rfid_": Meaning("rFID", "", "lower", "Frechet Inception distance of reconstructions to their originals."),
    "sfid_": Meaning("sFID", "", "lower", "The same on spatial features: composition rather than content."),
    "pfid_": Meaning("pFID", "", "lower", "rFID of reconstructions from disturbed codes."),
    "pfd_": Meaning("Perturbed Frechet", "", "lower", "Distance of reconstructions from disturbed codes. Not FID."),
    "rsfid_": Meaning("rsFID", "", "lower", "sFID of reconstructions to their originals."),
    "fd_": Meaning("Frechet", "", "lower", "Feature distance of samples to real pictures. Not FID."),
    "rfd_": Meaning("Reconstruction Frechet", "", "lower", "Distance of reconstructions to originals. Not FID."),
    "is_": Meaning(
        "Inception Score", "", "higher", "How sure a classifier is of each picture, and how varied all are."
    ),
    "ris_": Meaning("Inception Score", "", "higher", "The same of reconstructions."),
    "kid_": Meaning("KID", "", "lower", "Kernel distance of samples to real pictures."),
    "precision_": Meaning("Precision", "", "higher", "Share of samples that lie among real pictures."),
    "recall_": Meaning("Recall", "", "higher", "Share of real pictures that lie among samples."),
    "ssim": Meaning("SSIM", "", "higher", "Structural likeness of reconstructions, at most 1 (uniform 7 x 7 window)."),
    "ssim_llamagen": Meaning("SSIM (LlamaGen)", "", "higher", "With data range 2 on [0, 1] pictures: reads too high."),
    "lpips_vgg": Meaning("LPIPS", "", "lower", "Perceptual distance of reconstructions (VGG16, version 0.1)."),
    "codebook_usage": Meaning("Codebook usage", "share", "higher", "Codes that occur at all."),
    "codebook_entropy_bits": Meaning("Code entropy", "bits", "higher", "Of the codes' frequencies."),
    "codebook_perplexity": Meaning("Code perplexity", "codes", "higher", "Codes in effective use."),
    "psnr": Meaning("PSNR", "dB", "higher", "Pixel error of reconstructions, averaged per picture."),
    "ssim_gauss": Meaning("SSIM", "", "higher", "Structural likeness of reconstructions, at most 1 (Gaussian window)."),
    "reconstruction_fd_": Meaning(
        "Reconstruction Frechet", "", "lower", "Feature distance between reconstructions and their originals. Not FID."
    ),
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
    write_atomic(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
