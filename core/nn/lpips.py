"""LPIPS: a distance between pictures in the features of a frozen classifier (Zhang et al. 2018, version 0.1).

For each of a few layers: unit-length features, squared difference, a learnt non-negative weight per channel, mean over
positions; the layers are summed. Two backbones:

- vgg16: the published metric, with the linear heads that VQGAN and all systems here use. Its backbone is a download.
- squeeze: SqueezeNet 1.1 from the `ndf` package with the heads that were learnt for another release of the same
  network. It works offline and is NOT the published LPIPS-squeeze: numbers made with it carry its name.

B batch, C channels, H x W pixels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UserError, nearest
from core.nn.conv import channels_last
from core.nn.frozen import Frozen
from core.nn.offline import SQUEEZENET_MEAN, load_squeezenet
from core.weights.adapter import describe_differences
from core.weights.pickles import load_pickle
from core.weights.released import find_local_file, find_package_file, helper, needs

VGG_WIDTHS = (64, 128, 256, 512, 512)
_CONVS_PER_STAGE = (2, 2, 3, 3, 3)
# Index in squeezenet1_1.features -> channels there.
_SQUEEZE_TAPS = {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}
_PIXELS = {  # mean and std of pixels in [-1, 1]
    "vgg16": ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)),
    "squeeze": (tuple(mean / 127.5 - 1 for mean in SQUEEZENET_MEAN), (1 / 127.5,) * 3),
}
_SQUEEZE_HEADS = (
    "lpips==0.1.4",
    "lpips/weights/v0.1/squeeze.pth",
    "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
)


class LPIPS(Frozen):
    """Distance of two batches of pictures.

    Args:
        backbone: "vgg16" or "squeeze".
        widths: of the five stages of VGG16.
        pretrained: False leaves random weights, for tests.
    """

    backbone: nn.Sequential
    compiled_whole = True  # its layers are single ones

    def __init__(self, backbone: str = "vgg16", widths: tuple[int, ...] = VGG_WIDTHS, pretrained: bool = True):
        if backbone not in _PIXELS:
            raise UserError(f'LPIPS has no backbone "{backbone}".{nearest(backbone, _PIXELS)}')
        super().__init__(*_PIXELS[backbone])
        if backbone == "vgg16":
            self.name = "lpips-vgg"
            layers, self.taps = _vgg16(widths)
        else:
            self.name = "lpips-squeeze (ndf backbone)"
            layers, self.taps = _squeezenet(pretrained), dict(_SQUEEZE_TAPS)
        self.backbone = layers
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in self.taps.values())
        if pretrained:
            if backbone == "vgg16":
                load_exactly(layers, _vgg16_weights(len(layers)), "vgg16-397923af.pth")
            heads = _head_weights(backbone)
            heads = {f"{i}.weight": heads[f"lin{i}.model.1.weight"] for i in range(len(self.taps))}
            load_exactly(self.heads, heads, "LPIPS's linear layers")
        channels_last(self)
        self.freeze()

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features of pictures in [0, 1], one (B, C, H', W') per tapped layer."""
        x = self.normalise(images * 2 - 1)
        tapped = []
        for index, layer in enumerate(self.backbone):
            x = layer(x)
            if index in self.taps:
                # vector_norm and not sqrt of the sum: its gradient is 0, not NaN, where every channel is 0.
                tapped.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return tapped

    def forward(self, images: Tensor, recon: Tensor) -> Tensor:
        """(B,) distances of pictures in [0, 1]. Gradients reach `recon` only."""
        with torch.no_grad():
            targets = self.features(images)
        layers = zip(targets, self.features(recon), self.heads)
        distances = [head((target - rebuilt).square()).mean(dim=(1, 2, 3)) for target, rebuilt, head in layers]  # (B,)
        return functools.reduce(torch.add, distances)


@needs("vgg16-397923af.pth", "vgg.pth")
def lpips_vgg(widths: tuple[int, ...] = VGG_WIDTHS, pretrained: bool = True) -> LPIPS:
    return LPIPS("vgg16", tuple(widths), pretrained)


def lpips_squeeze(pretrained: bool = True) -> LPIPS:
    return LPIPS("squeeze", pretrained=pretrained)


# ---------------------------------------------------------------------------------------------------------------------
# Backbones and weights
# ---------------------------------------------------------------------------------------------------------------------
def _vgg16(widths: tuple[int, ...]) -> tuple[nn.Sequential, dict[int, int]]:
    """torchvision's vgg16.features up to relu5_3, same indices; and the tapped indices with their widths."""
    layers, taps, channels = [], {}, 3
    for stage, (width, convs) in enumerate(zip(widths, _CONVS_PER_STAGE, strict=True)):
        if stage > 0:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(convs):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        taps[len(layers) - 1] = width
    return nn.Sequential(*layers), taps


def _squeezenet(pretrained: bool) -> Any:
    if pretrained:
        return load_squeezenet()
    import torchvision

    return torchvision.models.squeezenet1_1(weights=None).features


def _vgg16_weights(layers: int) -> dict[str, Tensor]:
    """The first `layers` of torchvision's VGG16, as keys of `_vgg16`."""
    advice = "For training without it, perceptual: {lpips_squeeze: 1.0} needs no download."
    weights = helper_weights("vgg16-397923af.pth", advice)
    weights = {k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features.")}
    return {k: v for k, v in weights.items() if int(k.split(".")[0]) < layers}


def _head_weights(backbone: str) -> dict[str, Tensor]:
    squeeze = find_local_file("squeeze.pth") or find_package_file(*_SQUEEZE_HEADS) if backbone == "squeeze" else None
    path = squeeze or helper("vgg.pth").get()
    heads = load_pickle(path)
    if "lin0.model.1.weight" not in heads:
        raise UserError(f"{path} is not LPIPS's linear layers. Remove it and: pip install --no-deps lpips==0.1.4")
    return heads


def load_exactly(network: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Fill a frozen network; UserError where the file called `name` is of another one."""
    if problems := describe_differences(state, network.state_dict()):
        raise UserError(
            f"{name} does not fit the network that it is read for: {'; '.join(problems)}. Get the file again, or "
            "say how large its network is."
        )
    network.load_state_dict(state)


def helper_weights(name: str, advice: str) -> dict[str, Tensor]:
    """The tensors of a network of core/weights/helpers.toml; `advice` says how to do without it."""
    try:
        return load_pickle(helper(name).get())
    except UserError as error:
        raise UserError(f"{error} {advice}") from error
