"""Latents of RecTok's official pre-tokenised data: `<root>/<path of the picture>.npz` with the posterior's moments.

Each file holds `moments` and `moments_flip`, (N, 2C) each: of the picture and of its mirror image (the official
`--use_cached_tokens`). A run reads one of them per picture; no picture is decoded and no encoder runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.arrays import NpzFile
from core.errors import UserError
from data.base import FileSource
from data.transforms import Transform

NAMES = ("moments", "moments_flip")  # by view


class MomentFiles:
    """What data.cache.FeatureCache is to a loader, from one file per picture.

    Args:
        root: folder of the .npz files, in the layout of the pictures.
        source: the pictures, by files: their paths name the .npz files.
        shape: (N, 2C) that the tokenizer's moments have.
    """

    arrays = {"latents": {}}

    def __init__(self, root: str | Path, source: FileSource, shape: tuple[int, int]):
        self.path, self.source, self.shape = Path(root).expanduser(), source, shape
        if not isinstance(source, FileSource):
            raise UserError("data.moments names .npz files after picture files: data.url must be folder:// or list://.")
        self._read(0, 0)  # a wrong folder or tokenizer is found before training

    def __len__(self) -> int:
        return len(self.source)

    def check(self, source: object, transform: Transform) -> None:
        """UserError unless views are the picture and its mirror image."""
        if transform.crop != "center":
            raise UserError(f"data.moments holds centre crops and their mirror images, data.crop is {transform.crop}.")

    def _read(self, index: int, view: int) -> np.ndarray:
        path = self.path / (os.fsdecode(self.source.packed_keys[index]) + ".npz")
        with NpzFile(path) as file:
            found = file.load(NAMES[view])
        if found.shape != self.shape or found.dtype.kind != "f" or not np.isfinite(found).all():
            raise UserError(
                f"{path}: {NAMES[view]} is {found.dtype} {list(found.shape)} or not finite, this tokenizer's "
                f"moments are floats {list(self.shape)}. Use moments of this tokenizer."
            )
        return found.astype(np.float32)

    def get(self, indices: Sequence[int], views: Sequence[int]) -> dict[str, Tensor]:
        """{"latents": (B, N, 2C) fp32} of (index, view) pairs."""
        found = [self._read(index, view) for index, view in zip(indices, views)]
        return {"latents": torch.from_numpy(np.stack(found))}

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        """(B,) int64."""
        return torch.from_numpy(self.source.labels[np.asarray(indices)].astype(np.int64))
