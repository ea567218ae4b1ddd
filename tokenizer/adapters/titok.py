"""Released TiTok files -> our state dict and back."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from core.nn.transformer import rename_block
from core.weights.adapter import BARE, Adapter, Facts, Names, State, layer_count
from tokenizer.adapters.maskgit import USAGE, ask_groups, halves, maskgit_name, published_maskgit_name
from tokenizer.vq.titok import SIZES, TiTok

_PIXEL = "pixel_"  # pixel_decoder.* is a MaskGIT decoder with a prefix


def _rename(state: State) -> State:
    levels = layer_count(state, "pixel_decoder.up.")
    renamed = {}
    for name, value in state.items():
        if name.startswith("pixel_decoder."):
            name = maskgit_name(name, levels, _PIXEL)
        else:
            name = rename_block(name).replace("pixel_quantize.embedding.", "pixel_codebook.")
            name = name.removeprefix("decoder.") if name.startswith("decoder.conv_out.") else name
            name = name.replace("quantize.", "quantizer.") if name.startswith("quantize.") else name
        renamed[name] = value
    return renamed


def _restore(model: nn.Module) -> State:
    levels = len(model.pixel_decoder.levels) if model.pixel_decoder is not None else 0
    restored = {}
    for name, value in model.state_dict().items():
        if name == USAGE:
            continue
        if name.startswith("pixel_decoder."):
            name = published_maskgit_name(name, levels, _PIXEL)
        else:
            name = rename_block(name, back=True).replace("pixel_codebook.", "pixel_quantize.embedding.")
            name = name.replace("quantizer.", "quantize.") if name.startswith("quantizer.") else name
            name = f"decoder.{name}" if name.startswith("conv_out.") else name
        restored[name] = value
    return restored


# (legacy, codes, their width) of the released models -> whether their codes are unit vectors, a switch of its own.
_UNIT_VECTORS = {(True, 4096, 12): True, (False, 8192, 64): False}


def _size(state: State, half: str, facts: Facts) -> str | dict[str, int]:
    """All three official sizes have 64 channels per head; other widths have to say how many heads they have."""
    width, layers = state[f"{half}.positional_embedding"].shape[1], layer_count(state, f"{half}.transformer.")
    for name, size in SIZES.items():
        if (size.width, size.layers) == (width, layers):
            return name
    return {
        "width": width,
        "layers": layers,
        "heads": facts.ask(
            f"tokenizer.{half}.heads",
            f"the number of attention heads of the {half}",
            1,
            width // 64 if width % 64 == 0 else None,
        ),
    }


def pixel_halves(state: State) -> dict[str, Any]:
    """Settings of the MaskGIT decoder in a published legacy file."""
    return halves(_rename(state), "none.", "pixel_decoder.")


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    state = _rename(state)
    patch_size = state["encoder.patch_embed.weight"].shape[-1]
    vocab, dim = state["quantizer.embedding.weight"].shape
    seen, painted = (math.isqrt(state[f"{half}.positional_embedding"].shape[0] - 1) for half in ("encoder", "decoder"))
    legacy = "decoder.ffn.2.weight" in state
    known = _UNIT_VECTORS.get((legacy, vocab, dim))
    said = facts.said("use_l2_norm")
    settings = {
        "image_size": seen * patch_size,
        "patch_size": patch_size,
        "encoder": _size(state, "encoder", facts),
        "decoder": _size(state, "decoder", facts),
        "latents": state["latent_tokens"].shape[0],
        "vocab": vocab,
        "code_dim": dim,
        "normalise": bool(
            facts.ask(
                "tokenizer.normalise",
                "whether codes are unit vectors (use_l2_norm)",
                False,
                known if said is None else said,
            )
        ),
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
