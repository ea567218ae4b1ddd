"""Kernels in Triton. Imported only where they run: see core/nn/gated_norm.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated_norm_kernel(
    x_rows,
    y_rows,
    shift_rows,
    factor_rows,
    gate_rows,
    branch_rows,
    weight_row,
    bias_row,
    width,
    per_sample,
    shift_stride,
    factor_stride,
    gate_stride,
    eps,
    GATED: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row of `width`; `per_sample` rows in turn share shift, factor and gate."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // per_sample
    column = tl.arange(0, BLOCK)
    inside = column < width
    here = row * width + column
    x = tl.load(x_rows + here, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_rows + sample * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(branch_rows + here, mask=inside, other=0.0).to(tl.float32)
        x = (x + gate * branch).to(x_rows.dtype.element_ty)  # what the next one reads
        tl.store(x_rows + here, x, mask=inside)
        x = x.to(tl.float32)
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    y = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    if AFFINE:
        y = y * tl.load(weight_row + column, mask=inside, other=0.0).to(tl.float32)
        y = y + tl.load(bias_row + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factor_rows + sample * factor_stride + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_rows + sample * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_rows + here, (y * factor + shift).to(y_rows.dtype.element_ty), mask=inside)
