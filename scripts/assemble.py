"""From a checked config to running objects: the one place that sees every package.

Programs in this folder call `load_config`, then `train`, or `load_tokenizer` / `load_generator` for finished weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn

from core import config as config_module
from core import dist, hub
from core.config import RESERVED, RunConfig
from core.errors import UserError
from core.images import to_model_range
from core.registry import Registry
from core.rng import hash64, permutation
from core.specs import Continuous, DataSource, Guidance
from core.state_dicts import describe_differences
from core.train.checkpoint import Checkpoint
from core.train.log import ProgressLine
from core.train.run import RunFolder
from core.train.trainer import PREVIEW_IMAGES, Trainer
from data.cache import FeatureCache
from data.cache import build as build_cache
from data.loader import Loader, ordered_batches, read_or_replace, split
from data.sources import open_source
from data.transforms import Transform
from evaluation.environment import environment
from generator import GENERATORS
from generator.adapters import ADAPTERS as GENERATOR_ADAPTERS
from generator.task import GeneratorTask
from tokenizer import TOKENIZERS
from tokenizer.adapters import ADAPTERS as TOKENIZER_ADAPTERS
from tokenizer.losses import DISCRIMINATORS, OBJECTIVES
from tokenizer.task import TokenizerTask
from tokenizer.teachers import TEACHERS

REGISTRIES = {"tokenizer": TOKENIZERS, "generator": GENERATORS, "objective": OBJECTIVES,
              "discriminator": DISCRIMINATORS, "teacher": TEACHERS}
ADAPTERS = {"tokenizer": TOKENIZER_ADAPTERS, "generator": GENERATOR_ADAPTERS}


def load_config(path: str, overrides: list[str]) -> RunConfig:
    return config_module.load(path, overrides, REGISTRIES)


# ---------------------------------------------------------------------------------------------------------------------
# Networks, new and with weights
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Weights:
    """Weights of one network, from a run of ours or a released file."""

    settings: dict[str, Any]  # name and constructor arguments of the network
    path: Path
    constants: dict[str, Tensor]  # latent statistics and the like
    provenance: dict[str, Any]
    read: Callable[[nn.Module, bool], dict[str, Tensor]]  # (network, averaged) -> a state dict that fits it exactly

    def load(self, network: nn.Module, averaged: bool = True) -> None:
        network.load_state_dict(self.read(network, averaged))


def read_weights(kind: str, reference: str) -> Weights:
    """Find the weights of a tokenizer or generator.

    Args:
        kind: "tokenizer" or "generator".
        reference: run folder, checkpoint folder, file, file name in pretrained_models/, or hf://owner/repo/file.
    """
    path = hub.resolve(reference)
    return _from_checkpoint(kind, Checkpoint(path)) if path.is_dir() else _from_file(kind, path)


def _from_checkpoint(kind: str, checkpoint: Checkpoint) -> Weights:
    state = checkpoint.state
    if state["primary"] != kind:
        raise UserError(f"{checkpoint.path} holds a {state['primary']}, a {kind} was asked for.")
    settings = {k: v for k, v in state["config"][kind].items() if k not in RESERVED - {"name"}}

    def read(network: nn.Module, averaged: bool) -> dict[str, Tensor]:
        stem = f"{kind}.ema_{state['ema'][0]}" if averaged and state["ema"] else kind
        tensors = ADAPTERS[kind][settings["name"]].fit(checkpoint.tensors(stem), network)
        if problems := describe_differences(tensors, network.state_dict()):
            raise UserError(f"{checkpoint.path / stem} does not fit {type(network).__name__}: {'; '.join(problems)}")
        return tensors

    constants = checkpoint.tensors("constants") if "constants.safetensors" in checkpoint.files else {}
    return Weights(settings, checkpoint.path, constants, state["provenance"], read)


def _from_file(kind: str, path: Path) -> Weights:
    """A released file: the first adapter that recognises it."""
    loaded = hub.load_tensors(path)
    complaints = []
    for name, adapter in ADAPTERS[kind].items():
        try:
            settings = {"name": name, **adapter.describe(loaded)}
        except UserError as error:
            complaints.append(str(error))
            continue

        def read(network: nn.Module, averaged: bool) -> dict[str, Tensor]:
            try:
                return adapter.convert(network, loaded, use_ema=averaged)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None

        return Weights(settings, path, {}, {}, read)
    raise UserError(f"{path}: {'; '.join(complaints)}")


def _build(kind: str, component: dict[str, Any], weights: Weights | None, **defaults: Any) -> nn.Module:
    """A network from its config section; with weights, their settings fill in what the section leaves out."""
    settings = {k: v for k, v in component.items() if k not in RESERVED - {"name"}}
    if weights is not None:
        known = weights.settings
        if settings.get("name", known["name"]) != known["name"]:
            raise UserError(f'{weights.path} holds the {kind} "{known["name"]}", not "{settings["name"]}".')
        settings = {**known, **settings}
    network = REGISTRIES[kind].build(settings, **defaults)
    if weights is not None:
        weights.load(network, component.get("use_ema", True))
    return network


def load_tokenizer(component: dict[str, Any]) -> tuple[nn.Module, str]:
    """The tokenizer of a config section, frozen, and the fingerprint of its weights."""
    weights = read_weights("tokenizer", component["weights"]) if component.get("weights") else None
    tokenizer = _build("tokenizer", component, weights).eval().requires_grad_(False)
    return tokenizer, hub.fingerprint(tokenizer.state_dict())


def load_generator(reference: str, tokenizer: nn.Module | None = None, use_ema: bool = True) -> tuple[nn.Module, Weights]:
    """A finished generator, frozen. Its latent statistics are handed to `tokenizer`."""
    weights = read_weights("generator", reference)
    generator = _build("generator", {"use_ema": use_ema}, weights).eval().requires_grad_(False)
    if tokenizer is not None:
        check_pair(generator, tokenizer)
        if weights.constants:
            tokenizer.set_latent_stats(weights.constants["mean"], weights.constants["std"])
    return generator, weights


def check_pair(generator: nn.Module, tokenizer: nn.Module) -> None:
    problems = generator.fits(tokenizer.spec)
    if problems:
        raise UserError(f"{type(generator).__name__} does not fit the latents of {type(tokenizer).__name__} "
                        f"({tokenizer.spec}): {' '.join(problems)}")


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def open_train(config: RunConfig) -> DataSource:
    return open_source(config.data.url, config.data.split)


def open_val(config: RunConfig) -> DataSource | None:
    """Pictures to evaluate on, or None."""
    if config.data.val_url:
        return open_source(config.data.val_url, "val")
    if config.data.url.startswith("embedded://"):
        return open_source(config.data.url, "val")
    return None


def check_inputs(config: RunConfig) -> None:
    """Everything that can be wrong outside the config file, found without loading a network."""
    dist.pick_device(config.train.device)
    open_train(config)
    open_val(config)
    for reference in (config.tokenizer.get("weights"), config.train.init_from, config.sample.guide):
        if reference:
            hub.resolve(reference)


def _cache(config: RunConfig, name: str, source: DataSource, transform: Transform, network: nn.Module, fingerprint: str,
           producer: Callable[[Tensor], dict[str, Tensor]], world: dist.World, log: Callable[[str], None]) -> FeatureCache:
    """Open or make the per-picture cache called `name`; the network works on the run's device while it is made."""
    if transform.views is None:
        raise UserError(f'data.cache_{name}: data.crop="{config.data.crop}" shows a new crop each time, so nothing can be '
                        'kept. Use data.crop=center, or turn the cache off.')
    key = f"{hash64(source.fingerprint(), repr(transform.describe()), fingerprint):016x}"
    folder = Path(config.data.cache_dir) / f"{name}_{key}"
    if folder.exists():
        return FeatureCache(folder, source, transform, fingerprint)
    log(f"computing {name} once for {len(source):,} pictures x {transform.views} views -> {folder}")
    network.to(world.device).eval()
    line = ProgressLine(len(source), label=name) if world.is_main else None
    try:
        with torch.no_grad(), torch.autocast(world.device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            return build_cache(
                folder, source, transform, lambda images: producer(to_model_range(images.to(world.device))), fingerprint,
                progress=(lambda done, total: line.update(done)) if line else None, rank=world.rank, world=world.size,
                barrier=world.barrier, workers=config.data.workers, on_corrupt=config.data.on_corrupt)
    finally:
        if line:
            line.close()


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def semantic_widths(config: RunConfig, tokenizer_settings: dict[str, Any], pretrained: bool = True) -> dict[str, nn.Module]:
    """Build the teachers on the tokenizer's grid and tell the tokenizer how wide their features are."""
    defaults = TOKENIZERS.signature(tokenizer_settings["name"])
    image_size, patch = (tokenizer_settings.get(key, defaults[key].default) for key in ("image_size", "patch_size"))
    teachers = {name: TEACHERS.build(settings, image_size=image_size, grid=image_size // patch, pretrained=pretrained)
                for name, settings in config.teachers.items()}
    if teachers:
        widths = {name: teacher.dim for name, teacher in teachers.items()}
        tokenizer_settings["semantic"] = {**(tokenizer_settings.get("semantic") or {}), "teachers": widths}
    return teachers


def _initialise(config: RunConfig, kind: str, network: nn.Module) -> dict[str, Tensor] | None:
    """Load train.init_from, if given: raw weights into the network; returns the averaged ones for the EMA."""
    if not config.train.init_from:
        return None
    start = read_weights(kind, config.train.init_from)
    start.load(network, averaged=False)
    return start.read(network, True)


def _tokenizer_task(config: RunConfig, source: DataSource, val: DataSource | None, transform: Transform):
    """(task, averaged weights to start from or None)"""
    teachers = semantic_widths(config, config.tokenizer)
    torch.manual_seed(hash64(config.seed, "init") % 2**63)
    tokenizer = _build("tokenizer", config.tokenizer, None)
    objective = OBJECTIVES.build(config.objective)
    discriminator = None
    if config.discriminator:
        discriminator = DISCRIMINATORS.build(config.discriminator, sync=config.train.sync_batch_norm)
    objective.check_terms(tokenizer.term_names, bool(teachers), discriminator is not None)
    initial_ema = _initialise(config, "tokenizer", tokenizer)
    shown = val or source
    count = min(PREVIEW_IMAGES, len(shown))
    centre = Transform(image_size=transform.image_size)
    pictures = [read_or_replace(shown, i * len(shown) // count, config.data.on_corrupt)[0].image for i in range(count)]
    preview = torch.stack([centre.apply_view(picture, 0) for picture in pictures])
    return TokenizerTask(tokenizer, objective, discriminator, teachers, preview), initial_ema


def _generator_task(config: RunConfig, source: DataSource, world: dist.World, log: Callable[[str], None],
                    transform: Transform):
    """(task, averaged weights to start from or None, provenance)"""
    tokenizer, tokenizer_print = load_tokenizer(config.tokenizer)
    spec = tokenizer.spec
    shape = {"channels": spec.channels, "grid": list(spec.grid)} if isinstance(spec, Continuous) else {}
    shape["num_classes"] = source.num_classes
    accepted = GENERATORS.signature(config.generator["name"])
    for key, value in shape.items():  # so that the run folder says it all
        if key in accepted and config.generator.get(key) is None:
            config.generator[key] = value
    torch.manual_seed(hash64(config.seed, "init") % 2**63)
    generator = _build("generator", config.generator, None)
    check_pair(generator, tokenizer)
    initial_ema = _initialise(config, "generator", generator)
    if isinstance(spec, Continuous):
        _latent_statistics(config, tokenizer, tokenizer_print, source, transform, world, log)
    guide = load_generator(config.sample.guide)[0] if config.sample.guide and config.sample.guidance == "auto" else None
    if guide is not None:
        check_pair(guide, tokenizer)
    guidance = Guidance(config.sample.scale, config.sample.guidance, tuple(config.sample.interval), guide)
    task = GeneratorTask(generator, tokenizer, source.num_classes, guidance, {"steps": config.sample.steps})
    return task, initial_ema, {"tokenizer_fingerprint": tokenizer_print, "tokenizer": config.tokenizer}


STATISTICS_IMAGES = 10_000  # x 256 tokens: 2.5 million values per channel are plenty (spec of RecTok, section 5)


def _latent_statistics(config: RunConfig, tokenizer: nn.Module, fingerprint: str, source: DataSource,
                       transform: Transform, world: dist.World, log: Callable[[str], None]) -> None:
    """Set the tokenizer's normalisation, from the cache folder or by one pass over (part of) the training set."""
    from tokenizer.continuous.stats import StatsAccumulator, load_stats, save_stats

    key = f"{hash64(source.fingerprint(), transform.image_size, transform.crop, fingerprint):016x}"
    path = Path(config.data.cache_dir) / f"latent_stats_{key}.safetensors"
    if not path.is_file() and world.is_main:
        count = min(len(source), STATISTICS_IMAGES)
        chosen = sorted(permutation(len(source), "latent statistics")[:count].tolist())  # from all classes alike
        log(f"measuring latent statistics on {count:,} pictures -> {path}")
        plain = Transform(image_size=transform.image_size, crop="center", flip=False)
        accumulator = StatsAccumulator(tokenizer.spec.channels)
        tokenizer.to(world.device).eval()
        line = ProgressLine(count, label="latent statistics")
        for batch in ordered_batches(source, plain, 64, workers=config.data.workers, on_corrupt=config.data.on_corrupt,
                                     chosen=chosen):
            with torch.no_grad():
                accumulator.update(tokenizer.precompute(to_model_range(batch.images.to(world.device))))
            line.update(accumulator.images)
        line.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_stats(path, accumulator.compute(), fingerprint)
    world.barrier()
    stats = load_stats(path, fingerprint)
    tokenizer.set_latent_stats(stats.mean, stats.std)


def train(config: RunConfig) -> int:
    """Run a training to its end, or until it is asked to stop. Returns the exit code."""
    check_inputs(config)
    world = dist.start(config.train.device)
    try:
        return _train(config, world)
    finally:
        world.stop()


def _train(config: RunConfig, world: dist.World) -> int:
    started = time.perf_counter()

    def say(message: str) -> None:
        if world.is_main:
            print(message, flush=True)

    source, val = open_train(config), open_val(config)
    image_size = _image_size(config)
    transform = Transform(image_size=image_size, crop=config.data.crop, flip=config.data.flip)
    features = stored = None
    provenance: dict[str, Any] = {}
    if config.task == "tokenizer":
        task, initial_ema = _tokenizer_task(config, source, val, transform)
        if config.data.cache_features and task.teachers:
            bundle = nn.ModuleDict(task.teachers)
            features = _cache(config, "features", source, transform, bundle, hub.fingerprint(bundle.state_dict()),
                              lambda images: {n: t(images) for n, t in task.teachers.items()}, world, say)
    else:
        task, initial_ema, provenance = _generator_task(config, source, world, say, transform)
        if config.data.cache_latents:
            stored = _cache(config, "latents", source, transform, task.tokenizer, provenance["tokenizer_fingerprint"],
                            lambda images: {"latents": task.tokenizer.precompute(images)}, world, say)
    run = RunFolder(config, world.is_main)
    loader = Loader(source, transform, config.seed, config.train.global_batch, rank=world.rank, world=world.size,
                    workers=config.data.workers, on_corrupt=config.data.on_corrupt, pin=world.device.type == "cuda",
                    features=features, stored=stored)
    trainer = Trainer(task, config, batches=loader.batches, split=split, images_per_epoch=len(source),
                      data_fingerprint=source.fingerprint(), run=run, world=world,
                      evaluate=_online_evaluation(config, source, val, image_size, world), initial_ema=initial_ema,
                      provenance=provenance)
    run.open(environment())
    run.log(f"{config.task}: {sum(p.numel() for p in trainer.networks[task.primary].parameters()):,} parameters, "
            f"{len(source):,} pictures, {trainer.total_steps:,} steps of {config.train.global_batch} on {world.size} x "
            f"{world.device.type}; ready after {time.perf_counter() - started:.1f} s")
    code = trainer.fit()
    if loader.replaced_count:
        names = "; ".join(f"{key}: {reason}" for key, reason in loader.replaced_names.items())
        run.log(f"{loader.replaced_count} times a picture could not be read and the next one took its place ({names})")
    return code


def _image_size(config: RunConfig) -> int:
    """Of the tokenizer: from its section, or from its weights."""
    size = config.tokenizer.get("image_size")
    if size is None and config.tokenizer.get("weights"):
        size = read_weights("tokenizer", config.tokenizer["weights"]).settings.get("image_size")
    if size is None:
        size = TOKENIZERS.signature(config.tokenizer["name"])["image_size"].default
    return size


def _online_evaluation(config: RunConfig, source: DataSource, val: DataSource | None, image_size: int,
                       world: dist.World) -> Callable[[Any, nn.Module], dict[str, float]] | None:
    """What the trainer calls every train.eval_every, on the main rank."""
    if config.train.eval_every == "never":
        return None
    if val is None:
        raise UserError("train.eval_every is set but there is nothing to evaluate on: give data.val_url.")
    import measure

    if config.task == "tokenizer":
        return lambda task, network: measure.reconstruction(network, val, image_size, config.eval, world.device)
    return lambda task, network: measure.generation(task, network, config, source, val, image_size, world)
