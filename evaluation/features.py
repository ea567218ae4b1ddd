"""Feature networks: uint8 pictures in, named feature vectors out.

A network says which taps it has and how wide they are; every metric that needs features takes one. The offline one is
EfficientNet-Lite0 (weights ship in an installed package). A Frechet distance on it is not FID and is never called so:
its name is made of the network's name and the tap's, for example fd_lite0_block4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from core.nn.offline import efficientnet_lite0_input, load_efficientnet_lite0


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no autocast inside: cuDNN convolutions use TF32 by default, which moves features by about 1e-3; online
    evaluation runs within a training's autocast, which knows nothing of the half-precision distances of ADM."""
    # torch 2.9 gave every kind of operation its own setting and refuses to mix it with the older one
    if getattr(torch.backends.cudnn, "conv", None) is not None:
        holders, name, exact = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), "fp32_precision", "ieee"
    else:
        holders, name, exact = (torch.backends.cudnn, torch.backends.cuda.matmul), "allow_tf32", False
    before = [getattr(holder, name) for holder in holders]
    try:
        for holder in holders:
            setattr(holder, name, exact)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for holder, value in zip(holders, before):
            setattr(holder, name, value)


class FeatureNet(nn.Module):
    """Base of all feature networks. A subclass sets `name` and `dims` and writes `taps`.

    `name` stands for everything that changes the numbers (weights, input size), because it becomes part of metric
    names and of cache fingerprints.
    """

    name: str
    dims: dict[str, int]  # tap name -> width

    def distance_name(self, tap: str) -> str:
        """What a Frechet distance on `tap` is called. Only FID's own network overrides this."""
        return f"fd_{self.name}_{tap}"

    def taps(self, pixels: Tensor) -> dict[str, Tensor]:
        """Features of (B, 3, H, W) fp32 pixels on 0..255, tap name -> (B, dims[name])."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of (B, 3, H, W) uint8 pictures. Full fp32 whatever autocast or TF32 settings training uses."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"Feature networks take (B, 3, H, W) uint8 pictures, got {tuple(images.shape)} {images.dtype}. "
                "Convert floats with core.images.to_uint8 first, so that the rounding is chosen knowingly."
            )
        with full_precision():
            return self.taps(images.float())


class EfficientNetLite0(FeatureNet):
    """ImageNet-trained EfficientNet-Lite0.

    Taps: "block4" is the spatial mean after block 4 (112 wide: fit for Frechet distances at a few hundred pictures);
    "penultimate" is the pooled vector before the classifier (1280 wide: classification, nearest neighbours).

    Args:
        input_size: pictures are resized to this square. 224 is the network's own; 128 is 3.5 times quicker and gives
            other numbers, hence another `name`.
    """

    dims = {"block4": 112, "penultimate": 1280}

    def __init__(self, input_size: int = 224):
        super().__init__()
        # channels last: 1.7 times the pictures per second on a CPU, same features to 2e-6
        self.net = load_efficientnet_lite0().eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.input_size = input_size
        self.name = "lite0" if input_size == 224 else f"lite0_{input_size}px"

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in eval mode: batch statistics would make a picture's features depend on its neighbours."""
        return super().train(False)

    def taps(self, pixels: Tensor) -> dict[str, Tensor]:
        if pixels.shape[-2:] != (self.input_size, self.input_size):
            pixels = F.interpolate(pixels, (self.input_size, self.input_size), mode="bilinear", antialias=True)
        x = efficientnet_lite0_input(pixels).contiguous(memory_format=torch.channels_last)
        x = self.net.bn1(self.net.conv_stem(x))  # (B, 32, S/2, S/2), bn1 includes the ReLU6
        for index, block in enumerate(self.net.blocks):
            x = block(x)
            if index == 4:
                middle = x.mean((2, 3))  # (B, 112)
        x = self.net.bn2(self.net.conv_head(x))  # (B, 1280, S/32, S/32)
        return {"block4": middle, "penultimate": x.mean((2, 3))}
