"""The vision transformer of DINO and DINOv2 (Dosovitskiy et al. 2021; Caron et al. 2021; Oquab et al. 2023).

ImageFolder's encoder, decoder and semantic teacher and the backbone of the DINO discriminator are all this network;
parameter names are timm's. It offers its parts (embedding, blocks, norm), since each user puts other tokens in between.

B batch, N = grid^2 patches, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UserError, in_short
from core.limits import Layers, Width
from core.nn.attention import Attention
from core.nn.dropout import drop_path, path_factors
from core.nn.embed import resize_positions, sincos_2d
from core.nn.mlp import MLP, SwiGLU
from core.rng import Draws
from core.sizes import pick
from core.weights.released import Released, timm_file


@dataclass(frozen=True)
class ViTSize:
    """Shape of one transformer."""

    width: Width
    layers: Layers
    heads: Width

    @classmethod
    def parse(cls, value: str | dict[str, int], setting: str, table: Mapping[str, ViTSize] | None = None) -> ViTSize:
        """A name in `table` (VIT_SIZES, or timm's name of such a DINOv2 model), or {width, layers, heads}."""
        table = VIT_SIZES if table is None else table
        if isinstance(value, str):
            name = value.removeprefix("vit_").removesuffix("_patch14_dinov2.lvd142m")
            if "reg4" in value:
                raise UserError(
                    f'{setting} "{value}": models with register tokens are not supported; take the one without _reg4.'
                )
            value = name
        return pick(value, cls, table, setting)


VIT_SIZES = {
    "small": ViTSize(384, 12, 6),
    "base": ViTSize(768, 12, 12),
    "large": ViTSize(1024, 24, 16),
    "giant": ViTSize(1536, 40, 24),
}


class PatchEmbedding(nn.Module):
    """(B, 3, H, W) -> (B, N, D), one token per patch, row by row."""

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al. 2021)."""

    def __init__(self, width: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x))).

    Args:
        layer_scale: initial value of the learned factors; None for none.
        gated: SwiGLU in place of the GELU MLP (DINOv2 giant).
        drop: probability of dropping either branch of a sample in training.
        eps: of the norms.
    """

    def __init__(
        self, size: ViTSize, layer_scale: float | None, activation: str, gated: bool, drop: float, eps: float = 1e-6
    ):
        super().__init__()
        width = size.width
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, size.heads)
        self.mlp = SwiGLU(width, int(width * 2.66667)) if gated else MLP(width, 4 * width, activation)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale is not None else nn.Identity()
        self.ls2 = LayerScale(width, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop = drop

    def forward(self, x: Tensor, drops: Tensor | None = None) -> Tensor:
        """x (B, T, D); `drops` (B, 2) uniform draws for stochastic depth, or None."""
        first, second = (None, None) if drops is None else drops.unbind(1)
        branch = self.ls1(self.attn(self.norm1(x)))
        x = x + drop_path(branch, path_factors(first, self.drop, branch.dtype))
        branch = self.ls2(self.mlp(self.norm2(x)))
        return x + drop_path(branch, path_factors(second, self.drop, branch.dtype))


class VisionTransformer(nn.Module):
    """A trunk with class token and learned positions.

    Args:
        size: width, layers, heads.
        grid: patches per side that `pos_embed` covers, (1, 1 + grid^2, D), class token first.
        patch_size: None leaves out the patch embedding (the decoder reads no pixels).
        layer_scale: initial value, DINOv2: 1e-5; None for DINO.
        activation: of the MLP, see core.nn.mlp.
        final_norm: whether there is a LayerNorm after the blocks.
        drop: stochastic depth of the last block; grows linearly from 0 at the first.
    """

    def __init__(
        self,
        size: ViTSize,
        grid: int,
        patch_size: int | None,
        layer_scale: float | None = 1e-5,
        activation: str = "gelu",
        final_norm: bool = True,
        drop: float = 0.0,
    ):
        super().__init__()
        self.grid, self.size = grid, size
        self.cls_token = nn.Parameter(torch.randn(1, 1, size.width) * 1e-6)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid * grid, size.width) * 0.02)
        if patch_size is not None:
            self.patch_embed = PatchEmbedding(size.width, patch_size)
        gated = size == VIT_SIZES["giant"]
        rates = [drop * i / max(1, size.layers - 1) for i in range(size.layers)]
        self.blocks = nn.ModuleList(Block(size, layer_scale, activation, gated, rate) for rate in rates)
        self.norm = nn.LayerNorm(size.width, eps=1e-6) if final_norm else nn.Identity()
        for module in self.modules():  # timm's initialisation
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.no_grad()
    def start_from_nothing(self) -> None:
        """Weights to train from that are not DINOv2's, so that a token at once attends to those at its own place.

        Positions are 2-D sine-cosines (He et al. 2022, arXiv 2111.06377), layer scales are 1, queries and keys start
        equal (after Trockman and Kolter 2023, arXiv 2305.09828), projections keep the variance. With timm's small random
        weights latent tokens see the mean of all patches, and quantisation drowns what little tells them apart.
        """
        std = self.size.width**-0.5
        for block in self.blocks:
            assert isinstance(block, Block)
            for scale in (block.ls1, block.ls2):
                if isinstance(scale, LayerScale):
                    scale.gamma.fill_(1.0)
            nn.init.trunc_normal_(block.attn.qkv.weight, std=std)
            nn.init.trunc_normal_(block.attn.proj.weight, std=std)
            query, key, _ = block.attn.qkv.weight.chunk(3)
            key.copy_(query)
        width = self.size.width // 4 * 4
        self.pos_embed[:, 1:, :width] = sincos_2d(width, (self.grid, self.grid))

    def embed(self, patches: Tensor) -> Tensor:
        """Class token in front of (B, N, D) patches, positions added in fp32: (B, 1 + N, D)."""
        classes = self.cls_token.expand(len(patches), -1, -1)
        return torch.cat((classes, patches.to(classes.dtype)), dim=1) + self.pos_embed

    def positions(self, grid: int) -> Tensor:
        """The positions of the patches on a grid of another size, (1, grid^2, D) fp32."""
        learnt = self.pos_embed[:, 1:]
        return learnt if grid == self.grid else resize_positions(learnt, (grid, grid), antialias=True)

    def encode(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Blocks and final norm over any tokens (B, T, D). `draws` (core.rng.Draws) switch stochastic depth on."""
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            drops = draws.uniform(f"drop path {index}", (2,)) if draws is not None and block.drop > 0 else None
            x = block(x, drops)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures (B, 3, H, W) -> (B, 1 + N, D), class token first."""
        return self.encode(self.embed(self.patch_embed(images)))


def timm_shape(size: ViTSize) -> dict[str, int]:
    """What timm.create_model takes to build a vision transformer of another size than its name says."""
    return {"embed_dim": size.width, "depth": size.layers, "num_heads": size.heads}


def dinov2_model(name: str) -> str:
    """timm's name of the DINOv2 with the sizes VIT_SIZES[name]."""
    return f"vit_{name}_patch14_dinov2.lvd142m"


def dinov2_files(*keys: str) -> Callable[[dict[str, Any]], list[Released]]:
    """For core.weights.released.needs: the weights of DINOv2 for the sizes that a constructor has under these settings."""

    def files(settings: dict[str, Any]) -> list[Released]:
        sizes = {ViTSize.parse(settings[key], key) for key in keys}
        return [timm_file(dinov2_model(name)) for name, known in VIT_SIZES.items() if known in sizes]

    return files


def dinov2_weights(size: ViTSize, image_size: int, patch_size: int, file: str | None = None) -> dict[str, Tensor]:
    """Meta's DINOv2 for this picture and patch size, with the names of VisionTransformer.

    timm resizes the positions (bicubic, antialiased) and the patch kernel (pseudo-inverse resampling).

    Args:
        size: of the file; only those in VIT_SIZES can be downloaded.
        file: timm's file; None: the published one, see core/weights/helpers.toml.
    """
    import timm  # takes seconds: only when used
    from safetensors import SafetensorError

    name = next((name for name, known in VIT_SIZES.items() if known == size), None)
    if name is None and not file:
        raise UserError(
            f"{size} is no published DINOv2: use one of {', '.join(VIT_SIZES)}, name a file of weights of that "
            "size, or start from random weights with pretrained: false"
        )
    model = dinov2_model(name or "base")
    shape: dict[str, Any] = {} if name else timm_shape(size)
    try:
        overlay = {"file": file or str(timm_file(model).get())}
        network = timm.create_model(
            model,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            img_size=image_size,
            patch_size=patch_size,
            num_classes=0,
            **shape,
        )
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        raise UserError(
            f"could not get the weights of DINOv2: {in_short(error)} Or name a file of timm's {model} (`weights` of the "
            "teacher, `pretrained` of the tokenizer), or set pretrained: false to start from random "
            "weights."
        ) from None
    return rename_gated(network.state_dict())


def rename_gated(state: dict[str, Tensor], back: bool = False) -> dict[str, Tensor]:
    """timm's names of the gated MLP of DINOv2 giant -> core.nn.mlp's, or back; other models pass unchanged."""
    if not any(
        ".mlp.w12." in n
        if back
        else n.endswith("mlp.fc1.weight") and s.shape[0] == 2 * state[n.replace("fc1", "fc2")].shape[1]
        for n, s in state.items()
    ):
        return state
    pairs = (
        (("mlp.w12.", "mlp.fc1."), ("mlp.w3.", "mlp.fc2."))
        if back
        else (("mlp.fc1.", "mlp.w12."), ("mlp.fc2.", "mlp.w3."))
    )
    renamed = {}
    for name, value in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed
