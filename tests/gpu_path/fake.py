"""A CUDA device that is not there: code runs on fake tensors, which have shapes and devices but no numbers.

`Count` sees every operation that would become a kernel. What it cannot see: kernels that a library starts inside of one
operation, and time.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from generator.dit import flow
from tokenizer.vq import diffusion_decoder

WAITING = ("_local_scalar_dense", "nonzero", "unique", "is_nonzero", "equal.default", "masked_select")
# Allocations and views start no kernel; what these pick is what they read.
ALLOCATING = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "lift_fresh",
    "detach",
    "alias",
    "_unsafe_view",
    "_reshape_alias",
}
SHORT = 8  # places of a cache that counts as full: that of the codebooks of one position
PICKING = {"embedding", "index_select", "index", "gather", "index_copy_", "slice_scatter"}


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """One kernel, as on a GPU; on fake tensors the general entry decides for many."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    mask = None if attn_mask is None else attn_mask.expand(*q.shape[:3], -1)
    return fused(q, k, v, mask, False, dropout_p, is_causal, scale=scale)[0]


def size(tensors: Any) -> int:
    """Bytes; a tensor that is repeated without being laid out counts once."""
    total = 0
    for t in tree_leaves(tensors):
        if isinstance(t, Tensor) and t.device.type == "cuda":
            numel = 1
            for length, stride in zip(t.shape, t.stride()):
                numel *= length if stride else 1
            total += numel * t.element_size()
    return total


class Count(TorchDispatchMode):
    """Kernels, casts of weights, bytes moved and moments at which the host would wait, of what runs inside.

    Args:
        weights: parameters whose casts are counted.

    Attributes:
        filled: bytes of one filled place in all caches that are read as far as they are filled, which `bytes` is without.
    """

    def __init__(self, weights: list[Tensor] = ()):
        super().__init__()
        self.held = {w.untyped_storage()._cdata for w in weights}
        self.kernels, self.waits = Counter(), Counter()
        self.casts = self.bytes = self.filled = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        name = operation._overloadpacket.__name__
        given, made = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), result))
        on_gpu = [any(t.device.type == "cuda" for t in part) for part in (given, made)]
        if any(word in str(operation) for word in WAITING) and on_gpu[0]:
            self.waits[name] += 1
        crosses = name in ("_to_copy", "copy_") and len({t.device.type for t in (*given, *made)}) > 1
        if crosses and not (kwargs.get("non_blocking") or True in args):
            self.waits[name] += 1
        if not on_gpu[1] or operation.is_view or name in ALLOCATING:
            return result
        self.kernels[name] += 1
        if name == "_to_copy" and given[0].untyped_storage()._cdata in self.held:
            self.casts += 1
        if name == "decode_attention":  # core.nn.decode_attention, which the device tells how much it reads
            heads, memory = args[:2]
            place, short = size(memory) // memory.shape[2], memory.shape[2] < SHORT
            self.filled += 0 if short else place
            self.bytes += size(heads) + size(result) + size(args[4:]) + (size(memory) if short else place)
        elif name in PICKING:
            self.bytes += 2 * size(args[-1] if name == "index_copy_" else result)
        else:
            out = {id(t) for t in tree_leaves(kwargs.get("out"))}
            self.bytes += size([t for t in given if id(t) not in out]) + size(result)
        return result

    @property
    def total(self) -> int:
        return sum(self.kernels.values())


class Graph:
    """Stands for a CUDA graph: it knows what was recorded and how often it was replayed."""

    def __init__(self, count: Count):
        self.count, self.replays = count, 0

    def replay(self) -> None:
        self.replays += 1


def real(function: Callable) -> Callable:
    """`function` outside of the fake world: what it gives has numbers."""

    def run(*args):
        with unset_fake_temporarily():
            return function(*args)

    return run


@contextlib.contextmanager
def gpu(weights: Callable[[], list[Tensor]] = list) -> Iterator[list[Graph]]:
    """Inside, "cuda" is a device of fake tensors; receives every recording that is made.

    Args:
        weights: gives the parameters whose casts a recording counts.
    """
    graphs: list[Graph] = []

    def capture(function, warm_up: int = 1, pool: Any = None):
        for _ in range(warm_up):
            function()
        with Count(weights()) as count:
            result = function()
        graphs.append(Graph(count))
        return graphs[-1], result

    with contextlib.ExitStack() as stack:
        for target, value in (
            ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            ("torch.cuda.is_bf16_supported", lambda *_: True),
            ("torch.cuda.graph_pool_handle", lambda: None),
            ("torch.nn.init.trunc_normal_", lambda tensor, *_, **__: tensor),  # it looks at numbers
            ("torch.nn.functional.scaled_dot_product_attention", attention),
            ("core.nn.cuda_graph.capture", capture),
            ("generator.ar.decode.capture", capture),
            ("generator.dit.flow.sampling_times", real(flow.sampling_times)),
            ("tokenizer.vq.diffusion_decoder.solver_times", real(diffusion_decoder.solver_times)),
        ):
            stack.enter_context(mock.patch(target, value))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield graphs


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights are fake from the start, so that the published sizes take no time and no memory."""
    with torch.device("cuda"):
        network = make()
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:  # tables are made on the CPU
                module._buffers[name] = buffer.to("cuda")
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "cuda":  # some tables count as parameters
                module._parameters[name] = nn.Parameter(parameter.to("cuda"))
    return network.eval().requires_grad_(False)
