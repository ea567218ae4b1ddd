"""What a metric is, and the two ways in which one gathers pictures.

Each metric also has a function on arrays (`psnr`, `kid`, `frechet_from_moments` ...); the objects add what is needed to
gather batch by batch, on many ranks, with interruptions:

    metric.update(batch)          any number of times, on any rank
    metric.merge(other)           add what another object gathered
    metric.all_reduce(world)      every rank gets everything; every rank must call it, also one without pictures
    metric.state(), .load(state)  tensors for a file, and back
    metric.compute()              name -> number; the numbers do not depend on how the pictures were split
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from core.dist import World
from core.errors import UserError


class Metric(Protocol):
    def merge(self, other): ...

    def all_reduce(self, world: World): ...

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: dict[str, Tensor]): ...

    def compute(self) -> dict[str, float]: ...


class SumMetric:
    """Gathers one tensor of sums. A subclass sets `sums` to zeros and adds to it."""

    sums: Tensor

    def merge(self, other: SumMetric) -> SumMetric:
        self.sums += other.sums.to(self.sums.device)
        return self

    def all_reduce(self, world: World) -> SumMetric:
        world.sum(self.sums)
        return self

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums}

    def load(self, state: dict[str, Tensor]) -> SumMetric:
        if state["sums"].shape != self.sums.shape:
            found, wanted = tuple(state["sums"].shape), tuple(self.sums.shape)
            raise UserError(f"Stored sums have shape {found}, this metric's have {wanted}: they are of other settings.")
        self.sums = state["sums"].to(self.sums.device, copy=True)
        return self


class RowMetric:
    """Gathers rows, one or more per picture, in the order they come. They stay on their device until `compute`."""

    def __init__(self):
        self.parts: list[Tensor] = []

    @property
    def rows(self) -> Tensor:
        """(N, ...) of all pictures so far."""
        return torch.cat(self.parts) if self.parts else torch.zeros(0, dtype=torch.float64)

    @property
    def count(self) -> int:
        return sum(len(part) for part in self.parts)

    def merge(self, other: RowMetric) -> RowMetric:
        self.parts += other.parts
        return self

    def all_reduce(self, world: World) -> RowMetric:
        """Rank order. A rank that has no pictures still has to know the shape of a row: give each at least one."""
        self.parts = [world.gather(self.rows.to(world.device))]
        return self

    def state(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def load(self, state: dict[str, Tensor]) -> RowMetric:
        self.parts = [state["rows"]]
        return self
