"""LlamaGen's GPT files (D-AR-L-360K.pt and its like) -> our state dict and back."""

from __future__ import annotations

from typing import Any

from core.errors import UserError
from core.weights.adapter import BARE, Adapter, Facts, Names, State
from generator.adapters.llama import TRAINING_ONLY, decoder_size, to_ours, to_theirs
from generator.ar.gpt import GPT, SIZES

# FAR numbers its codebooks; here there is one.
_NAMES = {"tok_embeddings.weight": "tok_embeddings_1.weight", "output.weight": "output_1.weight"}
_BACK = {ours: theirs for theirs, ours in _NAMES.items()}


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    """The length is in no tensor: it follows the tokenizer."""
    vocab, width = state["tok_embeddings.weight"].shape
    return {
        "size": decoder_size(state, width, facts, SIZES),
        "vocab": vocab,
        "num_classes": state["cls_embedding.embedding_table.weight"].shape[0] - 1,
    }


def official_names(state: State) -> State:
    return {_BACK.get(name, name): value for name, value in to_theirs(state).items()}


def _restore(model: GPT) -> State:
    if model.branches > 1:
        raise UserError(
            f"there is no official layout of a GPT of {model.branches} codebooks: LlamaGen's has one. Leave "
            "out --to official."
        )
    return official_names(model.state_dict())


ADAPTER = Adapter(
    title="the LlamaGen generator of D-AR",
    build=GPT,
    inspect=_inspect,
    names=Names(
        markers=("tok_embeddings.weight", "cls_embedding.embedding_table.weight", "output.weight"),
        optional=TRAINING_ONLY,
    ),
    container=BARE,
    rename=lambda state: to_ours({_NAMES.get(name, name): value for name, value in state.items()}),
    restore=_restore,
)
