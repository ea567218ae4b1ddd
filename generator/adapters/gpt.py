"""LlamaGen's GPT files (D-AR-L-360K.pt and its like) -> our state dict and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from core.state_dicts import Adapter, State, layer_count
from generator.adapters.llama import TRAINING_ONLY, to_ours, to_theirs
from generator.ar.far import Size
from generator.ar.gpt import GPT, SIZES
from generator.ar.llama import ffn_width

# FAR numbers its codebooks; here there is one.
_NAMES = {"tok_embeddings.weight": "tok_embeddings_1.weight", "output.weight": "output_1.weight"}
_BACK = {ours: theirs for theirs, ours in _NAMES.items()}


def _inspect(state: State) -> dict[str, Any]:
    """The length is in no tensor: it follows the tokenizer. Heads have 64 channels unless a published size says else."""
    vocab, width = state["tok_embeddings.weight"].shape
    layers, hidden = layer_count(state, "layers."), state["layers.0.feed_forward.w1.weight"].shape[0]
    settings = {"vocab": vocab, "num_classes": state["cls_embedding.embedding_table.weight"].shape[0] - 1}
    rows = state["layers.0.attention.wqkv.weight"].shape[0]
    for name, size in SIZES.items():
        if (size.width, size.layers, ffn_width(size.width), 3 * size.width) == (width, layers, hidden, rows):
            return {"size": name, **settings}
    heads = max(1, width // 64)
    size = Size(width, layers, heads, 0, hidden, (rows - width) // 2 * heads // width)
    return {"size": asdict(size), **settings}


def official_names(state: State) -> State:
    return {_BACK.get(name, name): value for name, value in to_theirs(state).items()}


ADAPTER = Adapter(
    title="the LlamaGen generator of D-AR",
    build=GPT,
    inspect=_inspect,
    markers=("tok_embeddings.weight", "cls_embedding.embedding_table.weight", "output.weight"),
    container=None,
    optional=TRAINING_ONLY,
    rename=lambda state: to_ours({_NAMES.get(name, name): value for name, value in state.items()}),
    fit=lambda state, model: state,
    restore=lambda model: official_names(model.state_dict()),
)
