"""Evaluation fixtures about sets of features: Frechet distance, Inception Score, KID, precision and recall, codes."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from evaluation.distances import (
    Moments,
    frechet_distance,
    frechet_from_moments,
    inception_score,
    inception_score_adm,
    inception_score_single,
    kid,
    manifold_radii,
    polynomial_kernel,
    precision_recall,
    squared_mmd,
)
from evaluation.images import Codebooks
from tests.parity import Case, Tolerance, kind
from tests.parity.fields import notes, only, reads

SIZES = notes("told by the arrays", "n_a n_b dim") | only(input_cast="float32")


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Frechet
# ---------------------------------------------------------------------------------------------------------------------
def frechet_tolerance(case: Case, name: str) -> Tolerance:
    """Exact values to 1e-6 relative + 1e-6, and to 1e-9 where the distance itself is tiny. The references take
    means in float32 and roots of singular matrices: to 2e-6 relative or 1e-5."""
    if name == "mu_a":
        return Tolerance(1e-6, 1e-6)  # of a float32 mean
    if name == "sigma_a":
        return Tolerance(1e-9, 0.0)
    if name == "fid_exact_f64":
        return Tolerance(1e-6, 1e-6) if float(case.outputs[name]) > 0.1 else Tolerance(0.0, 1e-9)
    return Tolerance(0.0, max(2e-6 * abs(float(case.outputs[name])), 1e-5))


@kind("evaluation", "frechet", SIZES, frechet_tolerance)
def frechet(case: Case) -> dict[str, Tensor]:
    a, b = case.inputs["features_a"].float(), case.inputs["features_b"].float()
    first, second = Moments.of(a), Moments.of(b)
    distance = scalar(frechet_distance(first, second))
    result = {name: distance for name in case.outputs if name.startswith("fid_")}
    # Recorded: whether scipy called the product of covariances exactly singular, which a dead channel makes it.
    dead = [(gathered.covariance.diagonal() == 0).any() for gathered in (first, second)]
    result["adm_used_eps"] = (dead[0] | dead[1]).long()
    return result | {"mu_a": first.mean.float(), "sigma_a": first.covariance}


@kind("evaluation", "frechet_cached", SIZES, lambda case, name: Tolerance(1e-8, 0.0))
def frechet_cached(case: Case) -> dict[str, Tensor]:
    distance = scalar(frechet_from_moments(*(case.inputs[name] for name in ("mu1", "sigma1", "mu2", "sigma2"))))
    return dict.fromkeys(case.outputs, distance)


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------
@kind(
    "evaluation",
    "inception_score",
    reads("adm_split_size rng_seed") | notes("too small to matter", "rear_eps"),
    lambda case, name: Tolerance(1e-5, 1e-9),
)
def score(case: Case) -> dict[str, Tensor]:
    features, weight, bias = (case.inputs[name] for name in ("features", "fc_weight", "fc_bias"))
    unbiased = features @ weight.T
    logits = {"unbiased": unbiased, "biased": unbiased + bias}
    result = {"logits_unbiased_head": unbiased[: len(case.outputs["logits_unbiased_head"])]}
    result["isc_adm"] = scalar(inception_score_adm(unbiased, case.config["adm_split_size"])[0])
    result["isc_rear_evaluator"] = scalar(inception_score_single(unbiased)[0])
    for name in case.outputs:
        if found := re.fullmatch(r"isc_(std_)?torch_fidelity_(biased|unbiased)_splits(\d+)_shuffle([01])", name):
            seed = case.config["rng_seed"] if found[4] == "1" else None
            result[name] = scalar(inception_score(logits[found[2]], int(found[3]), seed)[1 if found[1] else 0])
    return result


def gaussian_kernel(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)) of (N, D) and (M, D) -> (N, M): torch-fidelity's other one, which no protocol uses."""
    squares = x.square().sum(1)[:, None] - 2 * x @ y.T + y.square().sum(1)
    return torch.exp(-squares.clamp(min=0) / (2 * sigma**2))


@kind(
    "evaluation",
    "kid",
    reads("rng_seed") | notes("a formula in words", "kernel"),
    lambda case, name: Tolerance(1e-9 if name.endswith("f64") else 1e-4, 0.0),
)
def kernel_distance(case: Case) -> dict[str, Tensor]:
    a, b = case.inputs["features_a"], case.inputs["features_b"]
    result: dict[str, Tensor] = {}
    for name in case.outputs:
        if found := re.fullmatch(r"kid_(rbf_)?(mean|std)_subsets(\d+)_size(\d+)", name):
            kernel = gaussian_kernel if found[1] else polynomial_kernel
            mean_std = kid(a, b, int(found[3]), int(found[4]), kernel, case.config["rng_seed"])
            result[name] = scalar(mean_std[found[2] == "std"])
        elif found := re.fullmatch(r"mmd2_unbiased_first(\d+)_f64", name):
            result[name] = squared_mmd(a[: int(found[1])], b[: int(found[1])])
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Precision and recall
# ---------------------------------------------------------------------------------------------------------------------
def prc_tolerance(case: Case, name: str) -> Tolerance:
    """float64 exact; half precision: radii to 5e-3, shares to two pictures of the smaller set, which are inside."""
    if name.startswith("radii"):
        return Tolerance(5e-3, 0.0)
    if name.endswith(("_adm", "_np_fp16")):
        return Tolerance(0.0, 2.0 / min(len(case.inputs["features_ref"]), len(case.inputs["features_gen"])) + 1e-9)
    return Tolerance(0.0, 1e-12 if name.endswith("_f64") else 1e-7)  # torch-fidelity's are float32


@kind("evaluation", "prc", reads("k row_batch_size") | SIZES, prc_tolerance)
def prc(case: Case) -> dict[str, Tensor]:
    real, generated = case.inputs["features_ref"].float(), case.inputs["features_gen"].float()
    k, block = case.config["k"], case.config["row_batch_size"]
    result = {
        "radii_ref_adm": manifold_radii(real, k, "adm_fp16", block),
        "radii_gen_adm": manifold_radii(generated, k, "adm_fp16", block),
    }
    for mode, names in (("exact", ("f64", "torch_fidelity")), ("adm_fp16", ("adm", "np_fp16"))):
        found = precision_recall(real=real, generated=generated, k=k, mode=mode, block=block)
        for name in names:
            result |= {f"precision_{name}": scalar(found.precision), f"recall_{name}": scalar(found.recall)}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Codes
# ---------------------------------------------------------------------------------------------------------------------
@kind("evaluation", "codebook_usage", reads("codebook_size rolling_window"), lambda case, name: Tolerance(1e-9, 0.0))
def codebook_usage(case: Case) -> dict[str, Tensor]:
    indices, vocab = case.inputs["indices"], case.config["codebook_size"]
    codebooks, steps = Codebooks(vocab), [step.view(1, -1, 1) for step in indices]
    whole = codebooks.usage(sum(codebooks.count(step) for step in steps))
    # A training's log counts the codes of a window that starts full of zeros.
    window, by_step = torch.zeros(1, case.config["rolling_window"], 1, dtype=indices.dtype), []
    for step in steps:
        window = torch.cat((window, step), 1)[:, -window.shape[1] :]
        by_step.append(scalar(codebooks.usage(codebooks.count(window))["codebook_usage"]))
    return {
        "rear_usage": scalar(whole["codebook_usage"]),
        "rear_entropy_bits": scalar(whole["codebook_entropy_bits"]),
        "perplexity": scalar(whole["codebook_perplexity"]),
        "rolling_usage": torch.stack(by_step),
    }
