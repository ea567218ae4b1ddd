"""Random draws as recordings hold them, in place of those of a run."""

from __future__ import annotations

from torch import Tensor

from core.rng import Draws


class RecordedDraws(Draws):
    """Draws replayed from a dictionary name -> tensor (or number)."""

    def __init__(self, recorded: dict[str, Tensor | float]):
        self.recorded = recorded

    def _get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        value = self.recorded[name]
        return value.reshape(-1, *shape)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        return self._get(name, shape)

    def normal(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        return self._get(name, shape)

    def categorical(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """As recorded: (B, *shape) uniform numbers, or (B, *shape, V) exponential noise."""
        return self.recorded[name]

    def shared_uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        return float(self.recorded[name])

    def fork(self, name: str) -> RecordedDraws:
        return self
