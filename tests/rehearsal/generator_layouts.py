"""Names and shapes of released files of generators, as layouts.py has those of tokenizers."""

from __future__ import annotations

from tests.rehearsal.layouts import Shapes, conv, linear, norm, stack, swiglu_block, under


def dit_dh(
    width: int = 1152,
    layers: int = 28,
    heads: int = 16,
    head_width: int = 2048,
    head_layers: int = 2,
    head_heads: int = 16,
    channels: int = 128,
    tokens: int = 256,
    classes: int = 1000,
) -> Shapes:
    def block(size: int) -> Shapes:
        return {**swiglu_block(size), **linear("adaLN_modulation.1", 6 * size, size)}

    blocks = {
        f"blocks.{i}.{key}": shape
        for i in range(layers + head_layers)
        for key, shape in block(width if i < layers else head_width).items()
    }
    final = {
        **norm("norm_final", head_width, False),
        **linear("linear", channels, head_width),
        **linear("adaLN_modulation.1", 2 * head_width, head_width),
    }
    return {
        "pos_embed": (1, tokens, width),
        **conv("x_embedder.proj", head_width, channels, 1),
        **conv("s_embedder.proj", width, channels, 1),
        **linear("s_projector", head_width, width),
        "t_embedder.W": (256,),
        **linear("t_embedder.mlp.0", width, 512),
        **linear("t_embedder.mlp.2", width, width),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        **under("final_layer", final),
        **blocks,
        **{
            f"{part}_feat_rope.freqs_{kind}": (tokens, size)
            for part, size in (("enc", width // heads), ("dec", head_width // head_heads))
            for kind in ("cos", "sin")
        },
    }


ROPE_TABLES = tuple(f"{part}_feat_rope.freqs_{kind}" for part in ("enc", "dec") for kind in ("cos", "sin"))


def _llama_block(width: int, hidden: int) -> Shapes:
    return {
        **linear("attention.wqkv", 3 * width, width, False),
        **linear("attention.wo", width, width, False),
        **{
            f"feed_forward.w{n}.weight": shape
            for n, shape in ((1, (hidden, width)), (3, (hidden, width)), (2, (width, hidden)))
        },
        **norm("attention_norm", width, False),
        **norm("ffn_norm", width, False),
    }


def _llama_hidden(width: int) -> int:
    return -(-int(2 * 4 * width / 3) // 256) * 256


def far(
    width: int = 1024,
    layers: int = 24,
    head_layers: int = 3,
    branches: int = 2,
    vocab: int = 16384,
    classes: int = 1000,
) -> Shapes:
    block = _llama_block(width, _llama_hidden(width))
    shapes = {
        "cls_embedding.embedding_table.weight": (classes + 1, width),
        **norm("norm", width, False),
        **linear("aggregation_layer", width, branches * width),
        **stack("layers", layers, block),
        **stack("ar_head", head_layers, block),
    }
    for i in range(1, branches + 1):
        shapes |= {f"tok_embeddings_{i}.weight": (vocab, width), f"output_{i}.weight": (vocab, width)}
    return shapes


def gpt(width: int = 1024, layers: int = 24, vocab: int = 16384, classes: int = 1000) -> Shapes:
    return {
        "cls_embedding.embedding_table.weight": (classes + 1, width),
        "tok_embeddings.weight": (vocab, width),
        **stack("layers", layers, _llama_block(width, _llama_hidden(width))),
        **norm("norm", width, False),
        "output.weight": (vocab, width),
    }


def rar(
    width: int = 768,
    layers: int = 24,
    heads: int = 16,
    tokens: int = 256,
    vocab: int = 1024,
    hidden: int | None = None,
    classes: int = 1000,
    alignment: tuple[int, int] | None = None,
) -> Shapes:
    """RAR; with `alignment` (width of the MLPs, width of the tokenizer's codes) reAR."""
    hidden = hidden or 4 * width
    block = {
        **norm("norm1", width),
        **linear("attn.qkv", 3 * width, width),
        **norm("attn.q_norm", width // heads),
        **norm("attn.k_norm", width // heads),
        **linear("attn.proj", width, width),
        **norm("norm2", width),
        **linear("mlp.fc1", hidden, width),
        **linear("mlp.fc2", width, hidden),
        **linear("adaLN_modulation.1", 6 * width, width),
    }
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens + 1024, width),
        "target_aware_pos_embed": (1, tokens + 1024, width),
        "timesteps_embeddings": (1, tokens + 100, width),
        **stack("blocks", layers, block),
        "embeddings.weight": (vocab + 1 + classes + 1, width),
        **linear("adaln_before_head.adaLN_modulation.1", 2 * width, width),
        **linear("lm_head", vocab, width),
    }
    for name in ("encode_align_mlp", "decode_align_mlp") if alignment else ():
        inner, codes = alignment
        shapes |= {
            **linear(f"{name}.0", inner, width),
            **linear(f"{name}.2", inner, inner),
            **linear(f"{name}.4", codes, inner),
        }
    return shapes


def var(
    width: int = 1088,
    layers: int = 17,
    heads: int = 17,
    length: int = 286,
    scales: int = 10,
    branches: int = 2,
    vocab: int = 4096,
    code_dim: int = 32,
    classes: int = 1000,
) -> Shapes:
    block = {
        "attn.scale_mul_1H11": (1, heads, 1, 1),
        **{f"attn.{n}": (width,) for n in ("q_bias", "v_bias", "zero_k_bias")},
        **linear("attn.mat_qkv", 3 * width, width, False),
        **linear("attn.proj", width, width),
        **linear("ffn.fc1", 4 * width, width),
        **linear("ffn.fc2", width, 4 * width),
        **linear("ada_lin.1", 6 * width, width),
    }
    return {
        "pos_start": (1, 1, width),
        "pos_1LC": (1, length, width),
        "lvl_1L": (1, length),
        "attn_bias_for_masking": (1, 1, length, length),
        **linear("word_embed", width, branches * code_dim),
        "class_emb.weight": (classes + 1, width),
        "lvl_embed.weight": (scales, width),
        **stack("blocks", layers, block),
        **linear("head_nm.ada_lin.1", 2 * width, width),
        **linear("head", branches * vocab, width),
    }
