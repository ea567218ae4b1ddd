"""reAR and RAR: teacher-forced logits, losses and gradients, optimiser steps, sampling with guidance, schedules."""

from __future__ import annotations

import torch
from torch import Tensor

from core.images import to_uint8, to_unit_range
from core.schema import Duration, OptimizerConfig, ScheduleConfig
from core.specs import Guidance, Loss, Progress
from core.train.ema import warmed
from core.train.optim import Schedule, make_adamw
from generator.adapters import ADAPTERS
from generator.ar.llama import run_blocks
from generator.ar.rar import RAR
from generator.ar.rear import annealed, perturb
from generator.guidance import scales
from tests.parity import Case, kind
from tests.parity.fields import FieldError, notes, reads
from tests.parity.rear_tokenizers import MASKGIT, build_maskgit
from tests.parity.recorded_draws import RecordedDraws
from tests.parity.rectok_models import below
from tokenizer.adapters import ADAPTERS as TOKENIZER_ADAPTERS

ADAPTER = ADAPTERS["rar"]
NETWORK = reads("vq_model.codebook_size vq_model.num_latent_tokens class_label_dropout") | (
    reads(
        "hidden_size num_hidden_layers num_attention_heads intermediate_size dropout attn_drop image_seq_len"
        " condition_num_classes perturb_mode transition_alignment transition_alignment_weight encode_align decode_align"
        " encode_align_layer_idx decode_align_layer_idx projection_dim z_dim"
    )
    | notes("ways to compute the same", "use_checkpoint kv_cache")
    | notes("given to the call", "randomize_temperature guidance_scale guidance_scale_pow class_label_dropout")
    | notes("the call is told where the annealing stands", "randomness_anneal_start randomness_anneal_end")
).below("generator")
TRAINED = NETWORK | reads("random_ratio")
SAMPLED = (
    NETWORK
    | notes("of training", "random_ratio")
    | (reads("guidance_scale randomize_temperature guidance_scale_pow") | notes("computes the same", "kv_cache")).below(
        "sampling"
    )
)


def build(case: Case, weights: dict[str, Tensor] | None = None) -> RAR:
    """From the official constructor arguments; the annealing runs over the whole of what `progress` says."""
    args, vq = case.config["generator"], case.config["vq_model"]
    layers, rear = args["num_hidden_layers"], None
    if vq.get("num_latent_tokens", args["image_seq_len"]) != args["image_seq_len"]:
        raise FieldError(f"sequences of {args['image_seq_len']} for pictures of {vq['num_latent_tokens']} codes")
    given = {
        name: args.get(name)
        for name in (
            "encode_align",
            "decode_align",
            "encode_align_layer_idx",
            "projection_dim",
            "decode_align_layer_idx",
            "transition_alignment_weight",
            "z_dim",
        )
    }
    if "perturb_mode" in args:
        aligned = args.get("transition_alignment", False)
        index = {
            part: given[f"{part}_align_layer_idx"] if aligned and given[f"{part}_align"] in (None, True) else None
            for part in ("encode", "decode")
        }
        if index["encode"] == index["decode"]:  # the official code then silently skips the decode head
            index["decode"] = None
        # The official code builds a head on a layer that does not exist; it never runs, so the other one stands in for it.
        rear = {
            f"{part}_layer": layer if layer is not None and layer < layers else None for part, layer in index.items()
        }
        mode = args["perturb_mode"]
        rear |= {
            "noise": mode if mode in ("switch", "mask") else "none",
            "anneal": [0.0, 1.0],
            "weight": args.get("transition_alignment_weight", 1.0),
            "projection": args.get("projection_dim", 2048),
        }
    model = RAR(
        size={
            "width": args["hidden_size"],
            "layers": layers,
            "heads": args["num_attention_heads"],
            "hidden": args["intermediate_size"],
        },
        length=args["image_seq_len"],
        vocab=vq["codebook_size"],
        num_classes=args["condition_num_classes"],
        label_drop=case.config["class_label_dropout"],
        dropout=args["dropout"],
        attention_dropout=args["attn_drop"],
        code_dim=args.get("z_dim", 256),
        rear=rear,
        permute=None if rear else [0.0, 1.0],
    )
    ADAPTER.load(model, weights or case.weights)
    if model.alignment is not None and "codebook" in case.inputs:
        model.alignment.set_codebook(case.inputs["codebook"][:, None])
    return model


def ratio(value: float) -> Progress:
    """A point of the run at which an annealing over all of it stands at `value`."""
    return Progress(1 - value, 1, 1, 0)


def recorded(inputs: dict[str, Tensor], vocab: int) -> RecordedDraws:
    names = {
        "label_drop_u": "label_drop",
        "noise_ratio_u": "noise_ratio",
        "noise_select_u": "noise_select",
        "order_u": "order",
    }
    draws = {ours: inputs[theirs] for theirs, ours in names.items() if theirs in inputs}
    draws = {name: value[..., None] if name == "noise_select" else value for name, value in draws.items()}
    if "noise_ratio" in draws:
        draws["noise_ratio"] = draws["noise_ratio"].flatten()
    if "noise_tokens" in inputs:  # as the uniform numbers that give these codes
        draws["noise_code"] = (inputs["noise_tokens"][..., None].double() + 0.5) / vocab
    if "perms" in inputs:  # as numbers whose sorted order is this permutation
        draws["permutation"] = inputs["perms"].argsort(-1).double() / inputs["perms"].shape[-1]
    return RecordedDraws(draws)


def official(model: RAR, values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = dict(zip(model.state_dict(keep_vars=True), ADAPTER.restore(model)))
    return {f"{prefix}/{names[name]}": value for name, value in values.items()}


def training(case: Case, loss: Loss, model: RAR, progress: Progress) -> dict[str, Tensor]:
    """What a training step leaves behind, and the network's outputs in between."""
    codes, labels, draws = case.inputs["tokens"], case.inputs["class_id"], recorded(case.inputs, model.vocab)
    loss.total.backward()
    result = official(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, "grad")
    dropped = model.drop_labels(labels, draws)
    order = None if model.permute is None else model.orders(len(labels), draws, annealed(progress, *model.permute))
    wanted = codes if order is None else codes.gather(1, order)
    given = wanted
    if model.rear is not None and model.rear.noise != "none":
        mask = model.vocab if model.rear.noise == "mask" else None
        given, selected = perturb(wanted[..., None], draws, annealed(progress, *model.rear.anneal), model.vocab, mask)
        given, result["perturb_mask"] = given[..., 0], selected[..., 0]
    taps = model.alignment.taps() if model.alignment is not None else None
    with torch.no_grad():
        x, condition = model.slots(given, dropped, order)
        x = run_blocks(model.blocks, x, condition, taps=taps)
        result |= {
            "logits": model.logits(x[:, 1:], condition[:, 1:]),
            "labels": wanted,
            "condition_ids": model.condition_ids(dropped),
        }
        for part in ("encode", "decode"):
            if model.alignment is not None and getattr(model.alignment, part) is not None:
                result[f"{part}_z"] = getattr(model.alignment, part)(taps[getattr(model.rear, f"{part}_layer")])
    result |= {
        "loss": loss.total[None],
        "ar_loss": loss.logs["ce"][None],
        "correct_tokens": loss.logs["accuracy"][None],
        "proj_loss": loss.logs.get("alignment", torch.zeros(()))[None],
    }
    return result


@kind("rear", "rear_train", TRAINED)
@kind("rear", "rar_train", TRAINED)
def train_forward(case: Case) -> dict[str, Tensor]:
    model, progress = build(case).train(), ratio(case.config["random_ratio"])
    loss = model(
        case.inputs["tokens"][..., None], case.inputs["class_id"], recorded(case.inputs, model.vocab), progress
    )
    return training(case, loss, model, progress)


@kind(
    "rear",
    "rear_steps",
    NETWORK
    | reads(
        "steps anneal_end max_grad_norm optimizer.learning_rate optimizer.beta1"
        " optimizer.beta2 optimizer.weight_decay optimizer.eps lr_scheduler.name lr_scheduler.max_train_steps"
        " lr_scheduler.warmup_steps lr_scheduler.end_lr"
    )
    | notes("annealed by the step", "random_ratio"),
)
def rear_steps(case: Case) -> dict[str, Tensor]:
    """Steps as the trainer takes them: groups, clipping, schedule, annealed noise."""
    config, model = case.config, build(case).train()
    optimizer = OptimizerConfig(
        lr=config["optimizer"]["learning_rate"],
        weight_decay=config["optimizer"]["weight_decay"],
        betas=[config["optimizer"]["beta1"], config["optimizer"]["beta2"]],
        eps=config["optimizer"].get("eps", 1e-8),
    )
    rates = schedule(
        {
            "name": config["lr_scheduler"].get("name", "cosine"),
            "base_lr": optimizer.lr,
            "end_lr": config["lr_scheduler"]["end_lr"],
            "warmup": config["lr_scheduler"]["warmup_steps"],
            "total": config["lr_scheduler"]["max_train_steps"],
        }
    )
    adamw, result = make_adamw(model, optimizer), {"losses": [], "grad_norms": [], "lrs": []}
    for step in range(config["steps"]):
        inputs = {name: value if name == "codebook" else value[step] for name, value in case.inputs.items()}
        progress = Progress(step, config["anneal_end"], 1, step)
        loss = model(inputs["tokens"][..., None], inputs["class_id"], recorded(inputs, model.vocab), progress).total
        adamw.zero_grad()
        loss.backward()
        for group in adamw.param_groups:
            group["lr"] = rates(step)
        result["losses"].append(loss.detach())
        result["grad_norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), config["max_grad_norm"]))
        result["lrs"].append(torch.tensor(rates(step), dtype=torch.float64))
        adamw.step()
    return {
        **{name: torch.stack(values) for name, values in result.items()},
        **official(model, model.state_dict(), "after"),
    }


@kind("rear", "gen", SAMPLED)
def generate(case: Case, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Sampled as the user does, with the cache; without recorded numbers the likeliest codes."""
    model, sampling, labels = build(case, weights).eval(), case.config["sampling"], case.inputs["class_id"]
    guidance = Guidance(sampling["guidance_scale"], schedule="cosine", power=sampling["guidance_scale_pow"])
    trace: list = []
    noise = case.inputs.get("sample_u")
    if noise is None:
        noise = torch.full((len(labels), model.length, model.vocab), 1.0)  # argmax of probability / 1
    ids = model.sample(
        labels,
        RecordedDraws({"codes": noise.unsqueeze(2)}),
        guidance,
        temperature=sampling["randomize_temperature"],
        trace=trace,
    )
    return {"ids": ids[..., 0], "probs": torch.stack([p for _, p in trace], 1)}


def schedule(recipe: dict) -> Schedule:
    """Learning rate per step: one picture per step."""
    settings = ScheduleConfig(recipe["name"], Duration(f"{recipe['warmup']}step"), recipe["end_lr"])
    return Schedule.from_config(
        OptimizerConfig(lr=recipe["base_lr"]),
        settings,
        global_batch=1,
        images_per_epoch=1,
        total_images=recipe["total"],
    )


@kind(
    "rear",
    "sched",
    reads("anneal.* lr.*.name lr.*.total lr.*.warmup lr.*.base_lr lr.*.end_lr cfg.*.n cfg.*.scale cfg.*.pow"),
)
def schedules(case: Case) -> dict[str, Tensor]:
    steps, result = case.inputs["steps"].tolist(), {}
    for name, (start, end) in case.config["anneal"].items():
        total = max(max(steps), end) + 1
        values = [annealed(Progress(step, total, 1, step), start / total, end / total) for step in steps]
        result[f"random_ratio/{name}"] = torch.tensor(values, dtype=torch.float64)
    for name, recipe in case.config["lr"].items():
        rates = schedule(recipe)
        result[f"lr/{name}"] = torch.tensor([rates(step) for step in steps], dtype=torch.float64)
    for name, recipe in case.config["cfg"].items():
        guidance = Guidance(recipe["scale"], schedule="cosine", power=recipe["pow"])
        result[f"cfg_scale/{name}"] = scales(guidance, recipe["n"])[:, 0]
    decays = [warmed(0.999, n) for n in case.inputs["ema_steps"].tolist()]
    return result | {"ema_decay": torch.tensor(decays, dtype=torch.float64)}


@kind("rear", "e2e", SAMPLED | MASKGIT.below("tokenizer"))
def end_to_end(case: Case) -> dict[str, Tensor]:
    """From labels to pixels, with the weights of both networks."""
    tokenizer = build_maskgit(case.config["tokenizer"])
    case.config["tokenizer"].get("commitment_cost")  # of training
    TOKENIZER_ADAPTERS["maskgit_vqgan"].load(tokenizer, below(case.weights, "tokenizer."))
    sampled = generate(case, below(case.weights, "generator."))
    with torch.no_grad():
        pictures = tokenizer.eval().decode(sampled["ids"][..., None])
    return {
        **sampled,
        "float_nchw": to_unit_range(pictures, clamp=True),
        "uint8_nhwc": to_uint8(pictures).permute(0, 2, 3, 1),
    }
