"""ImageFolder's VAR: teacher-forced logits, one training step, progressive training, sampling, schedules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.images import to_unit_range
from core.schema import Duration, OptimizerConfig, ScheduleConfig
from core.specs import Guidance, Progress
from core.train.guards import StepGuard
from core.train.optim import Schedule, make_adamw, weight_decay_at
from generator.adapters.var import ADAPTER
from generator.guidance import per_branch
from generator.sampling import probabilities
from generator.var.var import VAR, Progressive
from tests.parity import Case, Tolerance, kind
from tests.parity.fields import NOTE, FieldError, notes, only, reads
from tests.parity.imagefolder import TOKENIZER, build_tokenizer
from tests.parity.recorded_draws import RecordedDraws
from tests.parity.rectok_models import below
from tokenizer.multiscale.imagefolder import ImageFolder

NETWORK = (
    reads("num_classes depth embed_dim num_heads mlp_ratio attn_l2_norm patch_nums cond_drop_rate shared_aln")
    | only(drop_path_rate=0.0, drop_rate=0.0, attn_drop_rate=0.0, norm_eps=1e-6, tau=4, cos_attn=True)
    | notes("ways to compute the same", "flash_if_available fused_if_available")
).below("var")
PAIR = NOTE | TOKENIZER.below("tokenizer") | NETWORK
CODES = reads("product_quant codebook_size codebook_embed_dim v_patch_nums").below("tokenizer.model_args")


def build_var(case: Case) -> VAR:
    args, tokenizer = case.config["var"], case.config["tokenizer"]["model_args"]
    if list(args["patch_nums"]) != list(tokenizer["v_patch_nums"]):
        raise FieldError("patch_nums of VAR are not the scales of its tokenizer")
    model = VAR(
        depth=args["depth"],
        width=args.get("embed_dim", 64 * args["depth"]),
        heads=args.get("num_heads", args["depth"]),
        mlp_ratio=args.get("mlp_ratio", 4.0),
        scales=args["patch_nums"],
        branches=tokenizer.get("product_quant", 1),
        vocab=tokenizer["codebook_size"],
        code_dim=tokenizer["codebook_embed_dim"],
        num_classes=args["num_classes"],
        label_drop=args.get("cond_drop_rate", 0.1),
        drop_path=args.get("drop_path_rate", 0.0),
        l2_norm=args.get("attn_l2_norm", True),
        shared_adaln=args.get("shared_aln", False),
    )
    ADAPTER.load(model, below(case.weights, "var/"))
    return model.eval()


def build_pair(case: Case) -> tuple[VAR, ImageFolder]:
    config = case.config["tokenizer"]
    config["model_args"].get("semantic_guide")  # the frozen teacher is left out of the weights
    config = config.replaced(model_args={**config["model_args"].values_, "semantic_guide": "none"})
    tokenizer = build_tokenizer(config, below(case.weights, "tokenizer/")).eval()
    model = build_var(case)
    model.bind(tokenizer)
    return model, tokenizer


def flat(logits: Tensor) -> Tensor:
    """(B, N, K, V) -> (B, N, K V), as official logits lie."""
    return logits.flatten(2)


def step_tolerance(case: Case, name: str) -> Tolerance:
    """A step moves untouched classes by 2e-6, through the weight decay alone: that must be seen."""
    return Tolerance(0.0, 1e-6) if name.startswith("after_step/") else case.tolerance


@kind(
    "imagefolder",
    "var_train_step",
    judge=step_tolerance,
    fields=PAIR
    | reads(
        "label_smooth prog_si optimizer.AdamW_betas optimizer.lr optimizer.weight_decay_D_group optimizer.grad_clip optimizer.eps"
    )
    | only(**{"optimizer.weight_decay_ND_group": 0.0})
    | notes("words", "nd_group"),
)
def var_train_step(case: Case) -> dict[str, Tensor]:
    model, tokenizer = build_pair(case)
    labels, settings = case.inputs["label"], case.config["optimizer"]
    codes = tokenizer.encode(case.inputs["image"])
    inputs = tokenizer.scale_inputs(codes)
    with torch.no_grad():
        dropped = model.drop_labels(labels, RecordedDraws({"label_drop": case.inputs["label_drop_uniform_eval"]}))
        logits = model.logits(inputs, dropped)
    out = {"teacher_input": inputs, "logits_eval": flat(logits)}
    for branch in range(model.branches):
        out[f"target_indices_branch{branch}"] = codes[..., branch]

    model.train().label_smoothing = case.config.get("label_smooth", 0.0)
    if (finest := case.config.get("prog_si", -1)) >= 0:  # the first stage of a progressive training
        model.progressive = Progressive(until=1.0, first=finest)
    loss = model(
        codes, labels, RecordedDraws({"label_drop": case.inputs["label_drop_uniform_train"]}), Progress(0, 1000, 1, 0)
    )
    loss.total.backward()
    optimizer = make_adamw(
        model,
        OptimizerConfig(
            betas=settings["AdamW_betas"], eps=settings["eps"], weight_decay=settings["weight_decay_D_group"]
        ),
    )
    for group in optimizer.param_groups:
        group["lr"] = settings["lr"]
    trained = dict(model.named_parameters())
    guard = StepGuard(list(trained), list(trained.values()), settings["grad_clip"])
    norm = guard.before_step(optimizer, 0)
    optimizer.step()
    out |= {
        "train_loss": loss.total,
        "grad_norm_before_clip": norm,
        "metric_Lm": loss.logs["loss_mean"],
        "metric_Lt": loss.logs["loss_tail"],
        "metric_Accm": loss.logs["acc_mean"],
        "metric_Acct": loss.logs["acc_tail"],
    }
    return out | {f"after_step/{name}": value for name, value in ADAPTER.restore(model).items()}


@kind(
    "imagefolder", "var_progressive", NOTE | NETWORK | CODES | notes("logits know nothing else of it", "tokenizer.**")
)
@torch.no_grad()
def var_progressive(case: Case) -> dict[str, Tensor]:
    model, out = build_var(case), {}
    for name in case.outputs:
        finest = int(name.rsplit("_", 1)[1])
        uniform = case.inputs[f"label_drop_uniform_prog_si_{finest}"]
        labels = model.drop_labels(case.inputs["label"], RecordedDraws({"label_drop": uniform}))
        inputs = case.inputs["teacher_input_full"][:, : model.ends[finest] - model.ends[0]]
        out[name] = flat(model.logits(inputs, labels))
    return out


@kind(
    "imagefolder",
    "var_sample",
    PAIR
    | reads("cfg top_k top_p var.drop_path_rate")
    | notes("in train mode only", "tokenizer.tiny_overrides.drop_path_rate tokenizer.model_args.dropout_p"),
)
@torch.no_grad()
def var_sample(case: Case) -> dict[str, Tensor]:
    model, tokenizer = build_pair(case)
    branches = range(model.branches)

    def setting(name: str) -> list[Any]:
        return per_branch(case.config[name], model.branches, name)

    guidance = Guidance(tuple(1.0 + t for t in setting("cfg")), schedule="linear")
    seen: list[Tensor] = []

    def pick(scale: int, logits: Tensor) -> Tensor:
        start, end = (0, *model.ends)[scale], model.ends[scale]
        parts = zip(branches, setting("top_k"), setting("top_p"))
        found = torch.stack([probabilities(logits[:, :, k], 1.0, top_k, p) for k, top_k, p in parts], dim=2)
        seen.append(found)
        if "drawn_indices_branch0" in case.inputs:
            return torch.stack([case.inputs[f"drawn_indices_branch{k}"][:, start:end] for k in branches], dim=-1)
        return found.argmax(-1)

    codes, state = model.generate(case.inputs["label"], guidance, pick)
    f_hat = state.f_hat
    decoded = tokenizer.decode(codes)
    pictures = to_unit_range(decoded, clamp=True)
    out = {
        "f_hat": f_hat.flatten(1, 2),
        "image_01": pictures,
        "image_uint8_official_truncation": (pictures * 255).to(torch.uint8).permute(0, 2, 3, 1),
    }
    for k in branches:
        out[f"indices_branch{k}"] = codes[..., k]
        out[f"filtered_probs_branch{k}"] = torch.cat(seen, dim=1)[:, :, k]
    return out


def official_schedule(name: str, config: dict[str, Any]) -> Schedule:
    """The trainer's name of a schedule -> ours; a batch of one, so that images are iterations."""
    kind, hold, knee = {
        "cos": ("cosine", 0.0, 0.5),
        "lin00": ("linear", 0.0, 0.5),
        "lin0": ("linear", 0.05, 0.5),
        "lin": ("linear", 0.15, 0.5),
        "exp": ("exponential", 0.15, 0.5),
    }.get(name, ("bent", 0.0, float(name.removeprefix("lin") or 0.5) if name.startswith("lin") else 0.5))
    peak = config["peak_lr"]
    duration = Duration(f"{config['warmup_iters']}step")
    settings = ScheduleConfig(
        kind,
        duration,
        warmup_lr=peak * config["wp0"],
        min_lr=peak * config["wpe"],
        inclusive=True,
        hold=hold,
        knee=knee,
    )
    return Schedule.from_config(
        OptimizerConfig(lr=peak), settings, global_batch=1, images_per_epoch=1, total_images=config["max_iters"]
    )


@kind("imagefolder", "var_lr", reads("peak_lr wd wd_end warmup_iters max_iters wp0 wpe"))
def var_lr(case: Case) -> dict[str, Tensor]:
    """Our order of operations differs from theirs by rounding in double precision; anything more would be an error."""
    config, out = case.config, {}
    iterations = case.inputs["iteration"].tolist()
    for name, reference in case.outputs.items():
        if name == "wd":
            settings = OptimizerConfig(weight_decay=config["wd"], weight_decay_end=config["wd_end"])
            found = [weight_decay_at(settings, it / (config["max_iters"] - 1)) for it in iterations]
        else:
            schedule = official_schedule(name.removeprefix("lr_"), config)
            found = [schedule(it) for it in iterations]
        out[name] = torch.tensor(found, dtype=torch.float64)
        if not torch.allclose(out[name], reference, rtol=1e-9, atol=0):
            raise AssertionError(f"{name} differs by {((out[name] - reference) / reference).abs().max():.1e}")
    return out
