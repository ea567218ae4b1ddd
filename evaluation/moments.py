"""Mean and covariance of feature vectors, gathered batch by batch and merged across processes, in float64.

Sums are taken around a shift (the mean of the first batch), so means far from zero cost no digits, and a batch costs
one matrix product. Two gatherings with different shifts merge as Chan, Golub & LeVeque (1979) do. How the pictures were
cut into batches, shards or ranks changes the result by rounding only (1e-12 relative).
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.dist import World
from core.errors import UserError


class Moments:
    """Mean and covariance of (N, dim) features.

    Args:
        dim: width of a feature vector.
        device: where sums live; batches are moved there. A GPU is worth it: float64 products are quick enough on all.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.shift: Tensor | None = None  # (D,)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)  # (D,) sum of x - shift
        self.squares = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # (D, D) outer products

    @classmethod
    def of(cls, features: Tensor, block: int = 8192) -> Moments:
        """Of (N, D) features at hand, on their device; `block` rows are held in float64 at a time."""
        gathered = cls(features.shape[1], features.device)
        for rows in features.split(block):
            gathered.update(rows)
        return gathered

    @classmethod
    def stored(cls, count: int, mean: Tensor, covariance: Tensor) -> Moments:
        """From a file of statistics: (D,) mean and (D, D) unbiased covariance of `count` pictures, any float dtype."""
        if covariance.shape != (mean.numel(), mean.numel()):
            raise UserError(f"Statistics with a mean of {mean.numel()} and a covariance of {tuple(covariance.shape)}.")
        result = cls(mean.numel())
        result.count, result.shift = count, mean.detach().cpu().double().flatten()
        result.squares = covariance.detach().cpu().double() * (count - 1)
        return result

    @property
    def dim(self) -> int:
        return self.total.numel()

    @torch.no_grad()
    def update(self, features: Tensor) -> Moments:
        """Add (B, D) features of any float dtype."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UserError(f"Moments of (B, {self.dim}) features were given {tuple(features.shape)}.")
        if features.shape[0] == 0:
            return self
        x = features.detach().to(self.total.device, torch.float64, copy=True)
        if self.shift is None:
            self.shift = x.mean(0)
        x -= self.shift
        self.count += x.shape[0]
        self.total += x.sum(0)
        if x.device.type != "cpu":
            self.squares.addmm_(x.T, x)
        else:
            rows = x.numpy()
            self.squares += torch.from_numpy(rows.T @ rows)  # NumPy sees one matrix twice and does half the work
        return self

    def merge(self, other: Moments) -> Moments:
        """Add what another one has gathered."""
        if other.dim != self.dim:
            raise UserError(f"Moments of {self.dim} and of {other.dim} dimensions cannot be merged.")
        if other.count == 0:
            return self
        device = self.total.device
        if self.count == 0:
            self.count, self.shift = other.count, other.shift.to(device, copy=True)
            self.total, self.squares = other.total.to(device, copy=True), other.squares.to(device, copy=True)
            return self
        total, squares = other._around(self.shift)
        self.total, self.squares, self.count = self.total + total, self.squares + squares, self.count + other.count
        return self

    def _around(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """(total, squares) around another shift, on its device: x - shift = (x - ours) + offset."""
        total, squares = self.total.to(shift.device), self.squares.to(shift.device)
        offset = self.shift.to(shift.device) - shift
        cross = torch.outer(total, offset)
        return total + self.count * offset, squares + cross + cross.T + self.count * torch.outer(offset, offset)

    def all_reduce(self, world: World) -> Moments:
        """Every rank gets the moments of all ranks' pictures. Every rank must call it, also one without pictures."""
        if world.size == 1:
            return self
        count = world.sum(torch.tensor([float(self.count)], dtype=torch.float64, device=self.total.device))
        if count == 0:
            return self
        # around the mean of all ranks, their sums add
        shift = world.sum(self.mean * self.count if self.count else torch.zeros_like(self.total)) / count
        if self.count:
            self.total, self.squares = self._around(shift)
        self.shift, self.count = shift, int(count)
        world.sum(self.total)
        world.sum(self.squares)
        return self

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        if self.count == 0:
            raise UserError("A mean was asked for before any picture was added.")
        return self.shift + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, symmetric, unbiased (N - 1)."""
        if self.count < 2:
            raise UserError(f"A covariance needs at least 2 pictures, got {self.count}.")
        return torch.addr(self.squares, self.total, self.total, alpha=-1 / self.count).div_(self.count - 1)

    def state(self) -> dict[str, Tensor]:
        """What `load` takes back: tensors only, fit for a safetensors file."""
        shift = torch.zeros_like(self.total) if self.shift is None else self.shift
        return {"count": torch.tensor([self.count]), "shift": shift, "total": self.total, "squares": self.squares}

    def load(self, state: dict[str, Tensor]) -> Moments:
        """Go on from a stored `state`."""
        device = self.total.device
        if state["total"].numel() != self.dim:
            raise UserError(f"Stored moments have {state['total'].numel()} dimensions, {self.dim} were expected.")
        self.count = int(state["count"])
        self.shift = state["shift"].to(device, copy=True) if self.count else None
        self.total, self.squares = (state[name].to(device, copy=True) for name in ("total", "squares"))
        return self
