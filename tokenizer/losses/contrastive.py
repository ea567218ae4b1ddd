"""InfoNCE (van den Oord et al. 2018): the features of a picture should tell it from the others of its batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from core.dist import gather_over_ranks, group_rank, mean_over_ranks


def info_nce(
    rows: Tensor,
    columns: Tensor,
    *,
    scale: float = 1.0,
    normalise: bool = True,
    symmetric: bool = False,
    group: int = 0,
    across_ranks: bool = True,
    counted: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of scale * rows columns^T against "row i belongs to column i", (), fp32.

    Args:
        rows, columns: (B, D) of this rank. Gradients reach whichever requires them.
        normalise: to unit length first.
        symmetric: the mean of both directions instead of rows against all columns only.
        group: tell apart only the pictures of this many consecutive rows, as so many ranks would; 0 for all.
        across_ranks: against the batch of all ranks, so that the rank count changes nothing; micro-batches of one rank
            are not gathered. parity: False is FQGAN's.
        counted: (B,) bool, pictures that take part; None: all. The mean is over those of all ranks.
    """
    rows, columns = rows.float(), columns.float()
    if normalise:
        rows, columns = F.normalize(rows, dim=1), F.normalize(columns, dim=1)
    mine = torch.arange(len(rows), device=rows.device) + (group_rank() * len(rows) if across_ranks else 0)

    def one_way(a: Tensor, b: Tensor) -> Tensor:
        logits = scale * a @ (gather_over_ranks(b) if across_ranks else b).t()  # (B, B of all ranks)
        if group:
            others = mine[:, None] // group != torch.arange(logits.shape[1], device=mine.device) // group
            logits = logits.masked_fill(others, -torch.inf)
        if counted is None:
            return F.cross_entropy(logits, mine)
        weight, columns = counted.float(), gather_over_ranks(counted) if across_ranks else counted
        per_row = F.cross_entropy(logits.masked_fill(~columns[None], -1e9), mine, reduction="none")
        share = mean_over_ranks(weight.mean()) if across_ranks else weight.mean()
        return torch.where(counted, per_row, 0.0).mean() / share.clamp(min=1e-6)

    if not symmetric:
        return one_way(rows, columns)
    return 0.5 * (one_way(rows, columns) + one_way(columns, rows))
