"""What a measured number may be called. The name carries the protocol and N: neither can be guessed from a value.

    metric_name("fid", 50_000)                        fid_50k
    metric_name("fid", 5_000, "pytorch_fid")          fid_pytorch_fid_5k
    metric_name("is", 50_000, "torch_fidelity")       is_torch_fidelity_50k
    metric_name("fd_lite0_block4", 270)               fd_lite0_block4_270

Only the 2015 Inception network's pool features give a "fid" and its spatial ones an "sfid"; every other network's
Frechet distance is "fd_<network>_<tap>" (FeatureNet.distance_name says which).
"""

from __future__ import annotations

from core.errors import UserError


def short_count(count: int) -> str:
    """50000 -> "50k", 5000 -> "5k", 270 -> "270", 12345 -> "12345"."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


def metric_name(base: str, count: int, variant: str = "") -> str:
    """The name of metric `base` measured on `count` pictures.

    Args:
        variant: what sets the number apart from others called `base`: a protocol ("torch_fidelity"), a resize
            ("pytorch_fid"), an arithmetic ("adm_fp16"). "" for the plain one.
    """
    if count < 1:
        raise UserError(f"{base} of {count} pictures has no name: measure at least one.")
    return "_".join(part for part in (base, variant, short_count(count)) if part)


def few_pictures(count: int, dim: int) -> str:
    """A sentence to print beside a Frechet distance of `count` pictures, or "" when there are enough.

    The expectation of the distance is that of infinitely many pictures plus about c / N.
    """
    if count <= dim:
        return (
            f"{count} pictures in {dim} dimensions: the covariance has no full rank and the distance is far too high. "
            "Compare it with nothing but the same number of pictures, or ask for --infinity."
        )
    if count < min(50 * dim, 50_000):
        return f"A Frechet distance of {count} pictures is biased upwards: compare it with equal numbers only."
    return ""
