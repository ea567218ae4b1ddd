"""Released ImageFolder, XQ-GAN and RobustTok tokenizers -> our state dict and back."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from core.errors import UserError
from core.nn.vit import VIT_SIZES, rename_gated
from core.weights.adapter import Adapter, Container, Facts, layer_count, transformer_size
from core.weights.names import Names, State, renamed
from tokenizer.multiscale.imagefolder import RELEASED_SCALES, ImageFolder

_TRUNKS = ("encoder.model.", "decoder.model.")
_IGNORED = {
    "semantic_model.*": "the frozen teacher, without which the official programs want --semantic_guide none",
    "*.lvl1LC": "a table of levels, which is rebuilt",
    "sem_linear.*": "built and never used by the official code",
    "*.scaler": "1 / sqrt(bits), which is rebuilt",
}


def _ours(name: str) -> str:
    """Their name of a tensor -> ours."""
    name = re.sub(r"^quantize\.", "quantizes.0.", name)
    name = re.sub(
        r"^quantizes\.(\d+)\.quant_resi\.(?:qresi_ls\.|(?=\d))(\d+)\.", r"quantizer.quantizes.\1.phis.\2.", name
    )
    name = re.sub(r"^quantizes\.(\d+)\.quant_resi\.qresi\.", r"quantizer.quantizes.\1.phis.0.", name)
    name = re.sub(r"^quantizes\.", "quantizer.quantizes.", name)
    name = name.replace(".base_model.model.", ".").replace(".base_layer.", ".")  # adapters of the PEFT library
    name = re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name)
    name = name.replace(".norm.modules_to_save.default.", ".norm.")
    return re.sub(r"\.norm\.original_module\.(\w+)$", r".norm.original_\1", name)


def _theirs(name: str, model: ImageFolder) -> str:
    """The reverse."""
    quantizer = model.quantizer
    if match := re.match(r"quantizer\.quantizes\.(\d+)\.(.*)", name):
        branch, rest = match.groups()
        layout = {0: r"quant_resi.\1.", 1: "quant_resi.qresi."}.get(quantizer.shared_phi, r"quant_resi.qresi_ls.\1.")
        rest = re.sub(r"^phis\.(\d+)\.", layout, rest)
        return f"quantize.{rest}" if model.branches == 1 else f"quantizes.{branch}.{rest}"
    for trunk in _TRUNKS:
        if name.startswith(trunk) and model.tuning[trunk.split(".")[0]] == "lora":
            rest = name.removeprefix(trunk)
            rest = re.sub(r"(mlp\.\w+)\.(weight|bias)$", r"\1.base_layer.\2", rest)
            rest = re.sub(r"\.(lora_[AB])$", r".\1.default.weight", rest)
            rest = re.sub(r"^norm\.original_(\w+)$", r"norm.original_module.\1", rest)
            rest = re.sub(r"^norm\.(weight|bias)$", r"norm.modules_to_save.default.\1", rest)
            return f"{trunk}base_model.model.{rest}"
    return name


def _rename(state: State) -> State:
    ours = renamed(state, _ours)
    for name, value in ours.items():
        if name.endswith("ema_vocab_hit_SV") and value.ndim == 1:  # the plain quantiser has no scales
            ours[name] = value[None]
    return rename_gated(ours)


def _merge_adapters(state: State, part: str, scaling: float) -> State:
    """W + scaling B A in every adapted layer of a part; `scaling` where the file does not hold it, as official ones."""
    merged = {
        name: value
        for name, value in state.items()
        if not (name.startswith(part) and re.search(r"\.lora_[AB]$|\.scaling$|\.original_\w+$", name))
    }
    for name in state:
        if name.startswith(part) and name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            change = state[layer + ".lora_B"] @ state[name]
            merged[layer + ".weight"] = state[layer + ".weight"] + state.get(layer + ".scaling", scaling) * change
    return merged


def _fit(state: State, model: nn.Module) -> State:
    """The count of updates is not in official files: their usage statistics begin anew, as in the official code.
    Adapters are merged for a model without, and new for one whose weights have none."""
    ours = model.state_dict()
    for part, method in model.tuning.items():
        if method != "lora":
            state = _merge_adapters(state, f"{part}.", model.lora_scaling)
        elif not any(name.startswith(part) and name.endswith(".lora_A") for name in state):
            # A model about to be adapted: its adapters are new, and its last norm starts from the file's.
            norm = f"{part}.model.norm."
            state = {
                **state,
                **{n: t for n, t in ours.items() if n.startswith(part) and n.endswith((".lora_A", ".lora_B"))},
                **{f"{norm}original_{n.removeprefix(norm)}": t for n, t in state.items() if n.startswith(norm)},
            }
    updates = {name: torch.zeros_like(t) for name, t in ours.items() if name.endswith(".updates")}
    scaling = {name: t for name, t in ours.items() if name.endswith(".scaling")}
    return {**updates, **scaling, **state}


def _restore(model: ImageFolder) -> State:
    if len(model.decoder.to_pixel.convs):
        raise UserError(
            "the official ImageFolder code has no convolutions after the pixel head; a model with "
            f"tokenizer.pixel_channels={model.decoder.to_pixel.convs[0].in_channels} cannot be exported to its layout"
        )
    state = {
        _theirs(name, model): value
        for name, value in rename_gated(model.state_dict(), back=True).items()
        if not name.endswith((".updates", ".scaling")) and not name.startswith("sem_linear.")
    }
    if model.quantizer.shared_phi is None:
        state = {name: value[0] if name.endswith("ema_vocab_hit_SV") else value for name, value in state.items()}
    for branch in range(model.branches) if model.quantizer.binary else ():
        scale = torch.full((len(model.quantizer.scales),), model.code_dim**-0.5)
        state["quantize.scaler" if model.branches == 1 else f"quantizes.{branch}.scaler"] = scale
    return {**state, "encoder.lvl1LC": model.encoder.lvl1LC, "decoder.lvl1LC": model.decoder.lvl1LC}


def _trunk(state: State, part: str, facts: Facts) -> str | dict[str, int]:
    """The official code takes DINOv2 models alone, whose heads have 64 channels each; others must name them."""
    prefix = f"{part}.model."
    width, layers = state[prefix + "cls_token"].shape[-1], layer_count(state, prefix + "blocks.")
    heads = width // 64 if width % 64 == 0 else None
    return transformer_size(VIT_SIZES, width, layers, facts, f"tokenizer.{part}", f"the {part}", heads)


def _inspect(state: State, facts: Facts) -> dict[str, Any]:
    shared_phi = _shared_phi(state)
    state = _rename(state)
    branches = layer_count(state, "quantizer.quantizes.")
    latents = state["encoder.latent_tokens"].shape[1] // max(1, branches)
    grid = math.isqrt(state["encoder.model.pos_embed"].shape[1] - 1)
    patch = state["encoder.model.patch_embed.proj.weight"].shape[-1]
    hits = state["quantizer.quantizes.0.ema_vocab_hit_SV"]
    settings: dict[str, Any] = {
        "image_size": grid * patch,
        "patch_size": patch,
        "encoder": _trunk(state, "encoder", facts),
        "decoder": _trunk(state, "decoder", facts),
        "latent_grid": math.isqrt(latents),
        "branches": branches,
        "vocab": hits.shape[1],
        "code_dim": state["quant_conv.weight"].shape[0],
    }
    phis = layer_count(state, "quantizer.quantizes.0.phis.")
    settings["quantizer"] = "residual" if phis else "plain"
    if phis and "quantizer.quantizes.0.embedding.weight" not in state:
        settings["quantizer"] = "binary"
    if phis and shared_phi != 4:
        settings["shared_phi"] = shared_phi
    settings["scales"] = _scales(hits.shape[0], settings["latent_grid"], facts)
    if 1 < len(settings["scales"]) < 3:
        settings["start_drop"] = 1  # of training; the default asks for more scales
    adapters = {part: f"{part}.model.blocks.0.mlp.fc1.lora_A" for part in ("encoder", "decoder")}
    adapted = [part for part, name in adapters.items() if name in state]
    if adapted:
        rank = state[adapters[adapted[0]]].shape[0]
        settings |= {f"{part[:3]}_tuning": "lora" for part in adapted}
        settings |= {"lora_rank": rank, "lora_alpha": float(_alpha(rank, facts))}
    return settings


def _alpha(rank: int, facts: Facts) -> float:
    """The official adapters have rank 8 and alpha 8; of others no tensor tells it."""
    return facts.ask("tokenizer.lora_alpha", "the alpha of the adapters", float(rank), 8.0 if rank == 8 else None)


def _shared_phi(state: State) -> int:
    """How many convolutions all scales share, 0 where each scale has its own; their official names tell."""
    names = [name.partition(".quant_resi.")[2] for name in state if ".quant_resi." in name]
    if any(name[0].isdigit() for name in names):
        return 0
    return 1 if any(name.startswith("qresi.") for name in names) else len({n.split(".")[1] for n in names})


def _scales(count: int, side: int, facts: Facts) -> list[int]:
    """In no tensor: the released ones are known by their number and their end, others by what the trainer stored."""
    if count == 1:
        return [side]
    if (count, side) == (len(RELEASED_SCALES), RELEASED_SCALES[-1]):
        return list(RELEASED_SCALES)
    # patch_nums: of VAR's trainer, which keeps its tokenizer
    said = facts.said("v_patch_nums") or facts.said("patch_nums")
    said = list(said) if isinstance(said, (list, tuple)) and len(said) == count and said[-1] == side else None
    return list(facts.ask("tokenizer.scales", f"the {count} scales", [side] * count, said))


ADAPTER = Adapter(
    title="the ImageFolder tokenizer",
    build=ImageFolder,
    inspect=_inspect,
    names=Names(
        markers=("encoder.latent_tokens", "decoder.mask_token", "decoder.to_pixel.*", "quantize*.ema_vocab_hit_SV"),
        ignored=_IGNORED,
    ),
    container=Container(raw=("model", "module", "state_dict", "trainer.vae_local"), written=("model", "ema")),
    rename=_rename,
    restore=_restore,
    fit=_fit,
)
