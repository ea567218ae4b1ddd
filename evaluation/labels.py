"""Which class each generated picture is asked to show. This moves FID by a few hundredths, so it is recorded.

| name | label of picture i | who does so |
|---|---|---|
| balanced | i mod classes | RecTok, reAR |
| random | uniform, drawn from (seed, i) | FQGAN, D-AR: torch.randint per batch and rank, not balanced |
| val | of picture i of the validation set, in its order | ImageFolder: 50 of each class, sorted by class |
| a path | line i of a text file, or entry i of an integer .npy | |

The random labels of FQGAN and D-AR come from torch's generator of each rank, shared with the sampling of codes: they
change with the number of GPUs, the batch size and the torch version, so nobody can draw theirs again. Ours have the
same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.arrays import read_npy
from core.errors import UserError
from core.files import explain_os_errors
from core.rng import Draws, hash64

NAMES = ("balanced", "random", "val")


def make(kind: str, count: int, num_classes: int, seed: int = 0, val: Sequence[int] | None = None) -> Tensor:
    """(count,) int64 labels.

    Args:
        kind: a name of the table above, or the path of a file.
        val: labels of the validation set, for kind "val".
    """
    if kind == "balanced":
        return torch.arange(count) % num_classes
    if kind == "random":
        drawn = Draws(hash64(seed, "labels"), torch.arange(count)).uniform("label").flatten()
        return (drawn.double() * num_classes).long().clamp(max=num_classes - 1)
    if kind == "val":
        if val is None:
            raise UserError(
                "labels: val needs the validation set, whose labels are used. Give eval.val_url (or "
                "data.val_url), or a file of labels."
            )
        labels = torch.as_tensor(list(val), dtype=torch.int64)
        if len(labels) < count:
            raise UserError(
                f"labels: val has {len(labels)} pictures and {count} samples are asked for. "
                f"Use --num {len(labels)}, or labels: balanced."
            )
        return _in_range(labels[:count], num_classes, "the validation set")
    return _in_range(_read(Path(kind).expanduser(), count), num_classes, kind)


def _read(path: Path, count: int) -> Tensor:
    if not path.is_file():
        raise UserError(f'labels: "{path}" is neither {", ".join(NAMES)} nor a file with one label per line.')
    with explain_os_errors(path):
        try:
            if path.suffix == ".npy":
                values = read_npy(path)
                if values.ndim != 1 or values.dtype.kind not in "iu":
                    found = f"{values.dtype} of shape {values.shape}"
                    raise UserError(f"{path}: expected a row of whole numbers, got {found}.")
                labels = torch.from_numpy(values.astype(np.int64))
            else:
                labels = torch.tensor([int(line.split()[-1]) for line in path.read_text().splitlines() if line.strip()])
        except ValueError as error:
            raise UserError(f"{path}: expected one whole number per line ({error}).") from error
    if len(labels) < count:
        raise UserError(f"{path} has {len(labels)} labels and {count} samples are asked for.")
    return labels[:count]


def _in_range(labels: Tensor, num_classes: int, name: str) -> Tensor:
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise UserError(
            f"labels of {name} run from {int(labels.min())} to {int(labels.max())}; the generator knows "
            f"classes 0 to {num_classes - 1}."
        )
    return labels.long()


def describe(labels: Tensor, num_classes: int) -> dict[str, int]:
    """How even they are: fewest and most pictures of a class."""
    counts = torch.bincount(labels, minlength=num_classes)
    return {"classes": num_classes, "fewest_per_class": int(counts.min()), "most_per_class": int(counts.max())}
