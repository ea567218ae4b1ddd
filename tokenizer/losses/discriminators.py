"""Discriminators: networks that tell pictures from reconstructions, trained beside the tokenizer.

PatchGAN is the one of pix2pix (Isola et al. 2017, "NLayer"): strided 4x4 convolutions, one logit per overlapping patch.
Weight names are the ones of the released files, `main.<i>`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import UserError


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in both directions: every rank's loss depends on every rank's contribution."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, each (C,), over the batches of all ranks.

    Every rank fills its own row of one table, so that one collective does. Merging means and sums of squared
    deviations (Chan et al. 1979) keeps the digits that E[x^2] - E[x]^2 would lose.
    """
    count = x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    own = torch.stack((torch.full_like(mean, count), mean, variance))  # (3, C)
    before, after = dist.get_rank(), dist.get_world_size() - 1 - dist.get_rank()
    table = _SumOverRanks.apply(F.pad(own[None], (0, 0, 0, 0, before, after)))  # (ranks, 3, C)
    share = table[:, 0] / table[:, 0].sum(0)  # (ranks, C)
    total_mean = (share * table[:, 1]).sum(0)
    total_variance = (share * (table[:, 2] + (table[:, 1] - total_mean).square())).sum(0)
    return total_mean, total_variance


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that always uses the statistics of the batch, in train and in eval mode.

    The running statistics of nn.BatchNorm2d exist so that files agree; nothing reads or updates them (a buffer written
    in every forward breaks DDP, which runs two of them before a backward).

    Args:
        sync: statistics of the global batch, so that results do not depend on the number of ranks.
            parity: False is what the official code trained with, statistics of each GPU's share.
    """

    def __init__(self, channels: int, sync: bool = True):
        super().__init__(channels)
        self.sync = sync

    def forward(self, x: Tensor) -> Tensor:
        if self.sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            mean, variance = _global_moments(x)
            mean, scale = mean.view(1, -1, 1, 1), (self.weight * torch.rsqrt(variance + self.eps)).view(1, -1, 1, 1)
            return (x - mean) * scale + self.bias.view(1, -1, 1, 1)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


class PatchGAN(nn.Module):
    """(B, 3, H, W) pictures -> (B, 1, H', W') logits. PyTorch's default initialisation.

    Args:
        ndf: channels of the first layer; doubles per layer up to 8 x.
        n_layers: strided layers; 3 sees patches of 70 pixels.
        norm: "batch" or "none".
        sync: see BatchNorm.
    """

    def __init__(self, ndf: int = 64, n_layers: int = 3, norm: str = "batch", sync: bool = True):
        super().__init__()
        if norm not in ("batch", "none"):
            raise UserError(f'discriminator "patchgan": norm is "batch" or "none", not "{norm}".')
        layers: list[nn.Module] = [nn.Conv2d(3, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = ndf
        for index in range(1, n_layers + 1):
            width, stride = ndf * min(2**index, 8), 2 if index < n_layers else 1
            layers += [
                nn.Conv2d(channels, width, 4, stride=stride, padding=1, bias=norm == "none"),
                BatchNorm(width, sync) if norm == "batch" else nn.Identity(),
                nn.LeakyReLU(0.2),
            ]
            channels = width
        self.main = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, stride=1, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)  # (B, 1, H', W')
