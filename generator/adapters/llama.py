"""Names of LlamaGen's decoder layers <-> ours; shared by the files of every system built on them.

Theirs: attention.wqkv and .wo, feed_forward.w1, .w2 and .w3. Ours: attention.qkv and .proj, feed_forward.w12 ([w1; w3]
in one matrix) and .w3 (their w2).
"""

from __future__ import annotations

import torch

from core.errors import UserError
from core.state_dicts import State, matching

_PAIRS = ((".attention.wqkv.", ".attention.qkv."), (".attention.wo.", ".attention.proj."),
          (".feed_forward.w2.", ".feed_forward.w3."))
_GATE, _VALUE, _BOTH = ".feed_forward.w1.weight", ".feed_forward.w3.weight", ".feed_forward.w12.weight"
# Rotary tables and masks are plain attributes there, but caches enter the state dict of a model that has sampled.
NOT_WEIGHTS = {"freqs_cis": "a rotary table, which is rebuilt", "causal_mask": "a mask, which is rebuilt",
               "*.kv_cache.[kv]_cache": "a cache of keys and values"}

TRAINING_ONLY = ("alignment.encode.*", "alignment.decode.*")  # reAR's MLPs, under our names


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
