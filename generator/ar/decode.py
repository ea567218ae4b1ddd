"""The loop of step-by-step sampling, with one CUDA graph per step where there is a GPU."""

from __future__ import annotations

import functools
from typing import Callable

import torch
from torch import Tensor

from core.nn.cuda_graph import capture
from core.nn.kvcache import KVCache

STRIDE = 64  # positions by which the attended prefix grows when steps are captured: one graph for each


def uncompiled(sample: Callable) -> Callable:
    """Decorator of a sampling method: blocks that training compiled run as they are. Every step of sampling has other
    shapes and places, and the compiler would start afresh for each."""
    @functools.wraps(sample)
    def run(*args, **kwargs):
        with torch.compiler.set_stance("force_eager"):
            return sample(*args, **kwargs)

    return run


def decode(step: Callable[[Tensor], None], start: int, stop: int, cache: KVCache, lead: int = 0,
           after: Callable[[int], None] | None = None) -> None:
    """step(t) for t = start ... stop - 1, with the cache at position t + lead. Nothing here waits for the device.

    Args:
        step: gets t as a (1,) int64 tensor on the device. With a static cache on a GPU it is captured: it must find
            everything in fixed tensors, change nothing it reads for the same t (so running it twice does what running
            it once does), and draw from noise that was made before.
        cache: static or not, see core.nn.kvcache.
        lead: positions before that of code 0.
        after: called after every step with the number of positions that are done.
    """
    device = cache.position.device
    t, graph, cache.span = torch.zeros(1, dtype=torch.int64, device=device), None, 0
    for index in range(start, stop):
        t.fill_(index)
        cache.seek(index + lead)
        if cache.static and index + lead + 1 > cache.span:
            cache.span = min(cache.length, -(-(index + lead + 1) // STRIDE) * STRIDE)
            graph = capture(functools.partial(step, t))[0] if device.type == "cuda" else None
        if graph is not None:
            graph.replay()
        else:
            step(t)
        if after is not None:
            after(index + 1)
