"""The loop of step-by-step sampling, with CUDA graphs where there is a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from core.nn.cuda_graph import capture
from core.nn.kvcache import KVCache
from core.nn.precision import no_autocast


def uncompiled(sample: Callable) -> Callable:
    """Decorator of a sampling method: blocks that training compiled run as they are. Every step of sampling has other
    shapes and places, and the compiler would start afresh for each."""

    @functools.wraps(sample)
    def run(*args, **kwargs):
        with torch.compiler.set_stance("force_eager"):
            return sample(*args, **kwargs)

    return run


class Recordings:
    """The CUDA graphs of one step function, one for each span of its cache, kept as long as what they read is kept."""

    def __init__(self, step: Callable[[], None], cache: KVCache):
        self.step, self.cache, self.graphs = step, cache, {}
        self.pool = torch.cuda.graph_pool_handle() if self.records() else None  # they never run at the same time

    def records(self) -> bool:
        return self.cache.static and self.cache.position.device.type == "cuda"

    def __call__(self, place: int) -> None:
        self.cache.seek(place)
        span = self.cache.span(place + 1)
        if span in self.graphs:
            self.graphs[span].replay()
            return
        with no_autocast(self.cache.position):  # around the step alone: what `after` does follows the caller's
            self.step()  # libraries choose their kernels and allocate what they keep: nothing is run for that alone
            if self.records():
                self.graphs[span] = capture(self.step, 0, self.pool)[0]


def decode(step: Callable[[int], Any], start: int, stop: int, after: Callable[[int], None] | None = None) -> None:
    """step(t) for t = start ... stop - 1. Nothing here waits for the device.

    Args:
        step: Recordings of a function that finds everything in fixed tensors, changes nothing that it reads for the same
            t (so running it twice does what running it once does), and draws from noise that was made before.
        after: called after every step with the number of places that are done.
    """
    for index in range(start, stop):
        step(index)
        if after is not None:
            after(index + 1)
