"""Released VAR files of ImageFolder -> our state dict and back."""

from __future__ import annotations

import math
from typing import Any

import torch

from core.weights.adapter import Adapter, Container, Facts, entry, layer_count
from core.weights.names import Names, Renames, State
from generator.var.var import VAR

BESIDE = "trainer.vae_local"  # the tokenizer, in the trainer's file
_RELEASED = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11)
RENAMES = Renames(
    ("attn.mat_qkv.weight", "attn.qkv.weight"),
    ("attn.scale_mul_1H11", "attn.scale_mul"),
    ("class_emb.weight", "class_emb.embedding_table.weight"),
    ("head_nm.ada_lin.", "head_ada_lin."),
)
# Tables that follow from the sizes.
_REBUILT = {
    "attn_bias_for_masking": "the mask, which is rebuilt",
    "lvl_1L": "the table of scales, which is rebuilt",
    "*.zero_k_bias": "zeros",
}


def _restore(model: VAR) -> State:
    state = RENAMES.official(model.state_dict())
    for index, block in enumerate(model.blocks):
        state[f"blocks.{index}.attn.zero_k_bias"] = torch.zeros_like(block.attn.v_bias)
    level = model.lvl_1L[0]
    hidden = level[:, None] < level[None]
    mask = torch.zeros(hidden.shape, device=level.device).masked_fill(hidden, -torch.inf)
    return {**state, "attn_bias_for_masking": mask[None, None], "lvl_1L": model.lvl_1L}


def _scales(state: State, facts: Facts) -> list[int]:
    """From the table of levels where it is filled, the released ones by their sizes, else from what the trainer stored."""
    count, length = state["lvl_embed.weight"].shape[0], state["pos_1LC"].shape[1]
    if "lvl_1L" in state and not state["lvl_1L"].is_meta:
        levels = [math.isqrt(n) for n in state["lvl_1L"][0].long().bincount(minlength=count).tolist()]
        if 0 not in levels and sum(p * p for p in levels) == length:
            return levels
    if (count, length) == (len(_RELEASED), sum(p * p for p in _RELEASED)):
        return list(_RELEASED)
    said = facts.said("patch_nums") or facts.said("pn")
    said = [int(p) for p in said.split("_")] if isinstance(said, str) else said
    if said and (len(said), sum(p * p for p in said)) != (count, length):
        said = None  # of other weights
    stand_in = [1] * (count - 1) + [math.isqrt(max(1, length - count + 1))]
    return list(facts.ask("generator.scales", f"the {count} scales", stand_in, said))


def _branches(state: State, facts: Facts) -> dict[str, int]:
    """Two branches of 32-wide codes in everything that was released; else from the tokenizer in the file."""
    inputs, outputs = state["word_embed.weight"].shape[1], state["head.weight"].shape[0]
    codes = entry(facts.loaded, BESIDE) or {}
    if "quant_conv.weight" in codes:
        said = inputs // len(codes["quant_conv.weight"])
    elif inputs == 64 and outputs in (8192, 16384, 32768):
        said = 2
    else:
        said = facts.said("product_quant")
    branches = facts.ask("generator.branches", "the number of branches of the tokenizer", 1, said)
    return {"branches": branches, "code_dim": inputs // branches, "vocab": outputs // branches}


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    width, depth = len(state["word_embed.weight"]), layer_count(state, "blocks.")
    l2_norm = "blocks.0.attn.scale_mul_1H11" in state
    if l2_norm:
        heads = state["blocks.0.attn.scale_mul_1H11"].shape[1]
    else:
        known = depth if width == 64 * depth else None
        heads = facts.ask("generator.heads", "the number of attention heads", 1, known)
    settings = {
        "depth": depth,
        "width": width,
        "heads": heads,
        "scales": _scales(state, facts),
        "mlp_ratio": len(state["blocks.0.ffn.fc1.weight"]) / width,
        "num_classes": len(state["class_emb.weight"]) - 1,
        **_branches(state, facts),
    }
    if not l2_norm:
        settings["l2_norm"] = False
    if any(name.startswith("shared_ada_lin.") for name in state):
        settings["shared_adaln"] = True
    return settings


ADAPTER = Adapter(
    title="the VAR generator",
    build=VAR,
    inspect=_inspect,
    names=Names(
        markers=("pos_1LC", "lvl_embed.*", "word_embed.*", "head_nm.ada_lin.*", "blocks.*.attn.mat_qkv.*"),
        ignored=_REBUILT,
    ),
    container=Container(
        raw=("trainer.var_wo_ddp", "model", "module", "state_dict"), written=("trainer.var_wo_ddp", None), beside=BESIDE
    ),
    rename=RENAMES.ours,
    restore=_restore,
)
