"""Tiny files of the frozen helpers in their published layouts: teachers, perceptual networks, DINO-S, Inception.

Teachers and losses are small, since training computes with them; the settings in `tests/rehearsal/recipes.py` say how
small. Inception has its real shapes, for nothing can say otherwise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.rehearsal.containers import bare, make
from tests.rehearsal.layouts import Shapes, conv, linear, norm, stack, timm_vit, under

VIT = {"width": 32, "layers": 1, "heads": 2}  # of every tiny vision transformer
VGG_WIDTHS = [4, 8, 8, 8, 8]
CONVNEXT = [[8, 16, 1], [16, None, 1]]  # in, out and layers of each stage
RESNET_LAYERS = [1, 1, 1, 1]
CLASSES = 10  # of the classifiers
INCEPTION = "inception_stand_in.pth"  # the published name is for the published bytes, whose hash is checked


def dinov3(width: int = 1024, layers: int = 24, patch: int = 16, registers: int = 4) -> Shapes:
    """facebook/dinov3-vitl16-pretrain-lvd1689m as the transformers library saves it."""
    block = {
        **norm("norm1", width),
        **norm("norm2", width),
        **linear("attention.k_proj", width, width, False),
        **{k: v for n in "qvo" for k, v in linear(f"attention.{n}_proj", width, width).items()},
        "layer_scale1.lambda1": (width,),
        "layer_scale2.lambda1": (width,),
        **linear("mlp.up_proj", 4 * width, width),
        **linear("mlp.down_proj", width, 4 * width),
    }
    tokens = {
        "cls_token": (1, 1, width),
        "mask_token": (1, 1, width),
        "register_tokens": (1, registers, width),
        **conv("patch_embeddings", width, 3, patch),
    }
    return {**under("embeddings", tokens), **stack("layer", layers, block), **norm("norm", width)}


def siglip(width: int = 1024, layers: int = 24, patch: int = 16, grid: int = 16) -> Shapes:
    """timm's vit_large_patch16_siglip_256: no class token, and a pooling head that is not read."""
    shapes = {
        name: shape
        for name, shape in timm_vit(width, layers, grid, patch, layer_scale=False).items()
        if name != "cls_token"
    }
    pool = {
        "latent": (1, 1, width),
        **linear("q", width, width),
        **linear("kv", 2 * width, width),
        **linear("proj", width, width),
        **norm("norm", width),
        **linear("mlp.fc1", 4 * width, width),
        **linear("mlp.fc2", width, 4 * width),
    }
    return {**shapes, "pos_embed": (1, grid * grid, width), **under("attn_pool", pool)}


def clip_transformers(width: int = 1024, layers: int = 24, patch: int = 14, grid: int = 16, text: int = 768) -> Shapes:
    """openai/clip-vit-large-patch14 as the transformers library saves it, a piece of the text part included."""
    block = {
        **norm("layer_norm1", width),
        **norm("layer_norm2", width),
        **linear("mlp.fc1", 4 * width, width),
        **linear("mlp.fc2", width, 4 * width),
        **{
            k: v
            for n in ("q_proj", "k_proj", "v_proj", "out_proj")
            for k, v in linear(f"self_attn.{n}", width, width).items()
        },
    }
    vision = {
        "embeddings.class_embedding": (width,),
        "embeddings.position_ids": (1, grid * grid + 1),
        "embeddings.position_embedding.weight": (grid * grid + 1, width),
        **conv("embeddings.patch_embedding", width, 3, patch, False),
        **norm("pre_layrnorm", width),
        **stack("encoder.layers", layers, block),
        **norm("post_layernorm", width),
    }
    return {
        **under("vision_model", vision),
        "logit_scale": (),
        "visual_projection.weight": (text, width),
        "text_model.embeddings.token_embedding.weight": (64, text),
        **norm("text_model.final_layer_norm", text),
    }


def vgg16(widths: list[int]) -> Shapes:
    """torchvision's vgg16-397923af.pth; the classifier is there and is not read."""
    shapes, channels, index = {}, 3, 0
    for width, count in zip(widths, (2, 2, 3, 3, 3)):
        for _ in range(count):
            shapes |= conv(f"features.{index}", width, channels, 3)
            channels, index = width, index + 2
        index += 1
    return {**shapes, **linear("classifier.0", 16, channels), **linear("classifier.6", CLASSES, 16)}


def lpips_heads(widths: list[int]) -> Shapes:
    return {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate(widths)}


def convnext(stages: list[list]) -> Shapes:
    """torchvision's convnext_small: a stem, then blocks and a downsampling per stage."""
    first = stages[0][0]
    shapes = {**conv("features.0.0", first, 3, 4), **norm("features.0.1", first)}
    for i, (width, out, layers) in enumerate(stages):
        block = {
            "layer_scale": (width, 1, 1),
            "block.0.weight": (width, 1, 7, 7),
            "block.0.bias": (width,),
            **norm("block.2", width),
            **linear("block.3", 4 * width, width),
            **linear("block.5", width, 4 * width),
        }
        shapes |= stack(f"features.{2 * i + 1}", layers, block)
        if out is not None:
            shapes |= {**norm(f"features.{2 * i + 2}.0", width), **conv(f"features.{2 * i + 2}.1", out, width, 2)}
    return {**shapes, **norm("classifier.0", stages[-1][0]), **linear("classifier.2", CLASSES, stages[-1][0])}


def _batch_norm(name: str, width: int) -> Shapes:
    return {
        **norm(name, width),
        f"{name}.running_mean": (width,),
        f"{name}.running_var": (width,),
        f"{name}.num_batches_tracked": (),
    }


def resnet50(layers: list[int]) -> Shapes:
    shapes = {**conv("conv1", 64, 3, 7, False), **_batch_norm("bn1", 64), **linear("fc", CLASSES, 2048)}
    channels = 64
    for stage, (count, width) in enumerate(zip(layers, (64, 128, 256, 512)), 1):
        for i in range(count):
            name = f"layer{stage}.{i}"
            shapes |= {
                **conv(f"{name}.conv1", width, channels, 1, False),
                **conv(f"{name}.conv2", width, width, 3, False),
                **conv(f"{name}.conv3", 4 * width, width, 1, False),
                **{
                    k: v
                    for n, w in ((1, width), (2, width), (3, 4 * width))
                    for k, v in _batch_norm(f"{name}.bn{n}", w).items()
                },
            }
            if i == 0:
                shapes |= {
                    **conv(f"{name}.downsample.0", 4 * width, channels, 1, False),
                    **_batch_norm(f"{name}.downsample.1", 4 * width),
                }
            channels = 4 * width
    return shapes


def inception() -> Shapes:
    """weights-inception-2015-12-05-6726825d.pth: convolutions of 1x1, 3x3, 1x7 ..., each with a BatchNorm."""
    shapes: Shapes = {}

    def add(name: str, out: int, channels: int, height: int = 1, width: int | None = None) -> int:
        kernel = (height, width or height)
        shapes.update({f"{name}.conv.weight": (out, channels, *kernel), **_batch_norm(f"{name}.bn", out)})
        return out

    def chain(block: str, channels: int, *convs: tuple) -> None:
        for name, out, *kernel in convs:
            channels = add(f"{block}.{name}", out, channels, *kernel)

    for name, out, channels, kernel in (
        ("1a_3x3", 32, 3, 3),
        ("2a_3x3", 32, 32, 3),
        ("2b_3x3", 64, 32, 3),
        ("3b_1x1", 80, 64, 1),
        ("4a_3x3", 192, 80, 3),
    ):
        add(f"Conv2d_{name}", out, channels, kernel)
    for block, channels, pool in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
        chain(block, channels, ("branch1x1", 64))
        chain(block, channels, ("branch5x5_1", 48), ("branch5x5_2", 64, 5))
        chain(block, channels, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
        chain(block, channels, ("branch_pool", pool))
    chain("Mixed_6a", 288, ("branch3x3", 384, 3))
    chain("Mixed_6a", 288, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
    for block, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        chain(block, 768, ("branch1x1", 192))
        chain(block, 768, ("branch7x7_1", c), ("branch7x7_2", c, 1, 7), ("branch7x7_3", 192, 7, 1))
        chain(
            block,
            768,
            ("branch7x7dbl_1", c),
            ("branch7x7dbl_2", c, 7, 1),
            ("branch7x7dbl_3", c, 1, 7),
            ("branch7x7dbl_4", c, 7, 1),
            ("branch7x7dbl_5", 192, 1, 7),
        )
        chain(block, 768, ("branch_pool", 192))
    chain("Mixed_7a", 768, ("branch3x3_1", 192), ("branch3x3_2", 320, 3))
    chain(
        "Mixed_7a",
        768,
        ("branch7x7x3_1", 192),
        ("branch7x7x3_2", 192, 1, 7),
        ("branch7x7x3_3", 192, 7, 1),
        ("branch7x7x3_4", 192, 3),
    )
    for block, channels in (("Mixed_7b", 1280), ("Mixed_7c", 2048)):
        chain(block, channels, ("branch1x1", 320))
        for name, before in (("branch3x3", ("_1", 384)), ("branch3x3dbl", ("_1", 448))):
            steps = [(name + before[0], before[1])] + ([(f"{name}_2", 384, 3)] if "dbl" in name else [])
            chain(block, channels, *steps)
            fork = f"{name}_3" if "dbl" in name else f"{name}_2"
            add(f"{block}.{fork}a", 384, 384, 1, 3)
            add(f"{block}.{fork}b", 384, 384, 3, 1)
        chain(block, channels, ("branch_pool", 192))
    return {**shapes, **linear("fc", 1008, 2048)}


def _settle(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BatchNorm's counts are whole numbers and its variances positive."""
    return {
        name: torch.zeros(value.shape, dtype=torch.int64)
        if name.endswith(("num_batches_tracked", "position_ids"))
        else value.abs() + 0.5
        if name.endswith("running_var")
        else value
        for name, value in state.items()
    }


def write_all(folder: Path) -> None:
    """Everything below `folder`, which is a pretrained_models/."""
    width, layers = VIT["width"], VIT["layers"]

    def vit(patch: int, grid: int, seed: int, **kind: bool) -> dict[str, Tensor]:
        return make(timm_vit(width, layers, grid, patch, **kind), seed)

    files = {
        "dinov3-vitl16-pretrain-lvd1689m/model.safetensors": make(dinov3(width, layers), 1),
        "timm/vit_base_patch14_dinov2.lvd142m/model.safetensors": vit(14, 37, 2),
        "timm/vit_large_patch14_dinov2.lvd142m/model.safetensors": vit(14, 37, 12),
        "timm/vit_large_patch16_siglip_256.v2_webli/model.safetensors": make(siglip(width, layers), 13),
        "timm/vit_small_patch14_dinov2.lvd142m/model.safetensors": vit(14, 37, 3),
        "timm/vit_base_patch16_clip_224.openai/model.safetensors": vit(16, 14, 4, layer_scale=False, pre_norm=True),
        "timm/vit_large_patch14_clip_224.openai/model.safetensors": vit(14, 16, 5, layer_scale=False, pre_norm=True),
        "clip-vit-large-patch14/model.safetensors": make(clip_transformers(width, layers, text=16), 5),
        "dino_deitsmall16_pretrain.pth": vit(16, 14, 6, layer_scale=False),
        "vgg16-397923af.pth": make(vgg16(VGG_WIDTHS), 7),
        "vgg.pth": {name: value.abs() for name, value in make(lpips_heads(VGG_WIDTHS), 8).items()},
        "convnext_small-0c510722.pth": make(convnext(CONVNEXT), 9),
        "resnet50-0676ba61.pth": make(resnet50(RESNET_LAYERS), 10),
        INCEPTION: make(inception(), 11),
    }
    for name, state in files.items():
        state = {k: v.contiguous() for k, v in state.items()} if name.endswith(".safetensors") else state
        bare(_settle(state), folder / name)
