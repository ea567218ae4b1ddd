"""Tiny weights in the containers that the original programs write, with the objects that their trainers store.

The classes of those objects (ruamel's scalars, OmegaConf, D-AR's config ...) are made here for the time of one torch.save
and are importable by no program that reads the file, as on a machine where the original is not installed. Everything is
written as the specs describe the trainers; nothing of the project is used.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import pathlib
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.rehearsal.generator_layouts import ROPE_TABLES
from tests.rehearsal.layouts import Shapes


def make(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Weights as a short training might leave them: matrices that keep the scale, norms near one, small tables."""
    draws = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        last = name.rsplit(".", 1)[-1]
        if last in ("lvl1LC", "lvl_1L"):
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif last in ("codebook_used", "ema_vocab_hit_SV", "zero_k_bias", "attn_bias_for_masking"):
            state[name] = torch.zeros(shape)
        elif len(shape) == 1 and last in ("weight", "gamma"):  # of norms
            state[name] = 1.0 + 0.05 * torch.randn(shape, generator=draws)
        elif last == "embedding_table" or "embed" in name or last in ("latent_tokens", "W") or len(shape) < 2:
            state[name] = 0.5 * torch.randn(shape, generator=draws)
        else:
            state[name] = torch.randn(shape, generator=draws) / math.sqrt(math.prod(shape[1:]))
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Objects of packages that the reader does not have
# ---------------------------------------------------------------------------------------------------------------------
class _Scalar(float):
    """ruamel's scalars are numbers that remember how they were written."""

    def __new__(cls, value: float):
        self = super().__new__(cls, value)
        self.__dict__.update(_width=5, _prec=1, _m_sign=False, _exp="e", _underscore=None)
        return self


class _Integer(int):
    pass


class _Map(OrderedDict):
    pass


class _Node:
    """OmegaConf's containers: plain objects with a dictionary of nodes in `_content`."""

    def __init__(self, content: Any):
        self.__dict__.update(_metadata={"ref_type": dict, "flags": None}, _parent=None, _content=content)


class _Config:
    """D-AR's config_util.Config: a mapping with attribute _data."""

    def __init__(self, data: dict[str, Any]):
        self._data = data


@dataclasses.dataclass
class _Arguments:
    """A dataclass config, as several trainers keep theirs."""

    codebook_size: int = 64
    v_patch_nums: tuple[int, ...] = (1, 2)
    results_dir: Any = None


_FOREIGN = {
    ("ruamel.yaml.scalarfloat", "ScalarFloat"): _Scalar,
    ("ruamel.yaml.scalarint", "ScalarInt"): _Integer,
    ("ruamel.yaml.comments", "CommentedMap"): _Map,
    ("omegaconf.dictconfig", "DictConfig"): _Node,
    ("config_util", "Config"): _Config,
    ("modelling.tokenizer", "ModelArgs"): _Arguments,
}
_HOMES = {cls: home for home, cls in _FOREIGN.items()}


@contextlib.contextmanager
def foreign():
    """The packages exist while a file is written and are gone afterwards."""
    kept = {}
    for (module, name), cls in _FOREIGN.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in kept:
                kept[path] = sys.modules.get(path)
                sys.modules[path] = types.ModuleType(path)
        setattr(sys.modules[module], name, cls)
        cls.__module__, cls.__qualname__, cls.__name__ = module, name, name
    try:
        yield
    finally:
        for path, before in kept.items():
            if before is None:
                del sys.modules[path]
            else:
                sys.modules[path] = before
        for cls in _HOMES:
            cls.__module__ = __name__


def arguments(**more: Any) -> argparse.Namespace:
    """What argparse, a YAML of ruamel and the trainer's own additions leave in `args`."""
    return argparse.Namespace(
        lr=_Scalar(2e-4),
        weight_decay=_Scalar(0.05),
        epochs=_Integer(200),
        betas=[0.9, _Scalar(0.95)],
        model=_Map(v_patch_nums=[1, 1, 2], codebook_size=_Integer(4096)),
        results_dir=pathlib.PosixPath("results"),
        seed=numpy.int64(0),
        best_rfid=numpy.float64(1.5),
        losses=numpy.linspace(0, 1, 3),
        shapes=defaultdict(list, a=[1]),
        started=datetime.datetime(2024, 10, 1, 12),
        omega=_Node({"lr": 1e-4, "list": [1, 2]}),
        dataclass=_Arguments(),
        note="a bytearray in words, and os.system as well",
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        size=torch.Size([3, 256, 256]),
        flag=None,
        **more,
    )


def optimizer_state(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Of AdamW after one step, for the first parameters; hyper-parameters came from a YAML of ruamel."""
    few = [value for value in weights.values() if value.is_floating_point()][:3]
    state = {
        i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(v), "exp_avg_sq": torch.zeros_like(v)}
        for i, v in enumerate(few)
    }
    group = {
        "lr": _Scalar(2e-4),
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": _Scalar(0.05),
        "amsgrad": False,
        "foreach": None,
        "maximize": False,
        "params": list(range(len(few))),
    }
    return {"state": state, "param_groups": [group]}


def _averaged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Slightly other numbers, so that a test can tell which were read."""
    return {name: value * 0.999 if value.is_floating_point() else value for name, value in weights.items()}


def _save(content: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with foreign():
        torch.save(content, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# One writer per container: (weights, path) -> the file or folder that a user names
# ---------------------------------------------------------------------------------------------------------------------
def bare(weights: dict[str, Tensor], path: Path) -> Path:
    """A state dict alone: .bin, .pt, .pth or .safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(weights, path, {"format": "pt"})
        return path
    return _save(OrderedDict(weights), path)


def rectok_trainer(weights: dict[str, Tensor], path: Path) -> Path:
    """utils/misc.py of RecTok: model with buffers, model_ema of the parameters alone, scaler, epoch."""
    averaged = {name: value for name, value in _averaged(weights).items() if name not in ROPE_TABLES}
    scaler = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 7,
    }
    return _save(
        {
            "model": weights,
            "model_ema": averaged,
            "optimizer": optimizer_state(weights),
            "loss_scaler": scaler,
            "epoch": 599,
            "last_elapsed_time": 1.5,
        },
        path,
    )


def llamagen_trainer(weights: dict[str, Tensor], path: Path, **more: Any) -> Path:
    """FQGAN, ImageFolder and D-AR: model, ema, optimizer, discriminator, steps, args."""
    return _save(
        {
            "model": weights,
            "ema": _averaged(weights),
            "optimizer": optimizer_state(weights),
            "discriminator": {"main.0.weight": torch.zeros(4, 3, 4, 4)},
            "optimizer_disc": optimizer_state(weights),
            "steps": 250000,
            "args": arguments(),
            **more,
        },
        path,
    )


def compiled_generator(weights: dict[str, Tensor], path: Path) -> Path:
    """D-AR's and FAR's trainer of generators: torch.compile's prefix, no EMA."""
    named = {f"_orig_mod.{name}": value for name, value in weights.items()}
    return _save({"model": named, "optimizer": optimizer_state(weights), "steps": 360000, "args": arguments()}, path)


def dar_trainer(weights: dict[str, Tensor], path: Path, queries: int, groups: int, model: dict[str, Any]) -> Path:
    """D-AR's tokenizer: the config object alone says how many queries and groups there are."""
    config = _Config(
        {
            "model": {
                **model,
                "num_all_queries": queries,
                "num_query_groups": groups,
                "num_denoising_steps": groups,
                "queries_per_step": queries // groups,
            }
        }
    )
    return llamagen_trainer(weights, path, config=config)


def var_trainer(weights: dict[str, Tensor], path: Path, tokenizer: dict[str, Tensor], scales: list[int]) -> Path:
    """ar-ckpt-last.pth: {epoch, iter, trainer: {config, var_wo_ddp, vae_local, var_opt}, args}."""
    config = {
        "patch_nums": tuple(scales),
        "resos": tuple(16 * s for s in scales),
        "label_smooth": 0.1,
        "prog_it": 0,
        "last_prog_si": -1,
        "first_prog": True,
    }
    trainer = {
        "config": config,
        "var_wo_ddp": weights,
        "vae_local": tokenizer,
        "var_opt": {"scaler": None, "optimizer": optimizer_state(weights)},
    }
    given = OrderedDict(
        depth=2, exp_name="var", local_out_dir_path=pathlib.PosixPath("local_output"), tlr=_Scalar(1e-4)
    )
    return _save({"epoch": 349, "iter": 0, "trainer": trainer, "args": given}, path)


def accelerate_folder(weights: dict[str, Tensor], path: Path) -> Path:
    """checkpoint-N/ of reAR's and RAR's trainer."""
    for name in ("unwrapped_model", "ema_model"):
        _save(OrderedDict(_averaged(weights) if name == "ema_model" else weights), path / name / "pytorch_model.bin")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    _save(optimizer_state(weights), path / "optimizer.bin")
    _save({"last_epoch": 3, "_step_count": 4, "_last_lr": [_Scalar(4e-4)]}, path / "scheduler.bin")
    _save(
        {"step": 0, "numpy_random_seed": numpy.random.get_state(), "torch_manual_seed": torch.get_rng_state()},
        path / "random_states_0.pkl",
    )
    (path / "metadata.json").write_text(json.dumps({"global_step": 250000}))
    return path


def fsdp_consolidated(weights: dict[str, Tensor], path: Path) -> Path:
    """D-AR's FSDP trainer gathers a bare state dict in bf16 and saves it as consolidated.pth."""
    return _save(
        {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()}, path
    )


Writer = Callable[[dict[str, Tensor], Path], Path]
