"""One network in one file of ours: safetensors whose header says what it is.

Tensors lie under our names; what is used is plain, raw weights beside averaged ones start with "raw/", latent statistics
with "constants/". The header's entry "tessera" is JSON: kind, settings (name and constructor arguments), provenance, and
what else one wants to know of the weights (run/sharing.py): class names, preprocessing, the paired tokenizer, results.
Anyone can read the tensors with the safetensors library alone. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from core.errors import UserError, first_line, plainly
from core.files import explain_os_errors, replacing
from core.train.checkpoint import read_tensors

KEY, RAW, CONSTANTS = "tessera", "raw/", "constants/"


@dataclass
class WeightFile:
    """What such a file holds."""

    kind: str  # "tokenizer" or "generator"
    settings: dict[str, Any]
    weights: dict[str, Tensor]  # the averaged ones where there are any
    raw: dict[str, Tensor] = field(default_factory=dict)  # empty: `weights` are raw, or the only ones kept
    constants: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # {} in files of earlier versions


def replace_with(
    path: str | os.PathLike,
    write: Callable[[Path], object],
    overwrite: bool = False,
    at_last: Callable[[], object] = lambda: None,
) -> None:
    """Let `write` make a file under a temporary name; it takes the place of `path` when it is whole and on disk.

    Args:
        at_last: called just before it does.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already. Choose another name, or say --force to replace it.")
    from safetensors import SafetensorError

    with replacing(path) as temporary:
        try:
            write(temporary)
        except (SafetensorError, RuntimeError) as error:  # which is how these libraries say that a disk is full
            reason = first_line(error)[:200]
            raise UserError(
                f"{path} could not be written ({reason}). Free some space or choose another place."
            ) from error
        temporary.chmod(path.parent.stat().st_mode & 0o666)  # the safetensors library makes private files
        at_last()


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each with memory of its own, as file formats want them."""
    return {name: t.detach().cpu().clone().contiguous() for name, t in state.items()}


def save(
    path: str | os.PathLike, content: WeightFile, overwrite: bool = False, at_last: Callable[[], object] = lambda: None
) -> None:
    """Write the file, whole or not at all. `at_last`: see `replace_with`."""
    from safetensors.torch import save_file

    tensors = {
        **content.weights,
        **{RAW + name: t for name, t in content.raw.items()},
        **{CONSTANTS + name: t for name, t in content.constants.items()},
    }
    header = {
        "kind": content.kind,
        "settings": content.settings,
        "provenance": content.provenance,
        **({"about": content.about} if content.about else {}),
    }
    text = {KEY: json.dumps(header, sort_keys=True)}
    replace_with(path, lambda place: save_file(unshared(tensors), place, text), overwrite, at_last)


def read_header(path: str | os.PathLike) -> WeightFile | None:
    """What such a file says of itself, without its tensors; None when this is not such a file."""
    if Path(path).suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    with explain_os_errors(path):
        try:
            with safe_open(os.fspath(path), "pt") as file:
                about = (file.metadata() or {}).get(KEY)
        except SafetensorError:
            return None  # the reader of other files says what is wrong with it
    if about is None:
        return None
    try:
        about = json.loads(about)
        content = WeightFile(
            about["kind"], about["settings"], {}, provenance=about["provenance"], about=about.get("about", {})
        )
        if (
            content.kind not in ("tokenizer", "generator")
            or not isinstance(content.settings.get("name"), str)
            or not isinstance(content.provenance, dict)
            or not isinstance(content.about, dict)
        ):
            raise ValueError("kind, settings with a name, and provenance were expected")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path}: its header entry "{KEY}" is not what Tessera writes ({plainly(error)}). Make the file again with '
            "convert.py."
        ) from error
    return content


def read(path: str | os.PathLike) -> WeightFile | None:
    """The contents, mapped from disk; None when this is not such a file."""
    content = read_header(path)
    if content is None:
        return None
    for name, tensor in read_tensors(path).items():
        prefix = next((p for p in (RAW, CONSTANTS) if name.startswith(p)), "")
        {RAW: content.raw, CONSTANTS: content.constants, "": content.weights}[prefix][name.removeprefix(prefix)] = (
            tensor
        )
    return content
