"""Released TiTok files -> our state dict and back."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from core.nn.transformer import PUBLISHED_NAMES
from core.weights.adapter import BARE, Adapter, Facts, layer_count, transformer_size
from core.weights.names import Names, Renames, State
from tokenizer.adapters.maskgit import DECODER_NAMES, USAGE, ask_groups, halves, other_way, without_usage
from tokenizer.vq.titok import SIZES, TiTok

_LEVELS = "pixel_decoder.levels."
RENAMES = Renames(
    *PUBLISHED_NAMES,
    ("^pixel_decoder.up.{}.", "^pixel_decoder.levels.{}."),  # a MaskGIT decoder
    *DECODER_NAMES,
    ("^pixel_quantize.embedding.", "^pixel_codebook."),
    ("^decoder.conv_out.", "^conv_out."),
    ("^quantize.", "^quantizer."),
)


def _rename(state: State) -> State:
    return other_way(RENAMES.ours(state), _LEVELS)


def _restore(model: nn.Module) -> State:
    return RENAMES.official(other_way(without_usage(model), _LEVELS))


# (legacy, codes, their width) of the released models -> whether their codes are unit vectors, a switch of its own.
_UNIT_VECTORS = {(True, 4096, 12): True, (False, 8192, 64): False}


def _size(state: State, half: str, facts: Facts) -> str | dict[str, int]:
    """All three official sizes have 64 channels per head; widths that this does not divide have to say theirs."""
    width, layers = state[f"{half}.positional_embedding"].shape[1], layer_count(state, f"{half}.transformer.")
    heads = width // 64 if width % 64 == 0 else None
    return transformer_size(SIZES, width, layers, facts, f"tokenizer.{half}", f"the {half}", heads)


def pixel_halves(state: State) -> dict[str, Any]:
    """Settings of the MaskGIT decoder in a published legacy file."""
    return halves(_rename(state), "none.", "pixel_decoder.")


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    state = _rename(state)
    patch_size = state["encoder.patch_embed.weight"].shape[-1]
    vocab, dim = state["quantizer.embedding.weight"].shape
    seen, painted = (math.isqrt(state[f"{half}.positional_embedding"].shape[0] - 1) for half in ("encoder", "decoder"))
    legacy = "decoder.ffn.2.weight" in state
    unit_vectors = facts.ask(
        "tokenizer.normalise",
        "whether codes are unit vectors (use_l2_norm)",
        False,
        facts.said("use_l2_norm"),
        _UNIT_VECTORS.get((legacy, vocab, dim)),
    )
    settings = {
        "image_size": seen * patch_size,
        "patch_size": patch_size,
        "encoder": _size(state, "encoder", facts),
        "decoder": _size(state, "decoder", facts),
        "latents": state["latent_tokens"].shape[0],
        "vocab": vocab,
        "code_dim": dim,
        "normalise": bool(unit_vectors),
    }
    if painted != seen:
        settings["decoder_patch_size"] = seen * patch_size // max(1, painted)
    if legacy:
        settings |= {"legacy": True, "proxy": False}
        if "pixel_codebook.weight" in state:
            proxy = state["pixel_codebook.weight"].shape
            painter = halves(state, "none.", "pixel_decoder.")
            painter |= {
                k.rpartition(".")[2]: v for k, v in ask_groups(painter["channels"], facts, "proxy.groups").items()
            }
            settings["proxy"] = {**painter, "vocab": proxy[0], "code_dim": proxy[1]}
    return settings


ADAPTER = Adapter(
    title="TiTok",
    build=TiTok,
    inspect=_inspect,
    names=Names(
        markers=(
            "latent_tokens",
            "encoder.latent_token_positional_embedding",
            "decoder.latent_token_positional_embedding",
        ),
        optional=(USAGE,),
    ),
    container=BARE,
    rename=_rename,
    restore=_restore,
)
