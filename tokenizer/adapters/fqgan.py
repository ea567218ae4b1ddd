"""Released FQGAN files (fqgan_{dual,triple}_ds{16,8}.pt) -> our state dict and back.

The official dual and triple models are two classes with other names for the same parts; ours is one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.nn.embed import resize_rows
from core.nn.transformer import PUBLISHED_NAMES
from core.weights.adapter import Adapter, Container, Facts, layer_count
from core.weights.names import Names, Renames, State
from tokenizer.adapters.maskgit import ask_groups
from tokenizer.vq.fqgan import FQGAN

# Sub-codebook -> official adapter, official feature head, and what we call the teacher that it learnt from.
_PARTS = {
    "vis": ("visual_head", None, None),
    "sem": ("semantic_head", "feat_pred_head", "clip"),
    "sem_mid": ("semantic_head_mid", "mid_sem_feat_pred", "dinov2_class"),
    "sem_high": ("semantic_head_high", "high_sem_feat_pred", "clip"),
}
_TEACHERS = {branch: teacher for branch, (_, _, teacher) in _PARTS.items()}


def _renames(names: tuple[str, ...], teachers: dict[str, str]) -> Renames:
    """Of a model with these sub-codebooks. `teachers`: sub-codebook -> our name of its predictor."""
    pairs = []
    for name in names:
        adapter, head, _ = _PARTS[name]
        pairs += [
            (f"^encoder.{adapter}.0.", f"^heads.{name}.adapter."),
            (f"^encoder.norm_out_{name}.", f"^heads.{name}.norm_out."),
            (f"^encoder.conv_out_{name}.", f"^heads.{name}.conv_out."),
            (f"^quant_conv_{name}.", f"^quant_convs.{name}."),
            (f"^quantize_{name}.", f"^quantizers.{name}."),
        ]
        if head and name in teachers:
            pairs.append((f"^{head}.", f"^predictors.{teachers[name]}."))
    return Renames(
        *pairs,
        ("^encoder.conv_blocks.{}.downsample.", "^encoder.conv_blocks.{}.resize."),
        ("^decoder.conv_blocks.{}.upsample.", "^decoder.conv_blocks.{}.resize."),
        *PUBLISHED_NAMES,
    )


def _variant(state: State) -> tuple[str, ...]:
    """Sub-codebooks of an official file."""
    present = [name for name in _PARTS if f"quantize_{name}.embedding.weight" in state]
    for names in (("vis", "sem"), ("vis", "sem_mid", "sem_high")):
        if present == list(names):
            return names
    wanted = ("vis", "sem_mid", "sem_high") if any("sem_mid" in name for name in state) else ("vis", "sem")
    missing = [f"quantize_{name}.embedding.weight" for name in wanted if name not in present]
    raise UserError(
        "these are not the weights of an FQGAN tokenizer: "
        + (f"{', '.join(missing)} is missing; " if missing else "")
        + "codebooks quantize_vis and quantize_sem (dual) or "
        f"quantize_vis, quantize_sem_mid and quantize_sem_high (triple) are expected, found {present or 'none'}"
    )


def _rename(state: State) -> State:
    return _renames(_variant(state), _TEACHERS).ours(state)


def _restore(model: nn.Module) -> State:
    if any(name not in _PARTS for name in model.names) or len(model.names) == 1:
        raise UserError(
            f"the official FQGAN code has 2 or 3 sub-codebooks; a model with {', '.join(model.names)} cannot be "
            "exported to its layout"
        )
    teachers = {branch: teacher for teacher, branch in model.semantic.branches.items()}
    if "vis" in teachers or len(teachers) < len(model.semantic.branches):
        raise UserError(
            "the official FQGAN code has one predictor per semantic sub-codebook and none for vis; this model "
            "cannot be exported to its layout"
        )
    return _renames(model.names, teachers).official(model.state_dict())


def _names(state: State) -> list[str]:
    return sorted({name.split(".")[1] for name in state if name.startswith("quantizers.")})


def _fit(state: State, model: nn.Module) -> State:
    """Refuse another variant in one sentence; drop feature heads that this model is built without; resize positions."""
    theirs, levels = _names(state), layer_count(state, "encoder.conv_blocks.")
    if theirs and theirs != sorted(model.names):
        raise UserError(
            f"the weights have the sub-codebooks {', '.join(theirs)} and the model {', '.join(model.names)}: "
            f"set tokenizer.branches: {len(theirs)}, or give other weights"
        )
    model_levels = len(model.encoder.conv_blocks)
    if theirs and levels != model_levels:
        raise UserError(
            f"the weights have stride {2 ** (levels - 1)} and the model {2 ** (model_levels - 1)}: "
            f"set tokenizer.size: {'vq8' if levels == 4 else 'vq16'}, or give other weights"
        )
    for teacher, branch in model.semantic.branches.items():
        if not any(name.startswith(f"predictors.{teacher}.") for name in state):
            state = Renames((f"^predictors.{_TEACHERS.get(branch)}.", f"^predictors.{teacher}.")).ours(state)
    if not model.predictors:
        state = {name: value for name, value in state.items() if not name.startswith("predictors.")}
    state = {
        name: resize_rows(value, model.spec.grid, 1 if name.startswith("predictors.") else 0)
        if name.endswith("positional_embedding")
        else value
        for name, value in state.items()
    }
    rings = {name: buffer.numel() for name, buffer in model.named_buffers() if name.endswith("codebook_used")}
    return {name: _ring(value, rings[name]) if name in rings else value for name, value in state.items()}


def _ring(latest: Tensor, window: int) -> Tensor:
    """The latest `window` assignments of a file; where it has fewer the rest is zeros, like in a new model."""
    return torch.cat((latest.new_zeros(max(0, window - len(latest))), latest[-window:]))


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    names = _variant(state)
    state = _rename(state)
    levels = layer_count(state, "encoder.conv_blocks.")
    length = state[f"heads.{names[0]}.adapter.positional_embedding"].shape[0]
    channels = state["encoder.conv_in.weight"].shape[0]

    def mult(half: str) -> list[int]:
        return [state[f"{half}.conv_blocks.{i}.res.0.conv2.weight"].shape[0] // channels for i in range(levels)]

    vocab, dim = state[f"quantizers.{names[0]}.embedding.weight"].shape
    settings = {
        "image_size": math.isqrt(length) * 2 ** (levels - 1),
        "branches": len(names),
        "size": mult("encoder"),
        "channels": channels,
        "res_blocks": layer_count(state, "encoder.conv_blocks.0.res."),
        "z_channels": state["post_quant_conv.weight"].shape[0],
        "vocab": vocab,
        "code_dim": dim,
        "adapter_layers": layer_count(state, f"heads.{names[0]}.adapter.transformer."),
    }
    settings |= ask_groups(channels, facts)  # the official classes have 8 heads whatever the width, as ours by default
    if (decoder_mult := mult("decoder")[::-1]) != settings["size"]:
        settings["decoder_mult"] = decoder_mult
    if f"quantizers.{names[0]}.codebook_used" in state:
        settings["usage_window"] = len(state[f"quantizers.{names[0]}.codebook_used"])
    teachers = {_TEACHERS[name]: name for name in names if f"predictors.{_TEACHERS[name]}.class_embedding" in state}
    if teachers:
        first = next(iter(teachers))
        settings["semantic"] = {
            "teachers": {name: state[f"predictors.{name}.class_embedding"].shape[1] for name in teachers},
            "branches": teachers,
            "layers": layer_count(state, f"predictors.{first}.transformer."),
        }
    return settings


ADAPTER = Adapter(
    title="the FQGAN tokenizer",
    build=FQGAN,
    inspect=_inspect,
    names=Names(
        markers=(
            "encoder.visual_head.0.positional_embedding",
            "quantize_vis.embedding.weight",
            "post_quant_conv.weight",
        ),
        optional=("predictors.*", "quantizers.*.codebook_used"),
    ),
    container=Container(written=("model", "ema")),
    rename=_rename,
    restore=_restore,
    fit=_fit,
)
