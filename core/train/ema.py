"""Exponential moving averages of the weights, any number of decays, updated in one fused operation each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from core.train.parallel import place


def warmed(decay: float, updates: int) -> float:
    """`decay` approached from below while the average is young: n / (n + 9) of n updates so far, 0 for the first two."""
    return 0.0 if updates <= 1 else min(updates / (updates + 9), decay)


class Ema:
    """Averages of the trainable parameters of one network; frozen parameters and buffers are not copied.

    Args:
        network: whose weights are followed; averages start equal to them.
        decays: one average per decay, ema <- decay * ema + (1 - decay) * weight after every step.
    """

    def __init__(self, network: nn.Module, decays: list[float]):
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.averages = {decay: {n: p.detach().clone() for n, p in self.parameters.items()} for decay in decays}

    @torch.no_grad()
    def update(self, updates: int | None = None) -> None:
        """Follow the weights once more. With the number of `updates` so far, decays are warmed up."""
        weights: list[Tensor] = list(self.parameters.values())
        for decay, average in self.averages.items():
            share = 1.0 - (decay if updates is None else warmed(decay, updates))
            torch._foreach_lerp_(list(average.values()), weights, share)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self, decay: float | None = None) -> Iterator[None]:
        """Inside, the network has averaged weights (of the first decay by default). No copy: storages are swapped."""
        if not self.averages:
            yield
            return
        average = self.averages[next(iter(self.averages)) if decay is None else decay]
        self._swap(average)
        try:
            yield
        finally:
            self._swap(average)

    def _swap(self, average: dict[str, Tensor]) -> None:
        """Not for sharded networks, whose parameters are views of memory that FSDP owns."""
        for name, parameter in self.parameters.items():
            parameter.data, average[name] = average[name], parameter.data

    def state(self, decay: float) -> dict[str, Tensor]:
        return self.averages[decay]

    @torch.no_grad()
    def load(self, decay: float, state: dict[str, Tensor]) -> None:
        """Restore one average; names and shapes must match exactly."""
        average = self.averages[decay]
        if average.keys() != state.keys():
            raise ValueError(f"EMA names differ: {sorted(average.keys() ^ state.keys())[:5]}")
        for name, value in state.items():
            average[name].copy_(place(value, average[name]))
