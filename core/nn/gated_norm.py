"""What adaptive norms do between two products, in one kernel: add the gated branch, normalise, modulate.

In plain PyTorch these are three kernels per product of a decode step, which are so short that starting them takes longer than
running them. On a GPU Triton (it comes with PyTorch) makes one of them. Where it cannot, for want of a C compiler for
instance, the plain operations do the same.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.devices import without_tf32


def gated_norm(
    x: Tensor,
    shift: Tensor,
    factor: Tensor,
    norm: nn.LayerNorm,
    gate: Tensor | None = None,
    branch: Tensor | None = None,
) -> Tensor:
    """norm(x) factor + shift of x + gate branch, which replaces x in place; inference only.

    Args:
        x: (..., D), contiguous; the first dimension counts samples.
        shift, factor, gate: one row of D per sample, broadcast over what x has between.
        norm: fp32 inside.
        gate, branch: both or neither; `branch` has the shape of x.

    Returns:
        the shape of x, in the type of `shift`.
    """
    operation = torch.ops.tessera.gated_norm if x.device.type == "cuda" and has_triton() else _plain
    return operation(x, shift, factor, norm.weight, norm.bias, norm.eps, gate, branch)


def _plain(
    x: Tensor,
    shift: Tensor,
    factor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gate: Tensor | None,
    branch: Tensor | None,
) -> Tensor:
    if gate is not None and branch is not None:
        x.addcmul_(gate, branch)
    weight, bias = (part if part is None else part.float() for part in (weight, bias))
    normed = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    return torch.addcmul(shift, normed, factor, out=torch.empty_like(x, dtype=shift.dtype))


@functools.lru_cache(None)
def has_triton() -> bool:
    """Whether the package is there; see `kernel_works`."""
    return importlib.util.find_spec("triton") is not None


@torch.library.custom_op("tessera::gated_norm", mutates_args={"x"}, device_types="cuda")
def _on_gpu(
    x: Tensor,
    shift: Tensor,
    factor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gate: Tensor | None,
    branch: Tensor | None,
) -> Tensor:
    kind = x.dtype, shift.dtype, x.shape[-1], weight is not None, gate is not None
    run = _launch if _works(x.device, *kind) else _plain
    return run(x, shift, factor, weight, bias, eps, gate, branch)


@_on_gpu.register_fake
def _(x, shift, factor, weight, bias, eps, gate, branch):
    return torch.empty_like(x, dtype=shift.dtype)


def _launch(
    x: Tensor,
    shift: Tensor,
    factor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    gate: Tensor | None,
    branch: Tensor | None,
) -> Tensor:
    from core.nn.triton_kernels import gated_norm_kernel

    assert x.is_contiguous() and shift.stride(-1) == factor.stride(-1) == 1
    width, samples = x.shape[-1], x.shape[0]
    rows = x.numel() // width
    y = torch.empty_like(x, dtype=shift.dtype)
    block = 1 << (width - 1).bit_length()
    kernel: Any = gated_norm_kernel[(rows,)]
    kernel(
        x,
        y,
        shift,
        factor,
        x if gate is None else gate,
        x if branch is None else branch.contiguous(),
        x if weight is None else weight,
        x if bias is None else bias,
        width,
        rows // samples,
        shift.stride(0),
        factor.stride(0),
        0 if gate is None else gate.stride(0),
        eps,
        GATED=gate is not None,
        AFFINE=weight is not None,
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
    )
    return y


# How far a kernel may be from plain operations, relative and absolute: rounding happens at other places.
LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def kernel_works(
    otherwise: str, dtype: torch.dtype, fused: Callable[[], list[Tensor]], plain: Callable[[], list[Tensor]]
) -> bool:
    """Whether a kernel of ours computes here, in `dtype`, what plain operations do; where not, one line begins with
    `otherwise`."""
    limit = LIMITS[dtype]
    try:
        with without_tf32():
            results, wanted = ([t.float() for t in run()] for run in (fused, plain))
        if all(torch.allclose(a, b, rtol=limit, atol=limit) for a, b in zip(results, wanted, strict=True)):
            return True
        reason = f"it differs by {max(float((a - b).abs().max()) for a, b in zip(results, wanted)):.1e}"
    except Exception as error:  # whatever the compiler, the driver or their absence may raise
        reason = str(error).strip().split("\n")[0]
    _tell(f"{otherwise}, more slowly: {reason}")
    return False


@functools.lru_cache(None)  # once, however many kinds of tensors fail in this way
def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def triton_works(device: torch.device) -> bool:
    """Whether kernels can be compiled and run on `device`."""
    return _works(device, torch.float32, torch.float32, 40, False, True)


@functools.lru_cache(None)
def _works(
    device: torch.device, stream: torch.dtype, dtype: torch.dtype, width: int, affine: bool, gated: bool
) -> bool:
    """The same of this kernel for tensors of one kind, x in `stream` and the result in `dtype`: tried once per process,
    before the first recording of a step."""
    # Two samples of three rows; shift and the like are rows of a table, so their stride is not x's.
    numbers = torch.arange(26 * width, device=device).sin()
    shift, factor, gate = numbers[: 12 * width].view(2, 1, 6, width).to(dtype).unbind(2)[1:4]
    x, branch = numbers[12 * width : 24 * width].view(2, 2, 3, width).unbind()
    weights = numbers[-2 * width :].view(2, width).unbind() if affine else (None, None)

    def result(run: Callable[..., Tensor]) -> list[Tensor]:
        after = x.to(stream, copy=True)
        branches = (gate, branch.to(dtype)) if gated else (None, None)
        return [run(after, shift, factor, *weights, 1e-6, *branches), after]

    return kernel_works(
        "sampling goes on without the fused norm, with the same results",
        dtype if stream == torch.float32 else stream,  # the coarser one
        lambda: result(_launch),
        lambda: result(_plain),
    )
