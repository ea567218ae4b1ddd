"""Released tokenizer files -> our state dicts and back; one adapter per registered tokenizer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from core.errors import UserError
from core.nn.embed import resize_positions
from core.state_dicts import Adapter, State, layer_count
from tokenizer.continuous.rectok import SIZES, RecTok, Size


# -- RecTok -----------------------------------------------------------------------------------------------------------
def _rectok_rename(state: State) -> State:
    """Our names are the official ones; old files call the semantic decoders auxiliary, some hold the frozen teacher."""
    renamed = {name.replace("aux_", "sem_"): value for name, value in state.items()}
    return {name: value for name, value in renamed.items() if not name.startswith("sem_foundation_models.")}


def _rectok_fit(state: State, model: nn.Module) -> State:
    """Drop semantic decoders that this model is built without; resize learned positions to its grid."""
    if not model.sem_decoders:
        state = {name: value for name, value in state.items() if not name.startswith("sem_decoders.")}
    length = model.spec.length
    return {name: resize_positions(value, model.spec.grid)
            if name.endswith("positional_embedding") and value.ndim == 3 and value.shape[1] != length else value
            for name, value in state.items()}


def _rectok_size(state: State, prefix: str) -> str | dict[str, int]:
    width = state[prefix + "positional_embedding"].shape[-1]
    layers = layer_count(state, prefix + "transformer.")
    for name, size in SIZES.items():
        if (size.width, size.layers) == (width, layers):
            return name
    known = {size.width: size.heads for size in SIZES.values()}
    if width not in known:
        raise UserError(f"{prefix.rstrip('.')}: the number of attention heads does not follow from these weights; "
                        f"give it as {{width: {width}, layers: {layers}, heads: ...}}")
    return dataclasses.asdict(Size(width, layers, known[width]))


def _rectok_inspect(state: State) -> dict[str, Any]:
    state = _rectok_rename(state)
    try:
        patch_size = state["encoder.patch_embed.0.weight"].shape[-1]
        length = state["encoder.positional_embedding"].shape[1]
        channels = state["decoder.decoder_embed.weight"].shape[1]
    except KeyError as error:
        raise UserError(f"these are not the weights of a RecTok tokenizer: {error.args[0]} is missing") from error
    settings = {"image_size": math.isqrt(length) * patch_size, "patch_size": patch_size, "channels": channels,
                "encoder": _rectok_size(state, "encoder."), "decoder": _rectok_size(state, "decoder.")}
    if any(".attn.q_norm." in name for name in state):
        settings["qk_norm"] = True
    teachers = sorted({name.split(".")[1] for name in state if name.startswith("sem_decoders.")})
    if teachers:
        first = f"sem_decoders.{teachers[0]}."
        mlp = first + "2.weight" in state
        head = "2.weight" if mlp else "out.weight"
        semantic = {"teachers": {name: state[f"sem_decoders.{name}.{head}"].shape[0] for name in teachers},
                    "decoder": "mlp" if mlp else "transformer"}
        settings["semantic"] = semantic
        if mlp:
            settings["mask_ratio"] = 0.0
        else:
            semantic["size"] = _rectok_size(state, first)
    return settings


ADAPTERS = {
    "rectok": Adapter(
        title="the RecTok tokenizer",
        build=RecTok,
        inspect=_rectok_inspect,
        rename=_rectok_rename,
        fit=_rectok_fit,
        restore=lambda model: model.state_dict(),
    ),
}
