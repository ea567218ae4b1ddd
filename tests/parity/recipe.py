"""Weights, and large inputs, made by formula where fixtures are too large to store them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

CONSTANT = ("shift", "scale", "f")  # last parts of names whose fixed values belong to the architecture


def recipe_weights(shapes: Mapping[str, Iterable[int]], salt: int = 0) -> dict[str, Tensor]:
    """Official name -> fp32 tensor, a function of name and shape (and salt) alone; constants are left out."""
    weights = {}
    for name, shape in shapes.items():
        shape, last = tuple(shape), name.rsplit(".", 1)[-1]
        if last in CONSTANT:
            continue
        if last in ("codebook_used", "num_batches_tracked"):
            weights[name] = torch.zeros(shape)
            continue
        noise = np.random.RandomState(zlib.crc32(name.encode(), salt)).standard_normal(shape)
        if last == "running_var":
            value = 1 + 0.1 * np.abs(noise)
        elif len(shape) >= 2:
            value = noise / math.sqrt(math.prod(shape[1:]))
        else:
            value = 1 + 0.1 * noise if name.endswith("weight") else 0.05 * noise
        weights[name] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return weights


def recipe_inputs(shapes: Mapping[str, list]) -> dict[str, Tensor]:
    """Name -> fp32 tensor from [shape, low, high]: uniform between the two, or normal where they are null."""
    found = {}
    for name, (shape, low, high) in shapes.items():
        draws = np.random.RandomState(zlib.crc32(f"input {name}".encode()))
        values = draws.standard_normal(shape) if low is None else draws.uniform(low, high, shape)
        found[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return found
