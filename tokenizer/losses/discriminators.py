"""Discriminators: networks that tell pictures from reconstructions, trained beside the tokenizer.

PatchGAN is the one of pix2pix (Isola et al. 2017, "NLayer"): strided 4x4 convolutions, one logit per overlapping patch.
StyleGANDiscriminator is the residual one of StyleGAN2 (Karras et al. 2020) as VQGAN's descendants simplified it.
BlurDiscriminator smooths before it halves (Zhang 2019), as VQGAN+ does.
Weight names are those of the official codes. All take `draws`, for those that look at their pictures at random.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from core.dist import gather_over_ranks
from core.errors import UserError
from core.limits import Count, Layers, Pixels, Positive, Width
from core.nn.conv import channels_last, group_norm
from core.rng import Draws
from core.specs import Discriminator


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, each (C,), over the batches of all ranks.

    Merging means and sums of squared deviations (Chan et al. 1979) keeps the digits that E[x^2] - E[x]^2 would lose.
    """
    count = x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    of_this_rank = torch.stack((torch.full_like(mean, count), mean, variance))  # (3, C)
    table = gather_over_ranks(of_this_rank[None])  # (ranks, 3, C)
    share = table[:, 0] / table[:, 0].sum(0)  # (ranks, C)
    total_mean = (share * table[:, 1]).sum(0)
    total_variance = (share * (table[:, 2] + (table[:, 1] - total_mean).square())).sum(0)
    return total_mean, total_variance


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that always uses the statistics of the batch, in train and in eval mode.

    The running statistics of nn.BatchNorm2d are kept so that files agree; nothing reads them. A batch that is not finite
    leaves them alone, or every later checkpoint would hold NaN.

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
            if self.training:
                count = x.numel() // x.shape[1] * dist.get_world_size()
                unbiased = variance.detach() * (count / max(count - 1, 1))
                self._remember(
                    self.running_mean.lerp(mean.detach(), self.momentum), self.running_var.lerp(unbiased, self.momentum)
                )
            mean, scale = mean.view(1, -1, 1, 1), (self.weight * torch.rsqrt(variance + self.eps)).view(1, -1, 1, 1)
            return (x - mean) * scale + self.bias.view(1, -1, 1, 1)
        moved = (self.running_mean.clone(), self.running_var.clone()) if self.training else (None, None)
        result = F.batch_norm(x, *moved, self.weight, self.bias, True, self.momentum, self.eps)
        if self.training:
            self._remember(*moved)
        return result

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        for running, moved in ((self.running_mean, mean), (self.running_var, variance)):
            running.copy_(torch.where(moved.isfinite(), moved, running))


class PatchGAN(Discriminator):
    """(B, 3, H, W) pictures -> (B, 1, H', W') logits.

    Args:
        ndf: channels of the first layer; doubles per layer up to 8 x.
        n_layers: strided layers; 3 sees patches of 70 pixels.
        norm: "batch" or "none".
        sync: see BatchNorm.
        init: "default" is PyTorch's; "normal" is pix2pix's, convolutions N(0, 0.02), norms N(1, 0.02).
    """

    def __init__(
        self, ndf: Width = 64, n_layers: Layers = 3, norm: str = "batch", sync: bool = True, init: str = "default"
    ):
        super().__init__()
        if init not in ("default", "normal"):
            raise UserError(f'discriminator "patchgan": init is "default" or "normal", not "{init}".')
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
        for layer in self.main if init == "normal" else ():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)
        channels_last(self)

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        return self.main(images)  # (B, 1, H', W')


class Blur(nn.Module):
    """[1, 2, 1] in both directions on every channel, reflecting at the border: what keeps a stride from aliasing."""

    def __init__(self, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))  # in official files

    def forward(self, x: Tensor) -> Tensor:
        channels, weight, stride = x.shape[1], (self.f / self.f.sum()).to(x.dtype), self.stride
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        x = F.conv2d(x, weight.view(1, 1, 3, 1).expand(channels, 1, 3, 1), stride=(stride, 1), groups=channels)
        return F.conv2d(x, weight.view(1, 1, 1, 3).expand(channels, 1, 1, 3), stride=(1, stride), groups=channels)


class BlurDiscriminator(Discriminator):
    """(B, 3, H, W) pictures -> (B, 1, H / 2^stages, W / 2^stages) logits.

    The one of VQGAN+ in the terms that MaskBit's paper gives: blurred resampling, group norm, `stages` of doubling
    width. Its authors' code was not consulted; weights do not carry over.

    Args:
        channels: of the first stage; doubles per stage up to 8 x.
        stages: halvings.
        groups: of the norms.
    """

    def __init__(self, channels: Width = 128, stages: Layers = 4, groups: Count = 32):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(stages)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.LeakyReLU(0.2)]
        for before, width in zip([channels, *widths], widths):
            layers += [
                nn.Conv2d(before, width, 3, padding=1),
                Blur(stride=2),
                group_norm(width, groups),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))
        channels_last(self)

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        return self.main(images)


class _StyleBlock(nn.Module):
    """Half the size: (1x1 with stride 2) + (two 3x3, blur, 3x3 with stride 2), over sqrt 2."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, channels, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(channels, channels, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.downsample(self.net(x)) + self.conv_res(x)) * 2**-0.5


class StyleGANDiscriminator(Discriminator):
    """(B, 3, S, S) pictures -> (B, 1) logits.

    Args:
        image_size: S, a power of two and at least 8.
        channels: width at 32 x 32 and below is 512, and half of that for each doubling above, times this.
    """

    def __init__(self, image_size: Pixels = 256, channels: Positive = 1.0):
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise UserError(f'discriminator "stylegan": image_size is a power of two from 8 on, not {image_size}.')

        def width(size: int) -> int:
            return max(1, int(channels * min(512, 512 * 32 // size)))

        blocks: list[nn.Module] = [nn.Conv2d(3, width(image_size), 3, padding=1), nn.LeakyReLU(0.2)]
        size = image_size
        while size > 4:
            blocks.append(_StyleBlock(width(size), width(size // 2)))
            size //= 2
        self.blocks = nn.Sequential(*blocks)
        last = width(4)
        self.final_conv = nn.Sequential(nn.Conv2d(last, last, 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(nn.Linear(last * 16, last), nn.LeakyReLU(0.2), nn.Linear(last, 1))
        channels_last(self)

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        return self.final_linear(self.final_conv(self.blocks(images)).flatten(1))
