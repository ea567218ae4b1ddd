"""From a checked config to running objects: the one place that sees every package.

Programs in this folder call `load_config`, then `train`, or `load_tokenizer` / `load_generator` for finished weights.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import config as config_module
from core import dist
from core.config import RESERVED, RunConfig, SampleConfig
from core.errors import UserError
from core.images import to_model_range
from core.rng import hash64
from core.specs import Codes, Continuous, DataSource, Guidance, LatentSpec, MultiScale
from core.train.checkpoint import Checkpoint
from core.train.log import ProgressLine
from core.train.run import RunFolder
from core.train.trainer import PREVIEW_IMAGES, Trainer
from core.weights import files as weight_files
from core.weights import hub, released
from core.weights.adapter import describe_differences, merged, recognise, unusable
from data import tokens
from data.base import remarks, require_labels
from data.cache import FeatureCache
from data.cache import build as build_cache
from data.loader import Loader, read_or_replace, split
from data.moments import MomentFiles
from data.sources import open_source
from data.tokens import TokenStore
from data.transforms import Transform
from evaluation import protocols
from evaluation.environment import environment
from generator import GENERATORS
from generator.adapters import ADAPTERS as GENERATOR_ADAPTERS
from generator.task import GeneratorTask
from run import translate
from tokenizer import TOKENIZERS
from tokenizer.adapters import ADAPTERS as TOKENIZER_ADAPTERS
from tokenizer.continuous.stats import default_place, read_stats, save_stats
from tokenizer.losses import DISCRIMINATORS, OBJECTIVES
from tokenizer.task import TokenizerTask
from tokenizer.teachers import TEACHERS
from tokenizer.views import view

REGISTRIES = {
    "tokenizer": TOKENIZERS,
    "generator": GENERATORS,
    "objective": OBJECTIVES,
    "discriminator": DISCRIMINATORS,
    "teacher": TEACHERS,
}
ADAPTERS = {"tokenizer": TOKENIZER_ADAPTERS, "generator": GENERATOR_ADAPTERS}


def load_config(path: str, overrides: list[str]) -> RunConfig:
    """A checked config from a YAML file of ours, or one of an original's that run/translate.py can translate."""
    return config_module.load(*translate.translate(path, overrides), REGISTRIES)


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


def read_weights(kind: str, reference: str, given: dict[str, Any] | None = None) -> Weights:
    """Find the weights of a tokenizer or generator.

    Args:
        kind: "tokenizer" or "generator".
        reference: run folder, checkpoint folder, file, file name in pretrained_models/, or hf://owner/repo/file.
        given: settings that the user states; they answer what a released file does not tell (numbers of heads).
    """
    path = released.resolve(reference)
    if path.is_dir():
        return _from_checkpoint(kind, Checkpoint(path))
    ours = weight_files.read(path)
    return _from_file(kind, path, given) if ours is None else _from_ours(kind, path, ours)


def _from_checkpoint(kind: str, checkpoint: Checkpoint) -> Weights:
    state = checkpoint.state
    if state["primary"] != kind:
        raise UserError(f"{checkpoint.path} holds a {state['primary']}, a {kind} was asked for.")
    settings = {k: v for k, v in state["config"][kind].items() if k not in RESERVED - {"name"}}

    def tensors(averaged: bool) -> dict[str, Tensor]:
        return checkpoint.tensors(f"{kind}.ema_{state['ema'][0]}" if averaged and state["ema"] else kind)

    constants = checkpoint.tensors("constants") if "constants.safetensors" in checkpoint.files else {}
    read = _reader(kind, settings, checkpoint.path, tensors)
    return Weights(settings, checkpoint.path, constants, state["provenance"], read)


def _from_ours(kind: str, path: Path, content: weight_files.WeightFile) -> Weights:
    if content.kind != kind:
        raise UserError(f"{path} holds a {content.kind}, a {kind} was asked for.")

    def tensors(averaged: bool) -> dict[str, Tensor]:
        return content.weights if averaged or not content.raw else content.raw

    return Weights(
        content.settings, path, content.constants, content.provenance, _reader(kind, content.settings, path, tensors)
    )


def _reader(kind: str, settings: dict[str, Any], path: Path, tensors: Callable[[bool], dict[str, Tensor]]):
    """Weights.read of tensors that have our names already."""

    def read(network: nn.Module, averaged: bool) -> dict[str, Tensor]:
        adapter = ADAPTERS[kind].get(settings["name"])  # one that nobody published weights of has none
        state = adapter.fit(tensors(averaged), network) if adapter else tensors(averaged)
        if problems := describe_differences(state, network.state_dict()):
            raise UserError(f"{path} does not fit {type(network).__name__}: {'; '.join(problems)}")
        if problem := unusable(state, network.state_dict()):
            raise UserError(f"{path}: {problem}")
        return state

    return read


def _from_file(kind: str, path: Path, given: dict[str, Any] | None) -> Weights:
    """A released file, read by the adapter that recognises it."""
    loaded = hub.load_tensors(path)
    name = recognise(ADAPTERS[kind], loaded)
    if name is None:
        other = next((a[n].title for a in ADAPTERS.values() if (n := recognise(a, loaded))), None)
        raise UserError(
            f"{path} holds {other}, a {kind} was asked for."
            if other
            else f"{path}: these are not the weights of any {kind} that is known "
            f"({', '.join(a.title.removeprefix('the ') for a in ADAPTERS[kind].values())})."
        )
    adapter = ADAPTERS[kind][name]

    def told(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    settings = {"name": name, **told(adapter.describe, loaded, given)}
    return Weights(settings, path, {}, {}, lambda network, averaged: told(adapter.convert, network, loaded, averaged))


def _build(kind: str, component: dict[str, Any], weights: Weights | None, **defaults: Any) -> nn.Module:
    """A network from its config section; with weights, their settings fill in what the section leaves out."""
    settings = {k: v for k, v in component.items() if k not in RESERVED - {"name"}}
    if weights is not None:
        known = weights.settings
        if settings.get("name", known["name"]) != known["name"]:
            raise UserError(f'{weights.path} holds the {kind} "{known["name"]}", not "{settings["name"]}".')
        settings = merged(known, settings)
        if "pretrained" in REGISTRIES[kind].signature(settings["name"]):
            settings["pretrained"] = False  # what it would start from is about to be replaced
    network = REGISTRIES[kind].build(settings, **defaults)
    if weights is not None:
        try:
            weights.load(network, component.get("use_ema", True))
        except UserError as error:
            other = [
                f"{kind}.{key} is {settings[key]!r}, the weights were made with {known[key]!r}"
                for key in known
                if settings[key] != known[key]
            ]
            raise UserError(f"{'; '.join(other)}. {error}" if other else str(error)) from None
    return network


def load_tokenizer(component: dict[str, Any]) -> tuple[nn.Module, str]:
    """The tokenizer of a config section, frozen, and the fingerprint of its weights."""
    weights = read_weights("tokenizer", component["weights"], component) if component.get("weights") else None
    tokenizer = view(_build("tokenizer", component, weights), component.get("view")).eval().requires_grad_(False)
    fingerprint = hub.fingerprint(tokenizer.state_dict())
    if place := statistics_file(component):
        stats = read_stats(place, fingerprint)
        tokenizer.set_latent_stats(stats.mean, stats.std)
    return tokenizer, fingerprint


def statistics_file(component: dict[str, Any]) -> str | None:
    """Where the latent statistics of a tokenizer are: as its section says ("none": nowhere), else beside them."""
    if given := component.get("latent_stats"):
        return None if given == "none" else given
    beside = default_place(hub.resolve(component["weights"])) if component.get("weights") else None
    return str(beside) if beside and beside.is_file() else None


def load_generator(
    reference: str, tokenizer: nn.Module | None = None, use_ema: bool = True, given: dict[str, Any] | None = None
) -> tuple[nn.Module, Weights]:
    """A finished generator, frozen. Its latent statistics go to `tokenizer`, whose latents it must have learnt.

    `given`: see `read_weights`; the tokenizer's sizes answer too."""
    sizes = tokenizer.spec.sizes() if tokenizer is not None else {}  # of codes: released files do not tell all of them
    weights = read_weights("generator", reference, {**sizes, **(given or {})})
    generator = _build("generator", {"use_ema": use_ema}, weights, **sizes).eval().requires_grad_(False)
    if tokenizer is not None:
        pair(generator, tokenizer)
        trained_on, given = weights.provenance.get("tokenizer_fingerprint"), hub.fingerprint(tokenizer.state_dict())
        if trained_on and trained_on != given:
            known = weights.provenance.get("tokenizer", {}).get("weights") or "the tokenizer it was trained with"
            raise UserError(
                f"{weights.path} models the latents of tokenizer weights {trained_on}, but the tokenizer "
                f"in use has {given}: its statistics and samples belong to another tokenizer. Use {known}."
            )
        if weights.constants:
            tokenizer.set_latent_stats(weights.constants["mean"], weights.constants["std"])
        elif getattr(tokenizer, "latent_stats_known", True) is False:
            raise UserError(
                f"{weights.path} comes without the statistics of the latents it models. Measure them once: "
                "python -m scripts.latent_stats TOKENIZER [URL], or give tokenizer.latent_stats=FILE."
            )
    return generator, weights


KINDS = {Continuous: "a grid of real vectors", Codes: "one sequence of codes", MultiScale: "codes at several scales"}
OTHER_VIEWS = {(Codes, Continuous): "vectors", (MultiScale, Codes): "sequence"}


def check_kind(generator: str, spec: LatentSpec) -> None:
    """UserError where a generator of this name models another kind of latents, before it is built from their sizes."""
    wanted = GENERATORS.get(generator).models
    if isinstance(spec, wanted):
        return
    seen_as = OTHER_VIEWS.get((type(spec), wanted))
    fitting = [name for name in GENERATORS.names() if isinstance(spec, GENERATORS.get(name).models)]
    advice = (
        f"Set tokenizer.view={seen_as} to look at its codes that way."
        if seen_as
        else f"Choose from {', '.join(fitting)}."
    )
    raise UserError(f'generator "{generator}" models {KINDS[wanted]}, the tokenizer gives {spec}. {advice}')


def pair(generator: nn.Module, tokenizer: nn.Module) -> None:
    """Introduce a generator to the tokenizer whose latents it models; UserError if they do not fit."""
    problems = generator.fits(tokenizer.spec)
    if problems:
        raise UserError(
            f"{type(generator).__name__} does not fit the latents of {type(tokenizer).__name__} "
            f"({tokenizer.spec}): {' '.join(problems)}"
        )
    if hasattr(generator, "bind"):
        generator.bind(tokenizer)


def make_guidance(settings: SampleConfig, guide: nn.Module | None = None) -> Guidance:
    scale = tuple(settings.scale) if isinstance(settings.scale, list) else settings.scale
    return Guidance(
        scale, settings.guidance, tuple(settings.interval), guide, settings.schedule, settings.start, settings.power
    )


def sample_options(settings: SampleConfig, generator: nn.Module) -> dict[str, Any]:
    """Keyword arguments of generator.sample from the config; UserError for one that it does not take."""
    accepted = list(inspect.signature(generator.sample).parameters)[3:]  # after labels, draws, guidance
    given = settings.options()
    for name in given:
        if name not in accepted:
            raise UserError(
                f"sample.{name}: {type(generator).__name__} has no such sampling option; it takes "
                f"{', '.join(accepted) or 'none'}."
            )
    return given


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def open_train(config: RunConfig) -> DataSource:
    """What the run trains on: pictures, or a TokenStore where data.url is tokens://."""
    source = open_source(config.data.url, config.data.split)
    if config.task == "tokenizer" and isinstance(source, TokenStore):
        raise UserError(f"data.url={config.data.url} holds tokens; a tokenizer trains on pictures. Give those.")
    if config.task == "generator":
        require_labels(source)
    return source


def open_pictures(config: RunConfig) -> DataSource | None:
    """The training pictures: data.pictures behind tokens://, else data.url; None when a run has tokens alone."""
    if config.data.url.startswith("tokens://"):
        return open_source(config.data.pictures, config.data.split) if config.data.pictures else None
    return open_source(config.data.url, config.data.split)


def make_transform(config: RunConfig, image_size: int) -> Transform:
    """The crop that a config describes."""
    data = config.data
    flip = data.flip and data.crop != "ten"  # which has its mirror images
    return Transform(
        image_size,
        data.crop,
        flip,
        tuple(data.scale),
        short_side=data.short_side,
        crop_range=data.crop_range,
        resample=data.resample,
    )


def open_val(config: RunConfig) -> DataSource | None:
    """Pictures to evaluate on, or None."""
    if config.data.val_url:
        return open_source(config.data.val_url, "val")
    if config.data.url.startswith("embedded://"):
        return open_source(config.data.url, "val")
    return None


def needed_val(config: RunConfig) -> DataSource | None:
    """open_val where the run uses those pictures for more than previews; else None, whether they are here or not.

    Raises UserError with what they are for where they are needed and missing.
    """
    uses, tokens_alone = [], config.data.url.startswith("tokens://") and not config.data.pictures
    labels = config.eval.labels or protocols.get(config.eval.protocol, "generation").labels
    if config.train.eval_every != "never" and (config.task == "tokenizer" or labels == "val" or tokens_alone):
        uses.append("train.eval_every")
    if config.task == "generator" and config.data.stats_split == "val":
        uses.append("data.stats_split")
    if not uses:
        return None
    advice = f"It is there for {' and '.join(uses)}: give data.val_url=URL" + (
        ", or train.eval_every=never." if uses == ["train.eval_every"] else "."
    )
    try:
        val = open_val(config)
    except UserError as error:
        raise UserError(
            f"data.val_url={config.data.val_url} cannot be opened ({str(error).rstrip('.')}). {advice}"
        ) from None
    if val is None:
        raise UserError(f"there are no validation pictures. {advice}")
    return val


def check_inputs(config: RunConfig) -> None:
    """Everything that can be wrong outside the config file, found without loading a network and told together."""
    from run import needs

    dist.pick_device(config.train.device)
    missing = needs.lacking(config)
    try:
        open_train(config)
        needed_val(config)
    except UserError as error:
        if not missing:
            raise
        missing.append(f"data: {error}")
    needs.refuse(config, missing)


def compute_once(
    config: RunConfig,
    label: str,
    network: nn.Module,
    world: dist.World,
    log: Callable[[str], None],
    build: Callable[..., FeatureCache],
    precision: str,
    batch: int = 64,
) -> FeatureCache:
    """Call data.cache.build or data.tokens.build with `network` on the run's device and a progress line."""
    network.to(world.device).eval()
    line = ProgressLine(1, label=label) if world.is_main else None
    replaced: dict[str, str] = {}

    def progress(done: int, total: int) -> None:
        line.total = total * world.size  # of all ranks, which are about equally quick
        line.update(done * world.size)

    try:
        with torch.no_grad(), torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16"):
            made = build(
                batch=batch,
                progress=progress if line else None,
                rank=world.rank,
                world=world.size,
                barrier=world.barrier,
                workers=config.data.workers,
                on_corrupt=config.data.on_corrupt,
                replaced=replaced,
            )
    finally:
        if line:
            line.close()
    if replaced:
        log(f"{len(replaced)} pictures could not be read; the next one took their place: {', '.join([*replaced][:20])}")
    return made


def _cache(
    config: RunConfig,
    name: str,
    source: DataSource,
    transform: Transform,
    network: nn.Module,
    fingerprint: str,
    producer: Callable[[Tensor], Any],
    world: dist.World,
    log: Callable[[str], None],
    spec: LatentSpec | None = None,
) -> FeatureCache:
    """Open or make the per-picture cache called `name`: a token store when `spec` is given."""
    if transform.views is None:
        raise UserError(
            f'data.cache_{name}: data.crop="{config.data.crop}" shows a new crop each time, so nothing can '
            "be kept. Use data.crop=center, or turn the cache off."
        )
    key = f"{hash64(source.fingerprint(), repr(transform.describe()), fingerprint):016x}"
    folder = Path(config.data.cache_dir) / f"{name}_{key}"
    if not folder.exists():
        log(f"computing {name} once for {len(source):,} pictures x {transform.views} views -> {folder}")

    def on_device(images: Tensor) -> Any:
        return producer(to_model_range(images.to(world.device)))

    if spec is None:
        build = functools.partial(build_cache, folder, source, transform, on_device, fingerprint)
    else:
        build = functools.partial(tokens.build, folder, source, transform, spec, on_device, fingerprint)
    return compute_once(config, name, network, world, log, build, config.train.precision)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
def semantic_widths(
    config: RunConfig, tokenizer_settings: dict[str, Any], pretrained: bool = True
) -> dict[str, nn.Module]:
    """Build the teachers on the tokenizer's grid and tell the tokenizer how wide their features are."""
    defaults = TOKENIZERS.signature(tokenizer_settings["name"])
    image_size, patch = (
        tokenizer_settings.get(key, defaults[key].default if key in defaults else None)
        for key in ("image_size", "patch_size")
    )
    shape = {"image_size": image_size, **({"grid": image_size // patch} if patch else {})}
    teachers = {
        name: TEACHERS.build(settings, **shape, pretrained=pretrained) for name, settings in config.teachers.items()
    }
    if teachers:
        widths = {name: teacher.dim for name, teacher in teachers.items()}
        tokenizer_settings["semantic"] = {**(tokenizer_settings.get("semantic") or {}), "teachers": widths}
    return teachers


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
    tokenizer = _build("tokenizer", config.tokenizer, None)
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
    generator = _build("generator", config.generator, None)
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


def latent_statistics(
    config: RunConfig,
    tokenizer: nn.Module,
    fingerprint: str,
    source: DataSource,
    world: dist.World,
    log: Callable[[str], None],
) -> None:
    """Set the tokenizer's normalisation, from the cache folder or by one pass over (part of) the pictures."""
    from scripts import latent_stats

    count = min(len(source), config.data.stats_images or len(source))
    key = f"{hash64(source.fingerprint(), tokenizer.image_size, count, fingerprint):016x}"
    path = Path(config.data.cache_dir) / f"latent_stats_{key}.safetensors"
    if not path.is_file() and world.is_main:
        log(f"measuring latent statistics on {count:,} pictures -> {path}")
        found = latent_stats.measured(
            tokenizer, source, count, world.device, config.data.workers, config.data.on_corrupt
        )
        save_stats(path, found, fingerprint)
    world.barrier()
    stats = read_stats(str(path), fingerprint)
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
            features = _cache(
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
            stored = _cache(
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
    run.open(environment())
    run.log(
        f"{config.task}: {sum(p.numel() for p in trainer.networks[task.primary].parameters()):,} parameters, "
        f"{len(source):,} pictures, {trainer.total_steps:,} steps of {config.train.global_batch} on {world.size} x "
        f"{world.device.type}, in {trainer.accumulation} part(s) each; ready after "
        f"{time.perf_counter() - started:.1f} s"
    )
    run.log(f"data {config.data.url}: {getattr(source, 'inexact', 'order and resume are exact')}")
    for remark in remarks(source) if config.task == "generator" else ():
        run.log(remark)
    if hint := hint_for_small_sets(config, len(source)):
        run.log(hint)
    code = trainer.fit()
    if loader.replaced_count:
        names = "; ".join(f"{key}: {reason}" for key, reason in loader.replaced_names.items())
        run.log(f"{loader.replaced_count} times a picture could not be read and the next one took its place ({names})")
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
