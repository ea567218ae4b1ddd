"""Released RecTok files -> our state dict and back."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from core.nn.embed import resize_positions
from core.weights.adapter import Adapter, Facts, layer_count, transformer_size
from core.weights.names import Names, State
from tokenizer.continuous.rectok import SIZES, RecTok

SEMANTIC = "sem_decoders."


def _fit(state: State, model: nn.Module) -> State:
    """Resize learned positions to this model's grid. Semantic decoders, which only training needs, are dropped where the
    model is built without that teacher, and are the model's own where the file has none for it."""
    theirs, ours = ({n: v for n, v in s.items() if n.startswith(SEMANTIC)} for s in (state, model.state_dict()))
    unknown, begun = _teachers(theirs) - _teachers(ours), _teachers(ours) - _teachers(theirs)
    state = {name: value for name, value in state.items() if name not in theirs or _teacher(name) not in unknown}
    state |= {name: value for name, value in ours.items() if _teacher(name) in begun}

    def resizable(name: str, value: Tensor) -> bool:
        length = value.shape[1] if name.endswith("positional_embedding") and value.ndim == 3 else 0
        return length not in (0, model.spec.length) and math.isqrt(length) ** 2 == length

    return {
        name: resize_positions(value, model.spec.grid) if resizable(name, value) else value
        for name, value in state.items()
    }


def _teacher(name: str) -> str:
    return name.split(".")[1]


def _teachers(state: State) -> set[str]:
    return {_teacher(name) for name in state if name.startswith(SEMANTIC)}


def _size(state: State, prefix: str, facts: Facts, key: str) -> str | dict[str, int]:
    """The official table has one number of heads for each width; another width has to say its own."""
    width, layers = state[prefix + "positional_embedding"].shape[-1], layer_count(state, prefix + "transformer.")
    heads = {size.width: size.heads for size in SIZES.values()}.get(width)
    return transformer_size(SIZES, width, layers, facts, f"tokenizer.{key}", prefix.rstrip("."), heads)


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    patch_size = state["encoder.patch_embed.0.weight"].shape[-1]
    length = state["encoder.positional_embedding"].shape[1]
    channels = state["decoder.decoder_embed.weight"].shape[1]
    settings = {
        "image_size": math.isqrt(length) * patch_size,
        "patch_size": patch_size,
        "channels": channels,
        "encoder": _size(state, "encoder.", facts, "encoder"),
        "decoder": _size(state, "decoder.", facts, "decoder"),
    }
    if any(".attn.q_norm." in name for name in state):
        settings["qk_norm"] = True
    if teachers := sorted(_teachers(state)):
        first = f"{SEMANTIC}{teachers[0]}."
        mlp = first + "mlp.2.weight" in state
        head = "mlp.2.weight" if mlp else "out.weight"
        semantic = {
            "teachers": {name: state[f"{SEMANTIC}{name}.{head}"].shape[0] for name in teachers},
            "decoder": "mlp" if mlp else "transformer",
        }
        settings["semantic"] = semantic
        if mlp:
            settings["mask_ratio"] = 0.0
        else:
            semantic["size"] = _size(state, first, facts, "semantic.size")
    return settings


ADAPTER = Adapter(
    title="the RecTok tokenizer",
    build=RecTok,
    inspect=_inspect,
    names=Names(  # ours are the official ones
        markers=("encoder.patch_embed.0.*", "encoder.latent_head.*", "decoder.decoder_embed.*", "decoder.conv_out.*"),
        aliases={"aux_": "sem_"},  # old files call the semantic decoders auxiliary
    ),
    fit=_fit,
)
