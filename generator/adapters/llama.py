"""Names of LlamaGen's decoder layers <-> ours; shared by the files of every system built on them.

Theirs: attention.wqkv and .wo, feed_forward.w1, .w2 and .w3. Ours: attention.qkv and .proj, feed_forward.w12 ([w1; w3]
in one matrix) and .w3 (their w2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from core.errors import UserError
from core.weights.adapter import Facts, State, layer_count, matching
from generator.ar.far import Size
from generator.ar.llama import ffn_width

_PAIRS = (
    (".attention.wqkv.", ".attention.qkv."),
    (".attention.wo.", ".attention.proj."),
    (".feed_forward.w2.", ".feed_forward.w3."),
)
_GATE, _VALUE, _BOTH = ".feed_forward.w1.weight", ".feed_forward.w3.weight", ".feed_forward.w12.weight"
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
    return asdict(Size(width, layers, heads, head_layers, hidden, (rows - width) // 2 * heads // width))


def to_ours(state: State) -> State:
    """Rename and fuse."""
    renamed: State = {}
    for name, value in state.items():
        if name.endswith(_VALUE):
            continue
        if name.endswith(_GATE):
            other = name.removesuffix(_GATE) + _VALUE
            if other not in state:
                raise UserError(f"these weights are incomplete: {other} is missing")
            renamed[name.removesuffix(_GATE) + _BOTH] = torch.cat((value, state[other]))
            continue
        for theirs, ours in _PAIRS:
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


def to_theirs(state: State) -> State:
    """The inverse of `to_ours`, bit for bit. What TRAINING_ONLY names is in no official file."""
    renamed: State = {}
    for name, value in state.items():
        if matching(name, TRAINING_ONLY):
            continue
        if name.endswith(_BOTH):
            stem = name.removesuffix(_BOTH)
            renamed[stem + _GATE], renamed[stem + _VALUE] = (part.contiguous() for part in value.chunk(2))
            continue
        for theirs, ours in _PAIRS:
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed
