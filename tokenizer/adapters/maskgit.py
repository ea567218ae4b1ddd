"""Released files of MaskGIT-VQGAN and VQGAN+ -> our state dicts and back."""

from __future__ import annotations

from typing import Any

from torch import nn

from core.errors import UserError
from core.weights.adapter import BARE, Adapter, Facts, layer_count
from core.weights.names import Names, Renames, State, renamed
from tokenizer.vq.maskgit import MaskGITVQGAN, VQGANPlus

USAGE = "quantizer.codebook_used"  # ours; the published models have none


# ---------------------------------------------------------------------------------------------------------------------
# MaskGIT-VQGAN
# ---------------------------------------------------------------------------------------------------------------------
DECODER_NAMES = ((".block.", ".res."), (".upsample_conv.", ".resize.conv."))
_MASKGIT = Renames(
    ("^encoder.down.{}.", "^encoder.levels.{}."),
    ("^decoder.up.{}.", "^decoder.levels.{}."),
    ("^quantize.", "^quantizer."),
    *DECODER_NAMES,
)


def other_way(state: State, prefix: str) -> State:
    """With the levels of a decoder numbered from the other end: the published ones go from fine to coarse."""
    last = layer_count(state, prefix) - 1

    def turned(name: str) -> str:
        if not name.startswith(prefix):
            return name
        number, _, rest = name.removeprefix(prefix).partition(".")
        return f"{prefix}{last - int(number)}.{rest}"

    return renamed(state, turned)


def without_usage(model: nn.Module) -> State:
    return {name: tensor for name, tensor in model.state_dict().items() if name != USAGE}


def _maskgit_rename(state: State) -> State:
    return other_way(_MASKGIT.ours(state), "decoder.levels.")


def _maskgit_restore(model: nn.Module) -> State:
    return _MASKGIT.official(other_way(without_usage(model), "decoder.levels."))


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
_PLUS_RELEASED = (4096, 64)  # codes and their width, which are no unit vectors
_PLUS = Renames(  # its decoder is numbered from coarse to fine, like ours
    ("^encoder.down.{}.res_blocks.", "^encoder.levels.{}.res."),
    ("^encoder.down.{}.down_conv.", "^encoder.levels.{}.resize.conv."),
    ("^decoder.up.{}.res_blocks.", "^decoder.levels.{}.res."),
    ("^decoder.up.{}.upsample_conv.", "^decoder.levels.{}.resize.conv."),
    ("^encoder.mid.res_blocks.", "^encoder.mid."),
    ("^decoder.mid.res_blocks.", "^decoder.mid."),
    ("^quantize.", "^quantizer."),
)


def _plus_inspect(state: State, facts: Facts) -> dict[str, Any]:
    state = _PLUS.ours(state)
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
        known = False if (vocab, dim) == _PLUS_RELEASED else facts.said("use_l2_norm")
        unit_vectors = facts.ask("tokenizer.normalise", "whether codes are unit vectors", False, known)
        settings |= {"vocab": vocab, "code_dim": dim, "normalise": bool(unit_vectors)}
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
    rename=_PLUS.ours,
    restore=lambda model: _PLUS.official(without_usage(model)),
)
