"""Our D-AR networks as a fixture's official constructor arguments describe them, with the fixture's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.fields import FieldError, notes, only, reads
from tokenizer.adapters import ADAPTERS
from tokenizer.vq.dar import DAR
from tokenizer.vq.diffusion_decoder import DecoderSettings, DiffusionCore

FEATURES = "dinov2"
CORE = (
    reads("in_dim dim cond_dim patch_size depth mlp_head share_time_encoding repa_layer rope_base_len")
    | only(out_dim=3)
    | notes("saves memory only", "grad_checkpointing")
    | notes("the official code does not use it", "cfg")
)
SMALL = reads("repa_hidden repa_out_dim head_dim")
TOKENIZER = (
    reads(
        "encoder_patch_size num_encoder_layers num_decoder_layers query_low_rank encoder_dim decoder_dim vq_dim"
        " vq_codebook_size num_denoising_steps num_query_groups num_all_queries queries_per_step vq_enable"
        " sampling_resolution output_resolution rope_base_len"
    )
    | (CORE | reads("data_std time_shift")).below("diff_decoder")
).below("model") | SMALL.below("fixture_only")


def decoder_settings(official: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Ours from the official `diff_decoder` section."""
    if official.get("mlp_head", False) and not official.get("share_time_encoding", False):
        raise FieldError("mlp_head needs share_time_encoding, officially too")
    return {
        "width": official["dim"],
        "depth": official["depth"],
        "patch_size": official["patch_size"],
        "data_std": official.get("data_std", 1.0),
        "time_shift": official.get("time_shift", 1.0),
        "own_time": not official.get("share_time_encoding", False),
        "modulated_output": official.get("mlp_head", False),
        "feature_layer": official.get("repa_layer", 8),
        "feature_hidden": extra.get("repa_hidden", 2048),
        "rope_theta": official.get("rope_base_len", 10000),
    }


def build_tokenizer(config: dict[str, Any], weights: dict[str, Tensor], image_size: int) -> DAR:
    """From {"model": official arguments, "fixture_only": sizes that are hard-coded officially}."""
    model, extra = config["model"], config.get("fixture_only", {})
    core = model["diff_decoder"]
    if core.get("in_dim", 3) != 3 or core.get("cond_dim", model["decoder_dim"]) != model["decoder_dim"]:
        raise FieldError("a decoder of pictures has 3 channels, and conditions as wide as those it is given")
    decoder = decoder_settings(model["diff_decoder"], extra)
    has_features = any(name.startswith("diff_decoder.net.repa_out.") for name in weights)
    tokenizer = DAR(
        image_size=image_size,
        patch_size=model["encoder_patch_size"],
        encoder_width=model["encoder_dim"],
        encoder_layers=model["num_encoder_layers"],
        condition_width=model["decoder_dim"],
        condition_layers=model["num_decoder_layers"],
        length=model["num_all_queries"],
        groups=model["num_query_groups"],
        window=model.get("queries_per_step"),
        steps=max(model["num_denoising_steps"], model["num_query_groups"]),
        vocab=model["vq_codebook_size"],
        code_dim=model["vq_dim"],
        quantize=model.get("vq_enable", True),
        low_rank_queries=model.get("query_low_rank", True),
        decoder=decoder,
        output_size=model.get("output_resolution", 0),
        semantic={"teachers": {FEATURES: extra.get("repa_out_dim", 768)}} if has_features else None,
        usage_sample=0,
        head_dim=extra.get("head_dim", 64),
        rope_theta=model.get("rope_base_len", 10000),
    )
    weights = {
        name: value
        for name, value in weights.items()
        if model.get("vq_enable", True) or not name.startswith("quantize.")
    }
    if "quantize.codebook_used" not in weights and model.get("vq_enable", True):
        weights["quantize.codebook_used"] = torch.zeros(65536)  # the fixtures leave these zeros out
    ADAPTERS["dar"].load(tokenizer, weights)
    tokenizer.sampling_size = model.get("sampling_resolution", 256)  # the least that a decoder paints
    tokenizer.steps = model["num_denoising_steps"]  # our constructor refuses fewer steps than groups
    return tokenizer


def build_core(
    core: dict[str, Any], extra: dict[str, Any], weights: dict[str, Tensor], image_size: int
) -> DiffusionCore:
    network = DiffusionCore(
        DecoderSettings(**decoder_settings(core, extra)),
        condition_width=core["cond_dim"],
        image_size=image_size,
        channels=core.get("in_dim", 3),
        head_dim=extra.get("head_dim", 64),
        feature_width=extra.get("repa_out_dim", 768),
    )
    state = ADAPTERS["dar"].rename(weights)
    network.load_state_dict(state, strict=True)
    return network
