"""FAR files as the official trainer saves them -> our state dict and back.

reAR's training-only MLPs, which no official FAR has, are left out of exports and keep their initial weights on loading.
"""

from __future__ import annotations

from typing import Any

from core.weights.adapter import Adapter, Container, Facts, layer_count
from core.weights.names import Names, Renames, State
from generator.adapters.llama import FUSED, PAIRS, TRAINING_ONLY, decoder_size, official
from generator.ar.far import FAR, SIZES

RENAMES = Renames(*PAIRS, fused=FUSED)


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    """Length and grid are in no tensor: they follow the tokenizer. The number of heads is in none either: SIZES tells it
    for the published models, which other ones have to say."""
    vocab, width = state["output_1.weight"].shape
    return {
        "size": decoder_size(state, width, facts, SIZES),
        "branches": layer_count(state, "output_"),
        "vocab": vocab,
        "num_classes": len(state["cls_embedding.embedding_table.weight"]) - 1,
    }


ADAPTER = Adapter(
    title="the FAR generator",
    build=FAR,
    inspect=_inspect,
    names=Names(
        markers=("tok_embeddings_1.*", "output_1.*", "ar_head.*.attention.wqkv.*", "aggregation_layer.*"),
        optional=TRAINING_ONLY,
    ),
    container=Container(written=("model", "ema")),
    rename=RENAMES.ours,
    restore=lambda model: official(model.state_dict(), RENAMES),
)
