"""Make tests/parity/fixtures, the small set that travels with the code.

    python -m tests.parity.record [NAME...]     from ../shared/parity (or $TESSERA_PARITY); NAMEs only, else all

Three kinds of files, told apart by their metadata:

- "official": a recording as it is (`made` is absent);
- "cut": a recording without its largest outputs or some of its cases; what is left is untouched (`made` says so);
- "own": computed by this project's code, with weights and large inputs by formula (`weight_shapes`, `input_shapes`, see
  recipe.py) so that little is stored. Only a check that nothing changes: made from code that passes the official
  recordings, in a setting near one of them (`made` names it, and the settings that differ).
"""

from __future__ import annotations

import copy
import json
import math
import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity import EMBEDDED, KINDS, Case, Tolerance, compare, discover, fixture_folder
from tests.parity.fields import Fields
from tests.parity.recipe import recipe_inputs, recipe_weights

KEPT = ("freqs", "lvl1LC", "lvl_1L", "attn_bias", "zero_k_bias", "_shift", "_scale", "W", "updates")
SHAKES = 4  # roundings of other processors, which no code and no corner of a ReLU may hang on

# name -> {"from": recording, "mode": ..., "drop": outputs that begin so, "set": {path: value}, "outputs": bytes per tensor}
OFFICIAL = [
    "dar/gpt_generate_cfg",
    "dar/quantizer",
    "dar/image_ops",
    "dar/logit_filter",
    "evaluation/center_crop",
    "evaluation/codebook_usage",
    "evaluation/frechet_rank_deficient",
    "evaluation/frechet_dead_channels",
    "evaluation/frechet_cached_stats",
    "evaluation/inception_score",
    "evaluation/inception_recipe",
    "evaluation/kid",
    "evaluation/lpips_recipe",
    "evaluation/prc_small",
    "evaluation/prc_mixed_fallback",
    "evaluation/uint8_levels",
    "fqgan/far_dual_sample_noise_cfg",
    "fqgan/quantizer_l2_train",
    "fqgan/sampling_filters",
    "fqgan/stylegan_discriminator_recipe",
    "fqgan/lpips_recipe",
    "fqgan/psnr_ssim",
    "fqgan/image_preprocessing",
    "fqgan/full_dual_ds16_recipe",
    "fqgan/full_far_b_dual_recipe",
    "imagefolder/diffaug",
    "imagefolder/dinodisc",
    "imagefolder/linear_classifier",
    "imagefolder/quantizer_euclid_nonshared",
    "imagefolder/quantizer_share4",
    "imagefolder/tok_pq2_lora_eval",
    "imagefolder/var_lr_schedule",
    "rear/rar_generate_kv_cache",
    "rear/lookup_free_quantizer",
    "rear/preprocess",
    "rear/schedules",
    "rectok/losses_full",
    "rectok/utils_data_lr_ema_fid",
]
CUT: dict[str, dict[str, Any]] = {
    "fqgan/far_triple_train": {"outputs": 20_000},
    "rear/rear_train_forward": {"outputs": 8_000},
    "rectok/tok_decoder_finetune_step": {"outputs": 20_000},
    "rectok/tok_encode_decode_eval": {"outputs": 20_000},
    "evaluation/resize_tf1": {"cases": 2},
}
OWN: dict[str, dict[str, Any]] = {
    "dar/gpt_train": {},
    "dar/gpt_unguided": {"from": "dar/gpt_generate_cfg", "set": {"options.cfg_scale": "1.0"}},
    "dar/tok_encode": {},
    "dar/tok_decode_previews": {},
    "dar/tok_recon_overlap": {},
    "dar/tok_train_loss": {"set": {"options.perceptual_weight": -0.5}},
    "dar/diff_core_mlp_head": {},
    "dar/c2i_end_to_end": {"set": {"options.cfg_scale": "1.0,6.0"}},
    "fqgan/dual_ds16_tokenizer_eval": {},
    "fqgan/triple_ds8_tokenizer_train": {
        "set": {
            "loss.reconstruction_loss": "l1",
            "loss.reconstruction_weight": 2.0,
            "loss.perceptual_weight": 0.5,
            "loss.disc_adaptive_weight": True,
        }
    },
    "fqgan/extract_codes_tencrop": {},
    "imagefolder/tok_pq2_eval": {},
    "imagefolder/tok_vp2_plain_vq_eval": {},
    "imagefolder/tok_pq2_train_losses": {
        "set": {"model_args.clip_norm": True, "model_args.sem_loss_scale": 5.0, "epoch": 40}
    },
    "imagefolder/var_teacher_forced_step": {"set": {"label_smooth": 0.1}},
    "imagefolder/var_progressive_forward": {},
    "imagefolder/var_greedy_cfg": {"set": {"cfg": [3.25, 1.5], "top_k": [5, 0], "top_p": [0.0, 0.9]}},
    "imagefolder/vqloss_patchgan": {
        "set": {
            "reconstruction_loss": "l1",
            "gen_loss": "non-saturating",
            "disc_loss": "vanilla",
            "disc_adaptive_weight": True,
        }
    },
    "rear/maskgit_vqgan": {},
    "rear/vqgan_plus": {},
    "rear/titok_nonlegacy": {},
    "rear/rear_train_one_head": {"from": "rear/rear_train_forward", "set": {"generator.encode_align": False}},
    "rear/rar_train_forward": {},
    "rear/rear_optimizer_steps": {"set": {"lr_scheduler.warmup_steps": 1}},
    "rear/rear_generate_mixing": {"from": "rear/rear_generate_sampled_cfg", "set": {"sampling.guidance_scale": 0.5}},
    "rear/end_to_end_sample": {},
    "rectok/tok_train_forward_loss": {"set": {"args.sem_target": "reconstruction", "sem_loss_type": "l2"}},
    "rectok/tok_train_noise": {
        "from": "rectok/tok_train_forward_nomask_draw",
        "set": {
            "args.noise_schedule": "uniform",
            "args.gamma": 0.5,
            "args.sem_input_type": "clean",
            "sem_loss_type": "l1",
        },
    },
    "rectok/teacher_dinov3_and_sem_decoder": {},
    "rectok/latent_stats": {},
    "rectok/ddt_forward_guidance": {"set": {"cfg_scale": 2.5, "cfg_interval": [0.0, 0.6]}},
    "rectok/ddt_train_loss": {},
    "rectok/ddt_sample_euler": {},
}


def save(
    case: Case,
    name: str,
    meta: dict[str, str],
    weights: dict[str, Tensor],
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
) -> None:
    place = EMBEDDED / f"{name}.safetensors"
    place.parent.mkdir(parents=True, exist_ok=True)
    parts = {"weights": weights, "inputs": inputs, "outputs": outputs}
    tensors = {f"{part}/{key}": value.contiguous() for part, values in parts.items() for key, value in values.items()}
    save_file(tensors, place, metadata={**case.meta, **meta})
    print(f"{place.stat().st_size / 1e3:8.0f} kB  {name}", flush=True)


def cut(name: str, plan: dict[str, Any]) -> None:
    case = Case.load(fixture_folder() / f"{name}.safetensors")
    outputs = {key: value for key, value in case.outputs.items() if nbytes(value) <= plan.get("outputs", math.inf)}
    inputs = case.inputs
    if "cases" in plan:  # of files that hold several under names of their own
        chosen = sorted(
            {key.split("/")[0] for key in inputs},
            key=lambda c: sum(nbytes(v) for part in (inputs, outputs) for k, v in part.items() if k.split("/")[0] == c),
        )[: plan["cases"]]
        inputs, outputs = (
            {key: value for key, value in part.items() if key.split("/")[0] in chosen} for part in (inputs, outputs)
        )
    save(
        case,
        name,
        {"made": "cut: the official recording without its largest outputs or some of its cases"},
        case.weights,
        inputs,
        outputs,
    )


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def by_formula(inputs: dict[str, Tensor]) -> dict[str, list]:
    """Name -> [shape, low, high] of large inputs that are pictures or noise; the last two are null for noise."""
    found = {}
    for name, value in inputs.items():
        if not value.is_floating_point() or nbytes(value) < 4000:
            continue
        low, high = value.min().item(), value.max().item()
        bounds = next(
            ([a, b] for a, b in ((0.0, 1.0), (-1.0, 1.0)) if a <= low < a + 0.02 and b - 0.02 < high <= b), None
        )
        found[name] = [list(value.shape), *(bounds or [None, None])]
    return found


def own(name: str, plan: dict[str, Any]) -> None:
    """Compute anew, with other weights, and see that no whole number hangs on rounding."""
    source = plan.get("from", name)
    case = Case.load(fixture_folder() / f"{source}.safetensors")
    given = {"config": copy.deepcopy(case.config.values_), "options": copy.deepcopy(case.options.values_)}
    for path, value in plan.get("set", {}).items():
        part, keys = (
            (given["options"], path.split(".")[1:])
            if path.startswith("options.")
            else (given["config"], path.split("."))
        )
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
    made_up = {
        key: list(value.shape)
        for key, value in case.weights.items()
        if value.is_floating_point() and not key.endswith(KEPT) and not any(w in key for w in KEPT[:5])
    }
    stored = {key: value for key, value in case.weights.items() if key not in made_up}
    formula = by_formula(case.inputs)
    inputs = {key: value for key, value in case.inputs.items() if key not in formula}
    function = KINDS[case.system, case.kind]

    def compute(salt: int, shake: float, seed: int = 0) -> dict[str, Tensor]:
        weights = stored | recipe_weights(made_up, salt)
        if shake:
            generator = torch.Generator().manual_seed(100 * seed + salt)
            weights = {
                key: value if key in stored else value * (1 + shake * torch.randn(value.shape, generator=generator))
                for key, value in weights.items()
            }
        trial = Case(
            case.path,
            case.meta,
            Fields(given["config"]),
            Fields(given["options"], path="options."),
            weights,
            inputs | recipe_inputs(formula),
            dict(case.outputs),
        )
        found = function(trial)
        return {key: torch.as_tensor(found[key]).detach().clone() for key in case.outputs if key in found}

    for salt in range(1, 20):
        outputs = compute(salt, 0.0)
        shaken = (compute(salt, 1e-6, seed) for seed in range(SHAKES))
        if all(
            compare(key, other[key], value, Tolerance(1e-3, 1e-5)).passed
            for other in shaken
            for key, value in outputs.items()
        ):
            break
    else:
        raise SystemExit(f"{name}: no weights found whose outputs do not hang on rounding")
    limit = plan.get("outputs", 8_000)
    small = {key: value for key, value in outputs.items() if nbytes(value) <= limit and value.isfinite().all()}
    changed = ", ".join(f"{path} = {value}" for path, value in plan.get("set", {}).items()) or "none"
    meta = {
        "made": f"own: computed by this project's code; near the official {source}; settings that differ: {changed}",
        "config": json.dumps(given["config"]),
        "weight_shapes": json.dumps(made_up),
        "weight_salt": str(salt),
        "input_shapes": json.dumps(formula),
        "case": name.split("/")[1],
        "tolerance": "1e-4*max|ref| + 1e-5",
    }  # other CPUs sum in another order
    if given["options"]:
        meta["options"] = json.dumps(given["options"])
    save(case, name, meta, stored, inputs, small)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    discover()
    wanted = lambda name: not names or name in names
    for name in filter(wanted, OFFICIAL):
        case = Case.load(fixture_folder() / f"{name}.safetensors")
        save(case, name, {}, case.weights, case.inputs, case.outputs)
    for plans, make in ((CUT, cut), (OWN, own)):
        for name in filter(wanted, plans):
            make(name, plans[name])
    total = sum(path.stat().st_size for path in EMBEDDED.rglob("*.safetensors"))
    print(f"{total / 1e6:.1f} MB in {EMBEDDED}")


if __name__ == "__main__":
    main(sys.argv[1:])
