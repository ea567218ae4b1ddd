"""A finished generator with everything it needs to sample: tokenizer, latent statistics, guidance, sampling options.

    open_generator("work_dirs/my_run", ["sample.scale=1.5"])
    open_generator("reAR-L.safetensors", [])                              a released file, as its number was published
    open_generator("configs/rear/rear_l.yaml", [])                        the run that this config trained
    open_generator("my_file.pt", ["tokenizer.weights=pretrained_models/RecTok_decft.pth"])

Overrides are keys of the config, and win. A run brings its own config. A released file, told by its name, has the recipe
and the settings that core/weights/released.toml lists; for other files tokenizer.weights is needed, and sample.*, eval.*,
seed, data.* start from their defaults. A config whose run is not there stands for the released file that belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import config as config_module
from core.config import RunConfig, SampleConfig
from core.dist import World
from core.errors import UserError
from core.nn.precision import bf16_products
from core.rng import Draws
from core.specs import DataSource
from core.train.checkpoint import Checkpoint
from core.weights import files as weight_files
from core.weights import hub, released
from core.weights.adapter import recognise
from data.sources import open_source
from generator.task import GeneratorTask
from run import streaming
from run.latent_stats import latent_statistics
from run.load import (
    ADAPTERS,
    REGISTRIES,
    load_config,
    load_generator,
    load_tokenizer,
    make_guidance,
    pair,
    read_weights,
    sample_options,
)

ROOT = Path(__file__).resolve().parent.parent


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
        with bf16_products(labels.device, self.bf16):
            return self.task.sample(self.generator, labels, draws)

    def stream(
        self, labels: Tensor, draws: Draws, show: Callable[[int, Tensor], None] | None = None
    ) -> streaming.Streamed:
        """The same pictures, with what can be seen of them while their codes are being made."""
        with bf16_products(labels.device, self.bf16):
            return streaming.stream(
                self.generator, self.tokenizer, labels, draws, self.task.guidance, self.task.sample_options, show
            )


Log = Callable[[str], None]


def read_config(target: str, overrides: list[str], log: Log = lambda _: None) -> tuple[RunConfig, str]:
    """(config, reference of the generator's weights). No network is loaded.

    Args:
        target: a config file, a run folder, a checkpoint, a released file, or hf://owner/repository/file.
        overrides: config keys; `generator.weights=` names other weights than the target's own.
        log: is told what was chosen for the user.
    """
    if target.endswith((".yaml", ".yml")):
        config = load_config(target, overrides)
        weights = (config.generator or {}).get("weights") or _run_of(target, config, overrides, log)
    else:
        path = released.resolve(target)
        config = _config_of(target, path, overrides, log)
        weights = (config.generator or {}).get("weights") or str(path)
    if config.task != "generator":
        raise UserError(
            f"{target} is about a {config.task}; a generator was asked for. "
            "Tokenizers are measured with run_eval_tokenizer.sh."
        )
    if not config.tokenizer.get("weights"):
        raise UserError(f"{target}: say which tokenizer decodes its latents: tokenizer.weights=work_dirs/RUN")
    for reference in (weights, config.tokenizer["weights"], guide_of(config)):
        if reference:
            released.resolve(reference)
    return config, weights


def guide_of(config: RunConfig) -> str | None:
    """The weaker model of autoguidance, where sampling uses one."""
    sample = config.sample
    return sample.guide if sample.guidance == "auto" and make_guidance(sample).active else None


def _run_of(target: str, config: RunConfig, overrides: list[str], log: Log) -> str:
    """The run of a config, or, where it was never trained, the newest released file of that recipe that is here."""
    if config.run_dir.exists() or any(o.startswith(("name=", "work_dir=")) for o in overrides):
        return str(config.run_dir)
    files = [
        f
        for f in released.table()
        if f.recipe and (ROOT / f.recipe).resolve() == Path(target).resolve() and config.task == "generator"
    ]
    here = [f for f in files if f.place.is_file()]
    if here:
        log(f"there is no run {config.run_dir}: using {here[-1].place}, released for this config")
        return str(here[-1].place)
    advice = f"fetch released weights (bash run_download.sh {files[-1].name}), " if files else ""
    raise UserError(f"there is no run {config.run_dir} yet. Train it, {advice}or give --weights FILE_OR_RUN.")


def _config_of(target: str, path: Path, overrides: list[str], log: Log) -> RunConfig:
    """The config that belongs to a checkpoint or a file of generator weights."""
    if path.is_dir():
        given = Checkpoint(path).state["config"]
        return config_module.override(lambda: given, overrides, REGISTRIES, source=target)
    file = released.find(path)
    if file is None or not file.recipe:
        given = _unknown(target, path, overrides)
        return config_module.override(lambda: given, overrides, REGISTRIES, source=target)
    config = load_config(str(ROOT / file.recipe), [f"name={path.stem}", *file.settings, *overrides])
    config.tokenizer["weights"] = _beside(config.tokenizer.get("weights"), path)
    config.sample.guide = _beside(config.sample.guide, path)
    if config.task == "generator":
        plain, sample = asdict(SampleConfig()), asdict(config.sample)
        log(
            f"{path.name} as {file.recipe} says: tokenizer {config.tokenizer.get('weights')}, protocol "
            f"{config.eval.protocol}, "
            + ", ".join(f"{k} {v}" for k, v in sample.items() if v != plain[k])
            + (f". Published: {file.published}." if file.published else ".")
        )
    return config


def _beside(reference: str | None, path: Path) -> str | None:
    """`reference`, or the file of that name in the folder of `path` where there is no such file otherwise."""
    if not reference or "://" in reference or Path(reference).exists():
        return reference
    beside = path.parent / Path(reference).name
    return str(beside) if beside.is_file() else reference


def _unknown(target: str, path: Path, overrides: list[str]) -> dict[str, Any]:
    """The smallest config around a file; what training would need is filled in and never used."""
    given = config_module.read_overrides([o for o in overrides if o.startswith(("generator.", "tokenizer."))])
    tokenizer = {}
    if not given.get("tokenizer", {}).get("weights"):
        if weight_files.read(path) or not recognise(ADAPTERS["tokenizer"], hub.load_tensors(path)):
            raise UserError(
                f"{target} is a file of generator weights, and no released one by its name. Say which tokenizer decodes its "
                "latents: tokenizer.weights=pretrained_models/FILE"
            )
        tokenizer = {"weights": str(path)}  # VAR's trainer keeps its tokenizer beside it
    known = {**given.get("tokenizer", {}), **tokenizer}
    codes = read_weights("tokenizer", known["weights"], known).settings
    known = {key: codes[key] for key in ("branches", "scales") if key in codes}  # no VAR tells them itself
    settings = read_weights("generator", str(path), {**known, **given.get("generator", {})}).settings
    return {
        "name": path.stem,
        "task": "generator",
        "tokenizer": tokenizer,
        "generator": settings,
        "data": {"url": "folder://data/imagenet/train", "val_url": "folder://data/imagenet/val"},
        "train": {
            "duration": "0ep",
            "global_batch": 1,
            "optimizer": {"lr": 0.0},
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
        },
    }


def _pictures_for_statistics(config: RunConfig, reference: str) -> DataSource:
    try:
        return open_source(config.data.url, config.data.split)
    except UserError as error:
        raise UserError(
            f"{reference} comes without the statistics of the latents it models, and the pictures to measure them on are "
            f"not here ({error}) Measure them once on any pictures like ImageNet's: python -m scripts.latent_stats "
            f"{config.tokenizer['weights']} folder://data/imagenet/val --split val, or give data.url=URL."
        ) from None


def open_generator(target: str, overrides: list[str], world: World, log: Log = print) -> Finished:
    """Load it, on the world's device. Collective where latent statistics have to be measured first."""
    config, reference = read_config(target, overrides, log)
    tokenizer, tokenizer_print = load_tokenizer(config.tokenizer)
    use_ema = config.generator.get("use_ema", True)
    facts = {
        "weights": reference,
        "use_ema": use_ema,
        "tokenizer": config.tokenizer["weights"],
        "tokenizer_fingerprint": tokenizer_print,
    }
    carried = read_weights("generator", reference, config.generator).constants
    if not carried and not tokenizer.latent_stats_known:
        # parity: no released generator carries the statistics of its latents
        source = _pictures_for_statistics(config, reference)
        latent_statistics(config, tokenizer, tokenizer_print, source, world, log)
        facts["latent_statistics"] = f"measured on {config.data.url}"
    generator, weights = load_generator(reference, tokenizer, use_ema, config.generator)
    facts["weights_fingerprint"] = hub.fingerprint(generator.state_dict())
    guide = None
    if named := guide_of(config):
        guide = load_generator(named)[0]
        pair(guide, tokenizer)
        facts |= {"guide": named, "guide_fingerprint": hub.fingerprint(guide.state_dict())}
        guide.to(world.device)
    num_classes = weights.settings.get("num_classes") or open_source(config.data.url, config.data.split).num_classes
    task = GeneratorTask(
        generator.to(world.device),
        tokenizer.to(world.device),
        num_classes,
        make_guidance(config.sample, guide),
        sample_options(config.sample, generator),
    )
    return Finished(config, reference, task, tokenizer.image_size, num_classes, facts)
