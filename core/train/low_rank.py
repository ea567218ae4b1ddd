"""AdamW for what is adapted: low-rank changes of weights (LoRA, Hu et al. 2022), and rows of a table that learn slower.

    keep_adapted(generator)              only its class rows and the weights that get a low-rank change are trained
    optimizer = AdaptingAdamW(groups, factors=factors_of(generator, rank=8, alpha=8))

A LoRA layer computes with W0 + (alpha / rank) B A and trains A and B. Here the network keeps one plain weight, W, which is
that sum: A and B get the gradients that they would have there, from that of W, and after each step what B A changed by is
added to W. So a network's code, names, checkpoints, samplers and files know nothing of adapters, and there is nothing to
merge. What it costs: the gradient of W is computed whole; what it saves are the moments, which A and B alone have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.rng import hash64
from core.specs import Generator
from core.train.parallel import blocks_of


@dataclass
class Factors:
    """The change of one weight W (out, in): scale B A, with A (rank, in) and B (out, rank)."""

    name: str
    weight: Tensor
    scale: float
    a: nn.Parameter
    b: nn.Parameter


def adapted_weights(network: nn.Module) -> dict[str, Tensor]:
    """Weights of the linear layers of the repeated blocks, by name: what gets a low-rank change."""
    inside = {id(m) for block in blocks_of(network) for m in block.modules() if isinstance(m, nn.Linear)}
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
    return {f"{name}.weight": layer.weight for name, layer in layers.items()}


def keep_adapted(generator: Generator) -> None:
    """Let nothing be trained but the weights that get a low-rank change and the table of classes."""
    trained = {*adapted_weights(generator), generator.class_rows()[0]}
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in trained)


def factors_of(network: nn.Module, rank: int, alpha: float) -> list[Factors]:
    """New ones, a function of the weights' names: B is zero, A uniform as nn.Linear starts (Kaiming, a = sqrt 5)."""
    factors = []
    for name, weight in adapted_weights(network).items():
        outputs, inputs = weight.shape
        random = torch.Generator().manual_seed(hash64("low rank", name) >> 1)
        start = (2 * torch.rand(rank, inputs, generator=random) - 1) / math.sqrt(inputs)
        a, b = (nn.Parameter(t.to(weight.device)) for t in (start, torch.zeros(outputs, rank)))
        factors.append(Factors(name, weight, alpha / rank, a, b))
    return factors


class AdaptingAdamW(torch.optim.AdamW):
    """AdamW that moves factors for their weights, and the first rows of a table by a share of its steps.

    Args:
        groups: with the factors' A and B among their parameters.
        factors: of the weights that get a low-rank change.
        slow_rows: (table, how many rows, share); 0 keeps them bit for bit.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        factors: list[Factors],
        slow_rows: tuple[Tensor, int, float] | None,
        **options: Any,
    ):
        super().__init__(groups, **options)
        self.factors, self.slow_rows = factors, slow_rows

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; the gradients of adapted weights are read and not changed."""
        before = []
        for f in self.factors:
            for factor in (f.a, f.b):
                self._recall(factor)
            before.append((f.a.clone(), f.b.clone()))
            if f.weight.grad is not None:
                f.a.grad = f.scale * (f.b.T @ f.weight.grad)
                f.b.grad = f.scale * (f.weight.grad @ f.a.T)
        table, count, share = self.slow_rows or (torch.empty(0), 0, 1.0)
        rows = table[:count]
        held = rows.clone()
        super().step()
        for f, (a, b) in zip(self.factors, before):
            f.weight.add_(f.b @ f.a - b @ a, alpha=f.scale)
            for factor in (f.a, f.b):
                if factor in self.state:  # none before the first step, where they are what they begin as
                    self.state[factor]["factor"] = factor.detach()
        rows.copy_(held if share == 0 else torch.lerp(held, rows, share))

    def _recall(self, factor: Tensor) -> None:
        """Take a factor from the state, which is what checkpoints keep, where it is another tensor: after a restart."""
        kept = self.state.get(factor, {}).get("factor")
        if kept is not None and kept.data_ptr() != factor.data_ptr():
            factor.copy_(kept)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for f in self.factors:
            f.weight.grad = None
