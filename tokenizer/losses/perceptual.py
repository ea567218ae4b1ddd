"""The perceptual loss: a weighted mean of named distances (RecTok: P = sum(w p) / sum(w)).

parts: {lpips: 1.0, convnext_s: 0.1}     the published recipe ("lpips-convnext_s-1.0-0.1" in the official code)
parts: {lpips_squeeze: 1.0}              works without a download
parts: {lpips: {weight: 1.0, widths: [4, 8, 12, 16, 16], pretrained: false}}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import UserError
from core.nn.conv import channels_last
from core.nn.frozen import Frozen
from core.nn.lpips import helper_weights, load_exactly
from core.weights.released import Released, needed, needs
from tokenizer.losses import PERCEPTUAL


class ClassifierLogits(Frozen):
    """Mean squared difference of a classifier's outputs.

    Args:
        network: (B, 3, 224, 224) -> (B, classes).
        file: its published weights; None leaves random ones, for tests.
        advice: how to do without that file.
    """

    def __init__(self, network: nn.Module, file: str | None, advice: str):
        super().__init__()
        self.network = network
        if file is not None:
            load_exactly(network, helper_weights(file, advice), file)
        channels_last(network)
        self.freeze()

    def pixels(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] as the network wants them, (B, 3, 224, 224)."""
        return self.normalise(F.interpolate(images, size=(224, 224), mode="bilinear", antialias=True))

    def logits(self, images: Tensor) -> Tensor:
        """(B, classes) for pictures in [0, 1]."""
        return self.network(self.pixels(images))

    def forward(self, images: Tensor, recon: Tensor) -> Tensor:
        """One number for the batch. Gradients reach `recon` only."""
        with torch.no_grad():
            target = self.logits(images)
        return F.mse_loss(self.logits(recon), target)


@needs("convnext_small-0c510722.pth")
def convnext_logits(
    blocks: list[tuple] | None = None, classes: int = 1000, pretrained: bool = True
) -> ClassifierLogits:
    """ConvNeXt-Small (RecTok).

    Args:
        blocks: (in, out, layers) of each stage; None for those of ConvNeXt-Small.
        classes: number of outputs.
        pretrained: False leaves random weights, for tests.
    """
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = blocks or [(96, 192, 3), (192, 384, 3), (384, 768, 27), (768, None, 3)]
    network = ConvNeXt([CNBlockConfig(*block) for block in blocks], num_classes=classes)
    file = "convnext_small-0c510722.pth" if pretrained else None
    return ClassifierLogits(network, file, "Or leave convnext_s out of the perceptual parts.")


@needs("resnet50-0676ba61.pth")
def resnet_logits(layers: list[int] = (3, 4, 6, 3), classes: int = 1000, pretrained: bool = True) -> ClassifierLogits:
    """ResNet-50 (VQGAN+ of MaskBit).

    Args:
        layers, classes: blocks per stage and number of outputs, those of ResNet-50 by default.
        pretrained: False leaves random weights, for tests.
    """
    from torchvision.models.resnet import Bottleneck, ResNet

    network = ResNet(Bottleneck, list(layers), num_classes=classes)
    file = "resnet50-0676ba61.pth" if pretrained else None
    return ClassifierLogits(network, file, "Or use perceptual: {lpips_squeeze: 1.0}, which needs no download.")


def helpers_of(settings: dict[str, Any]) -> list[Released]:
    """What the parts of an objective's `perceptual` will load."""
    used = ((settings.get("weights") or {}).get("perceptual") and settings.get("perceptual")) or {}
    parts = {name: part if isinstance(part, dict) else {} for name, part in used.items()}
    return [file for name, part in parts.items() for file in needed(PERCEPTUAL.get(name), part)]


class Perceptual(nn.Module):
    """Weighted mean of the parts.

    Args:
        parts: name (see tokenizer.losses.PERCEPTUAL) -> weight, or -> {weight: ..., settings of the part}.
    """

    def __init__(self, parts: dict[str, float | dict[str, Any]]):
        super().__init__()
        self.weights, networks = {}, {}
        for name, settings in parts.items():
            settings = dict(settings) if isinstance(settings, dict) else {"weight": settings}
            self.weights[name] = float(settings.pop("weight", 1.0))
            networks[name] = PERCEPTUAL.build({"name": name, **settings})
        if sum(self.weights.values()) <= 0:
            raise UserError(f"perceptual: the weights of the parts must add up to more than 0, got {self.weights}.")
        self.parts = nn.ModuleDict(networks)

    def forward(self, images: Tensor, recon: Tensor) -> Tensor:
        """(B,) or () distances of pictures in [0, 1]; a part without a value per picture adds the same to all."""
        total = sum(weight * self.parts[name](images, recon) for name, weight in self.weights.items())
        return total / sum(self.weights.values())
