"""How long a call must take at least: its FLOPs and bytes, counted on the meta device, and the device's peaks.

Peaks are those of core/devices.py in bf16, and otherwise measured here by a product of matrices and a copy.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from core.devices import Peak, floor_seconds, peak_of
from core.estimate import FlopCounter
from core.nn.kvcache import KVCache


@dataclass
class Work:
    """Of one call, for the whole batch."""

    flops: float
    moved: float  # bytes


_ATEN = torch.ops.aten
_PICKING = {_ATEN.embedding, _ATEN.index_select, _ATEN.index, _ATEN.gather}  # these read what they return
_BLANK = {_ATEN.zeros_like, _ATEN.ones_like, _ATEN.empty_like, _ATEN.full_like, _ATEN.new_zeros, _ATEN.new_empty}


class ReadCounter(FlopCounter):
    """Counts also `numbers`: weights read by every operation inside, and keys and values read from caches."""

    def __init__(self, networks: list[torch.nn.Module]):
        super().__init__()
        self.numbers = 0
        self.sizes = {p.untyped_storage()._cdata: p.numel() for network in networks for p in network.parameters()}

    def see(self, operation: Any, arguments: Any, result: Any) -> None:
        packet = operation._overloadpacket
        if operation.is_view or packet in _BLANK:
            return
        for tensor in tree_leaves(arguments):
            if isinstance(tensor, Tensor) and (size := self.sizes.get(tensor.untyped_storage()._cdata)):
                self.numbers += min(size, (result if packet in _PICKING else tensor).numel())

    def __enter__(self) -> ReadCounter:
        counter, update = self, KVCache.update
        self.update = update

        def watched(self: KVCache, layer: int, k: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
            keys_and_values = update(self, layer, k, v)
            counter.numbers += sum(t.numel() for t in keys_and_values)
            return keys_and_values

        KVCache.update = watched
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        KVCache.update = self.update
        super().__exit__(*error)


# ---------------------------------------------------------------------------------------------------------------------
# Peaks
# ---------------------------------------------------------------------------------------------------------------------
def synchronize(device: torch.device) -> None:
    """Wait for everything that was started on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_seconds(call: Callable[[], Any], device: torch.device, budget: float = 0.2) -> float:
    """Of calls for `budget` seconds, after one that is not counted."""
    best, ends = float("inf"), None
    while ends is None or time.perf_counter() < ends:
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - started) if ends else best
        ends = ends or time.perf_counter() + budget
    return best


@functools.lru_cache(None)
def probe(device: torch.device, dtype: torch.dtype) -> Peak:
    """FLOPs per second of a product of square matrices in `dtype`, and bytes per second of a copy (read and written)."""
    large = device.type == "cuda"
    side, count = (8192, 1 << 28) if large else (1024, 1 << 24)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    copied = torch.empty_like(source)
    with torch.no_grad():
        flops = 2 * side**3 / _best_seconds(lambda: torch.mm(left, right, out=product), device)
        return Peak(flops, 2 * count / _best_seconds(lambda: copied.copy_(source), device))


@dataclass(frozen=True)
class Floor:
    """`seconds` of a call if arithmetic ran at peak and every byte moved once at the full bandwidth, the longer of the two.

    Attributes:
        bound: "flops" or "bytes".
        source: of the peak, "table" or "probe".
    """

    seconds: float
    bound: str
    peak: Peak
    source: str

    @classmethod
    def of(cls, work: Work, peak: Peak, source: str) -> Floor:
        """Of a call that asks for `work`."""
        bound = "flops" if work.flops / peak.flops > work.moved / peak.bandwidth else "bytes"
        return cls(floor_seconds(work.flops, work.moved, peak), bound, peak, source)


def peak_here(name: str, device: torch.device, precision: str) -> tuple[Peak, str]:
    """(peak, "table" or "probe") for products in "bf16" or "fp32" on the device of this name."""
    if precision == "bf16" and (known := peak_of(name)):
        return known, "table"
    return probe(device, torch.bfloat16 if precision == "bf16" else torch.float32), "probe"
