"""Inception Score (Salimans et al. 2016) of classifier outputs: exp of the mean KL from p(y|x) to p(y), in float64.

Published numbers differ in how the pictures are cut before the marginal p(y) is taken:

| form | parts | who |
|---|---|---|
| "adm" | chunks of 5,000 in the order given, the last may be shorter and counts the same | guided-diffusion |
| "shuffled" | ten parts after one shuffle with RandomState(2020); mean and population deviation | torch-fidelity |
| "single" | one part | reAR's evaluator |

All take logits without the classifier's bias. Softmax is never formed in float32, where 0 log 0 is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from evaluation.metric import SumMetric

CHUNK = 5000


def _log_p(logits: Tensor, least: int) -> Tensor:
    """(N, classes) float64."""
    if logits.shape[0] < least:
        raise UserError(f"An Inception Score over {least} splits needs at least {least} pictures, got {len(logits)}.")
    log_p = logits.detach().double().log_softmax(dim=1)
    if not torch.isfinite(log_p.sum()):
        raise UserError("The classifier's outputs hold NaN or infinity: an Inception Score has no value there.")
    return log_p


def _scores(log_p: Tensor, edges: list[int]) -> tuple[float, float]:
    scores = []
    for start, stop in zip(edges, edges[1:]):
        part = log_p[start:stop]  # (n, classes)
        log_marginal = part.logsumexp(0) - np.log(stop - start)
        scores.append((part.exp() * (part - log_marginal)).sum(1).mean().exp())
    result = torch.stack(scores)
    return float(result.mean()), float(result.std(correction=0))


def inception_score(logits: Tensor, splits: int = 10, seed: int | None = 2020) -> tuple[float, float]:
    """(mean, population standard deviation) over splits: torch-fidelity's form.

    Args:
        logits: (N, classes) without the classifier's bias.
        splits: parts of N / splits pictures, each scored by itself.
        seed: of the shuffle; None: no shuffle.
    """
    log_p = _log_p(logits, splits)
    count = log_p.shape[0]
    if seed is not None:
        log_p = log_p[torch.from_numpy(np.random.RandomState(seed).permutation(count)).to(log_p.device)]
    return _scores(log_p, [i * count // splits for i in range(splits + 1)])


def inception_score_adm(logits: Tensor, chunk: int = CHUNK) -> tuple[float, float]:
    """(mean, population standard deviation) over consecutive chunks. The order of the pictures matters: index order."""
    log_p = _log_p(logits, 1)
    return _scores(log_p, [*range(0, log_p.shape[0], chunk), log_p.shape[0]])


def inception_score_single(logits: Tensor) -> tuple[float, float]:
    """(score, 0) of all pictures as one part."""
    return inception_score(logits, splits=1, seed=None)


FORMS: dict[str, Callable[[Tensor], tuple[float, float]]] = {
    "adm": inception_score_adm,
    "shuffled": inception_score,
    "single": inception_score_single,
}


def uneven_chunks(labels: Tensor, chunk: int = CHUNK) -> str:
    """A sentence when a chunk of the "adm" form has far fewer classes than the whole, else "".

    Pictures sorted by label give chunks whose marginal is nearly one class, and a score far too low.
    """
    classes = len(torch.unique(labels))
    for number, part in enumerate(labels.split(chunk)):
        found, expected = len(torch.unique(part)), min(classes, len(part))
        if found < 0.5 * expected:
            return (
                f"Chunk {number} of the Inception Score holds {found} of {classes} classes: the pictures are "
                "sorted by label and the score is too low. Order them by index with balanced labels, or shuffle."
            )
    return ""


class StreamingInceptionScore(SumMetric):
    """The "single" form from running sums: no picture's outputs are kept. exp(H(mean p) - mean H(p))."""

    def __init__(self, classes: int = 1008, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(classes + 2, dtype=torch.float64, device=device)  # of p, of p log p, and the count

    @torch.no_grad()
    def update(self, logits: Tensor) -> StreamingInceptionScore:
        """Add (B, classes) logits without bias."""
        log_p = logits.to(self.sums.device).double().log_softmax(1)
        p = log_p.exp()
        negative_entropy = (p * log_p).sum().view(1)
        self.sums += torch.cat((p.sum(0), negative_entropy, self.sums.new_tensor([float(len(p))])))
        return self

    def compute(self) -> dict[str, float]:
        count = float(self.sums[-1])
        if count < 1:
            raise UserError("An Inception Score was asked for before any picture was added.")
        marginal, negative_entropy = self.sums[:-2] / count, self.sums[-2] / count
        score = (negative_entropy - torch.special.xlogy(marginal, marginal).sum()).exp()
        if not torch.isfinite(score):
            raise UserError("The classifier's outputs hold NaN or infinity: an Inception Score has no value there.")
        return {"is": float(score)}
