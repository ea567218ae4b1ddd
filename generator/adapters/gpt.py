"""LlamaGen's GPT files (D-AR-L-360K.pt and its like) -> our state dict and back."""

from __future__ import annotations

from typing import Any

from core.errors import UserError
from core.weights.adapter import BARE, Adapter, Facts
from core.weights.names import Names, Renames, State
from generator.adapters.llama import FUSED, PAIRS, TRAINING_ONLY, decoder_size, official
from generator.ar.gpt import GPT, SIZES

RENAMES = Renames(
    ("^tok_embeddings.", "^tok_embeddings_1."),  # FAR numbers its codebooks; here there is one
    ("^output.", "^output_1."),
    *PAIRS,
    fused=FUSED,
)


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    """The length is in no tensor: it follows the tokenizer."""
    vocab, width = state["tok_embeddings.weight"].shape
    return {
        "size": decoder_size(state, width, facts, SIZES),
        "vocab": vocab,
        "num_classes": state["cls_embedding.embedding_table.weight"].shape[0] - 1,
    }


def _restore(model: GPT) -> State:
    if model.branches > 1:
        raise UserError(
            f"there is no official layout of a GPT of {model.branches} codebooks: LlamaGen's has one. Leave "
            "out --to official."
        )
    return official(model.state_dict(), RENAMES)


ADAPTER = Adapter(
    title="the LlamaGen generator of D-AR",
    build=GPT,
    inspect=_inspect,
    names=Names(
        markers=("tok_embeddings.weight", "cls_embedding.embedding_table.weight", "output.weight"),
        optional=TRAINING_ONLY,
    ),
    container=BARE,
    rename=RENAMES.ours,
    restore=_restore,
)
