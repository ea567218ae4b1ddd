"""FAR files as the official trainer saves them -> our state dict and back.

reAR's training-only MLPs, which no official FAR has, are left out of exports and keep their initial weights on loading.
"""

from __future__ import annotations

from typing import Any

from core.errors import UserError
from core.weights.adapter import Adapter, Facts, State, layer_count
from generator.adapters.llama import TRAINING_ONLY, decoder_size, to_ours, to_theirs
from generator.ar.far import FAR, SIZES


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    """Length and grid are in no tensor: they follow the tokenizer. The number of heads is in none either: SIZES tells it
    for the published models, which other ones have to say."""
    try:
        branches = layer_count(state, "output_")
        vocab, width = state["tok_embeddings_1.weight"].shape
        classes = state["cls_embedding.embedding_table.weight"].shape[0] - 1
        size = decoder_size(state, width, facts, SIZES)
    except (KeyError, ValueError) as error:
        raise UserError(f"these are not the weights of a FAR generator: {error.args[0]} is missing") from error
    if branches == 0:
        raise UserError("these are not the weights of a FAR generator: output_1.weight is missing")
    return {"size": size, "branches": branches, "vocab": vocab, "num_classes": classes}


ADAPTER = Adapter(
    title="the FAR generator",
    build=FAR,
    inspect=_inspect,
    rename=to_ours,
    fit=lambda state, model: state,
    restore=lambda model: to_theirs(model.state_dict()),
    markers=("tok_embeddings_1.*", "output_1.*", "ar_head.*.attention.wqkv.*", "aggregation_layer.*"),
    optional=TRAINING_ONLY,
    container=("model", "ema"),
)
