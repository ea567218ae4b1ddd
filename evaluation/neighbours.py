"""Nearest training picture of each sample: shows at a glance whether a generator copies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_neighbours(queries: Tensor, references: Tensor, block: int = 8192) -> tuple[Tensor, Tensor]:
    """Most similar row of `references` (M, D) for each row of `queries` (N, D), by cosine.

    Works block by block of references, so memory is N x block. Of equal ones the first wins.
    Returns (index (N,) int64, similarity (N,) fp32 in [-1, 1]).
    """
    queries = F.normalize(queries.float(), dim=1)
    best = queries.new_full((queries.shape[0],), -torch.inf)
    index = torch.zeros(queries.shape[0], dtype=torch.int64, device=queries.device)
    for start in range(0, references.shape[0], block):
        similarity = queries @ F.normalize(references[start : start + block].float(), dim=1).T  # (N, block)
        value, place = similarity.max(1)
        better = value > best
        best = torch.where(better, value, best)
        index = torch.where(better, place + start, index)
    return index, best.clamp(-1.0, 1.0)
