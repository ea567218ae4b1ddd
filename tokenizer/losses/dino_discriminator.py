"""A discriminator on the features of a frozen DINO (Sauer et al. 2023, "StyleGAN-T"; VAR's tokenizer trains with it).

One small convolutional head per read-out of the backbone; only the heads are trained. Head and weight names are the ones
of the official files (`heads.i...`), which do not hold the backbone.

B batch, N patches of the backbone, D its width, M read-outs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import UserError
from core.images import to_unit_range
from core.limits import Count, Share, Whole
from core.nn.frozen import Frozen
from core.nn.lpips import helper_weights
from core.nn.precision import no_autocast
from core.nn.vit import VisionTransformer, ViTSize
from core.rng import Draws
from core.specs import Discriminator
from core.weights.pickles import load_pickle
from core.weights.released import needs

DINO_SMALL = ViTSize(384, 12, 6)
INPUT = 224  # pixels that the backbone sees
_WEIGHTS = "dino_deitsmall16_pretrain.pth"


class DinoFeatures(Frozen):
    """DINO ViT-S/16: the tokens before the first block and after some others.

    Args:
        size: of the transformer.
        depths: after which blocks tokens are read.
    """

    def __init__(self, size: ViTSize = DINO_SMALL, depths: tuple[int, ...] = (2, 5, 8, 11)):
        super().__init__()
        self.depths = tuple(depths)
        self.backbone = VisionTransformer(
            size, INPUT // 16, 16, layer_scale=None, activation="gelu_tanh", final_norm=False
        )
        self.freeze()

    def resize(self, images: Tensor, crop: tuple[Tensor, Tensor] | None) -> Tensor:
        """To 224 pixels. `crop`: (top, left), 0-dim tensors, of the window that a larger picture shows."""
        height, width = images.shape[-2:]
        if height <= INPUT and width <= INPUT:
            same = height == width == INPUT
            return images if same else F.interpolate(images, size=(INPUT, INPUT), mode="bicubic", align_corners=False)
        if crop is None:
            return F.interpolate(images, size=(INPUT, INPUT), mode="area")
        window = torch.arange(INPUT, device=images.device)
        return images.index_select(2, crop[0] + window).index_select(3, crop[1] + window)

    def forward(self, images: Tensor, crop: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
        """Pictures in [-1, 1] -> (B, D, N) per read-out: patch tokens plus the class token."""
        x = self.backbone.embed(self.backbone.patch_embed(self.normalise(self.resize(to_unit_range(images), crop))))
        taps = [x]
        for index, block in enumerate(self.backbone.blocks[: 1 + max(self.depths)]):
            x = block(x)
            if index in self.depths:
                taps.append(x)
        return [(tokens[:, 1:] + tokens[:, :1]).transpose(1, 2).float() for tokens in taps]


class SpectralConv1d(nn.Conv1d):
    """A convolution whose weight is divided by an estimate of its largest singular value (Miyato et al. 2018).

    One power iteration per forward in train mode, on buffers u and v. `weight_orig` is the trained tensor.
    """

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        weight = self._parameters.pop("weight")
        self.weight_orig = nn.Parameter(weight.data)
        flat = weight.data.flatten(1)
        for name, size in (("weight_u", flat.shape[0]), ("weight_v", flat.shape[1])):
            self.register_buffer(name, F.normalize(torch.randn(size), dim=0))
        with torch.no_grad():
            for _ in range(15 if not flat.is_meta else 0):  # as torch does when it parametrises a layer
                self._iterate(flat)

    def _iterate(self, flat: Tensor) -> None:
        self.weight_v.copy_(F.normalize(flat.t() @ self.weight_u, dim=0, eps=1e-12))
        self.weight_u.copy_(F.normalize(flat @ self.weight_v, dim=0, eps=1e-12))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight_orig.flatten(1)
        with no_autocast(x):  # nor is there a product of fp32 and bf16 on every device
            if self.training:
                with torch.no_grad():
                    self._iterate(flat)
            # copies, since the next forward before this one's backward changes the buffers
            sigma = torch.dot(self.weight_u.clone(), flat @ self.weight_v.clone())
        return self._conv_forward(x, self.weight_orig / sigma, self.bias)


class LocalBatchNorm(nn.Module):
    """BatchNorm over groups of at most 8 consecutive samples; no running statistics, the same in eval mode."""

    GROUP = 8

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        groups = math.ceil(len(x) / self.GROUP)
        while len(x) % groups:  # parity: the official code asks for a batch that divides evenly
            groups += 1
        grouped = x.float().unflatten(0, (groups, -1))  # (g, B / g, C, N)
        variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0, keepdim=True)
        x = ((grouped - mean) * torch.rsqrt(variance + 1e-6)).flatten(0, 1)
        return x * self.weight[:, None] + self.bias[:, None]


class _Residual(nn.Module):
    """(x + fn(x)) / sqrt(2)."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) * 2**-0.5


def _layer(width: int, kernel: int) -> nn.Sequential:
    conv = SpectralConv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(conv, LocalBatchNorm(width), nn.LeakyReLU(0.2))


@needs(_WEIGHTS)
class DinoDiscriminator(Discriminator):
    """(B, 3, H, W) pictures in [-1, 1] -> (B, M N) logits.

    Args:
        size: of the backbone, {width, layers, heads}; None for DINO's ViT-S/16.
        depths: after which blocks features are read, besides those before the first.
        kernel: of the second convolution of each head.
        pretrained: load the backbone; False for tests, or when weights are loaded otherwise.
        weights: file of the backbone; None: the published one, see core/weights/helpers.toml.
        crop_probability: how often pictures larger than 224 are cropped together, in place of being shrunk.
    """

    fake_first = True  # spectral norms iterate with every pass

    def __init__(
        self,
        size: dict | None = None,
        depths: list[Whole] | tuple[Whole, ...] = (2, 5, 8, 11),
        kernel: Count = 9,
        pretrained: bool = True,
        weights: str | None = None,
        crop_probability: Share = 0.5,
    ):
        super().__init__()
        shape = DINO_SMALL if size is None else ViTSize.parse(size, "discriminator.size")
        if any(not 0 <= depth < shape.layers for depth in depths):
            raise UserError(f"discriminator.depths {list(depths)}: the backbone has blocks 0 to {shape.layers - 1}")
        features = DinoFeatures(shape, tuple(depths))
        if pretrained:
            features.backbone.load_state_dict(_backbone_weights(weights))
        # In a tuple: no submodule, so that it is in no checkpoint, no optimiser and no DDP.
        self._features = (features,)
        self.crop_probability = crop_probability
        width = shape.width
        self.heads = nn.ModuleList(
            nn.Sequential(_layer(width, 1), _Residual(_layer(width, kernel)), SpectralConv1d(width, 1, 1))
            for _ in range(1 + len(depths))
        )

    @property
    def features(self) -> DinoFeatures:
        return self._features[0]

    def no_weight_decay(self) -> set[str]:
        """parity: nothing is spared, biases and norms are decayed too."""
        return set()

    def frozen(self) -> dict[str, nn.Module]:
        return {"features": self.features}

    def _apply(self, fn, recurse: bool = True):
        """The backbone follows moves to another device or type."""
        self.features._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """`draws` decide about the crop; without them pictures larger than 224 are shrunk."""
        crop, larger = None, max(images.shape[-2:]) > INPUT
        if draws is not None and larger and draws.shared_uniform("dino crop") < self.crop_probability:
            corner = [
                int(draws.shared_uniform(f"dino crop {axis}", 0, extent - INPUT + 1))
                for axis, extent in zip(("top", "left"), images.shape[-2:])
            ]
            crop = tuple(torch.tensor(place, device="cpu").to(images.device, non_blocking=True) for place in corner)
        taps = self.features(images, crop)
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, taps)], dim=1)


def _backbone_weights(weights: str | None) -> dict[str, Tensor]:
    advice = "Or set discriminator: {name: patchgan}."
    state = load_pickle(weights) if weights else helper_weights(_WEIGHTS, advice)
    state = {name: value for name, value in state.items() if not name.startswith(("norm.", "head."))}
    # parity: the official discriminator zeroes the bias of the keys, which changes no attention weight.
    for name in state:
        if name.endswith("attn.qkv.bias"):
            third = len(state[name]) // 3
            state[name][third : 2 * third] = 0
    return state
