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


@triton.jit
def mix64(x, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """core.rng's finaliser of splitmix64: its shifts are logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def dropout_kernel(
    x_rows,
    y_rows,
    keys,
    count,
    salt,
    threshold,
    scale,
    GOLDEN: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    DRAWS: tl.constexpr,
):
    """One program per `DRAWS` draws, of four elements each, of one sample of `count` elements. salt: what is added to keys."""
    sample = tl.program_id(1).to(tl.int64)
    draw = tl.program_id(0).to(tl.int64) * DRAWS + tl.arange(0, DRAWS)
    key = mix64(tl.load(keys + sample) + salt, FIRST, SECOND)
    bits = mix64(key + (draw + 1) * GOLDEN, FIRST, SECOND)
    lane = tl.arange(0, 4)
    value = ((bits[:, None] >> (16 * lane)[None, :]) & 0xFFFF) ^ 0x8000
    element = draw[:, None] * 4 + lane[None, :]
    here, inside = sample * count + element, element < count
    x = tl.load(x_rows + here, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(value >= threshold, x * scale, 0.0)
    tl.store(y_rows + here, y.to(y_rows.dtype.element_ty), mask=inside)
