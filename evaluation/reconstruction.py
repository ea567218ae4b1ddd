"""How close reconstructions are to their originals: PSNR and SSIM per picture, averaged over pictures.

Metrics are mergeable: `update` with batches on any process, `merge` what other processes gathered, `compute` once.

PSNR: 10 log10(1 / mse) of a picture on [0, 1] floats, at most 100 dB; averaged per picture, never from a mean mse.
SSIM ("ssim_gauss"): Wang et al. 2004 with an 11 x 11 Gaussian window of sigma 1.5, population covariance, K1 .01,
K2 .03, data range 1, per channel, only windows that lie inside the picture; mean over channels and places.
"""

from __future__ import annotations

from typing import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError
from core.images import to_uint8, to_unit_range
from evaluation.features import FeatureNet, full_precision_convolutions
from evaluation.frechet import Gaussian, frechet_distance

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2
_MAX_PSNR = 100.0


def psnr(original: Tensor, reconstruction: Tensor) -> Tensor:
    """(B,) in dB of two (B, 3, H, W) float pictures in [0, 1]."""
    mse = (original.float() - reconstruction.float()).double().square().mean((1, 2, 3))
    return (-10.0 * torch.log10(mse)).clamp(max=_MAX_PSNR)


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean of every window inside the picture, (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    offsets = torch.arange(_WINDOW, device=x.device, dtype=x.dtype) - _WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, _WINDOW)
    x = F.conv2d(x, weights, groups=x.shape[1])
    return F.conv2d(x, weights.transpose(2, 3), groups=x.shape[1])


def ssim(original: Tensor, reconstruction: Tensor) -> Tensor:
    """(B,) of two (B, 3, H, W) float pictures in [0, 1]."""
    if min(original.shape[-2:]) < _WINDOW:
        raise UserError(f"SSIM needs pictures of at least {_WINDOW} pixels a side, got {tuple(original.shape[-2:])}.")
    # variances are differences of means of squares: moving the grey level to the middle keeps fp32 digits
    x, y = original.float() - 0.5, reconstruction.float() - 0.5
    with full_precision_convolutions():
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blur(torch.cat((x, y, x * x, y * y, x * y), 1)).chunk(5, 1)
    var_x, var_y, cov = mean_xx - mean_x**2, mean_yy - mean_y**2, mean_xy - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * cov + _C2) / (var_x + var_y + _C2)
    return (luminance * structure).double().mean((1, 2, 3))


class PictureMean:
    """Mean over pictures of a function of (original, reconstruction) -> (B,)."""

    def __init__(self, name: str, function):
        self.name, self.function = name, function
        self.total, self.count = 0.0, 0

    def update(self, original: Tensor, reconstruction: Tensor) -> None:
        """Add a batch of (B, 3, H, W) float pictures; what leaves [0, 1] is clamped, as writing a file would."""
        if not (original.is_floating_point() and reconstruction.is_floating_point()):
            given = f"{original.dtype}, {reconstruction.dtype}"
            raise UserError(f"{self.name} takes float pictures in [0, 1], got {given}.")
        if original.shape != reconstruction.shape:
            raise UserError(f"{self.name}: shapes {tuple(original.shape)} and {tuple(reconstruction.shape)} differ.")
        values = self.function(original.clamp(0, 1), reconstruction.clamp(0, 1))
        self.total += float(values.double().sum())
        self.count += values.shape[0]

    def merge(self, other: "PictureMean") -> None:
        """Add what another process gathered."""
        self.total += other.total
        self.count += other.count

    def compute(self) -> dict[str, float]:
        if self.count == 0:
            raise UserError(f"{self.name} was asked for before any picture was added.")
        return {self.name: self.total / self.count}


class PSNR(PictureMean):
    def __init__(self):
        super().__init__("psnr", psnr)


class SSIM(PictureMean):
    def __init__(self):
        super().__init__("ssim_gauss", ssim)


def evaluate_reconstruction(
    pairs: Iterable[tuple[Tensor, Tensor]], net: FeatureNet | None = None, tap: str = "block4"
) -> dict[str, float]:
    """All reconstruction metrics of (originals uint8, reconstructions in [-1, 1] unclamped) batches.

    With `net` also the Frechet distance between originals and reconstructions (both as uint8, nearest rounding).
    """
    metrics = [PSNR(), SSIM()]
    real, fake = (Gaussian.empty(net.dims[tap] if net else 1) for _ in range(2))
    for original, reconstruction in pairs:
        reconstruction = reconstruction.float()
        for metric in metrics:
            metric.update(original.float() / 255.0, to_unit_range(reconstruction))
        if net:
            real.update(net(original)[tap])
            fake.update(net(to_uint8(reconstruction, "nearest"))[tap])
    result: dict[str, float] = {}
    for metric in metrics:
        result |= metric.compute()
    if net:
        result[f"reconstruction_frechet_{net.name}_{tap}"] = frechet_distance(real, fake)
    return result | {"num_pictures": metrics[0].count}
