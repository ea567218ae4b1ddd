"""FAR: teacher-forced logits, losses and gradients; cached sampling with guidance; the filters on logits."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from core.specs import Guidance
from generator.adapters import ADAPTERS
from generator.adapters.far import RENAMES
from generator.ar.far import FAR
from generator.ar.llama import ffn_width
from generator.sampling import probabilities
from tests.parity import Case, kind
from tests.parity.dar_generator import GPT_FIELDS, nucleus
from tests.parity.fields import FieldError, notes, only, reads
from tests.parity.recipe import recipe_weights
from tests.parity.recorded_draws import RecordedDraws

ADAPTER = ADAPTERS["far"]
MODEL = reads("variant") | (GPT_FIELDS | reads("ar_n_layer")).below("ModelArgs")
BRANCHES = {"dual": 2, "triple": 3}


def build(case: Case) -> FAR:
    """From the official constructor arguments, with the fixture's weights."""
    args = case.config["ModelArgs"]
    branches = len([name for name in case.weights if re.fullmatch(r"output_\d+\.weight", name)])
    if BRANCHES.get(case.config.get("variant"), branches) != branches:
        raise FieldError(f"variant {case.config['variant']} with weights of {branches} codebooks")
    side = round(args["block_size"] ** 0.5)
    model = FAR(
        size={
            "width": args["dim"],
            "layers": args["n_layer"],
            "heads": args["n_head"],
            "head_layers": args["ar_n_layer"],
            "hidden": ffn_width(args["dim"], args["multiple_of"], args.get("ffn_dim_multiplier")),
            "kv_heads": args.get("n_kv_head"),
        },
        length=args["block_size"],
        grid=[side, side],
        branches=branches,
        vocab=args["vocab_size"],
        num_classes=args["num_classes"],
        label_drop=args["class_dropout_prob"],
        token_dropout=args["token_dropout_p"],
        residual_dropout=args["resid_dropout_p"],
        ffn_dropout=args["ffn_dropout_p"],
        path_dropout=args["drop_path_rate"],
        rope_theta=args["rope_base"],
        norm_eps=args["norm_eps"],
    )
    ADAPTER.load(model, case.weights)
    return model


def codes_of(case: Case, branches: int) -> Tensor:
    return torch.stack([case.inputs[f"idx_{k + 1}"].long() for k in range(branches)], dim=-1)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Under official names. What is fused here is split: the gradient of a part is the part of the gradient."""
    return {
        f"grad/{name}": value
        for name, value in RENAMES.official({n: p.grad for n, p in model.named_parameters()}).items()
    }


@kind("fqgan", "far_train", MODEL)
def far_train(case: Case) -> dict[str, Tensor]:
    model = build(case).train()
    codes, labels = codes_of(case, model.branches), case.inputs["labels"]
    draws = RecordedDraws({"label_drop": case.inputs["class_drop_uniform"]})
    loss = model(codes, labels, draws)
    loss.total.backward()
    result = {"loss": loss.total, **gradients(model)}
    result["grad_norm_before_clip"] = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    with torch.no_grad():
        dropped = model.features(codes, model.drop_labels(labels, draws))
        plain = model.eval().features(codes, labels)
    for k in range(model.branches):
        result[f"ce_{k + 1}"] = loss.logs[f"ce_{k + 1}"]
        result[f"logits_{k + 1}"] = model.logits(dropped[:, :, k], k)
        result[f"eval_logits_{k + 1}"] = model.logits(plain[:, :, k], k)
    return result


@kind(
    "fqgan",
    "far_sample",
    MODEL
    | (reads("steps cfg_scale temperature top_k top_p") | notes("the official code ignores it", "cfg_interval")).below(
        "sampling"
    ),
)
def far_sample(case: Case) -> dict[str, Tensor]:
    """Sampled as the user does, with the cache; recorded exponential noise, or arg-max where there is none."""
    model, sampling = build(case).eval(), case.config["sampling"]
    trace: list = []
    batch = len(case.inputs["labels"])
    if "exp_noise" in case.inputs:
        noise = case.inputs["exp_noise"].permute(2, 0, 1, 3)  # (B, T, K, V)
    else:
        noise = torch.full((batch, sampling["steps"], model.branches), 0.5)
    codes = model.sample(
        case.inputs["labels"],
        RecordedDraws({"codes": noise}),
        Guidance(tuple(sampling["cfg_scale"])),
        temperature=sampling["temperature"],
        top_k=sampling["top_k"],
        top_p=[nucleus(p) for p in sampling["top_p"]],
        length=sampling["steps"],
        trace=trace,
    )
    guided = torch.stack([logits for logits, _ in trace]).view(sampling["steps"], model.branches, batch, -1)
    return {"guided_logits": guided, **{f"tokens_{k + 1}": codes[..., k] for k in range(model.branches)}}


@kind("fqgan", "sampling_filters", reads("cases"))
def sampling_filters(case: Case) -> dict[str, Tensor]:
    logits = case.inputs["logits"][:, -1]
    return {
        f"probs_{i}": probabilities(logits, settings["temperature"], settings["top_k"], nucleus(settings["top_p"]))
        for i, settings in enumerate(case.config["cases"])
    }


@kind("fqgan", "full_far", reads("model variant vocab_size block_size num_classes") | only(cls_token_num=1))
def full_far(case: Case) -> dict[str, Tensor]:
    """The published size with weights made by formula."""
    size = case.config["model"].removeprefix("FAR-").lower()
    length = case.config["block_size"]
    side, branches = round(length**0.5), sum(name.startswith("idx_") for name in case.inputs)
    if BRANCHES[case.config["variant"]] != branches:
        raise FieldError(f"variant {case.config['variant']} with codes of {branches} codebooks")
    with torch.device("meta"):
        model = FAR(
            size=size,
            branches=branches,
            vocab=case.config["vocab_size"],
            length=length,
            grid=[side, side],
            num_classes=case.config["num_classes"],
        )
        names = ADAPTER.restore(model)
    ADAPTER.load(model.eval(), recipe_weights({name: tensor.shape for name, tensor in names.items()}))
    columns, result = case.inputs["columns"], {}
    codes = codes_of(case, model.branches)
    with torch.no_grad():
        features = model.features(codes, case.inputs["labels"])
        for k in range(model.branches):
            logits = model.logits(features[:, :, k], k)
            result[f"logits_{k + 1}_cols"], result[f"logsumexp_{k + 1}"] = logits[..., columns], logits.logsumexp(-1)
            result[f"argmax_{k + 1}"] = logits.argmax(-1).int()
    steps = case.outputs["greedy_tokens_1"].shape[1]
    noise = torch.full((len(case.inputs["sample_labels"]), steps, model.branches), 0.5)
    sampled = model.sample(
        case.inputs["sample_labels"], RecordedDraws({"codes": noise}), Guidance(2.0), top_k=1, length=steps
    )
    return result | {f"greedy_tokens_{k + 1}": sampled[..., k].int() for k in range(model.branches)}
