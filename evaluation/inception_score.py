"""Inception score (Salimans et al. 2016) of classifier outputs: exp of the mean KL from p(y|x) to p(y), over splits.

The arithmetic of torch-fidelity: float64, the rows shuffled once with a fixed seed, ten contiguous splits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError


def inception_score(logits: Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """(mean, population standard deviation) over splits.

    Args:
        logits: (N, classes) without the classifier's bias.
        splits: parts of N / splits pictures, each scored by itself.
        seed: of the shuffle.
    """
    count = logits.shape[0]
    if count < splits:
        raise UserError(f"An inception score over {splits} splits needs at least {splits} pictures, got {count}.")
    order = np.random.RandomState(seed).permutation(count)
    log_p = logits.detach().cpu().double().log_softmax(dim=1)[torch.from_numpy(order)]
    scores = []
    for i in range(splits):
        part = log_p[i * count // splits : (i + 1) * count // splits]  # (n, classes)
        log_marginal = part.exp().mean(0, keepdim=True).log()
        divergence = (part.exp() * (part - log_marginal)).sum(1)
        scores.append(divergence.mean().exp())
    result = torch.stack(scores)
    return float(result.mean()), float(result.std(correction=0))
