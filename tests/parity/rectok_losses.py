"""RecTok: the complete loss module, and the DINOv3 teacher with the semantic decoder that imitates it."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from core.images import to_uint8
from core.specs import Progress, Recon
from tests.parity import Case, kind
from tests.parity.fields import FieldError, notes, only, reads
from tests.parity.rectok_models import TOKENIZER, below, build_tokenizer
from tokenizer.continuous.gaussian import Posterior
from tokenizer.losses.discriminators import PatchGAN
from tokenizer.losses.objective import Objective
from tokenizer.teachers import DINOv3Teacher

BACKBONE = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads patch_size num_register_tokens rope_theta"
)
TEACHER = (
    reads("processor_size")
    | (
        reads(BACKBONE + " image_size")
        | only(
            layer_norm_eps=1e-5,
            hidden_act="gelu",
            num_channels=3,
            use_gated_mlp=False,
            mlp_bias=True,
            query_bias=True,
            key_bias=False,
            value_bias=True,
            proj_bias=True,
            attention_dropout=0.0,
            drop_path_rate=0.0,
        )
        | notes(
            "only in train mode, or before training",
            "layerscale_value initializer_range pos_embed_shift pos_embed_jitter pos_embed_rescale",
        )
    ).below("dinov3")
).below("teacher")
LOSS = reads("lpips_widths convnext_blocks convnext_classes disc_ndf epochs") | reads(
    "reconstruction_weight perceptual_weight perceptual_loss sem_weight sem_loss_type sem_target kl_weight"
    " discriminator_weight discriminator_start_epoch"
).below("args")


def official_parts(text: str) -> dict[str, float]:
    """ "lpips-convnext_s-1.0-0.1" -> {"lpips": 1.0, "convnext_s": 0.1}."""
    words = text.split("-")
    names = [word for word in words if not re.fullmatch(r"[\d.]+", word)]
    numbers = [float(word) for word in words if re.fullmatch(r"[\d.]+", word)]
    return dict(zip(names, numbers or [1.0] * len(names), strict=True))


def build_objective(case: Case) -> Objective:
    config, args = case.config, case.config["args"]
    settings = {
        "lpips": {"widths": config["lpips_widths"]} if "lpips_widths" in config else {},
        "convnext_s": {"blocks": config.get("convnext_blocks"), "classes": config.get("convnext_classes", 1000)},
    }
    parts = official_parts(args.get("perceptual_loss", "lpips-convnext_s-1.0-0.1"))
    # The recorded features are those that the official loss is given: of the masked tokens, if it looks at those alone.
    if args.get("sem_target", "rec+align") not in ("rec+align", "reconstruction"):
        raise FieldError(f"sem_target {args['sem_target']}: rec+align or reconstruction")
    objective = Objective(
        weights={
            "reconstruction": args.get("reconstruction_weight", 1.0),
            "perceptual": 1.0,  # builds the networks, whose distances are recorded whatever they weigh
            "semantic": args.get("sem_weight", 1.0),
            "kl": args.get("kl_weight", 1e-6),
            "gan": args.get("discriminator_weight", 0.1),
        },
        perceptual={name: {"weight": weight, "pretrained": False, **settings[name]} for name, weight in parts.items()},
        semantic_loss=args.get("sem_loss_type", "cosine"),
        gan_start_epoch=args.get("discriminator_start_epoch", 0),
        log_variance=case.weights["logvar"].item(),
    )
    objective.weights["perceptual"] = args.get("perceptual_weight", 1.0)
    for name, theirs in (("lpips", "perceptual_loss.lpips."), ("convnext_s", "perceptual_loss.convnext.")):
        if name not in objective.perceptual.parts:
            continue
        part, weights = objective.perceptual.parts[name], below(case.weights, theirs)
        if name == "convnext_s":
            part.network.load_state_dict(weights)
        else:
            weights = {re.sub(r"net\.slice\d\.", "backbone.", key): tensor for key, tensor in weights.items()}
            weights = {re.sub(r"lin(\d)\.model\.1\.", r"heads.\1.", key): tensor for key, tensor in weights.items()}
            part.load_state_dict({k: v for k, v in weights.items() if not k.startswith("scaling_layer.")})
    return objective


def masked_features(case: Case) -> dict[str, Tensor]:
    """The inputs, with features of masked tokens where the fixture has those of all and says which are masked."""
    inputs, places = dict(case.inputs), case.inputs.get("ids_masked")
    if case.config["args"].get("sem_target", "rec+align") == "reconstruction" and places is not None:
        for name in ("sem", "pred_sem"):
            if inputs[name].shape[1] != places.shape[1]:
                inputs[name] = inputs[name].gather(1, places[..., None].expand(-1, -1, inputs[name].shape[-1]))
    return inputs


@kind("rectok", "loss", LOSS)
def loss(case: Case) -> dict[str, Tensor]:
    objective, inputs = build_objective(case), masked_features(case)
    blocks = sum(1 for name in below(case.weights, "discriminator.main.") if name.endswith("running_mean"))
    discriminator = PatchGAN(case.config["disc_ndf"], n_layers=blocks)
    discriminator.load_state_dict(below(case.weights, "discriminator."))
    out: dict[str, Tensor] = {}

    with torch.no_grad():
        parts = objective.perceptual.parts
        if "lpips" in parts:
            out["lpips_per_image"] = parts["lpips"](inputs["target"], inputs["recon"])
        if "convnext_s" in parts:
            out["convnext_logits"] = parts["convnext_s"].logits(inputs["target"])
            out["convnext_input"] = parts["convnext_s"].pixels(inputs["target"])[:1, :, ::8, ::8]
        out["perceptual_raw"] = objective.perceptual(inputs["target"], inputs["recon"])

    for epoch in case.config["epochs"]:
        progress = Progress(images_seen=epoch, total_images=1000, images_per_epoch=1, step=0)
        weights = objective.weights

        images = inputs["target"] * 2 - 1  # fixtures hold the [0, 1] that the loss sees
        recon01, moments, predicted = (inputs[n].clone().requires_grad_() for n in ("recon", "moments", "pred_sem"))
        recon = Recon(recon01 * 2 - 1, {"kl": Posterior(moments).kl().mean()}, {"dinov3": predicted})
        result = objective.generator_loss(images, recon, {"dinov3": inputs["sem"]}, discriminator, progress)
        result.total.backward()
        logs, active = result.logs, objective.gan_active(progress)
        reconstruction = (
            weights["reconstruction"] * logs["reconstruction"]
        )  # theirs is reported so, and PSNR taken from it
        out |= {
            f"ep{epoch}/gen/{name}": value
            for name, value in {
                "reconstruction_loss": reconstruction,
                "perceptual_loss": weights["perceptual"] * logs["perceptual"],
                "psnr": -10 * torch.log10(reconstruction),  # theirs is of the whole batch, ours per picture
                "sem_loss": weights["semantic"] * logs["semantic"],
                "kl_loss": weights["kl"] * logs["kl"],
                "gan_loss": logs["gan"],
                "weighted_gan_loss": logs["gan_weight"] * logs["gan"],
                "d_weight": torch.tensor(weights["gan"]),
                "discriminator_factor": torch.tensor(float(active)),
                "total_loss": logs["total"],
                "total": result.total,
                "grad_recon": recon01.grad,
                "grad_moments": moments.grad,
                "grad_pred_sem": predicted.grad,
            }.items()
        }

        discriminator.zero_grad()
        result = objective.discriminator_loss(images, recon.images, discriminator, progress)
        result.total.backward()
        first, last = discriminator.main[0].weight, discriminator.main[-1].weight
        out |= {
            f"ep{epoch}/disc/{name}": value
            for name, value in {
                "discriminator_loss": result.logs["discriminator"],
                "logits_real": result.logs["logits_real"],
                "logits_fake": result.logs["logits_fake"],
                "total": result.total,
                "grad_first": first.grad,
                "grad_last": last.grad,
            }.items()
        }
    return out


def build_teacher(case: Case) -> DINOv3Teacher:
    """The teacher of a fixture, with its weights."""
    config = case.config["teacher"]
    sizes = {name: value for name, value in config["dinov3"].items() if name in (*BACKBONE.split(), "image_size")}
    teacher = DINOv3Teacher(pretrained=False, processor_size=config.get("processor_size", 224), **sizes)
    teacher.load_weights(below(case.weights, "sem_foundation_models.dinov3."))
    return teacher


@kind("rectok", "teacher", TOKENIZER | TEACHER)
def teacher(case: Case) -> dict[str, Tensor]:
    teacher, images = build_teacher(case), case.inputs["x"]
    decoder = build_tokenizer(case).sem_decoders["dinov3"]
    with torch.no_grad():
        pixels = teacher.pixels(images)
        return {
            "image_uint8": to_uint8(images),
            "processor_pixels": teacher.processed(images),
            "teacher_pixels": pixels,
            "last_hidden_state": teacher.backbone.forward_features(pixels),
            "sem_feature": teacher(images),
            "pred_sem_feature": decoder(case.inputs["z"]),
        }
