"""Names of LlamaGen's decoder layers <-> ours; shared by the files of every system built on them.

Theirs: attention.wqkv and .wo, feed_forward.w1, .w2 and .w3. Ours: attention.qkv and .proj, feed_forward.w12 ([w1; w3]
in one matrix) and .w3 (their w2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from core.weights.adapter import Facts, layer_count
from core.weights.names import Renames, State, matching
from generator.ar.far import Size
from generator.ar.llama import ffn_width

PAIRS = (
    (".attention.wqkv.", ".attention.qkv."),
    (".attention.wo.", ".attention.proj."),
    (".feed_forward.w2.", ".feed_forward.w3."),
)
FUSED = {".feed_forward.w12.": (".feed_forward.w1.", ".feed_forward.w3.")}
TRAINING_ONLY = ("alignment.encode.*", "alignment.decode.*")  # reAR's MLPs, under our names


def decoder_size(state: State, width: int, facts: Facts, sizes: Mapping[str, Size]) -> str | dict[str, Any]:
    """Name of a published size, all of whose sizes agree, or a table. No tensor tells the number of heads: `sizes` do for
    the published models, and any other file has to be explained."""
    layers, head_layers = layer_count(state, "layers."), layer_count(state, "ar_head.")
    hidden, rows = (state[f"layers.0.{name}.weight"].shape[0] for name in ("feed_forward.w1", "attention.wqkv"))
    for name, known in sizes.items():
        if (width, layers, head_layers, hidden, rows) == (
            known.width,
            known.layers,
            known.head_layers,
            ffn_width(known.width),
            3 * known.width,
        ):
            return name
    heads = facts.ask(
        "generator.size.heads", "the number of attention heads", max(1, width // 64), facts.said("n_head")
    )
    shared = (rows - width) // 2  # the width of keys, and of values
    size = asdict(Size(width, layers, heads, head_layers, hidden, shared * heads // width))
    if shared == width:
        del size["kv_heads"]  # as many as `heads`, which nobody may have told yet
    return size


def official(state: State, names: Renames) -> State:
    """Our state under official names. What TRAINING_ONLY names is in no official file."""
    return names.official({name: tensor for name, tensor in state.items() if not matching(name, TRAINING_ONLY)})
