"""Our RecTok models as a fixture's official constructor arguments describe them, with the fixture's weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from generator import adapters as generator_adapters
from generator.dit.dit_dh import DiTDH
from tests.parity import Case
from tokenizer import adapters as tokenizer_adapters
from tokenizer.continuous.rectok import SIZES, RecTok

TEACHERS = ("dinov3", "dinov2", "siglip")

# Official argument -> ours, where the value is the same.
TOKENIZER_ARGUMENTS = {
    "img_size": "image_size", "patch_size": "patch_size", "token_channels": "channels", "gamma": "gamma",
    "noise_schedule": "noise_schedule", "mask_ratio": "mask_ratio", "mask_ratio_min": "mask_ratio_min",
    "mask_ratio_type": "mask_ratio_type",
}


def has_qk_norm(weights: dict[str, Any]) -> bool:
    """The weights know; the official flags for it reach some constructors and not others."""
    return any(".attn.q_norm." in name for name in weights)


def below(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def teacher_names(args: dict[str, Any]) -> list[str]:
    """The official code matches by substring: "dinov2,dinov3" means both."""
    return [name for name in TEACHERS if name in args.get("foundation_model_type", "")]


def build_tokenizer(case: Case) -> RecTok:
    """Every parameter requires a gradient, as in the fixtures, which freeze nothing."""
    args, sizes = case.config["args"], case.config.get("SIZE_DICT", {})

    def size(argument: str, default: str) -> dict[str, int]:
        name = args.get(argument, default)
        return sizes.get(name) or dataclasses.asdict(SIZES[name])

    settings = {ours: args[theirs] for theirs, ours in TOKENIZER_ARGUMENTS.items() if theirs in args}
    mask_ratio = settings.pop("mask_ratio", 0.0)
    if teachers := teacher_names(args):
        decoder = args.get("sem_dec_type", "transformer")
        head = "mlp.2" if decoder == "mlp" else "out"
        settings["semantic"] = {
            "teachers": {name: case.weights[f"sem_decoders.{name}.{head}.weight"].shape[0] for name in teachers},
            "decoder": decoder,
            "size": size("vit_sem_model_size", "tiny"),
            "input": args.get("sem_input_type", "noisy"),
        }
    tokenizer = RecTok(encoder=size("vit_enc_model_size", "base"), decoder=size("vit_dec_model_size", "base"),
                       mask_ratio=0.0, qk_norm=has_qk_norm(case.weights), **settings)
    # Set afterwards, since our constructor refuses an MLP decoder together with masking and the official one does not.
    tokenizer.mask_ratio = mask_ratio
    tokenizer_adapters.ADAPTERS["rectok"].load(tokenizer, case.weights)
    return tokenizer.requires_grad_(True)


def build_generator(args: dict[str, Any], weights: dict[str, Any]) -> DiTDH:
    """Frozen parameters (positions, time frequencies) stay frozen, as in the fixtures."""
    (trunk_width, head_width), (trunk_depth, head_depth) = args["hidden_size"], args["depth"]
    trunk_heads, head_heads = args["num_heads"]
    generator = DiTDH(
        size={"trunk_width": trunk_width, "trunk_depth": trunk_depth, "trunk_heads": trunk_heads,
              "head_width": head_width, "head_depth": head_depth, "head_heads": head_heads},
        channels=args["token_channels"],
        grid=args["img_size"] // args["tokenizer_patch_size"],
        num_classes=args.get("num_classes", 1000),
        label_drop=args.get("label_dropout_prob", args.get("label_drop_prob", 0.1)),
        qk_norm=has_qk_norm(weights),
    )
    generator_adapters.ADAPTERS["dit_dh"].load(generator, weights)
    return generator
