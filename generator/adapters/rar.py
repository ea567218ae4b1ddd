"""Released RAR and reAR files -> our state dict and back. Names agree except for reAR's two training-only MLPs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from core.errors import UserError
from core.weights.adapter import BARE, Adapter, Facts, layer_count
from core.weights.names import Names, Renames, State
from generator.ar.rar import EXTRA_POSITIONS, EXTRA_SLOTS, RAR, SIZES, Size

RENAMES = Renames(("^encode_align_mlp.", "^alignment.encode."), ("^decode_align_mlp.", "^alignment.decode."))


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    vocab, width = state["lm_head.weight"].shape
    length, slots = state["pos_embed"].shape[1] - EXTRA_POSITIONS, state["timesteps_embeddings"].shape[1] - EXTRA_SLOTS
    size = Size(
        width,
        layer_count(state, "blocks."),
        width // state["blocks.0.attn.q_norm.weight"].shape[0],
        state["blocks.0.mlp.fc1.weight"].shape[0],
    )
    settings = {
        "size": next((name for name, known in SIZES.items() if known == size), asdict(size)),
        "length": length,
        "vocab": vocab,
        "num_classes": state["embeddings.weight"].shape[0] - vocab - 2,
    }
    if slots != length:
        raise UserError(f"pos_embed has rows for {length} codes, timesteps_embeddings for {slots}")
    heads = {part: f"{part}_align_mlp." for part in ("encode", "decode") if f"{part}_align_mlp.0.weight" in state}
    if heads:
        prefix = next(iter(heads.values()))
        rear = {"projection": state[prefix + "0.weight"].shape[0]}
        settings |= {
            "code_dim": state[prefix + "4.weight"].shape[0],
            "rear": rear | {f"{part}_layer": None for part in ("encode", "decode") if part not in heads},
        }
    return settings


def _restore(model: RAR) -> State:
    if model.spare_rows != EXTRA_POSITIONS:
        raise UserError(
            f"the official RAR code has {EXTRA_POSITIONS} spare rows of positions; a model with "
            f"generator.spare_rows={model.spare_rows} cannot be exported to its layout"
        )
    return RENAMES.official(model.state_dict())


ADAPTER = Adapter(
    title="the RAR generator",
    build=RAR,
    inspect=_inspect,
    names=Names(
        markers=("target_aware_pos_embed", "timesteps_embeddings", "adaln_before_head.*", "blocks.*.attn.q_norm.*"),
        optional=("alignment.encode.*", "alignment.decode.*"),
    ),
    container=BARE,
    rename=RENAMES.ours,
    restore=_restore,
)
