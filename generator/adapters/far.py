"""FAR files as the official trainer saves them -> our state dict and back.

reAR's training-only MLPs, which no official FAR has, are left out of exports and keep their initial weights on loading.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from core.errors import UserError
from core.state_dicts import Adapter, State, layer_count
from generator.adapters.llama import NOT_WEIGHTS, TRAINING_ONLY, to_ours, to_theirs
from generator.ar.far import FAR, SIZES, Size
from generator.ar.llama import ffn_width

HEAD_DIM = 64  # of both published sizes; shapes alone do not tell


def _inspect(state: State) -> dict[str, Any]:
    """Length and grid are in no tensor: they follow the tokenizer."""
    try:
        branches = layer_count(state, "output_")
        vocab, width = state["tok_embeddings_1.weight"].shape
        classes = state["cls_embedding.embedding_table.weight"].shape[0] - 1
        heads = width // HEAD_DIM
        rows = state["layers.0.attention.wqkv.weight"].shape[0]
        kv_heads = (rows - width) // 2 * heads // width
        size = Size(width, layer_count(state, "layers."), heads, layer_count(state, "ar_head."),
                    state["layers.0.feed_forward.w1.weight"].shape[0], kv_heads)
    except (KeyError, ValueError) as error:
        raise UserError(f"these are not the weights of a FAR generator: {error.args[0]} is missing") from error
    if branches == 0 or width % HEAD_DIM:
        raise UserError("these are not the weights of a FAR generator: output_1.weight is missing" if not branches else
                        f"the number of attention heads does not follow from a width of {width}; give generator.size")
    for name, known in SIZES.items():
        if size == Size(**{**asdict(known), "hidden": ffn_width(known.width), "kv_heads": known.heads}):
            return {"size": name, "branches": branches, "vocab": vocab, "num_classes": classes}
    return {"size": asdict(size), "branches": branches, "vocab": vocab, "num_classes": classes}


ADAPTER = Adapter(
    title="the FAR generator",
    build=FAR,
    inspect=_inspect,
    rename=to_ours,
    fit=lambda state, model: state,
    restore=lambda model: to_theirs(model.state_dict()),
    markers=("tok_embeddings_1.*", "output_1.*", "ar_head.*.attention.wqkv.*", "aggregation_layer.*"),
    ignored=NOT_WEIGHTS,
    optional=TRAINING_ONLY,
    container=("model", "ema"),
)
