"""Released files of MaskGIT-VQGAN and VQGAN+ -> our state dicts and back."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from core.errors import UserError
from core.weights.adapter import BARE, Adapter, Facts, Names, State, layer_count
from tokenizer.vq.maskgit import MaskGITVQGAN, VQGANPlus

USAGE = "quantizer.codebook_used"  # ours; the published models have none


def _level(name: str, official: str, ours: str, count: int | None = None) -> str:
    """`official` with a level's number -> `ours`; with `count` the numbers run the other way."""

    def number(match: re.Match) -> str:
        index = int(match[1])
        return ours.format(index if count is None else count - 1 - index) + "."

    return re.sub("^" + re.escape(official).replace(r"\{\}", r"(\d+)") + r"\.", number, name)


# ---------------------------------------------------------------------------------------------------------------------
# MaskGIT-VQGAN
# ---------------------------------------------------------------------------------------------------------------------
def maskgit_name(name: str, levels: int, prefix: str = "") -> str:
    """Published name -> ours of a tensor of either half below `prefix`. The decoder is numbered from fine to coarse."""
    name = _level(name, prefix + "encoder.down.{}", prefix + "encoder.levels.{}")
    name = _level(name, prefix + "decoder.up.{}", prefix + "decoder.levels.{}", levels)
    return name.replace(".block.", ".res.").replace(".upsample_conv.", ".resize.conv.")


def published_maskgit_name(name: str, levels: int, prefix: str = "") -> str:
    """The reverse of `maskgit_name`."""
    name = _level(name, prefix + "encoder.levels.{}", prefix + "encoder.down.{}")
    name = _level(name, prefix + "decoder.levels.{}", prefix + "decoder.up.{}", levels)
    return name.replace(".res.", ".block.").replace(".resize.conv.", ".upsample_conv.")


def _maskgit_rename(state: State) -> State:
    levels = layer_count(state, "decoder.up.")
    return {maskgit_name(name, levels).replace("quantize.", "quantizer."): value for name, value in state.items()}


def _maskgit_restore(model: nn.Module) -> State:
    levels = len(model.decoder.levels)
    return {
        published_maskgit_name(name, levels).replace("quantizer.", "quantize."): value
        for name, value in model.state_dict().items()
        if name != USAGE
    }


def _maskgit_inspect(state: State, facts: Facts) -> dict[str, Any]:
    vocab, dim = state["quantize.embedding.weight"].shape
    settings = halves(_maskgit_rename(state))
    return {**settings, **ask_groups(settings["channels"], facts), "vocab": vocab, "code_dim": dim}


def ask_groups(channels: int, facts: Facts, key: str = "groups") -> dict[str, int]:
    """Every official norm has 32 groups; only a width that this does not divide has others, and no tensor tells them."""
    return {} if channels % 32 == 0 else {key: facts.ask(f"tokenizer.{key}", "the number of groups of the norms", 1)}


def halves(state: State, encoder: str = "encoder.", decoder: str = "decoder.") -> dict[str, Any]:
    """channels, channel_mult and res_blocks of a decoder (of ours), which has as many as its encoder."""
    count = layer_count(state, decoder + "levels.")
    fine_to_coarse = reversed(range(count))
    widths = [state[f"{decoder}levels.{i}.res.0.conv2.weight"].shape[0] for i in fine_to_coarse]
    channels = state[f"{encoder}conv_in.weight"].shape[0] if f"{encoder}conv_in.weight" in state else widths[0]
    return {
        "channels": channels,
        "channel_mult": [w // channels for w in widths],
        "res_blocks": layer_count(state, f"{decoder}levels.0.res."),
    }


MASKGIT = Adapter(
    title="MaskGIT-VQGAN",
    build=MaskGITVQGAN,
    inspect=_maskgit_inspect,
    names=Names(
        markers=(
            "encoder.down.0.block.0.conv1.weight",
            "decoder.up.0.block.0.conv1.weight",
            "quantize.embedding.weight",
        ),
        optional=(USAGE,),
    ),
    container=BARE,
    rename=_maskgit_rename,
    restore=_maskgit_restore,
)


# ---------------------------------------------------------------------------------------------------------------------
# VQGAN+
# ---------------------------------------------------------------------------------------------------------------------
# Published -> ours; its decoder is numbered from coarse to fine, like ours.
_PLUS_RELEASED = (4096, 64)  # codes and their width, which are no unit vectors
_PLUS = (
    ("encoder.down.{}.res_blocks", "encoder.levels.{}.res"),
    ("encoder.down.{}.down_conv", "encoder.levels.{}.resize.conv"),
    ("decoder.up.{}.res_blocks", "decoder.levels.{}.res"),
    ("decoder.up.{}.upsample_conv", "decoder.levels.{}.resize.conv"),
)


def _plus_name(name: str, back: bool = False) -> str:
    for published, ours in _PLUS:
        name = _level(name, ours, published) if back else _level(name, published, ours)
    whole = (("mid.res_blocks.", "mid."), ("quantize.", "quantizer."))
    for published, ours in whole:
        old, new = (ours, published) if back else (published, ours)
        if name.startswith((old, f"encoder.{old}", f"decoder.{old}")):
            name = name.replace(old, new, 1)
    return name


def _plus_rename(state: State) -> State:
    return {_plus_name(name): value for name, value in state.items()}


def _plus_restore(model: nn.Module) -> State:
    return {_plus_name(name, back=True): value for name, value in model.state_dict().items() if name != USAGE}


def _plus_inspect(state: State, facts: Facts) -> dict[str, Any]:
    state = _plus_rename(state)
    settings = halves(state)
    settings |= ask_groups(settings["channels"], facts)
    decoder_blocks, settings["res_blocks"] = settings["res_blocks"], layer_count(state, "encoder.levels.0.res.")
    if decoder_blocks != settings["res_blocks"]:
        settings["decoder_res_blocks"] = decoder_blocks
    if "encoder.levels.0.resize.conv.weight" not in state and len(settings["channel_mult"]) > 1:
        settings["halving"] = "pool"
    if "quantizer.bits_to_indices" in state:
        settings |= {"quantizer": "lookup_free", "code_dim": len(state["quantizer.bits_to_indices"])}
    elif "quantizer.embedding.weight" in state:
        vocab, dim = state["quantizer.embedding.weight"].shape
        settings |= {
            "vocab": vocab,
            "code_dim": dim,
            "normalise": bool(
                facts.ask(
                    "tokenizer.normalise",
                    "whether codes are unit vectors",
                    False,
                    False if (vocab, dim) == _PLUS_RELEASED else facts.said("use_l2_norm"),
                )
            ),
        }
    else:
        raise UserError("these are not the weights of VQGAN+: quantize.embedding.weight is missing")
    return settings


VQGAN_PLUS = Adapter(
    title="VQGAN+",
    build=VQGANPlus,
    inspect=_plus_inspect,
    names=Names(
        markers=(
            "encoder.down.0.res_blocks.0.conv1.weight",
            "decoder.up.0.res_blocks.0.conv1.weight",
            "encoder.mid.res_blocks.0.conv1.weight",
        ),
        optional=(USAGE,),
    ),
    container=BARE,
    rename=_plus_rename,
    restore=_plus_restore,
)
