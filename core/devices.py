"""What a device can do at most, and how long an amount of work must take on it at least.

Peaks are the vendors' figures for dense products with fp32 accumulation and for memory bandwidth; no kernel reaches
them, so a time computed from them is a floor.
"""

from __future__ import annotations

from dataclasses import dataclass


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
