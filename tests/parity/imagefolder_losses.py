"""ImageFolder's discriminator side: DiffAugment, the DINO discriminator, the complete loss module, the linear probe."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core.nn.probe import LinearProbe
from core.specs import Progress, Recon
from tests.parity import Case, kind
from tests.parity.fields import NOTE, FieldError, notes, only, reads
from tests.parity.recorded_draws import RecordedDraws
from tests.parity.rectok_models import below
from tokenizer.losses import diffaug
from tokenizer.losses.dino_discriminator import DinoDiscriminator
from tokenizer.losses.discriminators import PatchGAN
from tokenizer.losses.objective import Objective

DINO = NOTE | reads("depth key_depths num_heads") | notes("the weights tell", "ks")
LOSS = (
    reads(
        "disc_type disc_weight disc_loss gen_loss lecam_loss_weight disc_adaptive_weight global_step disc_start"
        " fade_blur_schedule codebook_loss sem_loss reconstruction_weight perceptual_weight reconstruction_loss aug_prob"
    )
    | only(disc_in_channels=3)
    | notes("the official code ignores it", "codebook_weight")
    | notes("the weights tell", "disc_dim disc_num_layers image_size")
)


@kind("imagefolder", "diffaug", reads("prob cutout blur_schedules.*"))
@torch.no_grad()
def diff_augment(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    numbers = inputs["draw_7_B_1_1"].flatten(1)  # (7, B)
    return {
        f"augmented_{name}": diffaug.augment(
            inputs["image"],
            inputs["switch_draw_3"].tolist(),
            numbers,
            probability=config["prob"],
            cutout=config["cutout"],
            blur_amount=amount,
        )
        for name, amount in config["blur_schedules"].plain().items()
    }


def build_dino(config: dict[str, Any], weights: dict[str, Tensor]) -> DinoDiscriminator:
    """Sizes are in the weights, but for the number of heads: 3 in every reduced backbone."""
    backbone = below(weights, "backbone/")
    depth = config.get("depth", 1 + max(int(m[1]) for name in backbone if (m := re.match(r"blocks\.(\d+)\.", name))))
    depths = config.get("key_depths", [0, 2, 3])
    size = {"width": backbone["cls_token"].shape[-1], "layers": depth, "heads": config.get("num_heads", 3)}
    kernel = weights["heads.0.1.fn.0.weight_orig"].shape[-1]
    discriminator = DinoDiscriminator(size, depths, kernel, pretrained=False)
    own = discriminator.features.backbone.state_dict()
    discriminator.features.backbone.load_state_dict({name: backbone[name] for name in own})
    discriminator.load_state_dict({name: value for name, value in weights.items() if name.startswith("heads.")})
    return discriminator


@kind("imagefolder", "dino_disc", DINO)
def dino_disc(case: Case) -> dict[str, Tensor]:
    images = case.inputs["image"]
    discriminator = build_dino(case.config, case.weights).eval()
    out = {f"activation_{i}": x for i, x in enumerate(discriminator.features(images))}
    pictures = images.clone().requires_grad_()
    logits = discriminator(pictures)
    logits.mean().backward()
    out |= {"logits_eval": logits, "grad_image_of_mean_logit": pictures.grad}
    if "crop_top" in case.inputs:
        draws = {"dino crop": 0.0} | {f"dino crop {axis}": case.inputs[f"crop_{axis}"] for axis in ("top", "left")}
        out["logits_eval_crop"] = discriminator(images, RecordedDraws(draws))
    discriminator.train()
    out["logits_train_first_call"] = discriminator(images)
    out["weight_u_after_one_train_call_head0"] = discriminator.heads[0][0][0].weight_u
    return out


class _GanDraws(RecordedDraws):
    """Recorded draws of one use of the discriminator: "generator", "fake" or "real"."""

    NAMES = {"generator": "gen_fake", "fake": "disc_fake", "real": "disc_real"}

    def fork(self, name: str) -> RecordedDraws:
        suffix = self.NAMES[name]
        switches = self.recorded.get(f"aug_switch_{suffix}", torch.zeros(3))
        draws = {f"augment {what}": switch for what, switch in zip(("translation", "colour", "cutout"), switches)}
        if f"aug_draw_{suffix}" in self.recorded:
            draws["augment"] = self.recorded[f"aug_draw_{suffix}"].flatten(1).t()
        return RecordedDraws(draws)


def build_objective(case: Case, widths: list[int], start: int) -> Objective:
    config = case.config
    dino = config["disc_type"] == "dinodisc"
    kinds = {"hinge": "hinge", "vanilla": "vanilla", "non-saturating": "vanilla"}  # the last is cross-entropy there
    probability, blur = config.get("aug_prob", 1.0), config.get("fade_blur_schedule", 0.0)
    objective = Objective(
        weights={
            "reconstruction": config.get("reconstruction_weight", 1.0),
            "perceptual": config.get("perceptual_weight", 1.0),
            "gan": config["disc_weight"],
            "discriminator": config["disc_weight"],
            "codebook": 1.0,
            "commitment": 1.0,
            "entropy": 1.0,
            "contrast": 1.0,
        },
        perceptual={"lpips": {"weight": 1.0, "pretrained": False, "widths": widths}},
        pixels="signed",
        reconstruction={"l2": "mse", "l1": "l1"}[config.get("reconstruction_loss", "l2")],
        gan_start=f"{start}step",
        gan_loss=config["gen_loss"].replace("-", "_"),
        discriminator_loss=kinds[config["disc_loss"]],
        adaptive_weight=config["disc_adaptive_weight"],
        augment={"probability": probability} if dino else None,
        lecam=config["lecam_loss_weight"] or 0.0,
    )
    if dino:
        objective.augment.blur_amount = lambda since_start, progress: blur
    return objective


@kind("imagefolder", "vqloss", DINO | LOSS)
def vqloss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    if config["disc_type"] not in ("dinodisc", "patchgan"):
        raise FieldError(f"disc_type {config['disc_type']} has no recording: dinodisc or patchgan")
    dino = config["disc_type"] == "dinodisc"
    weights = below(case.weights, "discriminator.")
    if dino:
        backbone = {name: value for name, value in case.weights.items() if "backbone/" in name}
        backbone = {f"backbone/{name.split('backbone/')[1]}": value for name, value in backbone.items()}
        discriminator = build_dino(config, {**weights, **backbone}).train()
    else:
        blocks = sum(1 for name in weights if name.endswith("running_mean"))
        discriminator = PatchGAN(len(weights["main.0.weight"]), n_layers=blocks)
        discriminator.load_state_dict(weights)
    lpips = below(case.weights, "lpips/")
    last = {
        stage: max(int(m[1]) for name in lpips if (m := re.match(rf"net\.slice{stage}\.(\d+)\.weight", name)))
        for stage in range(1, 6)
    }
    widths = [len(lpips[f"net.slice{stage}.{index}.weight"]) for stage, index in last.items()]
    vq, commit, entropy = config["codebook_loss"]
    objective = build_objective(case, widths, config["disc_start"])
    network = objective.perceptual.parts["lpips"]
    state = {re.sub(r"net\.slice\d\.", "backbone.", key): tensor for key, tensor in lpips.items()}
    state = {re.sub(r"lin(\d)\.model\.1\.", r"heads.\1.", key): tensor for key, tensor in state.items()}
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("scaling_layer.")})

    step = config["global_step"]
    progress = Progress(step, 10 * step, 10 * step, step)
    last_layer = inputs["last_layer"].clone().requires_grad_()
    images = inputs["image"]
    recon = F.conv2d(inputs["last_feature"], last_layer[..., None, None])
    terms = {"codebook": vq, "commitment": commit, "entropy": entropy, "contrast": config["sem_loss"]}
    recorded = _GanDraws(inputs)
    painted = Recon(recon, {name: torch.tensor(float(value)) for name, value in terms.items()}, last_layer=last_layer)
    reported = None
    if not objective.gan_active(
        progress
    ):  # the official loss asks the discriminator all the same, and counts it 0 times
        opened = build_objective(case, widths, 0)
        opened.perceptual = objective.perceptual
        reported = opened.generator_loss(images, painted, {}, discriminator, progress, recorded)
    found = objective.generator_loss(images, painted, {}, discriminator, progress, recorded)
    found.total.backward()
    discriminator.zero_grad()
    judged = objective.discriminator_loss(images, recon, discriminator, progress, recorded, discriminator.fake_first)
    judged.total.backward()
    logs, weighed = found.logs, (reported or found).logs["gan_weight"] / (config["disc_weight"] or 1.0)
    with torch.no_grad():
        per_image = network((images + 1) / 2, (recon + 1) / 2).view(-1, 1, 1, 1)
    out = {
        "generator_loss": found.total,
        "discriminator_loss": judged.total,
        "grad_last_layer": last_layer.grad,
        "adaptive_weight": weighed,
        "lpips": logs["perceptual"],
        "lpips_per_image": per_image,
        "mse": logs["reconstruction"],
        "reconstruction": recon,
        **{f"grad_disc/{name}": p.grad for name, p in discriminator.named_parameters()},
    }
    if objective.settings.lecam:
        out["lecam_ema_real_fake"] = objective.lecam_means
    if dino:  # a bias in front of a normalisation: its gradient is rounding noise, theirs about 1e-8
        for name in case.outputs:
            if re.search(r"grad_disc/heads\.\d\.(0\.0|1\.fn\.0)\.bias", name):
                ours = out[name]
                if ours.abs().max() > 1e-6:
                    raise AssertionError(f"{name} should vanish but reaches {ours.abs().max():.1e}")
                out[name] = case.outputs[name]
    return out


@kind("imagefolder", "linear_probe", reads("in_dim out_dim"))
def linear_probe(case: Case) -> dict[str, Tensor]:
    probe = LinearProbe(case.config["in_dim"], case.config["out_dim"])
    probe.load_state_dict(case.weights)
    features = case.inputs["features"]
    with torch.no_grad():
        out = {"logits_eval_before": probe.eval()(features), "logits_train": probe.train()(features)}
    out["loss_train"] = F.cross_entropy(out["logits_train"], case.inputs["label"])
    return {**out, "running_mean_after": probe.bn.running_mean, "running_var_after": probe.bn.running_var}
