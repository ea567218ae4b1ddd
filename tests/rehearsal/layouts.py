"""Names and shapes of released files of tokenizers, as functions of their sizes; the defaults are the published ones.

Written from the descriptions of the files alone: nothing of the project's adapters or exporters is used here, so that a
mistake in those cannot hide. Those of generators are in generator_layouts.py. `tests/rehearsal/test_files.py` compares every layout at its published size with the recorded
names and shapes. "int64" tensors and buffers of a trainer are listed like weights, since a state dict holds them too.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def linear(name: str, out: int, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, width), **({f"{name}.bias": (out,)} if bias else {})}


def conv(name: str, out: int, channels: int, kernel: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, channels, kernel, kernel), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (width,), **({f"{name}.bias": (width,)} if bias else {})}


def stack(name: str, count: int, shapes: Shapes) -> Shapes:
    """`count` equal blocks, numbered from 0."""
    return {f"{name}.{i}.{key}": shape for i in range(count) for key, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------------------------------
# RecTok
# ---------------------------------------------------------------------------------------------------------------------
def swiglu_block(width: int) -> Shapes:
    hidden = int(2 / 3 * 4 * width)
    return {
        **norm("norm1", width, False),
        **norm("norm2", width, False),
        **linear("attn.qkv", 3 * width, width),
        **linear("attn.proj", width, width),
        **linear("mlp.w12", 2 * hidden, width),
        **linear("mlp.w3", width, hidden),
    }


def rectok(
    width: int = 768,
    layers: int = 12,
    channels: int = 128,
    tokens: int = 256,
    patch: int = 16,
    semantic: dict[str, int] | None = None,
    semantic_width: int = 192,
    semantic_layers: int = 3,
) -> Shapes:
    """`semantic`: teacher -> width of its features, of the decoders that a stage-1 file holds."""
    trunk = {
        "positional_embedding": (1, tokens, width),
        **norm("ln_pre", width, False),
        **norm("ln_post", width, False),
        **stack("transformer", layers, swiglu_block(width)),
    }
    encoder = {**trunk, **conv("patch_embed.0", width, 3, patch), **linear("latent_head", 2 * channels, width)}
    decoder = {
        **trunk,
        "mask_token": (1, 1, width),
        **linear("decoder_embed", width, channels),
        **conv("ffn.1", 3 * patch * patch, width, 1),
        **conv("conv_out", 3, 3, 3),
    }
    shapes = {**under("encoder", encoder), **under("decoder", decoder)}
    for teacher, features in (semantic or {}).items():
        inner = {
            "positional_embedding": (1, tokens, semantic_width),
            "mask_embedding": (1, 1, semantic_width),
            **linear("token_embedding", semantic_width, channels),
            **norm("ln_pre", semantic_width, False),
            **stack("transformer", semantic_layers, swiglu_block(semantic_width)),
            **norm("ln_post", semantic_width, False),
            **linear("out", features, semantic_width),
        }
        shapes |= under(f"sem_decoders.{teacher}", inner)
    return shapes


# ---------------------------------------------------------------------------------------------------------------------
# FQGAN
# ---------------------------------------------------------------------------------------------------------------------
def _clip_block(width: int) -> Shapes:
    return {
        **norm("ln_1", width),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        **linear("attn.out_proj", width, width),
        **norm("ln_2", width),
        **linear("mlp.c_fc", 4 * width, width),
        **linear("mlp.c_proj", width, 4 * width),
    }


def _taming_residual(channels: int, out: int) -> Shapes:
    return {
        **norm("norm1", channels),
        **conv("conv1", out, channels, 3),
        **norm("norm2", out),
        **conv("conv2", out, out, 3),
        **(conv("nin_shortcut", out, channels, 1) if channels != out else {}),
    }


def _taming_attention(width: int) -> Shapes:
    return {
        **norm("norm", width),
        **{k: v for n in ("q", "k", "v", "proj_out") for k, v in conv(n, width, width, 1).items()},
    }


def _taming_half(levels: list[tuple[int, int]], blocks: int, attention_at: int, resize: str) -> Shapes:
    """Levels of an encoder or decoder, (channels in, channels out) each; all but the last end with `resize`."""
    shapes: Shapes = {}
    for i, (channels, out) in enumerate(levels):
        for j in range(blocks):
            shapes |= under(f"conv_blocks.{i}.res.{j}", _taming_residual(channels if j == 0 else out, out))
            if i == attention_at:
                shapes |= under(f"conv_blocks.{i}.attn.{j}", _taming_attention(out))
        if i < len(levels) - 1:
            shapes |= conv(f"conv_blocks.{i}.{resize}.conv", out, out, 3)
    return shapes


def fqgan(
    mult: tuple[int, ...] = (1, 1, 2, 2, 4),
    branches: dict[str, tuple[str, str | None, int]] | None = None,
    channels: int = 128,
    blocks: int = 2,
    z_channels: int = 256,
    vocab: int = 16384,
    code_dim: int = 8,
    tokens: int = 256,
    adapter_layers: int = 6,
    predictor_layers: int = 3,
    usage: int = 65536,
) -> Shapes:
    """`branches`: sub-codebook -> (adapter, feature head or None, width of that teacher)."""
    branches = branches or FQGAN_DUAL
    widths = [channels * m for m in mult]
    top = widths[-1]
    mid = {
        **under("mid.0", _taming_residual(top, top)),
        **under("mid.1", _taming_attention(top)),
        **under("mid.2", _taming_residual(top, top)),
    }
    down = list(zip([channels, *widths], widths))
    up = list(zip([top, *widths[::-1]], widths[::-1]))
    encoder = {**conv("conv_in", channels, 3, 3), **_taming_half(down, blocks, len(mult) - 1, "downsample"), **mid}
    shapes: Shapes = {}
    for name, (adapter, head, teacher) in branches.items():
        inner = {
            "positional_embedding": (tokens, top),
            **norm("ln_pre", top),
            **norm("ln_post", top),
            **stack("transformer", adapter_layers, _clip_block(top)),
        }
        encoder |= {
            **under(f"{adapter}.0", inner),
            **norm(f"norm_out_{name}", top),
            **conv(f"conv_out_{name}", z_channels, top, 3),
        }
        shapes |= {
            f"quantize_{name}.codebook_used": (usage,),
            f"quantize_{name}.embedding.weight": (vocab, code_dim),
            **conv(f"quant_conv_{name}", code_dim, z_channels, 1),
        }
        if head:
            shapes |= under(
                head,
                {
                    "class_embedding": (1, teacher),
                    "positional_embedding": (tokens + 1, teacher),
                    **linear("upscale.0", teacher, code_dim),
                    **linear("upscale.2", teacher, teacher),
                    **norm("ln_pre", teacher),
                    **stack("transformer", predictor_layers, _clip_block(teacher)),
                    **norm("ln_post", teacher),
                },
            )
    decoder = {
        **conv("conv_in", top, z_channels, 3),
        **mid,
        **_taming_half(up, blocks + 1, 0, "upsample"),
        **norm("norm_out", channels),
        **conv("conv_out", 3, channels, 3),
    }
    return {
        **under("encoder", encoder),
        **shapes,
        **conv("post_quant_conv", z_channels, code_dim * len(branches), 1),
        **under("decoder", decoder),
    }


FQGAN_DUAL = {"vis": ("visual_head", None, 0), "sem": ("semantic_head", "feat_pred_head", 1024)}
FQGAN_TRIPLE = {
    "vis": ("visual_head", None, 0),
    "sem_mid": ("semantic_head_mid", "mid_sem_feat_pred", 384),
    "sem_high": ("semantic_head_high", "high_sem_feat_pred", 768),
}


# ---------------------------------------------------------------------------------------------------------------------
# MaskGIT-VQGAN, VQGAN+, TiTok
# ---------------------------------------------------------------------------------------------------------------------
def _maskgit_residual(channels: int, out: int) -> Shapes:
    """The shortcut of a block that changes width is (out, out): the original's fault, and in all released files."""
    return {
        **norm("norm1", channels),
        **conv("conv1", out, channels, 3, False),
        **norm("norm2", out),
        **conv("conv2", out, out, 3, False),
        **(conv("nin_shortcut", out, out, 1, False) if channels != out else {}),
    }


def _maskgit_decoder(channels: int, mult: tuple[int, ...], blocks: int, code_dim: int, plus: bool) -> Shapes:
    widths = [channels * m for m in mult]
    top, count = widths[-1], len(widths)
    mid, level = ("mid.res_blocks", "res_blocks") if plus else ("mid", "block")
    shapes = {
        **conv("conv_in", top, code_dim, 3),
        **stack(mid, blocks, _maskgit_residual(top, top)),
        **norm("norm_out", channels),
        **conv("conv_out", 3, channels, 3),
    }
    before = top
    for place, out in enumerate(widths[::-1]):
        number = place if plus else count - 1 - place  # VQGAN+ numbers from the coarsest level, MaskGIT from the finest
        for j in range(blocks):
            shapes |= under(f"up.{number}.{level}.{j}", _maskgit_residual(before if j == 0 else out, out))
        if place < count - 1:
            shapes |= conv(f"up.{number}.upsample_conv", out, out, 3)
        before = out
    return shapes


def maskgit(
    channels: int = 128,
    mult: tuple[int, ...] = (1, 1, 2, 2, 4),
    blocks: int = 2,
    vocab: int = 1024,
    code_dim: int = 256,
    plus: bool = False,
) -> Shapes:
    """MaskGIT-VQGAN, or VQGAN+ with `plus`."""
    widths = [channels * m for m in mult]
    mid, level = ("mid.res_blocks", "res_blocks") if plus else ("mid", "block")
    encoder = {
        **conv("conv_in", channels, 3, 3, False),
        **stack(mid, blocks, _maskgit_residual(widths[-1], widths[-1])),
        **norm("norm_out", widths[-1]),
        **conv("conv_out", code_dim, widths[-1], 1),
    }
    for i, (before, out) in enumerate(zip([channels, *widths], widths)):
        for j in range(blocks):
            encoder |= under(f"down.{i}.{level}.{j}", _maskgit_residual(before if j == 0 else out, out))
        if plus and i < len(widths) - 1:
            encoder |= conv(f"down.{i}.down_conv", out, out, 3)
    return {
        **under("encoder", encoder),
        **under("decoder", _maskgit_decoder(channels, mult, blocks, code_dim, plus)),
        "quantize.embedding.weight": (vocab, code_dim),
    }


def titok(
    width: int = 512,
    layers: int = 8,
    latents: int = 128,
    vocab: int = 4096,
    code_dim: int = 12,
    tokens: int = 256,
    patch: int = 16,
    channels: int = 128,
    mult: tuple[int, ...] = (1, 1, 2, 2, 4),
    proxy: int = 1024,
    proxy_dim: int = 256,
    decoder_size: tuple[int, int] | None = None,
) -> Shapes:
    """The legacy layout (l32, b64, s128): the decoder predicts proxy codes that MaskGIT-VQGAN's decoder paints.

    With the width and layers of another decoder the later one (bl64, bl128, sl256), which paints itself.
    """

    def half(width: int, layers: int) -> Shapes:
        return {
            "class_embedding": (1, width),
            "positional_embedding": (tokens + 1, width),
            **norm("ln_pre", width),
            "latent_token_positional_embedding": (latents, width),
            **norm("ln_post", width),
            **stack("transformer", layers, _clip_block(width)),
        }

    encoder = {**half(width, layers), **conv("patch_embed", width, 3, patch), **conv("conv_out", code_dim, width, 1)}
    out, depth = decoder_size or (width, layers)
    decoder = {**half(out, depth), "mask_token": (1, 1, out), **linear("decoder_embed", out, code_dim)}
    shapes = {
        "latent_tokens": (latents, width),
        **under("encoder", encoder),
        "quantize.embedding.weight": (vocab, code_dim),
    }
    if decoder_size:
        painter = {**conv("ffn.0", 3 * patch * patch, out, 1), **conv("conv_out", 3, 3, 3)}
        return {**shapes, **under("decoder", {**decoder, **painter})}
    decoder |= {**conv("ffn.0", 2 * width, width, 1), **conv("ffn.2", proxy, 2 * width, 1)}
    return {
        **shapes,
        **under("decoder", decoder),
        "pixel_quantize.embedding.weight": (proxy, proxy_dim),
        **under("pixel_decoder", _maskgit_decoder(channels, mult, 2, proxy_dim, False)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# D-AR
# ---------------------------------------------------------------------------------------------------------------------
def _dar_attention(width: int, head: int = 64) -> Shapes:
    return {k: v for n in ("q", "k", "v", "proj") for k, v in linear(n, width, width).items()} | {
        **norm("q_norm", head),
        **norm("k_norm", head),
    }


def _dar_mlp(width: int) -> Shapes:
    return {**linear("mlp.fc1", 4 * width, width), **linear("mlp.fc2", width, 4 * width)}


def dar(
    width: int = 768,
    layers: int = 8,
    condition_width: int = 768,
    condition_layers: int = 8,
    patch: int = 16,
    vocab: int = 16384,
    code_dim: int = 8,
    usage: int = 65536,
    decoder_width: int = 768,
    decoder_depth: int = 12,
    decoder_patch: int = 8,
    head: int = 64,
    teacher: int = 768,
    feature_hidden: int = 2048,
    rows: int = 1024,
) -> Shapes:
    def block(size: int) -> Shapes:
        return {
            "gate1": (size,),
            "gate2": (size,),
            **under("attention", _dar_attention(size, head)),
            **_dar_mlp(size),
            **norm("norm1", size),
            **norm("norm2", size),
        }

    inner = decoder_width
    diffusion = {
        **under("attention", _dar_attention(inner, head)),
        **under("cross_attn", _dar_attention(inner, head)),
        **_dar_mlp(inner),
        **linear("adaLN_modulation.1", 6 * inner, inner),
        **{
            k: v
            for n in ("time_embed.mlp.0", "time_embed.mlp.2", "cond_embed.0", "cond_embed.2")
            for k, v in linear(n, inner, inner).items()
        },
    }
    pixels = 3 * decoder_patch**2
    net = {
        **linear("cond_mlp", inner, condition_width),
        **conv("conv_in", inner, pixels, 1),
        **conv("conv_out", pixels, inner, 1),
        **stack("blocks", decoder_depth, diffusion),
        **linear("repa_out.0", feature_hidden, inner),
        **linear("repa_out.2", feature_hidden, feature_hidden),
        **linear("repa_out.4", teacher, feature_hidden),
    }
    return {
        **stack("encoder_layers", layers, block(width)),
        **stack("decoder_layers", condition_layers, block(condition_width)),
        **conv("patchify", width, 3, patch),
        **conv("quant_in_conv", code_dim, width, 1, False),
        **conv("quant_out_conv", condition_width, code_dim, 1, False),
        "quantize.codebook_used": (usage,),
        "quantize.embedding.weight": (vocab, code_dim),
        "query_embedding.weight": (rows, code_dim),
        **linear("query_linear", width, code_dim),
        "decoder_embedding.weight": (rows, condition_width),
        **under("diff_decoder.net", net),
    }


# ---------------------------------------------------------------------------------------------------------------------
# ImageFolder, and the vision transformers of timm
# ---------------------------------------------------------------------------------------------------------------------
def timm_vit(
    width: int = 768,
    layers: int = 12,
    grid: int | None = 16,
    patch: int = 16,
    layer_scale: bool = True,
    pre_norm: bool = False,
    patch_embed: bool = True,
    hidden: int | None = None,
) -> Shapes:
    """DINO, DINOv2 (layer_scale) and CLIP (pre_norm, no bias in the patch embedding)."""
    hidden = hidden or 4 * width
    scale = {"ls1.gamma": (width,), "ls2.gamma": (width,)} if layer_scale else {}
    block = {
        **norm("norm1", width),
        **linear("attn.qkv", 3 * width, width),
        **linear("attn.proj", width, width),
        **scale,
        **norm("norm2", width),
        **linear("mlp.fc1", hidden, width),
        **linear("mlp.fc2", width, hidden),
    }
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        **(conv("patch_embed.proj", width, 3, patch, not pre_norm) if patch_embed else {}),
        **(norm("norm_pre", width) if pre_norm else {}),
        **stack("blocks", layers, block),
        **norm("norm", width),
    }


def imagefolder(
    width: int = 768,
    layers: int = 12,
    grid: int = 16,
    patch: int = 16,
    side: int = 11,
    branches: int = 2,
    scales: int = 10,
    vocab: int = 4096,
    code_dim: int = 32,
    phis: int = 4,
    teacher: int = 768,
    teacher_layers: int = 12,
    quantizer: str = "residual",
) -> Shapes:
    """ImageFolder's; with quantizer "plain" (one scale: `side` is 16) or "binary" (bits: `code_dim`) XQ-GAN's."""
    tokens, latents = grid * grid + 1, side * side
    encoder = {
        "latent_tokens": (1, branches * latents, width),
        "lvl1LC": (1, tokens + branches * latents),
        **under("model", timm_vit(width, layers, grid, patch)),
        "lvl_embed.weight": (1 + branches, width),
    }
    decoder = {
        "mask_token": (1, 1, width),
        "lvl1LC": (1, tokens + latents + 1),
        **under("model", timm_vit(width, layers, grid, patch, patch_embed=False)),
        "lvl_embed.weight": (2, width),
        **linear("to_pixel.model", 3 * patch * patch, width),
    }
    shapes = {
        **under("encoder", encoder),
        **under("decoder", decoder),
        **conv("quant_conv", code_dim, width, 1),
        **conv("post_quant_conv", width, code_dim * branches, 1),
        **under("semantic_model", timm_vit(teacher, teacher_layers, grid, patch)),
    }
    for i in range(branches):
        name = "quantize" if branches == 1 else f"quantizes.{i}"
        shapes[f"{name}.ema_vocab_hit_SV"] = (vocab,) if quantizer == "plain" else (scales, vocab)
        if quantizer == "binary":
            shapes[f"{name}.scaler"] = (scales,)
        else:
            shapes[f"{name}.embedding.weight"] = (vocab, code_dim)
        for p in range(phis) if quantizer != "plain" else ():
            shapes |= conv(f"{name}.quant_resi.qresi_ls.{p}", code_dim, code_dim, 3)
    return shapes
