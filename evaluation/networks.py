"""Feature networks: uint8 pictures in, named feature vectors out.

A network says which taps it has and how wide they are; every metric that needs features takes one. There are two.

Inception is FID's network: TensorFlow's classify_image graph of 2015-12-05, with the port's tensor names. It differs
from torchvision's InceptionV3 in its weights and in three places: average pools leave the padding out of the count, the
last block pools by maximum, and there are 1008 outputs. Numbers made with torchvision's are not FID.

    uint8 -> 299 x 299 by TensorFlow 1 bilinear -> (x - 128) / 128 -> network
    pool     2048  mean over places after Mixed_7c                      FID, KID, precision, recall
    spatial  2023  Mixed_6d.branch1x1, 17 x 17 x the first 7 channels   sFID (in height, width, channel order)
    logits   1008  fc without its bias                                  Inception Score
    64, 192, 768   mean over places after the two max pools, Mixed_6e   quick diagnostics

EfficientNet-Lite0 is the offline stand-in (its weights ship in an installed package). A Frechet distance on it is not
FID and is never called so: its name is made of the network's name and the tap's, for example fd_lite0_block4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.devices import without_tf32
from core.errors import UserError, nearest
from core.files import sha256_file
from core.nn.offline import efficientnet_lite0_input, load_efficientnet_lite0
from core.weights.hub import is_offline, load_tensors, resolve
from core.weights.pickles import load_pickle
from core.weights.released import helper
from evaluation.protocols import PROTOCOLS, Protocol


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no autocast inside: cuDNN convolutions use TF32 by default, which moves features by about 1e-3;
    online evaluation runs within a training's autocast, which knows nothing of the half-precision distances of ADM."""
    with without_tf32(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


class FeatureNet(nn.Module, ABC):
    """Base of all feature networks. A subclass sets `name` and `dims` and writes `taps`.

    `name` stands for everything that changes the numbers (weights, input size), because it becomes part of metric
    names and of cache fingerprints.
    """

    name: str
    dims: dict[str, int]  # tap name -> width
    is_published = False  # whether these are FID's own weights, so that a distance may be called FID
    preprocess: str | None = None  # how pictures become its input, where that is not told by the name
    weights_sha256: str | None = None  # of the file of weights, where there is one

    def facts(self) -> dict[str, str]:
        """What reference files call the network and its input. The same weights with another input are one network."""
        return {"network": "inception" if self.is_published else self.name, "preprocess": self.preprocess or self.name}

    def distance_name(self, tap: str) -> str:
        """What a Frechet distance on `tap` is called. Only FID's own network overrides this."""
        return f"fd_{self.name}_{tap}"

    @abstractmethod
    def taps(self, pixels: Tensor) -> dict[str, Tensor]:
        """Features of (B, 3, H, W) fp32 pixels on 0..255, tap name -> (B, dims[name])."""

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


def features_of(net: FeatureNet, images: Tensor, batch: int) -> dict[str, Tensor]:
    """Features of (N, 3, H, W) uint8 pictures, `batch` at a time, on the network's device."""
    device = next(net.parameters()).device
    parts = [net(piece.to(device, non_blocking=True)) for piece in images.split(batch)]
    return {tap: torch.cat([p[tap] for p in parts]) for tap in parts[0]}


class EfficientNetLite0(FeatureNet):
    """ImageNet-trained EfficientNet-Lite0.

    Taps: "block4" is the spatial mean after block 4 (112 wide: fit for Frechet distances at a few hundred pictures);
    "penultimate" is the pooled vector before the classifier (1280 wide: classification, nearest neighbours).

    Args:
        input_size: pictures are resized to this square. 224 is the network's own; 128 is 3.5 times quicker and gives
            other numbers, hence another `name`.
    """

    dims: ClassVar = {"block4": 112, "penultimate": 1280}

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


WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d"  # first digits
SIZE, SPATIAL_CHANNELS = 299, 7
DIMS = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": 1008, "64": 64, "192": 192, "768": 768}


# ---------------------------------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------------------------------
class ConvBN(nn.Module):
    """Convolution without bias, BatchNorm, ReLU. Stride 1 keeps the size, stride 2 does not pad; `pad` overrules.

    It computes with one convolution that has BatchNorm's scale and offset in it, made by `fold`.
    """

    def __init__(
        self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool | None = None
    ):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if (stride == 1 if pad is None else pad) else 0
        self.conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def fold(self, dtype: torch.dtype) -> None:
        scale = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        self.weight = (self.conv.weight.double() * scale[:, None, None, None]).to(dtype)
        self.bias = (self.bn.bias.double() - self.bn.running_mean.double() * scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.conv.stride, self.conv.padding).relu_()


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


class Mixed(nn.Module):
    """Branches side by side, concatenated over channels.

    Args:
        channels: of the input.
        branches: chains of (name, out, kernel[, stride]). A list in a chain is a fork: its convolutions read the same
            input and are concatenated.
        pool: what the last branch does with the input.
        pool_width: of the 1x1 convolution after it; 0: none.
    """

    def __init__(self, channels: int, *branches: list, pool: Callable[[Tensor], Tensor], pool_width: int = 0):
        super().__init__()
        self.pool = pool
        self.chains: list[list[list[str]]] = []
        for branch in branches:
            width, chain = channels, []
            for step in branch:
                convs = step if isinstance(step, list) else [step]
                for name, *shape in convs:
                    self.add_module(name, ConvBN(width, *shape))
                chain.append([conv[0] for conv in convs])
                width = sum(conv[1] for conv in convs)
            self.chains.append(chain)
        self.branch_pool = ConvBN(channels, pool_width, 1) if pool_width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            y = x
            for names in chain:
                parts = [self.get_submodule(name)(y) for name in names]
                y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            outputs.append(y)
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], 1)


def _mixed_35(channels: int, pool_width: int) -> Mixed:
    return Mixed(
        channels,
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        pool=_average,
        pool_width=pool_width,
    )


def _mixed_17(c7: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    return Mixed(
        768,
        [("branch1x1", 192, 1)],
        [("branch7x7_1", c7, 1), ("branch7x7_2", c7, row), ("branch7x7_3", 192, column)],
        [
            ("branch7x7dbl_1", c7, 1),
            ("branch7x7dbl_2", c7, column),
            ("branch7x7dbl_3", c7, row),
            ("branch7x7dbl_4", c7, column),
            ("branch7x7dbl_5", 192, row),
        ],
        pool=_average,
        pool_width=192,
    )


def _mixed_8(channels: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    def fork(name: str) -> list[tuple]:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    return Mixed(
        channels,
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), fork("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
        pool=pool,
        pool_width=192,
    )


class InceptionV3(nn.Module):
    """(B, 3, 299, 299) normalised pixels -> the features of this file's docstring, and "logits_biased"."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_35(192, 32), _mixed_35(256, 64), _mixed_35(288, 64)
        self.Mixed_6a = Mixed(
            288,
            [("branch3x3", 384, 3, 2)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
            pool=_halve,
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_mixed_17, (128, 160, 160, 192))
        self.Mixed_7a = Mixed(
            768,
            [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
            [
                ("branch7x7x3_1", 192, 1),
                ("branch7x7x3_2", 192, (1, 7)),
                ("branch7x7x3_3", 192, (7, 1)),
                ("branch7x7x3_4", 192, 3, 2),
            ],
            pool=_halve,
        )
        self.Mixed_7b, self.Mixed_7c = _mixed_8(1280, _average), _mixed_8(2048, _largest)
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def fold(self, dtype: torch.dtype = torch.float32) -> InceptionV3:
        """Call after loading weights and before `forward`."""
        for module in self.modules():
            if isinstance(module, ConvBN):
                module.fold(dtype)
        self.fc.to(dtype)
        self.layout = torch.contiguous_format
        return self

    def arrange(self, layout: torch.memory_format) -> None:
        """Keep the folded weights in the layout that the pixels come in."""
        if layout != self.layout:
            for module in self.modules():
                if isinstance(module, ConvBN):
                    module.weight = module.weight.contiguous(memory_format=layout)
            self.layout = layout

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        first = x = _halve(x)
        second = x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        fourth = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        third = x = self.Mixed_6e(fourth)
        pool = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))  # (B, 2048)
        logits = F.linear(pool, self.fc.weight)
        return {
            "pool": pool,
            # branch1x1 comes first in the concatenation; TensorFlow flattens channels last
            "spatial": fourth[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1),
            "logits": logits,
            "logits_biased": logits + self.fc.bias,
            "64": first.mean((2, 3)),
            "192": second.mean((2, 3)),
            "768": third.mean((2, 3)),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------
def resize_tf1(pixels: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) fp32 -> (B, C, height, width): TensorFlow 1's resize_bilinear, bit for bit.

    Neither corners nor half pixels are aligned and nothing is smoothed before shrinking.
    """

    def taps(old: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
        position = torch.arange(new, device=pixels.device, dtype=torch.float32) * (
            torch.tensor(old, dtype=torch.float32) / torch.tensor(new, dtype=torch.float32)
        ).to(pixels.device)
        low = position.floor()
        return low.long(), (low.long() + 1).clamp(max=old - 1), position - low

    low, high, share = taps(pixels.shape[3], width)
    left, right = pixels.index_select(3, low), pixels.index_select(3, high)
    pixels = left + (right - left) * share  # a + (b - a) t and x before y, as TensorFlow: other forms differ by 2e-7
    low, high, share = taps(pixels.shape[2], height)
    top, bottom = pixels.index_select(2, low), pixels.index_select(2, high)
    return top + (bottom - top) * share[:, None]


def _tf1(pixels: Tensor) -> Tensor:
    return (resize_tf1(pixels, SIZE, SIZE) - 128.0) / 128.0


def _pytorch_fid(pixels: Tensor) -> Tensor:
    pixels = F.interpolate(pixels / 255.0, (SIZE, SIZE), mode="bilinear", align_corners=False)
    return 2.0 * pixels - 1.0


PREPROCESS: dict[str, Callable[[Tensor], Tensor]] = {"tf1": _tf1, "pytorch_fid": _pytorch_fid}


# ---------------------------------------------------------------------------------------------------------------------
# The feature network
# ---------------------------------------------------------------------------------------------------------------------
class Inception(FeatureNet):
    """FID's network.

    Args:
        weights: a file (.pth or .safetensors), an hf:// or https:// address, or a state dict. None: the published
            file, see core/weights/helpers.toml.
        taps: which features to return; see this file's docstring.
        preprocess: "tf1", or "pytorch_fid" for that package's resize and scale, which give other numbers.
        dtype: torch.float64 runs the network itself in double precision (reAR's evaluator); resizing stays float32.
    """

    def __init__(
        self,
        weights: str | Path | Mapping[str, Tensor] | None = None,
        taps: tuple[str, ...] = ("pool", "spatial", "logits"),
        preprocess: str = "tf1",
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        for tap in taps:
            if tap not in DIMS:
                raise UserError(f'Inception has no tap "{tap}".{nearest(tap, DIMS)}')
        if preprocess not in PREPROCESS:
            raise UserError(f'Inception has no preprocess "{preprocess}".{nearest(preprocess, PREPROCESS)}')
        self.dims = {tap: DIMS[tap] for tap in taps}
        self.preprocess, self.dtype = preprocess, dtype
        tensors, self.weights_sha256 = load_inception_weights(weights)
        self.net = InceptionV3()
        load_strictly(self.net, tensors, str(weights) if isinstance(weights, (str, Path)) else "the state dict")
        self.net.fold(dtype)
        self.is_published = self.weights_sha256.startswith(WEIGHTS_SHA256)
        weights_name = "" if self.is_published else f"_{self.weights_sha256[:8] or 'custom'}"
        self.name = "inception" + weights_name + ("" if preprocess == "tf1" else f"_{preprocess}")
        self.name += "_float64" if dtype == torch.float64 else ""

    def distance_name(self, tap: str) -> str:
        base = {"pool": "fid", "spatial": "sfid"}.get(tap)
        if base is None or not self.is_published:
            return super().distance_name(tap)
        return base if self.preprocess == "tf1" else f"{base}_{self.preprocess}"

    def train(self, mode: bool = True) -> Inception:
        """Stays in eval mode."""
        return super().train(False)

    def taps(self, pixels: Tensor) -> dict[str, Tensor]:
        # a CPU is 1.4 times quicker with channels last, in float32 only
        on_cpu = pixels.device.type == "cpu" and self.dtype == torch.float32
        layout = torch.channels_last if on_cpu else torch.contiguous_format
        self.net.arrange(layout)
        features = self.net(PREPROCESS[self.preprocess](pixels).to(self.dtype).contiguous(memory_format=layout))
        return {name: features[name] for name in self.dims}


def load_strictly(net: InceptionV3, tensors: Mapping[str, Tensor], source: str) -> None:
    """Every tensor must be there with its shape; only BatchNorm's batch counters may be missing."""
    expected = net.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    missing, unknown = sorted(expected.keys() - tensors.keys() - counters), sorted(tensors.keys() - expected.keys())
    wrong = [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
    if missing or unknown or wrong:
        what = [f"no {missing[0]}" for _ in missing[:1]] + [f"an unknown {unknown[0]}" for _ in unknown[:1]]
        what += [f"{name} of shape {tuple(tensors[name].shape)}" for name in sorted(wrong)[:1]]
        raise UserError(
            f"{source} is not the network of FID: it has {' and '.join(what)}. torchvision's InceptionV3 is another "
            f"network and its distances are not FID; use {WEIGHTS_FILE} of torch-fidelity."
        )
    net.load_state_dict({**{name: expected[name] for name in counters}, **tensors})


def load_inception_weights(weights: str | Path | Mapping[str, Tensor] | None) -> tuple[Mapping[str, Tensor], str]:
    """(state dict, sha256 of its file, "" for a dict). See `Inception`."""
    if isinstance(weights, Mapping):
        return weights, ""
    if weights is not None:
        path = resolve(str(weights))
        tensors = load_tensors(path)
        return tensors, sha256_file(path)
    path = helper(WEIGHTS_FILE).get()
    digest = sha256_file(path)
    if not digest.startswith(WEIGHTS_SHA256):
        raise UserError(
            f"{path} is not the published file: its sha256 is {digest[:8]}..., expected {WEIGHTS_SHA256}... "
            "It is damaged or another network; delete it and get it again, or name a file of your own by path."
        )
    return load_pickle(path), digest


# ---------------------------------------------------------------------------------------------------------------------
# Which one
# ---------------------------------------------------------------------------------------------------------------------
OFFLINE_SIZE = 128  # pixels the offline network sees; nearly four times quicker than its own 224


def look_for_net(name: str, protocol: Protocol) -> FeatureNet | None:
    """`feature_net` on the CPU, for --check; None where the published weights have yet to be downloaded."""
    if name == "inception" and helper(WEIGHTS_FILE).found() is None and not is_offline():
        return None
    return feature_net(torch.device("cpu"), name, protocol)


def feature_net(device: torch.device, name: str = "lite0", protocol: Protocol = PROTOCOLS["adm"]) -> FeatureNet:
    """The network that metrics see pictures through.

    Args:
        name: "inception" (FID's own), "lite0" (the offline stand-in, whose distances are never called FID), "auto"
            (Inception if its weights are here, else the stand-in) or a file of Inception weights.
        protocol: says how pictures become the network's input.
    """
    if name == "auto":
        name = "inception" if helper(WEIGHTS_FILE).found() is not None else "lite0"
    if name == "lite0":
        return EfficientNetLite0(OFFLINE_SIZE).to(device)
    dtype = torch.float64 if protocol.dtype == "float64" else torch.float32
    weights = None if name == "inception" else name
    return Inception(weights, preprocess=protocol.preprocess, dtype=dtype).to(device)
