"""What a training step costs, before anything runs: FLOPs and bytes, from tensors that have no data.

A step is run forward and backward on fake tensors: they have a shape, a type and a place, so every operation happens in
the precision it would have (autocast included) and attention by the kernel that would do it, but nothing is computed.
Bytes that are alive are counted as they come and go. Kernels that a compiler fuses keep less: the peak is of the code as
it is written.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _fused_attention(query, key, value, *_, **__) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _fused_attention_backward(grad, query, key, value, *_, **__) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_attention_backward,
}


@dataclass
class Step:
    """Of one pass over a micro-batch, all networks together."""

    flops: float = 0.0  # forward and backward
    forward: dict[str, float] = field(default_factory=dict)  # FLOPs of one forward pass of each trained network
    peak: int = 0  # most bytes alive at once, weights, gradients and optimiser state not counted


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of the operations inside it; subclasses look at those in `see` too."""

    def __init__(self):
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        packet = operation._overloadpacket
        if packet in _ATTENTION:
            self.flops += _ATTENTION[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        self.see(operation, (args, kwargs), result)
        return result

    def see(self, operation: Any, arguments: Any, result: Any) -> None:
        """Called after each operation."""


class _Meter(FlopCounter):
    """Counts living bytes as well. Storages in `known` are not counted."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.now, self.peak = 0, 0
        self._alive = dict.fromkeys(known)

    def see(self, operation: Any, arguments: Any, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        watch = self._alive[key] = weakref.finalize(storage, self._gone, key, size)
        watch.atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


class Rehearsal:
    """Networks of the meta device, made to compute on fake tensors.

    Args:
        trained: name -> network. They get gradients at once, as between the micro-batches of a step.
        frozen: networks that take part beside them.
        half: matrix products in bfloat16.
    """

    def __init__(self, trained: dict[str, nn.Module], frozen: list[nn.Module], half: bool):
        self.trained, self.half = trained, half
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            for network in [*trained.values(), *frozen]:
                held = [*network.parameters(), *network.buffers()]
                if any(t.is_meta for t in held):  # else one before it took it along
                    network.to_empty(device="cpu")
            for network in trained.values():
                for parameter in network.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        held = [t for n in [*trained.values(), *frozen] for t in [*n.parameters(), *n.buffers()]]
        held += [t.grad for t in held if t.grad is not None]
        self.known = {t.untyped_storage()._cdata for t in held}

    def step(self, phases: Callable[[dict[str, Any]], Any]) -> Step:
        """Run `phases(networks)`, an iterator of core.specs.Phase as core.specs.Task.phases gives it, to its end."""
        step = Step()

        def watched(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                before = meter.flops
                result = self.trained[name](*args, **kwargs)
                step.forward.setdefault(name, meter.flops - before)
                return result

            return call

        with self.mode, _Meter(self.known) as meter:
            running = phases({name: watched(name) for name in self.trained})
            while True:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                    phase = next(running, None)
                if phase is None:
                    break
                phase.loss.total.backward()
                del phase
        step.flops, step.peak = meter.flops, meter.peak
        return step


def number(value: float) -> str:
    """1.23 T, 45.6 M ..., with a space behind it for the unit; from 1e15 on 1.23e20, as recipes state whole runs."""
    if abs(value) >= 1e15:
        return f"{value:.3g} ".replace("e+", "e")
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} "
