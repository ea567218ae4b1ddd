"""How much of a codebook is used, per branch (and scale), never pooled over branches.

    usage       distinct codes / V over the whole set
    entropy     -sum p log2(p + 1e-8) over all V codes, in bits (reAR)
    perplexity  exp of the entropy in nats, without the epsilon

B batch, L tokens, K branches, V codebook size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import UserError
from core.rng import Draws
from evaluation.metric import SumMetric


class CodebookUsage(SumMetric):
    """Counts of every code of every branch and scale.

    Args:
        vocab: V, of each branch.
        branches: K.
        scales: tokens per scale, summing to L; None: the sequence is one scale.
        names: of the branches, for the metrics' names. None: numbers, or nothing for a single branch.
    """

    def __init__(
        self,
        vocab: int,
        branches: int = 1,
        scales: tuple[int, ...] | None = None,
        names: tuple[str, ...] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.vocab, self.branches, self.scales = vocab, branches, tuple(scales) if scales else None
        self.names = names or (("",) if branches == 1 else tuple(f"branch{k}" for k in range(branches)))
        if len(self.names) != branches:
            raise UserError(f"{branches} branches of a codebook, {len(self.names)} names: {', '.join(self.names)}.")
        # counts, (scales, K, V)
        self.sums = torch.zeros(len(self.scales or (1,)), branches, vocab, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, codes: Tensor) -> CodebookUsage:
        """Add (B, L, K) codes, or (B, L) of a single branch."""
        codes = codes if codes.ndim == 3 else codes[..., None]
        if codes.shape[2] != self.branches or (self.scales and codes.shape[1] != sum(self.scales)):
            tokens = f"{sum(self.scales)} tokens and " if self.scales else ""
            given = tuple(codes.shape)
            raise UserError(f"Codes of shape {given} were given, {tokens}{self.branches} branches expected.")
        self.sums += count_codes(codes.to(self.sums.device), self.vocab, self.scales)
        return self

    def compute(self) -> dict[str, float]:
        """codebook_usage, codebook_entropy_bits and codebook_perplexity, each with _branch and _scale<n> where there
        are several. Without a scale: over all of them."""
        if int(self.sums.sum()) == 0:
            raise UserError("Codebook usage was asked for before any code was added.")
        result: dict[str, float] = {}
        for branch, name in enumerate(self.names):
            rows = {"": self.sums[:, branch].sum(0)}
            if self.scales:
                rows |= {f"scale{i}": self.sums[i, branch] for i in range(len(self.scales))}
            for scale, counts in rows.items():
                for metric, value in usage_of_counts(counts).items():
                    result["_".join(part for part in (metric, name, scale) if part)] = value
        return result


def count_codes(codes: Tensor, vocab: int, scales: tuple[int, ...] | None = None) -> Tensor:
    """(scales, K, V) int64 counts of (B, L, K) codes; without `scales` there is one."""
    wrong = (codes < 0) | (codes >= vocab)
    if bool(wrong.any()):
        raise UserError(f"A code is {int(codes[wrong][0])}, but the codebook has {vocab}: 0 to {vocab - 1}.")
    rows = [
        torch.bincount(part.flatten(), minlength=vocab)
        for scale in codes.split(scales or codes.shape[1], dim=1)
        for part in scale.unbind(2)
    ]
    return torch.stack(rows).view(-1, codes.shape[2], vocab)


def usage_of_counts(counts: Tensor) -> dict[str, float]:
    """Of (V,) counts of one codebook."""
    p = counts.double() / counts.sum()
    return {
        "codebook_usage": float((counts > 0).double().mean()),
        "codebook_entropy_bits": float(-(p * torch.log2(p + 1e-8)).sum()),
        "codebook_perplexity": float((-torch.special.xlogy(p, p).sum()).exp()),
    }


class RollingUsage:
    """Usage in a training log: the share of codes among the last `window` ones (FQGAN, D-AR, ImageFolder).

    # parity: the window starts full of zeros, so code 0 counts as used and usage reads low until it has been filled.
    """

    def __init__(self, vocab: int, window: int = 65_536, device: torch.device | str = "cpu"):
        self.vocab, self.window = vocab, torch.zeros(window, dtype=torch.int64, device=device)

    def update(self, codes: Tensor) -> Tensor:
        """Append codes of any shape, the oldest drop out. Returns the usage, a float64 scalar on the device."""
        self.window = torch.cat((self.window, codes.flatten().to(self.window)))[-self.window.numel() :]
        used = torch.zeros(self.vocab, dtype=torch.float64, device=self.window.device)
        return used.index_fill_(0, self.window, 1.0).mean()

    def state(self) -> dict[str, Tensor]:
        return {"window": self.window}

    def load(self, state: dict[str, Tensor]) -> RollingUsage:
        self.window = state["window"].to(self.window.device, copy=True)
        return self


@dataclass(frozen=True)
class Perturbation:
    """The noise of pFID (RobustTok, ImageFolder): the rFID of pictures whose codes were disturbed.

    A picture is chosen with probability `beta`; each of its codes is replaced with probability `alpha`, by one of the
    `delta` nearest codes of its codebook, itself among them. A value means nothing without the three.
    """

    alpha: float
    beta: float
    delta: int

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """ "0.5,0.1,50" -> alpha 0.5, beta 0.1, delta 50."""
        try:
            alpha, beta, delta = text.split(",")
            made = cls(float(alpha), float(beta), int(delta))
        except ValueError:
            raise UserError(f"--perturb {text}: give ALPHA,BETA,DELTA, for example 0.5,0.1,50.") from None
        if not (0 <= made.alpha <= 1 and 0 <= made.beta <= 1 and made.delta >= 1):
            raise UserError(f"--perturb {text}: alpha and beta are between 0 and 1, delta is 1 or more.")
        return made

    def __str__(self) -> str:
        return f"alpha {self.alpha:g}, beta {self.beta:g}, delta {self.delta}"

    def __call__(self, codes: Tensor, codebooks: Tensor, draws: Draws) -> Tensor:
        """Disturbed codes.

        Args:
            codes: (B, L, K).
            codebooks: (V, K, D).
            draws: of the pictures; the noise of a picture does not depend on its batch.
        """
        vocab, branches, _ = codebooks.shape
        if self.delta > vocab:
            raise UserError(f"delta = {self.delta} nearest codes of a codebook with {vocab}. Choose a smaller one.")
        shape = codes.shape[1:]
        chosen = draws.uniform("pfid_picture").view(-1, 1, 1) < self.beta  # (B, 1, 1)
        replaced = chosen & (draws.uniform("pfid_token", shape) < self.alpha)  # (B, L, K)
        which = (draws.uniform("pfid_neighbour", shape) * self.delta).long().clamp(max=self.delta - 1)  # (B, L, K)
        found = [self._nearest(codes[..., k], codebooks[:, k], which[..., k]) for k in range(branches)]
        return torch.where(replaced, torch.stack(found, -1), codes)

    def _nearest(self, codes: Tensor, codebook: Tensor, which: Tensor) -> Tensor:
        """The `which`-th nearest code of each of (B, L) codes."""
        vectors = codebook.detach().float()
        used, place = torch.unique(codes, return_inverse=True)
        near = [torch.cdist(p, vectors).topk(self.delta, largest=False).indices for p in vectors[used].split(1024)]
        return torch.cat(near)[place, which]
