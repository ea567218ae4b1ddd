"""Ranges of settings, declared with their type where the argument is: core/config.py holds values against them and `--help`
prints them. Only the standard library.

    def __init__(self, *, layers: Layers = 12, dropout: Rate = 0.1, scales: list[Count] = (1, 2))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Limits:
    """What a number may be; None for no limit. `above` and `below` exclude the limit itself."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False

    def hold(self, value: Any) -> bool:
        """Whether a value lies inside; what is no number does."""
        if type(value) not in (int, float):
            return True
        low = self.low is None or (value > self.low if self.above else value >= self.low)
        return low and (self.high is None or (value < self.high if self.below else value <= self.high))

    def __str__(self) -> str:
        if self.low is not None and self.high is not None and not (self.above or self.below):
            return f"between {self.low} and {self.high}"
        low = "" if self.low is None else f"{'more than' if self.above else 'at least'} {self.low}"
        high = "" if self.high is None else f"{'less than' if self.below else 'at most'} {self.high}"
        return " and ".join(part for part in (low, high) if part)


Count = Annotated[int, Limits(1, 2**24)]  # codes, classes, positions
Width = Annotated[int, Limits(1, 2**16)]  # channels of a layer
Layers = Annotated[int, Limits(1, 256)]
Pixels = Annotated[int, Limits(1, 2**14)]  # of one side
Whole = Annotated[int, Limits(0, 2**24)]
Share = Annotated[float, Limits(0, 1)]
Rate = Annotated[float, Limits(0, 1, below=True)]  # of what is dropped while the rest is scaled up
Factor = Annotated[float, Limits(0)]
Positive = Annotated[float, Limits(0, above=True)]
