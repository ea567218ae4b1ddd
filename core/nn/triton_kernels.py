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


@triton.jit
def _normed(x, mean_of, inside, weight, bias, channel, eps):
    """x normalised over its `mean_of` channels, weighted and shifted."""
    mean = tl.sum(x, axis=0) / mean_of
    centred = tl.where(inside, x - mean, 0.0)
    x = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / mean_of + eps)
    return x * tl.load(weight + channel, mask=inside, other=0.0) + tl.load(bias + channel, mask=inside, other=0.0)


@triton.jit
def decode_attention_kernel(
    heads,
    memory,
    out,
    position,
    affine,
    row,
    q_heads,
    kv_heads,
    width,
    memory_stride,
    head_stride,
    scale,
    eps,
    NORMED: tl.constexpr,
    TURNED: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """One program per sample and head of queries: `PLACES` earlier positions at a time, with a running softmax that begins
    at the new position. The first of the heads that share keys and values stores the new ones."""
    sample, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = q_heads // kv_heads
    pair = head // group
    place = tl.load(position)
    channel = tl.arange(0, CHANNELS)
    inside = channel < width
    new = heads + sample * (q_heads + 2 * kv_heads) * width
    q_from, k_from = new + head * width, new + (q_heads + pair) * width
    kind = heads.dtype.element_ty
    q = tl.load(q_from + channel, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_from + channel, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(new + (q_heads + kv_heads + pair) * width + channel, mask=inside, other=0.0)
    if NORMED:
        bias = affine + (q_heads + kv_heads) * width
        q = _normed(q, width, inside, affine + head * width, bias + head * width, channel, eps)
        own = (q_heads + pair) * width
        k = _normed(k, width, inside, affine + own, bias + own, channel, eps)
    if TURNED:  # the other of each pair of channels
        cos = tl.load(row + channel, mask=inside, other=0.0)
        sin = tl.load(row + width + channel, mask=inside, other=0.0)
        q = q * cos + tl.load(q_from + (channel ^ 1), mask=inside, other=0.0).to(tl.float32) * sin
        k = k * cos + tl.load(k_from + (channel ^ 1), mask=inside, other=0.0).to(tl.float32) * sin
    k = k.to(kind)
    q, keys = q.to(kind).to(tl.float32) * scale, memory + sample * memory_stride + pair * head_stride
    values = keys + kv_heads * head_stride
    if head % group == 0:
        tl.store(keys + place * width + channel, k, mask=inside)
        tl.store(values + place * width + channel, v, mask=inside)
    highest = tl.sum(q * k.to(tl.float32), axis=0)
    total, mixed = highest * 0 + 1.0, v.to(tl.float32)
    for start in range(0, place, PLACES):
        earlier = start + tl.arange(0, PLACES)
        seen = earlier < place
        here = earlier[:, None] * width + channel[None, :]
        both = seen[:, None] & inside[None, :]
        known = tl.load(keys + here, mask=both, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(known * q[None, :], axis=1), -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        weights, faded = tl.exp(scores - higher), tl.exp(highest - higher)
        known = tl.load(values + here, mask=both, other=0.0).to(tl.float32)
        mixed = mixed * faded + tl.sum(weights[:, None] * known, axis=0)
        total = total * faded + tl.sum(weights, axis=0)
        highest = higher
    tl.store(out + (sample * q_heads + head) * width + channel, (mixed / total).to(kind), mask=inside)
