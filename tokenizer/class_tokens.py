"""Teachers that say one thing about a whole picture: the class tokens of CLIP and DINOv2 (FQGAN, section 3.3).

The networks are timm's. Weights come from timm's hub copies, or from files: timm's, OpenAI's or Meta's own, or those
of the transformers library (`openai/clip-vit-large-patch14/model.safetensors`), which are renamed here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.errors import UserError
from core.images import to_unit_range
from core.nn.embed import resize_positions
from core.rng import Draws
from core.weights import hub
from core.weights.adapter import describe_differences
from core.weights.names import Renames
from core.weights.released import find_weights, needs
from tokenizer.teachers import Teacher, create_timm, timm_helper

# Names of the transformers library and timm's, for both families.
_NAMES = Renames(
    ("^vision_model.embeddings.class_embedding", "^cls_token"),
    ("^embeddings.cls_token", "^cls_token"),
    ("^vision_model.embeddings.position_embedding.weight", "^pos_embed"),
    ("^embeddings.position_embeddings", "^pos_embed"),
    ("^vision_model.embeddings.patch_embedding.", "^patch_embed.proj."),
    ("^embeddings.patch_embeddings.projection.", "^patch_embed.proj."),
    ("^vision_model.pre_layrnorm.", "^norm_pre."),
    ("^vision_model.post_layernorm.", "^norm."),
    ("^layernorm.", "^norm."),
    ("^vision_model.encoder.layers.", "^blocks."),
    ("^encoder.layer.", "^blocks."),
    (".layer_norm{}.", ".norm{}."),
    (".self_attn.qkv_proj.", ".attn.qkv."),
    (".attention.attention.qkv.", ".attn.qkv."),
    (".self_attn.out_proj.", ".attn.proj."),
    (".attention.output.dense.", ".attn.proj."),
    (".layer_scale{}.lambda1", ".ls{}.gamma"),
    fused={
        ".self_attn.qkv_proj.": (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj."),
        ".attention.attention.qkv.": (
            ".attention.attention.query.",
            ".attention.attention.key.",
            ".attention.attention.value.",
        ),
    },
)
# The text part, projections and what only pretraining uses are none of these.
_KEPT = ("vision_model.", "embeddings.", "encoder.", "layernorm.")


def is_transformers_file(weights: dict[str, Tensor]) -> bool:
    return any(name.startswith(("vision_model.", "embeddings.", "dinov2.embeddings.")) for name in weights)


def timm_from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP (text part and all) or DINOv2 file of the transformers library under timm's names."""
    weights = {name.removeprefix("dinov2."): tensor for name, tensor in weights.items()}
    kept = {n: t for n, t in weights.items() if n.startswith(_KEPT) and not n.endswith(("mask_token", "position_ids"))}
    state = _NAMES.ours(kept)
    tables = {name: state[name] for name in ("cls_token", "pos_embed") if name in state}
    return {**state, **{name: table.reshape(1, -1, table.shape[-1]) for name, table in tables.items()}}


def _backbone(name: str, model: str, weights: str | None, pretrained: bool, size: dict | None) -> nn.Module:
    """`create_timm`, which here also takes a file of the transformers library."""
    path = find_weights(weights) if weights and pretrained else None
    loaded = hub.load_tensors(path) if path else {}
    if not is_transformers_file(loaded):
        return create_timm(name, model, str(path) if path else weights, pretrained, size)
    backbone, state = create_timm(name, model, None, False, size), timm_from_transformers(loaded)
    if problems := describe_differences(state, backbone.state_dict()):
        raise UserError(f'teacher "{name}": {path} is not a file of {model}: {"; ".join(problems)}')
    backbone.load_state_dict(state)
    return backbone


def nearest_pixels(images: Tensor, size: int) -> Tensor:
    """Pictures in [-1, 1] -> [0, 1], (B, 3, size, size), source pixel floor(i * in / out); not "nearest-exact"."""
    return F.interpolate(to_unit_range(images.float()), size=(size, size), mode="nearest")


class ClassToken(Teacher):
    """The class token of a vision transformer of timm: one feature per picture, (B, 1, dim).

    Pictures are resized by nearest neighbour. parity: FQGAN's teachers see such pictures, and the released tokenizers
    learnt from them.

    Args:
        name: under which its features are known.
        model: timm's name.
        image_size: what the backbone sees.
        normed: take the token after the final norm; CLIP's teachers in FQGAN come before it.
        weights: a file (see above), its name below pretrained_models/, or hf://owner/repo/file; None downloads timm's.
        pretrained: False leaves random weights, for tests.
        size: {width, layers, heads} of `weights` that are smaller than the model's name says.
    """

    grid = 1

    def __init__(
        self,
        name: str,
        model: str,
        image_size: int,
        normed: bool,
        weights: str | None = None,
        pretrained: bool = True,
        size: dict | None = None,
    ):
        backbone = _backbone(name, model, weights, pretrained, size)
        super().__init__(backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"])
        if backbone.num_prefix_tokens == 0:
            raise UserError(f'teacher "{name}": {model} has no class token')
        self.name, self.dim, self.size = name, backbone.num_features, image_size
        patch = backbone.patch_embed.patch_size[0]
        grid = (image_size // patch, image_size // patch)
        if backbone.patch_embed.grid_size != grid:
            # timm smooths when it shrinks a table; the publishers' own code does not.
            prefix = backbone.pos_embed.shape[1] - backbone.patch_embed.num_patches
            table = backbone.pos_embed.detach()
            resized = resize_positions(table[:, prefix:], grid)
            backbone.pos_embed = nn.Parameter(torch.cat((table[:, :prefix], resized), dim=1))
            backbone.patch_embed.img_size, backbone.patch_embed.grid_size = (image_size, image_size), grid
            backbone.patch_embed.num_patches = grid[0] * grid[1]
        if not normed:
            backbone.norm = nn.Identity()
        self.backbone = backbone
        self.freeze()

    def pixels(self, images: Tensor) -> Tensor:
        """What the backbone sees of pictures in [-1, 1], (B, 3, image_size, image_size)."""
        return self.normalise(nearest_pixels(images, self.size))

    def features(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        return self.backbone.forward_features(self.pixels(images))[:, :1]


@needs(timm_helper)
def clip(
    weights: str | None = None,
    pretrained: bool = True,
    model: str = "vit_large_patch14_clip_quickgelu_224.openai",
    size: dict | None = None,
) -> ClassToken:
    """OpenAI's CLIP. FQGAN: ViT-L/14 (the default) for dual, vit_base_patch16_clip_quickgelu_224.openai for triple."""
    return ClassToken("clip", model, 224, False, weights, pretrained, size)


@needs(timm_helper)
def dinov2_class(
    weights: str | None = None,
    pretrained: bool = True,
    model: str = "vit_small_patch14_dinov2.lvd142m",
    size: dict | None = None,
) -> ClassToken:
    """DINOv2 at 224 x 224, after its final norm. FQGAN triple: ViT-S/14 (the default)."""
    return ClassToken("dinov2_class", model, 224, True, weights, pretrained, size)
