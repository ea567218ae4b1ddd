"""Released TiTok files -> our state dict and back."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from core.errors import UserError
from core.nn.transformer import rename_block
from core.state_dicts import Adapter, State, layer_count
from tokenizer.adapters.maskgit import USAGE, halves, maskgit_name, published_maskgit_name
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


def _size(state: State, half: str) -> str | dict[str, int]:
    width, layers = state[f"{half}.positional_embedding"].shape[1], layer_count(state, f"{half}.transformer.")
    for name, size in SIZES.items():
        if (size.width, size.layers) == (width, layers):
            return name
    if width % 64:
        raise UserError(f"{half}: the number of attention heads does not follow from these weights; "
                        f"give it as {{width: {width}, layers: {layers}, heads: ...}}")
    return {"width": width, "layers": layers, "heads": width // 64}


def pixel_halves(state: State) -> dict[str, Any]:
    """Settings of the MaskGIT decoder in a published legacy file."""
    return halves(_rename(state), "none.", "pixel_decoder.")


def _inspect(state: State) -> dict[str, Any]:
    state = _rename(state)
    patch_size = state["encoder.patch_embed.weight"].shape[-1]
    vocab, dim = state["quantizer.embedding.weight"].shape
    settings = {
        "image_size": math.isqrt(state["encoder.positional_embedding"].shape[0] - 1) * patch_size,
        "patch_size": patch_size, "encoder": _size(state, "encoder"), "decoder": _size(state, "decoder"),
        "latents": state["latent_tokens"].shape[0], "vocab": vocab, "code_dim": dim,
    }
    if "decoder.ffn.2.weight" in state:  # the released legacy models are the ones with unit vectors
        settings |= {"legacy": True, "normalise": True, "proxy": False}
        if "pixel_codebook.weight" in state:
            proxy = state["pixel_codebook.weight"].shape
            settings["proxy"] = {**halves(state, "none.", "pixel_decoder."), "vocab": proxy[0], "code_dim": proxy[1]}
    return settings


ADAPTER = Adapter(
    title="TiTok",
    build=TiTok,
    inspect=_inspect,
    rename=_rename,
    fit=lambda state, model: state,
    restore=_restore,
    markers=("latent_tokens", "encoder.latent_token_positional_embedding", "decoder.latent_token_positional_embedding"),
    optional=(USAGE,),
    container=None,
)
