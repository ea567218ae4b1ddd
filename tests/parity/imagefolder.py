"""ImageFolder's tokenizer: the quantiser, the whole model in use and in training, adapters."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core.specs import Progress
from tests.parity import Case, kind
from tests.parity.fields import NOTE, FieldError, notes, only, reads
from tests.parity.recorded_draws import RecordedDraws
from tests.parity.rectok_models import below
from tokenizer.adapters.imagefolder import ADAPTER
from tokenizer.multiscale.imagefolder import ImageFolder
from tokenizer.multiscale.quantizer import MultiScaleQuantizer
from tokenizer.teachers import DINOv2ClassTeacher

MODEL = (
    reads(
        "codebook_size codebook_embed_dim v_patch_nums semantic_guide num_latent_tokens encoder_model decoder_model"
        " product_quant codebook_drop start_drop share_quant_resi clip_norm sem_loss_scale sem_loss_weight"
    )
    | only(
        enc_type="dinov2",
        dec_type="dinov2",
        detail_guide=["none", None],
        abs_pos_embed=True,
        dropout_p=0.0,
        norm_type=["none", None],
    )
    | notes("builds an unused layer only", "half_sem")
    | notes(
        "the official multi-scale quantiser does not take them",
        "codebook_l2_norm codebook_show_usage commit_loss_beta entropy_loss_ratio",
    )
)
TINY = reads("img_size patch_size embed_dim depth num_heads") | only(drop_path_rate=0.0)
TOKENIZER = NOTE | only(factory="VQ_models['VQ-16']") | MODEL.below("model_args") | TINY.below("tiny_overrides")
EVALUATED = TOKENIZER | notes("in train mode only", "tiny_overrides.drop_path_rate model_args.dropout_p")
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def trunk_size(timm_name: str, tiny: dict[str, Any]) -> dict[str, int]:
    width, layers, heads = next(size for name, size in SIZES.items() if f"_{name}_" in timm_name)
    return {
        "width": tiny.get("embed_dim", width),
        "layers": tiny.get("depth", layers),
        "heads": tiny.get("num_heads", heads),
    }


def build_tokenizer(config: dict[str, Any], weights: dict[str, Tensor], **settings: Any) -> ImageFolder:
    """Ours for a fixture's {model_args, tiny_overrides}; every weight of the fixture must find its place."""
    args, tiny = config["model_args"], config.get("tiny_overrides", {})
    branches, scales = args.get("product_quant", 1), args["v_patch_nums"]
    if args.get("num_latent_tokens", scales[-1] ** 2) != scales[-1] ** 2:
        raise FieldError(f"num_latent_tokens {args['num_latent_tokens']} is not the last scale, squared")
    tokenizer = ImageFolder(
        image_size=tiny.get("img_size", 256),
        patch_size=tiny.get("patch_size", 16),
        encoder=trunk_size(args["encoder_model"], tiny),
        decoder=trunk_size(args["decoder_model"], tiny),
        latent_grid=scales[-1],
        scales=scales,
        branches=branches,
        vocab=args["codebook_size"],
        code_dim=args["codebook_embed_dim"],
        quantizer="plain" if len(scales) == 1 else "residual",
        shared_phi=args.get("share_quant_resi", 4),
        commitment="sum",
        codebook_drop=args.get("codebook_drop", 0.0),
        start_drop=min(args.get("start_drop", 1), len(scales)),
        semantic={
            "teachers": {"dinov2_patch16": tiny.get("embed_dim", 768)},
            "scale": args.get("sem_loss_scale", 1.0),
            "normalise": args.get("clip_norm", False),
        }
        if args.get("semantic_guide") == "dinov2"
        else None,
        drop_path=0.0,
        **settings,
    )
    args.get("sem_loss_weight")  # read where there are losses
    ADAPTER.load(tokenizer, weights)
    return tokenizer


def build_teacher(config: dict[str, Any], weights: dict[str, Tensor]) -> DINOv2ClassTeacher:
    args, tiny = config["model_args"], config.get("tiny_overrides", {})
    teacher = DINOv2ClassTeacher(
        tiny.get("img_size", 256), tiny.get("patch_size", 16), trunk_size(args["encoder_model"], tiny), pretrained=False
    )
    teacher.backbone.load_state_dict(weights)
    return teacher


def official_gradients(model: ImageFolder) -> dict[str, Tensor]:
    """Gradients under the names of the official parameters, "grad/..."."""
    with torch.no_grad():
        for parameter in model.parameters():  # the exporter renames values: let it rename gradients
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return {f"grad/{name}": value for name, value in ADAPTER.restore(model).items()}


# -- the quantiser ----------------------------------------------------------------------------------------------------
def build_quantizer(case: Case) -> MultiScaleQuantizer:
    config = case.config
    if config.get("num_latent_tokens", config["v_patch_nums"][-1] ** 2) != config["v_patch_nums"][-1] ** 2:
        raise FieldError(f"num_latent_tokens {config['num_latent_tokens']} is not the last scale, squared")
    quantizer = MultiScaleQuantizer(
        config["vocab_size"],
        config["Cvae"],
        tuple(config["v_patch_nums"]),
        1,
        shared_phi=config["share_quant_resi"],
        phi_ratio=abs(config.get("quant_resi", 0.5)),
        cosine=config["using_znorm"],
    )
    state = ADAPTER.rename({f"quantize.{name}": value for name, value in case.weights.items()})
    state = {name.removeprefix("quantizer."): value for name, value in state.items()}
    quantizer.load_state_dict({**state, "quantizes.0.updates": torch.zeros((), dtype=torch.int64)})
    return quantizer


@kind(
    "imagefolder",
    "quantizer",
    reads("vocab_size Cvae using_znorm beta v_patch_nums share_quant_resi quant_resi num_latent_tokens codebook_drop"),
)
def quantizer(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    scales, beta = config["v_patch_nums"], config.get("beta", 0.25)
    dropped = int(len(inputs["features"]) * config["codebook_drop"])
    kept = inputs["n_scales_kept"].clone()
    kept[dropped:] = len(scales)
    out: dict[str, Tensor] = {}
    for convention in ("xqgan", "seed_release"):
        model = build_quantizer(case)
        features = inputs["features"].clone().requires_grad_()
        found = model(features[:, None], kept, update_usage=True)
        f_hat, codebook = found.features[:, 0], found.codebook_loss
        commitment = beta * found.commitment_sum / (len(scales) if convention == "seed_release" else 1)
        (codebook + commitment + 0.1 * f_hat.square().mean()).backward()
        branch = model.quantizes[0]
        out |= {
            f"{convention}_{name}": value
            for name, value in {
                "f_hat": f_hat,
                "vq_loss": codebook,
                "commit_loss": commitment,
                "total_loss": codebook + commitment,
                "grad_features": features.grad,
                "grad_codebook": branch.embedding.weight.grad,
                "hit_buffer_after": branch.ema_vocab_hit_SV,
                "usage_percent": model.usage(len(features))[0],
            }.items()
        }
    model = build_quantizer(case)
    with torch.no_grad():
        codes = model.encode(inputs["features"][:, None])
        maps = model.partial_maps(codes)
        following = [model.inputs(f_hat, s + 1) for s, f_hat in enumerate(maps)]  # after the last scale the map itself
    return {
        **out,
        "indices": codes[..., 0],
        "f_hat_per_scale": torch.cat(maps, dim=1),
        "embed_to_fhat_last": maps[-1][:, 0],
        "var_input": torch.cat(following[:-1], dim=1),
        "next_inputs": torch.cat(following, dim=1).transpose(1, 2),
    }


# -- the tokenizer ------------------------------------------------------------------------------------------------------
@kind("imagefolder", "tok_eval", EVALUATED)
@torch.no_grad()
def tok_eval(case: Case) -> dict[str, Tensor]:
    images = case.inputs["image"]
    tokenizer = build_tokenizer(case.config, case.weights).eval()
    codes = tokenizer.encode(images)
    maps = tokenizer.quantizer.partial_maps(codes)
    decoded = tokenizer.decode(codes)
    tokens = tokenizer.encoder(images)
    out = {
        "encoder_tokens": tokens,
        "quant_conv_out": tokenizer.quant_conv(tokens.transpose(1, 2)[..., None]),
        "f_hat": maps[-1].flatten(1, 2),
        "decoded_unclamped": decoded,
        "reconstruction": decoded.clamp(-1, 1),
        "fhat_to_img": tokenizer.decode_features(maps[-1]).clamp(-1, 1),
        "reconstruction_per_scale": torch.stack(tokenizer.previews(codes), dim=1).clamp(-1, 1),
        "semantic_branch_f_hat": tokenizer.probe_features(images)["last"]
        .transpose(1, 2)
        .unflatten(2, maps[-1].shape[-2:]),
        "var_input_from_indices": tokenizer.scale_inputs(codes),
    }
    for branch in range(tokenizer.branches):
        out[f"indices_branch{branch}"] = codes[..., branch]
        out[f"f_hat_per_scale_branch{branch}"] = torch.stack([f_hat[:, branch] for f_hat in maps], dim=1)
    if teacher_weights := below(case.weights, "semantic_model."):
        out["semantic_model_cls"] = build_teacher(case.config, teacher_weights)(images)[:, 0]
    return out


@kind(
    "imagefolder",
    "tok_lora_eval",
    EVALUATED
    | reads("enc_tuning_method dec_tuning_method lora.r lora.alpha trainable")
    | only(**{"lora.dropout": 0.0, "lora.fully_trained_copy": [["norm"]]})
    | notes("r, alpha and the names of the weights tell", "lora.target lora.scaling"),
)
@torch.no_grad()
def tok_lora_eval(case: Case) -> dict[str, Tensor]:
    """With adapters, and with adapters merged into the weights."""
    config, images = case.config, case.inputs["image"]
    methods = {"enc_tuning": config["enc_tuning_method"], "dec_tuning": config["dec_tuning_method"]}
    size = {"lora_rank": config["lora"]["r"], "lora_alpha": config["lora"]["alpha"]}
    adapted = build_tokenizer(config, case.weights, **methods, **size).eval()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    official = {re.sub("^semantic.*", "", name) for name in config.get("trainable", [])}
    expected = set(ADAPTER.rename(dict.fromkeys(official, torch.zeros(0))))
    if official and trained != expected:
        raise AssertionError(f"other parameters are trained: {sorted(trained ^ expected)[:8]}")
    merged = build_tokenizer(config, case.weights, **size).eval()
    out = {}
    for tokenizer in (merged, adapted):
        tokens = tokenizer.encoder(images)
        z = tokenizer.quant_conv(tokens.transpose(1, 2)[..., None])
        found = {"quant_conv_out": z, "reconstruction": tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)}
        for name, value in out.items():
            if (value - found[name]).abs().max() > 1e-4 * value.abs().max():
                raise AssertionError(f"merging the adapters changes {name}")
        out |= found
    return out


@kind("imagefolder", "tok_train", TOKENIZER | reads("epoch alpha_beta_delta"))
def tok_train(case: Case) -> dict[str, Tensor]:
    args, images = case.config["model_args"], case.inputs["image"]
    tokenizer = build_tokenizer(case.config, case.weights).train()
    if any(case.config.get("alpha_beta_delta", [0.0])[:2]):
        raise FieldError("latent perturbation (RobustTok's training) is not part of this tokenizer")
    scales, start, batch = len(args["v_patch_nums"]), tokenizer.start_drop, len(images)
    # Theirs drops the first ones, and with one branch nobody loses a scale but the contrast still leaves them out.
    first = (torch.arange(batch) >= int(batch * tokenizer.codebook_drop)).float()
    kept = torch.full((batch,), scales)
    if tokenizer.branches > 1 and "n_scales_kept" in case.inputs:
        kept = case.inputs["n_scales_kept"]
    draws = {"scales kept": (kept - start + 0.5) / (scales - start + 1), "quantizer dropout": first}
    features = None
    if tokenizer.semantic is not None:
        features = {"dinov2_patch16": build_teacher(case.config, below(case.weights, "semantic_model."))(images)}
    epoch = case.config.get("epoch", 0)
    recon = tokenizer(images, RecordedDraws(draws), features, Progress(epoch, 1000, 1, 0))
    codebook, commitment = recon.terms["codebook"], 0.25 * recon.terms["commitment"]
    semantic = args.get("sem_loss_weight", 0.1) * recon.terms.get("contrast", torch.zeros(()))
    mse = F.mse_loss(recon.images, images)
    total = mse + codebook + commitment + semantic
    total.backward()
    return {
        "vq_loss": codebook,
        "commit_loss": commitment,
        "sem_loss": semantic,
        "mse": mse,
        "total": total,
        "reconstruction": recon.images,
        "dependency_cosine_times_weight": torch.zeros(()),
        "codebook_usage_percent": tokenizer.quantizer.usage(batch).mean(0),
        **official_gradients(tokenizer),
    }
