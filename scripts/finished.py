"""A finished generator with everything it needs to sample: tokenizer, latent statistics, guidance, sampling options.

    open_generator("work_dirs/my_run", ["sample.scale=1.5"])
    open_generator("pretrained_models/ditdhxl_epoch_0599.pth", ["tokenizer.weights=pretrained_models/RecTok_decft.pth"])
    open_generator("configs/rectok/ditdh_xl.yaml", [])                    the run that this config trained

Overrides are keys of the config. A run brings its own; for a released file tokenizer.weights is needed, and sample.*,
eval.*, seed, data.* start from their defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn

from core import config as config_module
from core import hub
from core.config import RunConfig
from core.dist import World
from core.errors import UserError
from core.rng import Draws
from core.train.checkpoint import Checkpoint
from data.sources import open_source
from generator.task import GeneratorTask

import assemble
import streaming


@dataclass
class Finished:
    """Ready to sample. `facts` name the weights, for records."""

    config: RunConfig
    weights: str
    task: GeneratorTask
    image_size: int
    num_classes: int
    facts: dict[str, Any]

    @property
    def generator(self) -> nn.Module:
        return self.task.generator

    @property
    def tokenizer(self) -> nn.Module:
        return self.task.tokenizer

    @property
    def bf16(self) -> bool:
        return self.config.train.precision == "bf16"

    @torch.no_grad()
    def sample(self, labels: Tensor, draws: Draws) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of the classes `labels`, in the precision of the config."""
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.bf16):
            return self.task.sample(self.generator, labels, draws)

    def stream(self, labels: Tensor, draws: Draws, show: Callable[[int, Tensor], None] | None = None) -> streaming.Streamed:
        """The same pictures, with what can be seen of them while their codes are being made."""
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.bf16):
            return streaming.stream(self.generator, self.tokenizer, labels, draws, self.task.guidance,
                                    self.task.sample_options, show)


def read_config(target: str, overrides: list[str]) -> tuple[RunConfig, str]:
    """(config, reference of the generator's weights). No network is loaded.

    Args:
        target: a config file, a run folder, a checkpoint, a released file, or hf://owner/repository/file.
        overrides: config keys; `generator.weights=` names other weights than the target's own.
    """
    if target.endswith((".yaml", ".yml")):
        config = assemble.load_config(target, overrides)
        weights = (config.generator or {}).get("weights") or str(config.run_dir)
    else:
        path = hub.resolve(target)
        given = Checkpoint(path).state["config"] if path.is_dir() else _released(target, path, overrides)
        config = config_module.override(lambda: given, overrides, assemble.REGISTRIES, source=target)
        weights = (config.generator or {}).get("weights") or str(path)
    if config.task != "generator":
        raise UserError(
            f"{target} is about a {config.task}; a generator was asked for. "
            "Tokenizers are measured with run_eval_tokenizer.sh."
        )
    if not config.tokenizer.get("weights"):
        raise UserError(f"{target}: say which tokenizer decodes its latents: tokenizer.weights=work_dirs/RUN")
    for reference in (weights, config.tokenizer["weights"], config.sample.guide):
        if reference:
            hub.resolve(reference)
    return config, weights


def _released(target: str, path: Path, overrides: list[str]) -> dict[str, Any]:
    """The smallest config around a released file; what training would need is filled in and never used."""
    if not any(o.startswith("tokenizer.weights=") for o in overrides):
        raise UserError(
            f"{target} is a file of generator weights. Say which tokenizer decodes its latents: "
            "tokenizer.weights=pretrained_models/FILE"
        )
    given = config_module.read_overrides([o for o in overrides if o.startswith(("generator.", "tokenizer."))])
    codes = assemble.read_weights("tokenizer", given["tokenizer"]["weights"], given["tokenizer"]).settings
    known = {key: codes[key] for key in ("branches", "scales") if key in codes}  # no VAR tells them itself
    settings = assemble.read_weights("generator", str(path), {**known, **given.get("generator", {})}).settings
    return {
        "name": path.stem,
        "task": "generator",
        "tokenizer": {},
        "generator": settings,
        "data": {"url": "folder://data/imagenet/train", "val_url": "folder://data/imagenet/val"},
        "train": {
            "duration": "0ep",
            "global_batch": 1,
            "optimizer": {"lr": 0.0},
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
        },
    }


def open_generator(target: str, overrides: list[str], world: World, log: Callable[[str], None] = print) -> Finished:
    """Load it, on the world's device. Collective where latent statistics have to be measured first."""
    config, reference = read_config(target, overrides)
    tokenizer, tokenizer_print = assemble.load_tokenizer(config.tokenizer)
    use_ema = config.generator.get("use_ema", True)
    facts = {
        "weights": reference,
        "use_ema": use_ema,
        "tokenizer": config.tokenizer["weights"],
        "tokenizer_fingerprint": tokenizer_print,
    }
    if not assemble.read_weights("generator", reference, config.generator).constants and not getattr(
        tokenizer, "latent_stats_known", True
    ):
        # parity: no released generator carries the statistics of its latents
        source = open_source(config.data.url, config.data.split)
        assemble.latent_statistics(config, tokenizer, tokenizer_print, source, world, log)
        facts["latent_statistics"] = f"measured on {config.data.url}"
    generator, weights = assemble.load_generator(reference, tokenizer, use_ema, config.generator)
    facts["weights_fingerprint"] = hub.fingerprint(generator.state_dict())
    guide = None
    if config.sample.guidance == "auto" and config.sample.guide:
        guide = assemble.load_generator(config.sample.guide)[0]
        assemble.pair(guide, tokenizer)
        facts |= {"guide": config.sample.guide, "guide_fingerprint": hub.fingerprint(guide.state_dict())}
        guide.to(world.device)
    num_classes = weights.settings.get("num_classes") or open_source(config.data.url, config.data.split).num_classes
    task = GeneratorTask(
        generator.to(world.device),
        tokenizer.to(world.device),
        num_classes,
        assemble.make_guidance(config.sample, guide),
        assemble.sample_options(config.sample, generator),
    )
    return Finished(config, reference, task, tokenizer.image_size, num_classes, facts)
