"""The quantisers, as FQGAN and reAR recorded them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.parity import Case, kind
from tests.parity.fields import reads
from tokenizer.vq.quantizer import LookupFreeQuantizer, Quantized, VectorQuantizer


def to_tokens(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), what quantisers take."""
    return maps.movedim(1, -1)


def to_maps(tokens: Tensor) -> Tensor:
    return tokens.movedim(-1, 1)


@kind("fqgan", "quantizer_train", reads("n_e e_dim beta entropy_loss_ratio l2_norm show_usage"))
def quantizer_train(case: Case) -> dict[str, Tensor]:
    config = case.config
    quantizer = VectorQuantizer(
        config["n_e"],
        config["e_dim"],
        normalise=config["l2_norm"],
        entropy=True,
        usage_window=len(case.weights.get("codebook_used", ())) * config.get("show_usage", True),
    )
    tables = ("embedding.weight", *["codebook_used"] * bool(quantizer.usage_window))
    quantizer.load_state_dict({name: case.weights[name] for name in tables})
    z = case.inputs["z"].clone().requires_grad_()
    found = quantizer(to_tokens(z))
    quant = to_maps(found.values)
    terms = found.terms
    commitment, entropy = config["beta"] * terms["commitment"], config["entropy_loss_ratio"] * terms["entropy"]
    (terms["codebook"] + commitment + entropy + (quant * case.inputs["upstream"]).sum()).backward()
    tracked = {"usage": torch.zeros(())}
    if quantizer.usage_window:
        tail = len(case.outputs["codebook_used_tail"])
        tracked = {"usage": quantizer.track(found.codes), "codebook_used_tail": quantizer.codebook_used[-tail:]}
    return {
        **tracked,
        "vq_loss": terms["codebook"],
        "commit_loss": commitment,
        "entropy_loss": entropy,
        "indices": found.codes.flatten(),
        "quant": quant,
        "entry": to_maps(quantizer.embed(found.codes)),
        "grad_z": z.grad,
        "grad_embedding": quantizer.embedding.weight.grad,
    }


ENTROPY = reads("commitment_cost entropy_loss_weight entropy_loss_temperature entropy_gamma")


def rear_entropy(config: dict) -> dict:
    """Constructor arguments of our quantisers from reAR's."""
    return {
        "entropy": config["entropy_loss_weight"] > 0,
        "temperature": config["entropy_loss_temperature"],
        "gamma": config["entropy_gamma"],
        "floor": "clamp",
    }


def rear_result(config: dict, found: Quantized, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """(the loss, what the official quantiser reports)"""
    commitment = config["commitment_cost"] * found.terms["commitment"]
    zero = torch.zeros_like(commitment)
    counts = training and "entropy" in found.terms
    entropy = config["entropy_loss_weight"] * found.terms["entropy"] if counts else zero
    loss = commitment + entropy
    result = {
        "commitment_loss": commitment,
        "entropy_loss": entropy,
        "per_sample_entropy": found.logs["per_sample_entropy"] if counts else zero,
        "avg_entropy": config["entropy_gamma"] * found.logs["batch_entropy"] if counts else zero,  # theirs is scaled
    }
    if "codebook" in found.terms:
        result["codebook_loss"], loss = found.terms["codebook"], loss + found.terms["codebook"]
    result["quantizer_loss"] = loss
    return loss, {f"result/{name}": value.detach().reshape(1) for name, value in result.items()}


@kind("rear", "lfq", reads("token_bits") | ENTROPY)
def lfq(case: Case) -> dict[str, Tensor]:
    quantizer = LookupFreeQuantizer(case.config["token_bits"], **rear_entropy(case.config))
    quantizer.load_state_dict(case.weights)
    z = case.inputs["z"].clone().requires_grad_()
    found = quantizer(to_tokens(z))
    loss, result = rear_result(case.config, found, training=True)
    loss.backward()
    return {
        "quantized": to_maps(found.values),
        "grad_z": z.grad,
        "codebook_entry": quantizer.embed(case.inputs["codes"]),
        "result/min_encoding_indices": found.codes,
        **result,
    }
