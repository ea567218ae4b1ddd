"""Linear layers whose products are made by the faster library.

PyTorch leaves fp32 products on a CPU to MKL. On AMD's processors with AVX-512 oneDNN, which comes with PyTorch and makes its
convolutions, is 1.08 to 1.17 times as fast (docs/benchmarks.md), but for small products and for the gradient of the
weights. Both are fp32 throughout; they differ in the last bits, as MKL does from processor to processor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.devices import is_rehearsal

TOKENS, WEIGHTS = 64, 1 << 18  # at least: below them a call costs more than it saves


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: (..., K), (N, K), (N,) -> (..., N)."""
    if not by_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return torch.ops.tessera.linear(x, weight, bias)
    return _product(x, weight, bias)  # without what an operator of ours costs per call


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether that makes this product of (B, T, K). B does not count: with each library a row has the same bits in a batch of
    any size, and must not change them with the number of ranks."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.ndim > 2
        and x.shape[-2] >= TOKENS
        and weight.numel() >= WEIGHTS
        and prefers_onednn()
        and not _left_to_torch
        and not torch.is_autocast_enabled("cpu")
        and not is_rehearsal()
    )


@torch.compiler.assume_constant_result  # a compiler must not look into it: it would compile around the product
def prefers_onednn() -> bool:
    """Whether this is one of the processors on which it is faster."""
    return _prefers_onednn()


@functools.lru_cache(None)
def _prefers_onednn() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


_left_to_torch = False


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """Inside, all products are PyTorch's own, for comparisons."""
    global _left_to_torch
    before, _left_to_torch = _left_to_torch, True
    try:
        yield
    finally:
        _left_to_torch = before


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("tessera::linear", mutates_args=(), device_types="cpu")
def _as_operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, bias)


@_as_operator.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _remember(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, gradient: Tensor):
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    rows = gradient.flatten(0, -2)  # (M, N)
    return (
        torch.ops.tessera.linear(gradient, weight.t(), None) if of_x else None,
        rows.t() @ x.flatten(0, -2) if of_weight else None,  # MKL is the faster one here
        rows.sum(0) if of_bias else None,
    )


_as_operator.register_autograd(_backward, setup_context=_remember)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def adopt(network: nn.Module) -> None:
    """Make a Linear of every nn.Linear in a network that others have written."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
