"""Released D-AR tokenizer files -> our state dict and back.

The official attention layers have one matrix each for query, key and value; ours have one for all that see the same
input: `attention.{q,k,v}` <-> `attention.qkv`, `cross_attn.{k,v}` <-> `cross_attn.kv`.
"""

from __future__ import annotations

import math
from typing import Any

from core.errors import UserError
from core.weights.adapter import BARE, Adapter, Facts, layer_count
from core.weights.names import Names, Renames, State
from tokenizer.vq.dar import DAR
from tokenizer.vq.diffusion_decoder import DecoderSettings

TABLE_ROWS = 1024  # of queries and positions, in every released file
RENAMES = Renames(
    fused={
        ".attention.qkv.": (".attention.q.", ".attention.k.", ".attention.v."),
        ".cross_attn.kv.": (".cross_attn.k.", ".cross_attn.v."),
    }
)
# (width of the encoder, width of the conditions, codes, numbers in a code) of the released tokenizer, and what our
# defaults are. Their tables have TABLE_ROWS rows in every file, so no tensor tells.
_RELEASED = {(768, 768, 16384, 8): {"length": 256, "groups": 8}}
# What the trainer's config calls the settings that are in no tensor.
_SAID = {
    "length": "num_all_queries",
    "groups": "num_query_groups",
    "window": "queries_per_step",
    "steps": "num_denoising_steps",
    "output_size": "output_resolution",
    "rope_theta": "rope_base_len",
    "image_size": "sampling_resolution",
}
# And those of its diffusion decoder, with the official defaults where there is a config that leaves them out.
_SAID_OF_DECODER = {
    "time_shift": ("time_shift", 1.0),
    "data_std": ("data_std", 1.0),
    "feature_layer": ("repa_layer", 8),
    "rope_theta": ("rope_base_len", 10000.0),
}


def _sequence(state: State, facts: Facts) -> dict[str, Any]:
    """What the file says of its queries, else the released numbers for the released sizes."""
    sizes = (
        len(state["patchify.weight"]),
        state["decoder_embedding.weight"].shape[1],
        len(state.get("quantize.embedding.weight", ())),
        len(state["quant_in_conv.weight"]),
    )
    released = _RELEASED.get(sizes, {})
    said = {key: facts.said(word) for key, word in _SAID.items() if facts.said(word) is not None}
    for key, what, stand_in in (("length", "the number of queries", 256), ("groups", "the number of their groups", 8)):
        said[key] = facts.ask(f"tokenizer.{key}", what, stand_in, said.get(key), released.get(key))
    if said.get("window") == said["length"] // said["groups"]:
        del said["window"]
    return said


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    net = "diff_decoder.net."
    encoder_width, _, patch_size, _ = state["patchify.weight"].shape
    condition_width = state["decoder_embedding.weight"].shape[1]
    width, pixels = state[net + "conv_in.weight"].shape[:2]
    decoder: dict[str, Any] = {
        "width": width,
        "depth": layer_count(state, net + "blocks."),
        "patch_size": math.isqrt(pixels // 3),
    }
    if net + "time_embed.mlp.0.weight" in state:
        decoder["own_time"] = False
    if net + "linear_out.linear.weight" in state:
        decoder["modulated_output"] = True
    configured = facts.said("num_all_queries") is not None  # without a config: as released, which is written out
    for key, (word, default) in _SAID_OF_DECODER.items():
        said = facts.said(f"diff_decoder.{word}") if configured else None
        decoder[key] = said if said is not None else default if configured else getattr(DecoderSettings(), key)
    settings = {
        **_sequence(state, facts),
        "patch_size": patch_size,
        "encoder_width": encoder_width,
        "encoder_layers": layer_count(state, "encoder_layers."),
        "condition_width": condition_width,
        "condition_layers": layer_count(state, "decoder_layers."),
        "code_dim": state["quant_in_conv.weight"].shape[0],
        "decoder": decoder,
        "head_dim": state[net + "blocks.0.attention.q_norm.weight"].shape[0],
    }
    if "quantize.embedding.weight" in state:
        settings["vocab"] = state["quantize.embedding.weight"].shape[0]
    else:
        settings["quantize"] = False
    if "quantize.codebook_used" in state:
        settings["usage_window"] = state["quantize.codebook_used"].shape[0]
    if "query_linear.weight" not in state:
        settings["low_rank_queries"] = False
    if net + "repa_out.4.weight" in state:
        settings["semantic"] = {"teachers": {"dinov2": state[net + "repa_out.4.weight"].shape[0]}}
        decoder["feature_hidden"] = state[net + "repa_out.0.weight"].shape[0]
    return settings


def _restore(model: DAR) -> State:
    if len(convs := model.diff_decoder.net.pixel_convs):
        raise UserError(
            "the official D-AR code has no convolutions after its output layer; a model with "
            f"tokenizer.decoder.pixel_channels={convs[0].out_channels} cannot be exported to its layout"
        )
    if model.places is not None:
        raise UserError(
            "the codes of the official D-AR code have no places; a model with tokenizer.places=true cannot be exported to "
            "its layout"
        )
    if (rows := model.decoder_embedding.num_embeddings) != TABLE_ROWS:
        raise UserError(
            f"the official D-AR code has tables of {TABLE_ROWS} rows; a model with tokenizer.table_rows={rows} cannot be "
            "exported to its layout"
        )
    return RENAMES.official(model.state_dict())


ADAPTER = Adapter(
    title="the D-AR tokenizer",
    build=DAR,
    inspect=_inspect,
    names=Names(
        markers=(
            "diff_decoder.net.conv_in.weight",
            "query_embedding.weight",
            "decoder_embedding.weight",
            "quant_in_conv.weight",
        ),
        optional=("diff_decoder.net.repa_out.*", "quantize.codebook_used"),
    ),
    container=BARE,
    rename=RENAMES.ours,
    restore=_restore,
)
