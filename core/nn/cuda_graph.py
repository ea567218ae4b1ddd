"""Functions of tensors as CUDA graphs: recorded once, then replayed without launching their kernels one by one."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn


@functools.lru_cache(None)
def cuda_graphs_work(device: torch.device) -> bool:
    """Whether functions on `device` can be recorded; says so on stderr, once, where they cannot."""
    if device.type != "cuda":
        print(f"no CUDA graphs on {device.type}: steps run kernel by kernel, with the same results", file=sys.stderr)
    return device.type == "cuda"


def capture(function: Callable[[], Any], warm_up: int = 1, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`function` as a graph, and its result, which every replay overwrites.

    Args:
        function: finds everything in fixed tensors, and running it several times does what running it once does.
        warm_up: calls before the recording, in which libraries choose their kernels and allocate what they keep.
        pool: of memory, torch.cuda.graph_pool_handle(), that graphs share which never run at the same time.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(warm_up):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile: the loader's pins memory.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph, result


class Replayed:
    """Records `function` at its first call and replays it at every other; inference only.

    All calls must have inputs of the same shapes. The result, a tensor or several, is overwritten by the next call but
    keeps its place, so that another recorded function may read it there.

    Args:
        pool: see `capture`.
    """

    WARM_UP = 1

    def __init__(self, function: Callable[..., Any], pool: Any = None):
        self.function, self.pool, self.graph = function, pool, None

    def _call(self) -> Any:
        # A graph must not read weights that autocast has cast and cached outside of it.
        on = torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=on, cache_enabled=False):
            return self.function(*self.inputs)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        if self.graph is None:
            self.inputs = [value.clone(memory_format=torch.contiguous_format) for value in inputs]
            self.graph, self.output = capture(self._call, self.WARM_UP, self.pool)
        for held, value in zip(self.inputs, inputs, strict=True):
            held.copy_(value)
        self.graph.replay()
        return self.output


def weak_method(owner: Any, method: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """method(owner, *arguments, ...) for `owner` itself to hold. A bound method would keep it alive, and with it gigabytes of
    a GPU, until Python happens to look for objects that only refer to each other."""
    return functools.partial(method, weakref.proxy(owner), *arguments)


def addresses(module: nn.Module) -> tuple[int, ...]:
    """Where the weights lie: recordings of a module hold as long as these are the same and somebody keeps them there."""
    return tuple(weight.untyped_storage()._cdata for weight in module.parameters())


class Kept:
    """One value that a module keeps between calls, for as long as it is asked for with the same key.

    A copy of the module begins without it, since its weights lie elsewhere.
    """

    def __init__(self):
        self.key: Hashable = None
        self.value: Any = None

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key != self.key:
            self.clear()  # what it held is free before the next is made
            self.key, self.value = key, make()
        return self.value

    def clear(self) -> None:
        self.key = self.value = None

    def __deepcopy__(self, memo: dict) -> Kept:
        return Kept()

    def __reduce__(self):
        return Kept, ()
