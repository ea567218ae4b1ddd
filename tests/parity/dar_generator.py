"""Fixtures of D-AR's language model: teacher-forced logits and gradients, guided sampling, and codes to images."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from core.rng import RecordedDraws
from core.specs import Guidance
from generator.adapters import ADAPTERS
from generator.adapters.gpt import official_names
from generator.ar.gpt import GPT
from generator.ar.llama import ffn_width
from generator.guidance import scales
from generator.sampling import probabilities
from tests.parity import Case, kind
from tests.parity.dar_models import build_tokenizer
from tests.parity.dar_tokenizer import images_uint8
from tests.parity.rectok_models import below


def build(args: dict, weights: dict[str, Tensor]) -> GPT:
    """From the official constructor arguments."""
    model = GPT(
        size={"width": args["dim"], "layers": args["n_layer"], "heads": args["n_head"], "kv_heads": args.get("n_kv_head"),
              "hidden": ffn_width(args["dim"], args.get("multiple_of", 256), args.get("ffn_dim_multiplier"))},
        length=args["block_size"], vocab=args["vocab_size"], num_classes=args["num_classes"],
        label_drop=args.get("class_dropout_prob", 0.1), token_dropout=args.get("token_dropout_p", 0.1),
        residual_dropout=args.get("resid_dropout_p", 0.1), ffn_dropout=args.get("ffn_dropout_p", 0.1),
        path_dropout=args.get("drop_path_rate", 0.0), rope_theta=args.get("rope_base", 10000),
        norm_eps=args.get("norm_eps", 1e-5))
    ADAPTERS["gpt"].load(model, weights)
    return model


def guidance_of(options: dict, length: int) -> Guidance:
    """The official string "a" or "a,b", and the last guided step."""
    numbers = [float(part) for part in str(options["cfg_scale"]).split(",")]
    first, last = numbers[0], numbers[-1]
    if first == 1.0 and last > 1.0:
        first = 1.001
    interval = options.get("cfg_interval", -1)
    end = (interval + 1) / length if interval is not None and interval > -1 else 1.0
    return Guidance(last, schedule="linear", start=first, interval=(0.0, end))


def logits_of(model: GPT, codes: Tensor, labels: Tensor) -> Tensor:
    """(B, t + 1, V): one more than there are codes."""
    return model.logits(model.norm(model.trunk(codes, labels)), 0)


@kind("dar", "gpt_train")
def gpt_train(case: Case) -> dict[str, Tensor]:
    model = build(case.config, case.weights).train()
    codes, labels = case.inputs["tokens"][..., None], case.inputs["labels"]
    draws = RecordedDraws({"label_drop": case.inputs["class_drop_u"]})
    loss = model(codes, labels, draws)
    loss.total.backward()
    gradients = official_names({n: p.grad for n, p in model.named_parameters()})
    with torch.no_grad():
        logits = logits_of(model, codes[:, :-1], model.drop_labels(labels, draws))
        plain = logits_of(model.eval(), codes, labels)
    return {"loss": loss.total, "logits": logits, "eval_logits": plain,
            **{f"grad/{name}": gradients[name] for name in json.loads(case.meta["options"])["grad_keys"]}}


@kind("dar", "gpt_generate")
def gpt_generate(case: Case) -> dict[str, Tensor]:
    options, labels = json.loads(case.meta["options"]), case.inputs["labels"]
    model = build(case.config, case.weights).eval()
    length = options["max_new_tokens"]
    guidance = guidance_of(options, length)
    trace: list = []
    draws = RecordedDraws({"codes": torch.full((len(labels), length, 1), 0.5)})
    codes = model.sample(labels, draws, guidance, temperature=0, length=length, trace=trace,
                         shared=options.get("prefix_tokens", 0))
    both = torch.cat((labels, torch.full_like(labels, model.num_classes)))
    with torch.no_grad():
        raw = logits_of(model, codes[:, :-1].repeat(2, 1, 1), both)
    return {"tokens": codes[..., 0].int(), "cfg_schedule": scales(guidance_of({**options, "cfg_interval": -1}, length),
                                                                  length)[:, 0],
            "combined_logits": torch.stack([logits for logits, _ in trace], 1), "raw_logits": raw}


@kind("dar", "logit_filter")
def logit_filter(case: Case) -> dict[str, Tensor]:
    result = {}
    for i, (temperature, top_k, top_p) in enumerate(json.loads(case.meta["options"])["settings"]):
        result[f"probs_{i}"] = probabilities(case.inputs["logits"], temperature, top_k, top_p)
        result[f"argmax_{i}"] = result[f"probs_{i}"].argmax(-1, keepdim=True)
    return result


@kind("dar", "c2i_end_to_end")
def c2i_end_to_end(case: Case) -> dict[str, Tensor]:
    """Labels -> codes -> images: whole, and as the stream makes them while codes arrive one by one."""
    options, labels = json.loads(case.meta["options"]), case.inputs["labels"]
    model = build(case.config["gpt"], below(case.weights, "gpt.")).eval()
    size = tuple(case.inputs["noise"].shape[-2:])
    tokenizer = build_tokenizer(case.config["tokenizer"], below(case.weights, "tokenizer."), max(size)).eval()
    length = case.config["gpt"]["block_size"]
    draws = RecordedDraws({"codes": torch.full((len(labels), length, 1), 0.5), "noise": case.inputs["noise"]})
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
            assert torch.allclose(image, pictures[(clip or 0) - 1], rtol=1e-4, atol=1e-5)
            result["image_full" if clip is None else f"image_clip{clip}"] = image
    return result | {"uint8": images_uint8(result["image_full"])}
