"""Released DiT^DH files -> our state dict and back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from core.weights.adapter import Adapter, Container, Facts, layer_count
from core.weights.names import Names, State
from generator.dit.dit_dh import SIZES, DiTDH, Size

# Their RoPE tables are saved in "model" and absent from "model_ema"; ours are rebuilt, so they never need to be read.
_ROPE = {
    "enc_feat_rope.freqs_cos": "trunk_cos",
    "enc_feat_rope.freqs_sin": "trunk_sin",
    "dec_feat_rope.freqs_cos": "head_cos",
    "dec_feat_rope.freqs_sin": "head_sin",
}


def _restore(model: nn.Module) -> State:
    return {**model.state_dict(), **{theirs: getattr(model, ours) for theirs, ours in _ROPE.items()}}


def _size(state: State, facts: Facts) -> str | dict[str, int]:
    """The number of heads follows from the RoPE tables, or from the table of sizes."""
    widths = [state[f"blocks.{i}.norm1.weight"].shape[0] for i in range(layer_count(state, "blocks."))]
    head_width = state["x_embedder.proj.weight"].shape[0]
    trunk_width = state["s_embedder.proj.weight"].shape[0]
    # With equal widths the head cannot be told from the trunk by shape; the published one has two blocks.
    head_depth = widths.count(head_width) if head_width != trunk_width else 2
    shape = {
        "trunk_width": trunk_width,
        "trunk_depth": len(widths) - head_depth,
        "head_width": head_width,
        "head_depth": head_depth,
    }
    for name, size in SIZES.items():
        if all(getattr(size, key) == value for key, value in shape.items()):
            return name
    for part, table in (("trunk", "enc_feat_rope.freqs_cos"), ("head", "dec_feat_rope.freqs_cos")):
        shape[f"{part}_heads"] = (
            shape[f"{part}_width"] // state[table].shape[1]
            if table in state
            else facts.ask(f"generator.size.{part}_heads", f"the number of attention heads of the {part}", 1)
        )
    return dataclasses.asdict(Size(**shape))


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    settings = {
        "size": _size(state, facts),
        "channels": state["x_embedder.proj.weight"].shape[1],
        "grid": math.isqrt(state["pos_embed"].shape[1]),
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
    }
    if any(".attn.q_norm." in name for name in state):
        settings["qk_norm"] = True
    return settings


ADAPTER = Adapter(
    title="the DiT^DH generator",
    build=DiTDH,
    inspect=_inspect,
    names=Names(  # ours are the official ones
        ("x_embedder.proj.*", "s_embedder.proj.*", "blocks.*.adaLN_modulation.1.*", "final_layer.norm_final.*")
    ),
    container=Container(raw_only=tuple(_ROPE)),
    restore=_restore,
)
