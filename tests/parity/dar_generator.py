"""Fixtures of D-AR's language model: teacher-forced logits and gradients, guided sampling, and codes to images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from core.schema import linear_scales
from core.specs import Guidance
from generator.adapters import ADAPTERS
from generator.adapters.gpt import RENAMES
from generator.ar.gpt import GPT
from generator.ar.llama import ffn_width
from generator.sampling import probabilities
from tests.parity import Case, kind
from tests.parity.dar_models import TOKENIZER, build_tokenizer
from tests.parity.dar_tokenizer import alike, images_uint8, painted_size
from tests.parity.fields import notes, only, reads
from tests.parity.recorded_draws import RecordedDraws
from tests.parity.rectok_models import below

GPT_FIELDS = (
    reads(
        "dim n_layer n_head n_kv_head multiple_of ffn_dim_multiplier block_size vocab_size num_classes class_dropout_prob"
        " token_dropout_p resid_dropout_p ffn_dropout_p drop_path_rate rope_base norm_eps"
    )
    | only(cls_token_num=1, model_type="c2i", attn_dropout_p=0.0)
    | notes("sizes of the official caches", "max_batch_size max_seq_len")
    | notes("before training", "initializer_range")
)


def build(args: Mapping, weights: dict[str, Tensor]) -> GPT:
    """From the official constructor arguments."""
    model = GPT(
        size={
            "width": args["dim"],
            "layers": args["n_layer"],
            "heads": args["n_head"],
            "kv_heads": args.get("n_kv_head"),
            "hidden": ffn_width(args["dim"], args.get("multiple_of", 256), args.get("ffn_dim_multiplier")),
        },
        length=args["block_size"],
        vocab=args["vocab_size"],
        num_classes=args["num_classes"],
        label_drop=args.get("class_dropout_prob", 0.1),
        token_dropout=args.get("token_dropout_p", 0.1),
        residual_dropout=args.get("resid_dropout_p", 0.1),
        ffn_dropout=args.get("ffn_dropout_p", 0.1),
        path_dropout=args.get("drop_path_rate", 0.0),
        rope_theta=args.get("rope_base", 10000),
        norm_eps=args.get("norm_eps", 1e-5),
    )
    ADAPTERS["gpt"].load(model, weights)
    return model


def guidance_of(options: Mapping, length: int) -> Guidance:
    """The official string "a" or "a,b", and the last guided step."""
    text = str(options["cfg_scale"])
    first, last = linear_scales(text if "," in text else f"{text},{text}")
    interval = options.get("cfg_interval", -1)
    end = (interval + 1) / length if interval is not None and interval > -1 else 1.0
    return Guidance(last, schedule="linear", start=first, interval=(0.0, end))


def logits_of(model: GPT, codes: Tensor, labels: Tensor) -> Tensor:
    """(B, t + 1, V): one more than there are codes."""
    return model.logits(model.norm(model.trunk(codes, labels)), 0)


@kind("dar", "gpt_train", GPT_FIELDS | reads("grad_keys").below("options"))
def gpt_train(case: Case) -> dict[str, Tensor]:
    model = build(case.config, case.weights).train()
    codes, labels = case.inputs["tokens"][..., None], case.inputs["labels"]
    draws = RecordedDraws({"label_drop": case.inputs["class_drop_u"]})
    loss = model(codes, labels, draws)
    loss.total.backward()
    gradients = RENAMES.official({n: p.grad for n, p in model.named_parameters()})
    with torch.no_grad():
        logits = logits_of(model, codes[:, :-1], model.drop_labels(labels, draws))
        plain = logits_of(model.eval(), codes, labels)
    return {
        "loss": loss.total,
        "logits": logits,
        "eval_logits": plain,
        **{f"grad/{name}": gradients[name] for name in case.options["grad_keys"]},
    }


@kind(
    "dar",
    "gpt_generate",
    GPT_FIELDS
    | (
        reads("max_new_tokens cfg_scale cfg_interval prefix_tokens temperature top_k top_p") | only(sample_logits=False)
    ).below("options"),
)
def gpt_generate(case: Case) -> dict[str, Tensor]:
    """Arg-max decoding: temperature and filters cannot change it, but must be accepted."""
    options, labels = case.options, case.inputs["labels"]
    model = build(case.config, case.weights).eval()
    length = options["max_new_tokens"]
    guidance, trace = guidance_of(options, length), []
    draws = RecordedDraws({"codes": torch.full((len(labels), length, 1), 0.5)})
    filters = {"top_k": options.get("top_k", 0) or 0, "top_p": nucleus(options.get("top_p", 1.0))}
    options.get("temperature")
    codes = model.sample(
        labels,
        draws,
        guidance,
        temperature=0,
        length=length,
        trace=trace,
        shared=options.get("prefix_tokens", 0),
        **filters,
    )
    # Without guidance the official batch is not doubled.
    both = torch.cat((labels, torch.full_like(labels, model.num_classes))) if guidance.active else labels
    with torch.no_grad():
        raw = logits_of(model, codes[:, :-1].repeat(len(both) // len(labels), 1, 1), both)
    return {
        "tokens": codes[..., 0].int(),
        "cfg_schedule": torch.linspace(guidance.start, guidance.scale, length),
        "combined_logits": torch.stack([logits for logits, _ in trace], 1),
        "raw_logits": raw,
    }


def nucleus(p: float) -> float:
    """LlamaGen's top_p as ours: its 0 leaves the likeliest code, ours leaves all."""
    return p or 1e-30


@kind("dar", "logit_filter", reads("settings").below("options"))
def logit_filter(case: Case) -> dict[str, Tensor]:
    result = {}
    for i, (temperature, top_k, top_p) in enumerate(case.options["settings"]):
        result[f"probs_{i}"] = probabilities(case.inputs["logits"], temperature, top_k, nucleus(top_p))
        result[f"argmax_{i}"] = result[f"probs_{i}"].argmax(-1, keepdim=True)
    return result


@kind(
    "dar",
    "c2i_end_to_end",
    TOKENIZER.below("tokenizer")
    | GPT_FIELDS.below("gpt")
    | reads("cfg_scale cfg_interval clip_steps height width").below("options"),
)
def c2i_end_to_end(case: Case) -> dict[str, Tensor]:
    """Labels -> codes -> images: whole, and as the stream makes them while codes arrive one by one."""
    options, labels = case.options, case.inputs["labels"]
    model = build(case.config["gpt"], below(case.weights, "gpt.")).eval()
    noise = case.inputs["noise"]
    tokenizer = build_tokenizer(
        case.config["tokenizer"], below(case.weights, "tokenizer."), max(noise.shape[-2:])
    ).eval()
    size = painted_size(tokenizer, options, noise)
    length = case.config["gpt"]["block_size"]
    draws = RecordedDraws({"codes": torch.full((len(labels), length, 1), 0.5), "noise": noise})
    stream, pictures, done = tokenizer.stream(len(labels), draws, size=size), [], 0

    def arrived(codes: Tensor) -> None:
        nonlocal done
        pictures.extend(stream.feed(codes[:, done:]))
        done = codes.shape[1]

    codes = model.sample(labels, draws, guidance_of(options, length), top_k=1, on_codes=arrived)
    result = {"tokens": codes[..., 0].int()}
    with torch.no_grad():
        for clip in options["clip_steps"]:
            image = tokenizer.decode(codes, draws, clip=clip, size=size)
            assert alike(image, pictures[(clip or 0) - 1])
            result["image_full" if clip is None else f"image_clip{clip}"] = image
    return result | {"uint8": images_uint8(result["image_full"])}
