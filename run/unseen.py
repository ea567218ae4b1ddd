"""The pictures that a tokenizer is measured on where none were named: those that its training left out."""

from __future__ import annotations

from typing import Any

from core import launch
from core.errors import UserError
from data.sources import exists, open_source
from run.data import IMAGENET_VAL
from run.weights import read_weights

LEFT_OUT = "the pictures that training left out"
IMAGENET = "folder://data/imagenet"  # with train and val


def training_data(weights: str, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `data` section that a tokenizer was trained with; {} where its weights do not tell, or are not here.

    Args:
        weights: of the tokenizer, as tokenizer.weights names them.
        known: settings that the user states, see run.weights.read_weights.
    """
    try:
        tokenizer = read_weights("tokenizer", weights, known)
    except UserError:  # which the program says when it reads them
        return {}
    return (tokenizer.trained or tokenizer.about.get("config") or {}).get("data") or {}


def unseen(data: dict[str, Any]) -> str:
    """Where the pictures lie that training on `data` left out; ImageNet's validation pictures where it does not tell."""
    if data.get("val_url"):
        return data["val_url"]
    return data["url"] if _has_halves(data) else IMAGENET_VAL


def both_halves(data: dict[str, Any]) -> str:
    """One URL of the pictures that were trained on (its split train) and of unseen ones (val)."""
    if _has_halves(data):
        return data["url"]
    seen, left_out = data.get("url") or "", data.get("val_url") or ""
    parent = seen.removesuffix("/train")
    return parent if parent != seen and left_out == f"{parent}/val" else IMAGENET


def _has_halves(data: dict[str, Any]) -> bool:
    """Whether data.url has a half that was not trained on."""
    if not data.get("url") or data.get("split") not in (None, "train"):
        return False
    try:
        seen, left_out = (open_source(data["url"], split) for split in ("train", "val"))
    except UserError:
        return False
    return seen.fingerprint() != left_out.fingerprint()


def choose(url: str, what: str, command: str) -> str:
    """`url`, which nobody named; said in a line. UserError where it is not here.

    Args:
        what: it is to the model, for that line.
        command: behind which pictures can be named, for the message.
    """
    if not exists(url):
        raise UserError(
            f"no pictures were named, and {url}, which is taken then, is not here: name them, {command} folder://my/pictures"
        )
    known = "" if url in (IMAGENET, IMAGENET_VAL) else f", {what}"
    launch.say(f"no pictures were named: taking {url}{known}")
    return url
