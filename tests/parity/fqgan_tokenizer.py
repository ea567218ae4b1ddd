"""FQGAN's tokenizers, their losses and discriminators. The quantiser is in fqgan_quantizer.py, FAR elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.images import to_model_range, to_uint8, to_unit_range
from core.nn.frozen import CLIP_MEAN, CLIP_STD, Frozen
from core.nn.lpips import LPIPS
from core.specs import Progress
from evaluation.images import psnr, ssim
from tests.parity import Case, kind
from tests.parity.fields import NOTE, FieldError, notes, only, reads
from tests.parity.fqgan_quantizer import to_maps
from tests.parity.recipe import recipe_weights
from tests.parity.rectok import gradients
from tests.parity.rectok_models import below
from tokenizer.adapters.fqgan import ADAPTER
from tokenizer.class_tokens import nearest_pixels
from tokenizer.losses.contrastive import info_nce
from tokenizer.losses.discriminators import PatchGAN, StyleGANDiscriminator
from tokenizer.losses.objective import Objective
from tokenizer.vq.fqgan import FQGAN

SURE = 1e-4  # index margin from which on an index must agree
TEACHERS = {
    "dual": {"clip": "sem"},
    "triple": {"dinov2_class": "sem_mid", "clip": "sem_high"},
}  # teacher -> sub-codebook
FEATURES = {"sem": "", "sem_mid": "_mid", "sem_high": "_high"}  # sub-codebook -> ending of recorded names
MODEL = (
    reads(
        "codebook_size codebook_embed_dim codebook_l2_norm encoder_ch_mult decoder_ch_mult z_channels"
        " with_clip_supervision"
    )
    | only(dropout_p=0.0)
    | reads("codebook_show_usage")
    | notes("of training", "commit_loss_beta entropy_loss_ratio with_disentanglement disentanglement_ratio")
)
CONSTANTS = NOTE | reads(
    "image_size grid ch num_res_blocks groupnorm_groups adapter_width adapter_layers adapter_heads"
    " feat_head_width feat_head_layers feat_head_heads"
)
TOKENIZER = reads("variant") | MODEL.below("ModelArgs") | CONSTANTS.below("scaled_down_constants")
EVALUATED = TOKENIZER | reads("ModelArgs.with_disentanglement ModelArgs.disentanglement_ratio")
LOSS = (
    reads(
        "disc_start disc_weight disc_dim disc_num_layers disc_type disc_loss gen_adv_loss image_size semantic_weight"
        " reconstruction_loss rec_loss reconstruction_weight perceptual_weight disc_adaptive_weight"
        " with_clip_supervision class_"
    )
    | only(disc_in_channels=3)
    | notes("the official code ignores it", "codebook_weight")
)
TRAINED = EVALUATED | reads("ModelArgs.commit_loss_beta ModelArgs.entropy_loss_ratio global_step") | LOSS.below("loss")


def build_tokenizer(case: Case) -> FQGAN:
    """The tokenizer of a fixture, with its weights where there are any."""
    config, args = case.config, case.config.get("ModelArgs", case.config)
    small = config.get("scaled_down_constants", {})
    branches = {"dual": 2, "triple": 3}[config["variant"]]
    size = {"VQ-16": "vq16", "VQ-8": "vq8"}.get(config.get("vq_model"), args.get("encoder_ch_mult", "vq16"))
    if args.get("with_clip_supervision") is False and any(n.startswith("feat_pred_head") for n in case.weights):
        raise FieldError("feature heads without supervision by CLIP")
    settings: dict[str, Any] = {
        "image_size": small.get("image_size", 256),
        "branches": branches,
        "size": size,
        "decoder_mult": args.get("decoder_ch_mult"),
        "channels": small.get("ch", 128),
        "res_blocks": small.get("num_res_blocks", 2),
        "groups": small.get("groupnorm_groups", 32),
        "z_channels": args.get("z_channels", 256),
        "vocab": args["codebook_size"],
        "code_dim": args["codebook_embed_dim"],
        "adapter_layers": small.get("adapter_layers", 6),
        "adapter_heads": small.get("adapter_heads", 8),
        "normalise": args.get("codebook_l2_norm", True),
    } | ({} if args.get("codebook_show_usage", True) else {"usage_window": 0})
    heads = {name: small.get(f"feat_head_{name}", default) for name, default in (("layers", 3), ("heads", 8))}
    small.get("feat_head_width")
    if args.get("with_clip_supervision"):
        widths = small.get("feat_head_width", 1024 if branches == 2 else [384, 768])
        widths = widths if isinstance(widths, list) else [widths]
        teachers = TEACHERS[config["variant"]]
        settings["semantic"] = {"teachers": dict(zip(teachers, widths, strict=True)), "branches": teachers, **heads}
    with torch.device("meta"):
        tokenizer = FQGAN(**settings)
    weights = {n: t for n, t in case.weights.items() if not n.startswith("discriminator.")}
    weights = weights or recipe_weights({n: t.shape for n, t in ADAPTER.restore(tokenizer).items()})
    ADAPTER.load(tokenizer, {name: tensor.float() for name, tensor in weights.items()})
    # The official constants that follow from others.
    given = {"adapter_width": small.get("adapter_width"), "grid": small.get("grid")}
    found = {
        "adapter_width": tokenizer.heads["vis"].adapter.positional_embedding.shape[1],
        "grid": tokenizer.spec.grid[0],
    }
    if wrong := [name for name, value in given.items() if value not in (None, found[name])]:
        raise FieldError(f"{wrong[0]} is {given[wrong[0]]} where the other sizes make it {found[wrong[0]]}")
    return tokenizer


def as_maps(tokens: Tensor, tokenizer: FQGAN) -> Tensor:
    """(B, L, D) -> (B, D, h, w)."""
    return to_maps(tokens.unflatten(1, tokenizer.spec.grid))


def sure(case: Case, name: str, codes: Tensor) -> Tensor:
    """Our codes where the fixture is sure of its own, and its own elsewhere."""
    recorded = case.outputs[f"indices_{name}"]
    return torch.where(case.outputs[f"index_margin_{name}"] > SURE, codes.flatten().to(recorded.dtype), recorded)


def disentanglement(case: Case) -> float:
    """The weight of that term."""
    args = case.config["ModelArgs"]
    ratio = args.get("disentanglement_ratio", 0.1)
    return ratio if args.get("with_disentanglement", True) else 0.0


def build_discriminator(case: Case) -> PatchGAN | StyleGANDiscriminator:
    loss = case.config["loss"]
    side = loss.get("image_size", 256)
    if loss.get("disc_type", "patchgan") == "stylegan":
        network = StyleGANDiscriminator(side)
    else:
        network = PatchGAN(loss["disc_dim"], n_layers=loss.get("disc_num_layers", 3))
    weights = below(case.weights, "discriminator.")
    network.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in weights.items()})
    return network


@kind("fqgan", "tok_eval", EVALUATED)
@torch.no_grad()
def tok_eval(case: Case) -> dict[str, Tensor]:
    tokenizer, images = build_tokenizer(case).eval(), case.inputs["image"]
    recon, codes = tokenizer(images, None), tokenizer.encode(images)
    vectors, maps = tokenizer.vectors(images), tokenizer.branch_maps(images)
    recorded = torch.stack([case.outputs[f"indices_{name}"].view(codes.shape[:2]) for name in tokenizer.names], dim=-1)
    from_codes = tokenizer.decode(recorded)
    out = {
        "recon_from_codes": from_codes,
        "recon_from_quant": recon.images,
        "recon_uint8": to_uint8(from_codes, "plus128").permute(0, 2, 3, 1),
        "disentangle_loss": disentanglement(case) * recon.terms["disentangle"],
    }
    for k, name in enumerate(tokenizer.names):
        quantized, z = recon.details["quantized"][name], vectors[name]
        margins = tokenizer.quantizers[name].distances(z).topk(2, largest=False).values.diff(dim=-1)
        out |= {
            f"encoder_{name}": maps[name],
            f"pre_quant_{name}": as_maps(z, tokenizer),
            f"quant_{name}": as_maps(quantized.values, tokenizer),
            f"indices_{name}": sure(case, name, codes[..., k]),
            f"index_margin_{name}": margins.flatten(),
        }
    for teacher, rows in recon.details["features"].items():
        out[f"feat_pred{FEATURES[tokenizer.semantic.branches[teacher]]}"] = rows
    return out


def build_objective(case: Case, teachers: int, start: int | None = None) -> Objective:
    """The official loss; its perceptual part is a recorded constant, which `tok_train` adds.

    Seen by a network: the last layer's gradients of what is reconstructed and of what the discriminator thinks, where
    the official adaptive weight is asked for.
    """
    loss, args = case.config["loss"], case.config["ModelArgs"]
    if not loss.get("with_clip_supervision", bool(teachers)) and teachers:
        raise FieldError("loss.with_clip_supervision is false, but the tokenizer predicts features")
    if "class_" in loss and case.config["variant"] not in loss["class_"]:
        raise FieldError(f"loss.class_ {loss['class_']} is not that of {case.config['variant']} codebooks")
    kind_of_error = loss.get("reconstruction_loss", loss.get("rec_loss", "l2"))
    semantic = loss.get("semantic_weight", 0.5) * teachers
    return Objective(
        weights={
            "reconstruction": loss.get("reconstruction_weight", 1.0),
            "codebook": 1.0,
            "commitment": args["commit_loss_beta"],
            "entropy": args["entropy_loss_ratio"],
            "disentangle": disentanglement(case),
            "semantic": semantic,
            "gan": loss["disc_weight"],
            "discriminator": loss["disc_weight"],
        },
        pixels="signed",
        semantic_loss="infonce",
        gan_start=f"{loss['disc_start'] if start is None else start}step",
        gan_loss=loss.get("gen_adv_loss", "hinge").replace("-", "_"),
        discriminator_loss="hinge" if loss.get("disc_loss", "hinge") == "hinge" else "vanilla",
        reconstruction={"l2": "mse", "l1": "l1"}[kind_of_error],
        adaptive_weight=loss.get("disc_adaptive_weight", False),
    )


def adaptive_weight(objective: Objective, logs: dict[str, Tensor]) -> Tensor:
    """Without the constant weight that ours includes; 1 where it is off."""
    if not objective.settings.adaptive_weight or not objective.weights["gan"]:
        return torch.ones(())
    return logs["gan_weight"] / objective.weights["gan"]


def _teacher_pixels(images: Tensor, *statistics: tuple[float, ...]) -> Tensor:
    """Every 16th pixel of what a teacher with this mean and std (default: ImageNet's) sees."""
    return Frozen(*statistics).normalise(nearest_pixels(images, 224))[:, :, ::16, ::16]


@kind("fqgan", "tok_train", TRAINED)
def tok_train(case: Case) -> dict[str, Tensor]:
    config, images = case.config, case.inputs["image"]
    loss, args = config["loss"], config["ModelArgs"]
    tokenizer = build_tokenizer(case).train()
    names, teachers = tokenizer.names, tokenizer.semantic.branches
    objective = build_objective(case, len(teachers))
    perceptual = loss.get("perceptual_weight", 1.0)
    beta, ratio, disentangle = args["commit_loss_beta"], args["entropy_loss_ratio"], disentanglement(case)
    discriminator = build_discriminator(case)
    progress = Progress(0, 1, 1, config["global_step"])  # the step that the official loss is told
    recorded = {"clip": case.inputs.get("teacher_clip_tokens"), "dinov2_class": case.inputs.get("teacher_dino_tokens")}
    features = {teacher: recorded[teacher][:, :1] for teacher in teachers}

    recon = tokenizer(images, None)
    reported = None
    if not objective.gan_active(
        progress
    ):  # the official loss asks the discriminator all the same, and counts it 0 times
        reported = build_objective(case, len(teachers), start=0).generator_loss(
            images, recon, features, discriminator, progress
        )
    result = objective.generator_loss(images, recon, features, discriminator, progress)
    reported = reported or result
    result.total.backward()
    fake = recon.images.detach()
    step = objective.discriminator_loss(images, fake, discriminator, progress)
    step.total.backward()
    grads = gradients(discriminator)
    norm = grads["grad_norm"]
    clip = (1.0 / (norm + 1e-6)).clamp(max=1.0)  # recorded after clipping

    logs = result.logs
    out = {
        "recon": recon.images,
        "rec_loss": logs["reconstruction"],
        "adv_loss_g": reported.logs["gan"],
        **dict.fromkeys(
            ("disc_adaptive_weight", "adaptive_weight", "d_weight"), adaptive_weight(objective, reported.logs)
        ),
        "disentangle_loss": disentangle * logs["disentangle"],
        "loss_generator": result.total + perceptual * case.inputs["perceptual_loss"].mean(),
        "loss_discriminator": step.total,
        "grad_norm_disc_before_clip": norm,
        "teacher_pixels_every_16th": _teacher_pixels(images, CLIP_MEAN, CLIP_STD),
        "dino_pixels_every_16th": _teacher_pixels(images),
    }
    out |= {f"grad_disc/{name.removeprefix('grad/')}": clip * g for name, g in grads.items() if name != "grad_norm"}
    out |= {f"disc_after/{name}": buffer for name, buffer in discriminator.named_buffers()}
    for name in names:
        out |= {
            f"vq_loss_{name}": logs[f"codebook/{name}"],
            f"commit_loss_{name}": beta * logs[f"commitment/{name}"],
            f"entropy_loss_{name}": ratio * logs[f"entropy/{name}"],
            f"usage_{name}": logs.get(f"usage/{name}", torch.zeros(())),
        }
        if tokenizer.quantizers[name].usage_window:
            out[f"codebook_used_tail/quantize_{name}"] = tokenizer.quantizers[name].codebook_used[-256:]
    for teacher, branch in teachers.items():
        ending = FEATURES[branch]
        out[f"feat_pred{ending}"] = recon.details["features"][teacher]
        out[f"semantic_loss{ending}"] = info_nce(recon.predictions[teacher][:, 0], features[teacher][:, 0])
    own = gradients(tokenizer)
    out["grad_norm_before_clip"] = own.pop("grad_norm")
    official = {tensor.data_ptr(): name for name, tensor in ADAPTER.restore(tokenizer).items()}
    out |= {f"grad/{official[p.data_ptr()]}": own[f"grad/{name}"] for name, p in tokenizer.named_parameters()}
    return out


@kind("fqgan", "full_tok", reads("vq_model variant codebook_size codebook_embed_dim with_clip_supervision"))
@torch.no_grad()
def full_tok(case: Case) -> dict[str, Tensor]:
    tokenizer, images = build_tokenizer(case).eval(), to_model_range(case.inputs["image_uint8"])
    vectors = tokenizer.vectors(images)
    out, recorded = {}, []
    for name in tokenizer.names:
        quantizer = tokenizer.quantizers[name]
        margins = quantizer.distances(vectors[name]).topk(2, largest=False).values.diff(dim=-1)
        out |= {
            f"pre_quant_{name}": as_maps(vectors[name], tokenizer),
            f"index_margin_{name}": margins.flatten(),
            f"indices_{name}": sure(case, name, quantizer.encode(vectors[name])),
        }
        recorded.append(case.outputs[f"indices_{name}"].long().view(len(images), -1))
    out["recon_every_4th"] = tokenizer.decode(torch.stack(recorded, dim=-1))[:, :, ::4, ::4]
    for teacher, predict in tokenizer.predictors.items():
        branch = tokenizer.semantic.branches[teacher]
        rows = predict(tokenizer.quantizers[branch](vectors[branch]).values)
        out[f"feat_pred{FEATURES[branch]}_cls"] = rows[:, 0]
    return out


@kind("fqgan", "discriminator", reads("image_size"))
@torch.no_grad()
def discriminator(case: Case) -> dict[str, Tensor]:
    network = StyleGANDiscriminator(case.config["image_size"])
    own = network.state_dict()
    network.load_state_dict(case.weights or {**own, **recipe_weights({n: t.shape for n, t in own.items()})})
    return {"logits": network(case.inputs["image"])}


@kind("fqgan", "lpips")
@torch.no_grad()
def lpips(case: Case) -> dict[str, Tensor]:
    network = LPIPS("vgg16", pretrained=False)
    names = {}  # official name -> ours; slice k ends with the k-th tapped layer
    for index, layer in enumerate(network.backbone):
        if hasattr(layer, "weight"):
            stage = 1 + sum(tap < index for tap in network.taps)
            names |= {f"net.slice{stage}.{index}.{part}": f"backbone.{index}.{part}" for part in ("weight", "bias")}
    names |= {f"lin{i}.model.1.weight": f"heads.{i}.weight" for i in range(len(network.heads))}
    own = network.state_dict()
    drawn = case.weights or recipe_weights({theirs: own[ours].shape for theirs, ours in names.items()})
    # "afterwards lin*.model.1.weight replaced by its absolute value"
    network.load_state_dict({names[n]: t.abs() if n.startswith("lin") else t for n, t in drawn.items()})

    def features(images: Tensor) -> list[Tensor]:
        x, found = network.normalise(images), []
        for index, layer in enumerate(network.backbone):
            x = layer(x)
            if index in network.taps:
                found.append(x)
        return found

    taps = features(case.inputs["image"])
    distance = network(case.inputs["image"] * 0.5 + 0.5, case.inputs["recon"] * 0.5 + 0.5)
    return {"lpips": distance.view(-1, 1, 1, 1), "relu1_2_mean": taps[0].mean(), "relu5_3_mean": taps[-1].mean()}


@kind("fqgan", "image_metrics", notes("what recorded it", "skimage"))
def image_metrics(case: Case) -> dict[str, Tensor]:
    original, recon = to_unit_range(case.inputs["image"]), to_uint8(case.inputs["decoded"], "plus128")
    as_file = recon.float() / 255.0
    return {
        "recon_uint8": recon.permute(0, 2, 3, 1),
        "psnr": psnr(original, as_file),
        "ssim": ssim(original, as_file, "ssim_llamagen").float(),
    }
