"""The training program: what a config asks for is put together and handed to the Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core import dist
from core.config import RunConfig
from core.errors import UserError
from core.rng import hash64
from core.specs import Continuous, DataSource
from core.train.run import RunFolder
from core.train.trainer import PREVIEW_IMAGES, Trainer
from core.weights import hub
from data.base import left_out, remarks, require_same_classes
from data.loader import Loader, read_or_replace, split
from data.token_files import MomentFiles
from data.tokens import TokenStore
from data.transforms import Transform
from evaluation.environment import environment
from generator import GENERATORS
from generator.task import GeneratorTask
from run import missing
from run.data import asks_val_labels, kept, make_transform, needed_val, open_pictures, open_train, open_val
from run.latent_stats import latent_statistics
from run.load import (
    build,
    check_kind,
    load_generator,
    load_tokenizer,
    make_guidance,
    pair,
    read_weights,
    sample_options,
    semantic_widths,
    statistics_file,
)
from tokenizer import TOKENIZERS
from tokenizer.losses import DISCRIMINATORS, OBJECTIVES
from tokenizer.task import TokenizerTask


def check_inputs(config: RunConfig) -> DataSource | None:
    """Everything that can be wrong outside the config file, found without loading a network and told together.

    Returns the training data.
    """
    dist.pick_device(config.train.device)
    problems = missing.lacking(config)
    source = None
    try:
        source, val = open_train(config), needed_val(config)
        if val is not None and asks_val_labels(config):
            require_same_classes(source.class_names, val.class_names, f"data.val_url={config.data.val_url}")
    except UserError as error:
        if not problems:
            raise
        problems.append(f"data: {error}")
    missing.refuse(config, problems)
    return source


def data_notes(config: RunConfig, source: DataSource) -> list[str]:
    """What a run says about its data: whether it is exact, what is not read of it, and what looks like a mistake."""
    line = left_out(source)
    return (
        [f"{config.data.url}: {source.inexact or 'order and resume are exact'}"]
        + ([line] if line else [])
        + (remarks(source) if config.task == "generator" else [])
    )


def _initialise(config: RunConfig, kind: str, network: nn.Module) -> dict[str, Tensor] | None:
    """Load train.init_from, if given: raw weights into the network; returns the averaged ones for the EMA."""
    if not config.train.init_from:
        return None
    start = read_weights(kind, config.train.init_from, getattr(config, kind))
    start.load(network, averaged=False)
    return start.read(network, True)


def _tokenizer_task(config: RunConfig, source: DataSource, val: DataSource | None):
    """(task, averaged weights to start from or None)"""
    torch.manual_seed(hash64(config.seed, "teachers") % 2**63)  # for toys, whose teachers are random
    teachers = semantic_widths(config, config.tokenizer)
    torch.manual_seed(hash64(config.seed, "init") % 2**63)
    tokenizer = build("tokenizer", config.tokenizer, None)
    objective = OBJECTIVES.build(config.objective)
    discriminator = None
    if config.discriminator:
        discriminator = DISCRIMINATORS.build(
            config.discriminator, sync=config.train.sync_batch_norm, image_size=tokenizer.image_size
        )
    objective.check_terms(tokenizer.term_names, bool(teachers), discriminator is not None)
    initial_ema = _initialise(config, "tokenizer", tokenizer)
    shown = val or _shown(config) or source
    count = min(PREVIEW_IMAGES, len(shown))
    centre = Transform(image_size=tokenizer.image_size)
    pictures = [read_or_replace(shown, i * len(shown) // count, config.data.on_corrupt)[0].image for i in range(count)]
    preview = torch.stack([centre.apply_view(picture, 0) for picture in pictures])
    return TokenizerTask(tokenizer, objective, discriminator, teachers, preview), initial_ema


def _shown(config: RunConfig) -> DataSource | None:
    """Validation pictures for previews, where there are any on this machine."""
    try:
        return open_val(config)
    except UserError:
        return None


def _generator_task(config: RunConfig, source: DataSource, world: dist.World, log: Callable[[str], None]):
    """(task, averaged weights to start from or None, provenance)"""
    tokenizer, tokenizer_print = load_tokenizer(config.tokenizer)
    spec = tokenizer.spec
    check_kind(config.generator["name"], spec)
    shape = {**spec.sizes(), "num_classes": source.num_classes}
    accepted = GENERATORS.signature(config.generator["name"])
    for key, value in shape.items():  # so that the run folder says it all
        if key in accepted and config.generator.get(key) is None:
            config.generator[key] = value
    torch.manual_seed(hash64(config.seed, "init") % 2**63)
    generator = build("generator", config.generator, None)
    pair(generator, tokenizer)
    initial_ema = _initialise(config, "generator", generator)
    if isinstance(source, TokenStore):
        source.check_tokenizer(spec, tokenizer_print, tokenizer.image_size)
    if isinstance(spec, Continuous) and not statistics_file(config.tokenizer):
        pictures = source if config.data.stats_split == "train" else open_val(config)
        latent_statistics(config, tokenizer, tokenizer_print, pictures, world, log)
    guide = load_generator(config.sample.guide)[0] if config.sample.guide and config.sample.guidance == "auto" else None
    if guide is not None:
        pair(guide, tokenizer)
    task = GeneratorTask(
        generator,
        tokenizer,
        source.num_classes,
        make_guidance(config.sample, guide),
        sample_options(config.sample, generator),
    )
    return task, initial_ema, {"tokenizer_fingerprint": tokenizer_print, "tokenizer": config.tokenizer}


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

    source, val = open_train(config), needed_val(config)
    features = stored = None
    pictures = source
    if isinstance(source, TokenStore):
        stored, pictures = source, open_pictures(config)
    provenance: dict[str, Any] = {}
    if config.task == "tokenizer":
        task, initial_ema = _tokenizer_task(config, source, val)
        transform = make_transform(config, task.tokenizer.image_size)
        if config.data.cache_features and task.teachers:
            bundle = nn.ModuleDict(task.teachers)
            features = kept(
                config,
                "features",
                source,
                transform,
                bundle,
                hub.fingerprint(bundle.state_dict()),
                lambda images: {n: t(images) for n, t in task.teachers.items()},
                world,
                say,
            )
    else:
        task, initial_ema, provenance = _generator_task(config, source, world, say)
        transform = source.transform if stored is not None else make_transform(config, task.tokenizer.image_size)
        if config.data.moments:
            tokens_and_moments = (task.tokenizer.spec.length, 2 * task.tokenizer.spec.channels)
            stored = MomentFiles(config.data.moments, source, tokens_and_moments)
        elif config.data.cache_latents and stored is None:
            stored = kept(
                config,
                "latents",
                source,
                transform,
                task.tokenizer,
                provenance["tokenizer_fingerprint"],
                task.tokenizer.precompute,
                world,
                say,
                spec=task.tokenizer.spec,
            )
    run = RunFolder(config, world.is_main)
    loader = Loader(
        None if source is stored else source,
        transform,
        config.seed,
        config.train.global_batch,
        rank=world.rank,
        world=world.size,
        workers=config.data.workers,
        on_corrupt=config.data.on_corrupt,
        max_corrupt=config.data.max_corrupt,
        pin=world.device.type == "cuda",
        features=features,
        stored=stored,
    )
    trainer = Trainer(
        task,
        config,
        batches=loader.batches,
        split=split,
        images_per_epoch=len(source),
        data_fingerprint=source.fingerprint(),
        run=run,
        world=world,
        evaluate=_online_evaluation(config, pictures, val, task.tokenizer.image_size, world),
        initial_ema=initial_ema,
        provenance=provenance,
    )
    world.on_main(lambda: run.open(environment()))
    run.log(
        f"{config.task}: {sum(p.numel() for p in trainer.networks[task.primary].parameters()):,} parameters, "
        f"{len(source):,} pictures, {trainer.total_steps:,} steps of {config.train.global_batch} on {world.size} x "
        f"{world.device.type}, in {trainer.accumulation} part(s) each; ready after "
        f"{time.perf_counter() - started:.1f} s"
    )
    for note in data_notes(config, source) if world.is_main else ():
        run.log(f"data {note}")
    if hint := hint_for_small_sets(config, len(source)):
        run.log(hint)
    try:
        code = trainer.fit()
    finally:
        run.close()
    if count := len(loader.replaced):
        run.log(f"unreadable pictures, for which the next one was taken: {count} ({loader.replaced.names()})")
    return code


SMALL_SET = 50_000  # pictures; the published recipes are made for 1.28 million


def hint_for_small_sets(config: RunConfig, count: int) -> str | None:
    """What to change in a recipe for a training set of `count` pictures; None where there is nothing to tell."""
    if count >= SMALL_SET or config.data.url.startswith(("embedded://", "synthetic://")):
        return None
    hints = []
    if not config.train.init_from:
        hints.append("start from released or own weights (train.init_from=FILE)")
    section = config.tokenizer if config.task == "tokenizer" else config.generator
    registry = TOKENIZERS if config.task == "tokenizer" else GENERATORS
    accepted = registry.signature(section["name"])
    if "enc_tuning" in accepted and section.get("enc_tuning", "full") == "full":
        hints.append("train adapters only (tokenizer.enc_tuning=lora tokenizer.dec_tuning=lora, or frozen)")
    if config.train.global_batch > 128:
        hints.append("make train.global_batch smaller (128) and the learning rate with it")
    if not config.data.flip and not config.data.url.startswith("tokens://"):
        hints.append("mirror half of the pictures (data.flip=true)")
    if not hints:
        return None
    return f"{count:,} pictures are few for this recipe. What helps: " + "; ".join(hints) + ". See docs/data.md."


def _online_evaluation(
    config: RunConfig, pictures: DataSource | None, val: DataSource | None, image_size: int, world: dist.World
) -> Callable[[Any, nn.Module], dict[str, float]] | None:
    """What the trainer calls every train.eval_every, on all ranks."""
    if config.train.eval_every == "never":
        return None
    from evaluation import measure

    return measure.Online(config, pictures or val, val, image_size, world)
