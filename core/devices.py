"""What a device can do at most, how long an amount of work must take on it at least, and how exactly it does fp32.

Peaks are the vendors' figures for dense products with fp32 accumulation and for memory bandwidth; no kernel reaches
them, so a time computed from them is a floor.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Peak:
    """bf16 FLOPs per second and bytes per second."""

    flops: float
    bandwidth: float


_T = 1e12
# Parts of torch.cuda.get_device_name, the more specific first.
PEAKS: dict[str, Peak] = {
    "B200": Peak(2250 * _T, 8.0 * _T),
    "GH200": Peak(989 * _T, 4.0 * _T),
    "H200": Peak(989 * _T, 4.8 * _T),
    "H100 NVL": Peak(835 * _T, 3.9 * _T),
    "H100 PCIe": Peak(756 * _T, 2.0 * _T),
    "H100": Peak(989 * _T, 3.35 * _T),
    "H800": Peak(989 * _T, 3.35 * _T),
    "A100-SXM4-40GB": Peak(312 * _T, 1.555 * _T),
    "A100-PCIE-40GB": Peak(312 * _T, 1.555 * _T),
    "A100 80GB PCIe": Peak(312 * _T, 1.935 * _T),
    "A100": Peak(312 * _T, 2.039 * _T),
    "L40S": Peak(362 * _T, 0.864 * _T),
    "L40": Peak(181 * _T, 0.864 * _T),
    "L4": Peak(121 * _T, 0.3 * _T),
    "A10G": Peak(70 * _T, 0.6 * _T),
    "A6000": Peak(155 * _T, 0.768 * _T),
    "RTX 4090": Peak(165 * _T, 1.008 * _T),
    "RTX 3090": Peak(71 * _T, 0.936 * _T),
}


def peak_of(name: str) -> Peak | None:
    """The peak of a device by its name; None for one that is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part.lower() in name.lower()), None)


def floor_seconds(flops: float, moved_bytes: float, peak: Peak) -> float:
    """Arithmetic and memory traffic overlap at best: the longer of the two."""
    return max(flops / peak.flops, moved_bytes / peak.bandwidth)


# What a picture of 256 x 256 takes at most while a network of these systems looks at it or paints it, in fp32, activations
# of the convolutional decoders and caches of the generators included.
PICTURE_BYTES = 256 * 2**20


def pictures_at_once(asked: int, device: torch.device, side: int = 256) -> int:
    """How many pictures of `side` pixels go through a network together: `asked`, or if that is 0 a power of two from 8 to
    512 whose activations take at most half of the GPU's free memory; 64 on a CPU."""
    if asked:
        return asked
    if device.type != "cuda":
        return 64
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch for itself
    free = torch.cuda.mem_get_info(device)[0] + unused
    fitting = free / 2 / (PICTURE_BYTES * (side / 256) ** 2)
    return min(512, max(8, 2 ** int(math.log2(max(1.0, fitting)))))


# ---------------------------------------------------------------------------------------------------------------------
# TF32: fp32 products with 10 bits of mantissa, several times as fast on the tensor cores of a GPU
# ---------------------------------------------------------------------------------------------------------------------
def _switches() -> tuple[tuple[Any, ...], str, dict[bool, Any]]:
    """torch's settings of convolutions and of matrix products: (holders, their attribute, its value for TF32 or not)."""
    # torch 2.9 gave every kind of operation its own setting and refuses to mix it with the older one
    if (convolutions := getattr(torch.backends.cudnn, "conv", None)) is not None:
        return (convolutions, torch.backends.cuda.matmul), "fp32_precision", {True: "tf32", False: "ieee"}
    return (torch.backends.cudnn, torch.backends.cuda.matmul), "allow_tf32", {True: True, False: False}


def set_tf32(allowed: bool | None) -> None:
    """Of all fp32 convolutions and products from here on; None: as torch sets out, convolutions in TF32, products not."""
    holders, name, values = _switches()
    for holder, default in zip(holders, (True, False)):
        setattr(holder, name, values[default if allowed is None else allowed])


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, fp32 is fp32."""
    holders, name, values = _switches()
    before = [getattr(holder, name) for holder in holders]
    try:
        for holder in holders:
            setattr(holder, name, values[False])
        yield
    finally:
        for holder, value in zip(holders, before):
            setattr(holder, name, value)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Of one device per second, in the precision of a config; None where no table tells."""
    if device.type != "cuda" or precision != "bf16":
        return None
    peak = peak_of(torch.cuda.get_device_name(device))
    return peak.flops if peak else None


def peak_memory(device: torch.device) -> int:
    """Most bytes since the last reset on a GPU; of this process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# Estimates for a GPU where there is none
# ---------------------------------------------------------------------------------------------------------------------
_rehearsing = False


def is_rehearsal() -> bool:
    """Whether tensors have no data, and are to cost what they would on a GPU."""
    return _rehearsing


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, fake tensors of the CPU stand for those of a GPU."""
    global _rehearsing
    before, _rehearsing = _rehearsing, True
    try:
        yield
    finally:
        _rehearsing = before
