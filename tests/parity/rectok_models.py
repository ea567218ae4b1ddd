"""Our RecTok models as a fixture's official constructor arguments describe them, with the fixture's weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from generator import adapters as generator_adapters
from generator.dit.dit_dh import DiTDH
from tests.parity import Case
from tests.parity.fields import FieldError, notes, only, reads
from tokenizer import adapters as tokenizer_adapters
from tokenizer.continuous.rectok import SIZES, RecTok

TEACHERS = ("dinov3", "dinov2", "siglip")

# Official argument -> ours, where the value is the same.
TOKENIZER_ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "token_channels": "channels",
    "gamma": "gamma",
    "noise_schedule": "noise_schedule",
    "mask_ratio": "mask_ratio",
    "mask_ratio_min": "mask_ratio_min",
    "mask_ratio_type": "mask_ratio_type",
}

TOKENIZER = reads("SIZE_DICT.*.width SIZE_DICT.*.layers SIZE_DICT.*.heads") | (
    reads(
        "img_size patch_size token_channels gamma noise_schedule mask_ratio mask_ratio_min mask_ratio_type"
        " vit_enc_model_size vit_dec_model_size vit_sem_model_size foundation_model_type sem_dec_type sem_input_type sem_target"
    )
    | notes("the weights tell", "use_qknorm qk_norm")
    | notes("has no effect officially", "model cls_token_type grad_checkpointing")
    | only(diff_cls_token=False, disable_kl=False, scale_factor=1.0)
).below("args")
NETWORK = (
    reads(
        "img_size tokenizer_patch_size token_channels hidden_size depth num_heads num_classes label_dropout_prob"
        " label_drop_prob class_dropout_prob num_sampling_steps"
    )
    | only(
        patch_size=[[1, 1], 1],
        mlp_ratio=4.0,
        use_swiglu=True,
        use_rope=True,
        use_rmsnorm=True,
        wo_shift=False,
        use_pos_embed=True,
    )
    | notes("the weights tell", "use_qknorm qk_norm")
    | notes("has no effect officially", "model grad_checkpointing")
)
GENERATOR = NETWORK.below("args", "guide_args")


def has_qk_norm(weights: dict[str, Any]) -> bool:
    """The weights know; the official flags for it reach some constructors and not others."""
    return any(".attn.q_norm." in name for name in weights)


def below(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def teacher_names(args: dict[str, Any]) -> list[str]:
    """The official code matches by substring: "dinov2,dinov3" means both."""
    return [name for name in TEACHERS if name in (args.get("foundation_model_type") or "")]


def build_tokenizer(case: Case) -> RecTok:
    """Every parameter requires a gradient, as in the fixtures, which freeze nothing."""
    args = case.config["args"]
    sizes = case.config["SIZE_DICT"].plain() if case.config.get("SIZE_DICT") else {}
    for name in ("foundation_model_type", "sem_dec_type", "sem_input_type", "vit_sem_model_size", "sem_target"):
        args.get(name)  # of the semantic decoders, where there are any
    if unknown := {word.strip() for word in (args.get("foundation_model_type") or "").split(",")} - {
        *TEACHERS,
        "",
        "none",
    }:
        raise FieldError(f"foundation_model_type {sorted(unknown)}: known are {', '.join(TEACHERS)}")

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
    tokenizer = RecTok(
        encoder=size("vit_enc_model_size", "base"),
        decoder=size("vit_dec_model_size", "base"),
        mask_ratio=0.0,
        qk_norm=has_qk_norm(case.weights),
        **settings,
    )
    # Set afterwards, since our constructor refuses an MLP decoder together with masking and the official one does not.
    tokenizer.mask_ratio = mask_ratio
    tokenizer_adapters.ADAPTERS["rectok"].load(tokenizer, case.weights)
    return tokenizer.requires_grad_(True)


def build_generator(args: dict[str, Any], weights: dict[str, Any]) -> DiTDH:
    """Frozen parameters (positions, time frequencies) stay frozen, as in the fixtures."""
    args.get("num_sampling_steps")  # of sampling
    (trunk_width, head_width), (trunk_depth, head_depth) = args["hidden_size"], args["depth"]
    trunk_heads, head_heads = args["num_heads"]
    generator = DiTDH(
        size={
            "trunk_width": trunk_width,
            "trunk_depth": trunk_depth,
            "trunk_heads": trunk_heads,
            "head_width": head_width,
            "head_depth": head_depth,
            "head_heads": head_heads,
        },
        channels=args["token_channels"],
        grid=args["img_size"] // args["tokenizer_patch_size"],
        num_classes=args.get("num_classes", 1000),
        label_drop=args.get("label_dropout_prob", args.get("label_drop_prob", args.get("class_dropout_prob", 0.1))),
        qk_norm=has_qk_norm(weights),
    )
    generator_adapters.ADAPTERS["dit_dh"].load(generator, weights)
    return generator
