"""From a checked config to networks, new or with weights: the one place that sees all of them.

    load_config                         YAML and overrides -> RunConfig
    read_tokenizer, read_generator      finished networks, whose weights run/weights.py finds
    build_pair                          tokenizer, generator and guide of a generator's config, whatever they are for
    build_tokenizer_task                a new tokenizer with teachers, objective and discriminator
    random_task                         the same without any weights: of the benchmark and --dry-run, sizes alone count

`weights` says where weights come from: "load" those that a config names, "random" none, "meta" not even memory for them.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from core import config as config_module
from core.dist import World
from core.errors import UserError
from core.files import ROOT
from core.rng import hash64
from core.schema import RunConfig, SampleConfig
from core.specs import Codes, Continuous, Generator, LatentSpec, MultiScale, Tokenizer
from core.weights import hub, released
from core.weights.adapter import merged
from core.weights.encoding import encoding_fingerprint
from generator import GENERATORS
from generator.settings import guide_of, sampling_of
from generator.task import GeneratorTask
from run import translate
from run.recipes import recipe_of
from run.weights import Source, Weights, constructor_arguments, open_weights, read_weights
from tokenizer import TOKENIZERS
from tokenizer.continuous.stats import default_place, read_stats
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
IMAGENET_CLASSES = 1000

Origin = Literal["load", "random", "meta"]
Network = TypeVar("Network", bound=nn.Module)


def load_config(path: str, overrides: list[str]) -> RunConfig:
    """A checked config from a YAML file of ours, or one of an original's that run/translate.py can translate."""
    return config_module.load(*translate.translate(path, overrides), REGISTRIES)


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Loaded(Generic[Network]):
    """A network with what is known of it.

    Attributes:
        module: where weights were loaded, in evaluation mode and without gradients.
        settings: its name and constructor arguments.
        fingerprint: of its weights (core.weights.hub.fingerprint); "" for random ones.
        weights: where they are from, with what else is noted there; None for random ones.
    """

    module: Network
    settings: dict[str, Any]
    fingerprint: str = ""
    weights: Weights | None = None

    @property
    def image_size(self: Loaded[Tokenizer]) -> int:
        """Of a tokenizer: pixels of a side of its pictures."""
        return self.module.image_size


def build(
    kind: str, section: dict[str, Any], weights: Weights | None = None, filled: bool = True, **defaults: Any
) -> Any:
    """A network of this kind from its config section; with weights, their settings fill in what the section leaves out.

    Args:
        filled: False: on the meta device, only the sizes of the weights count.
    """
    settings = constructor_arguments(section)
    if weights is None:
        return REGISTRIES[kind].build(settings, **defaults)
    known = weights.settings
    if settings.get("name", known["name"]) != known["name"]:
        raise UserError(f'{weights.path} holds the {kind} "{known["name"]}", not "{settings["name"]}".')
    settings = untrained(REGISTRIES[kind], merged(known, settings))  # what it would start from is about to be replaced
    if not filled:
        with torch.device("meta"):
            return REGISTRIES[kind].build(settings, **defaults).to("meta")  # tables are made on the CPU
    network = REGISTRIES[kind].build(settings, **defaults)
    try:
        weights.load(network, section.get("use_ema", True))
    except UserError as error:
        others = [
            f"{kind}.{key} is {settings[key]!r}, the weights were made with {value!r}"
            for key, value in known.items()
            if settings[key] != value
        ]
        raise UserError(f"{'; '.join(others)}. {error}" if others else str(error)) from None
    return network


def _frozen(network: Network, settings: dict[str, Any], weights: Weights | None) -> Loaded[Network]:
    network.eval().requires_grad_(False)
    return Loaded(network, weights.settings if weights else settings, hub.fingerprint(network.state_dict()), weights)


def read_tokenizer(
    section: dict[str, Any], source: Source | None = None, world: World | None = None
) -> Loaded[Tokenizer]:
    """The tokenizer of a config section, with its latent statistics where they are known.

    Args:
        source: of section["weights"], where it is opened already.
        world: several ranks, unless `source` follows; they take the same weights. Collective then.
    """
    weights = None
    if section.get("weights"):
        weights = read_weights("tokenizer", source or open_weights(section["weights"], "tokenizer", world), section)
    tokenizer = _frozen(view(build("tokenizer", section, weights), section.get("view")), section, weights)
    if place := statistics_file(section, weights):
        stats = read_stats(place, tokenizer.fingerprint, lambda: encoding_fingerprint(tokenizer.module))
        tokenizer.module.set_latent_stats(stats.mean, stats.std)
    return tokenizer


def _encodes_alike(tokenizer: Loaded[Tokenizer], weights: Weights) -> bool:
    """Whether the tokenizer makes the latents that a generator's weights have learnt, as far as these tell."""
    known = weights.provenance.get("tokenizer_encoding")
    return known is not None and known == encoding_fingerprint(tokenizer.module)


def statistics_file(section: dict[str, Any], weights: Weights | None) -> str | None:
    """Where the latent statistics of a tokenizer are: as its section says ("none": nowhere), else beside its weights."""
    if named := section.get("latent_stats"):
        return None if named == "none" else named
    beside = default_place(weights.path) if weights else None
    return str(beside) if beside and beside.is_file() else None


def lay_out_tokenizer(section: dict[str, Any], source: Source | None = None) -> Loaded[Tokenizer]:
    """The tokenizer that `read_tokenizer` makes of finished weights, on the meta device; their values are not read."""
    weights = read_weights("tokenizer", source or section["weights"], section)
    network = build("tokenizer", section, weights, filled=False)
    with torch.device("meta"):
        return Loaded(view(network, section.get("view")).eval(), weights.settings)


def tokenizer_layout(section: dict[str, Any], source: Source | None = None) -> tuple[dict[str, Any], str | None]:
    """(constructor arguments of a tokenizer, where they come from if not from the section itself or its weights).

    Nothing is downloaded. UserError where neither the section, nor its file, nor the table of released files tells.
    """
    settings = constructor_arguments(section)
    reference = section.get("weights")
    if not reference:
        return settings, None
    problem = f"{reference} is not on this machine."
    if "://" not in reference:
        try:
            return {**read_weights("tokenizer", source or reference, section).settings, **settings}, None
        except UserError as error:
            problem = str(error)
    file = released.find(reference)
    if file is not None and (file.network or file.recipe):
        known, place = file.network, "the table of released files"
        if not known and file.recipe:
            paired = load_config(str(ROOT / file.recipe), []).tokenizer
            known, place = constructor_arguments(paired), file.recipe
            if "name" not in known:  # a file with both networks: the recipe names the tokenizer's own
                known = tokenizer_layout(paired)[0]
        return {**known, **settings}, f"{file.name} is not here; its sizes are those of {place}"
    if trained_by := recipe_of(reference):
        recipe, _ = trained_by
        known = constructor_arguments(load_config(str(ROOT / recipe), []).tokenizer)
        return {**known, **settings}, f"{reference} is not here; its sizes are those of {recipe}"
    if "name" in settings:
        return settings, f"{reference} is not here; its sizes are the defaults of {settings['name']}"
    raise UserError(
        f"{problem} Only the tokenizer's sizes are needed here: give tokenizer.name=... and its settings, or "
        "--tokenizer-config CONFIG to the benchmark."
    )


def untrained_tokenizer(section: dict[str, Any], source: Source | None = None) -> Loaded[Tokenizer]:
    """A tokenizer without weights, on the current default device."""
    settings = untrained(TOKENIZERS, tokenizer_layout(section, source)[0])
    tokenizer = TOKENIZERS.build(settings)
    tokenizer.to(torch.get_default_device())  # tables are made on the CPU whatever the context says, and views compute
    return Loaded(view(tokenizer, section.get("view")).eval().requires_grad_(False), settings)


def read_generator(
    source: str | Source, tokenizer: Loaded[Tokenizer] | None = None, section: dict[str, Any] | None = None
) -> Loaded[Generator]:
    """A finished generator. Its latent statistics go to `tokenizer`, whose latents it must have learnt.

    Args:
        section: settings that the user states, and `use_ema`; the tokenizer's sizes answer too.
    """
    section = section or {}
    source = open_weights(source, "generator", None) if isinstance(source, str) else source
    sizes = tokenizer.module.spec.sizes() if tokenizer else {}  # of codes: released files do not tell all of them
    weights = read_weights("generator", source, {**sizes, **section})
    network: Generator = build("generator", {"use_ema": section.get("use_ema", True)}, weights, **sizes)
    generator = _frozen(network, section, weights)
    if tokenizer is None:
        return generator
    introduce(network, tokenizer.module)
    trained_on = weights.provenance.get("tokenizer_fingerprint")
    if trained_on and trained_on != tokenizer.fingerprint and not _encodes_alike(tokenizer, weights):
        known = weights.provenance.get("tokenizer", {}).get("weights") or "the tokenizer it was trained with"
        raise UserError(
            f"{weights.path} models the latents of tokenizer weights {trained_on}, but the tokenizer "
            f"in use has {tokenizer.fingerprint} and does not encode as they did: its statistics and samples belong to another tokenizer. Use {known}."
        )
    if weights.constants:
        tokenizer.module.set_latent_stats(weights.constants["mean"], weights.constants["std"])
    return generator


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and generator
# ---------------------------------------------------------------------------------------------------------------------
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


def introduce(generator: Generator, tokenizer: Tokenizer) -> None:
    """Bind a generator to the tokenizer whose latents it models; UserError if they do not fit."""
    problems = generator.fits(tokenizer.spec)
    if problems:
        raise UserError(
            f"{type(generator).__name__} does not fit the latents of {type(tokenizer).__name__} "
            f"({tokenizer.spec}): {' '.join(problems)}"
        )
    generator.bind(tokenizer)


@dataclass
class Pair:
    """A generator, the tokenizer whose latents it models, and the weaker generator that guides it, if one does."""

    tokenizer: Loaded[Tokenizer]
    generator: Loaded[Generator]
    guide: Loaded[Generator] | None = None

    def to(self, device: torch.device) -> None:
        """Move the networks."""
        for network in (self.tokenizer, self.generator, self.guide):
            if network is not None:
                network.module.to(device)

    @property
    def lacks_statistics(self) -> bool:
        """Whether the mean and standard deviation of the latents have yet to be measured: run/latent_stats.py."""
        return not self.tokenizer.module.latent_stats_known

    def task(self, num_classes: int, settings: SampleConfig) -> GeneratorTask:
        """Ready to train or to sample as `settings` say. UserError for finished weights without their statistics."""
        if self.generator.weights and self.lacks_statistics:
            raise UserError(
                f"{self.generator.weights.path} comes without the statistics of the latents it models. Measure them once: "
                "python -m scripts.latent_stats TOKENIZER [URL], or give tokenizer.latent_stats=FILE."
            )
        generator, tokenizer = self.generator.module, self.tokenizer.module
        guidance, options = sampling_of(settings, generator, tokenizer.spec, self.guide and self.guide.module)
        return GeneratorTask(generator, tokenizer, num_classes, guidance, options)


def build_pair(
    config: RunConfig,
    weights: Origin = "load",
    sources: dict[str, Source] | None = None,
    guide: RunConfig | None = None,
    num_classes: int = IMAGENET_CLASSES,
) -> Pair:
    """Tokenizer, generator and guide of a generator's config, which have been found to fit each other.

    Args:
        weights: of tokenizer and guide.
        sources: weights that are resolved already, by setting: "tokenizer.weights", "sample.guide" and
            "generator.weights", without which the generator is a new one.
        guide: config of the guide where weights are not loaded; None: no guide then.
        num_classes: of a new generator.
    """
    sources = sources or {}
    if weights != "load":
        with torch.device("meta") if weights == "meta" else contextlib.nullcontext():
            tokenizer = untrained_tokenizer(config.tokenizer, sources.get("tokenizer.weights"))
            pair = Pair(tokenizer, _new_generator(config, tokenizer, num_classes))
            if guide is not None:
                pair.guide = _new_generator(guide, tokenizer, num_classes)
                pair.guide.module.eval().requires_grad_(False)
        return pair
    tokenizer = read_tokenizer(config.tokenizer, sources.get("tokenizer.weights"))
    if "generator.weights" in sources:
        generator = read_generator(sources["generator.weights"], tokenizer, config.generator)
    else:
        generator = _new_generator(config, tokenizer, num_classes)
    pair = Pair(tokenizer, generator)
    if named := guide_of(config.sample):
        pair.guide = read_generator(sources.get("sample.guide", named))
        introduce(pair.guide.module, tokenizer.module)
    return pair


def lay_out_pair(config: RunConfig, sources: dict[str, Source]) -> Pair:
    """The pair that `build_pair` makes of finished weights, on the meta device. UserError where one would not fit the
    other; the values of weights are not read.

    Args:
        sources: "tokenizer.weights", "generator.weights" and, where it is used, "sample.guide".
    """

    def generator_of(setting: str, section: dict[str, Any]) -> Loaded[Generator]:
        sizes = tokenizer.module.spec.sizes()
        weights = read_weights("generator", sources[setting], {**sizes, **section})
        network = build("generator", {}, weights, filled=False, **sizes)
        introduce(network, tokenizer.module)
        return Loaded(network.eval(), weights.settings)

    tokenizer = lay_out_tokenizer(config.tokenizer, sources["tokenizer.weights"])
    with torch.device("meta"):
        pair = Pair(tokenizer, generator_of("generator.weights", config.generator or {}))
        if guide_of(config.sample):
            pair.guide = generator_of("sample.guide", {})
    return pair


def _new_generator(config: RunConfig, tokenizer: Loaded[Tokenizer], num_classes: int) -> Loaded[Generator]:
    """The generator of a config with random weights; the tokenizer's sizes fill in what the config leaves out."""
    assert config.generator is not None
    spec, settings = tokenizer.module.spec, constructor_arguments(config.generator)
    check_kind(settings["name"], spec)
    accepted = GENERATORS.signature(settings["name"])
    for key, value in {**spec.sizes(), "num_classes": num_classes}.items():
        if key in accepted and settings.get(key) is None:
            settings[key] = value
    torch.manual_seed(hash64(config.seed, "init") % 2**63)
    generator: Generator = build("generator", settings).to(torch.get_default_device())  # see untrained_tokenizer
    introduce(generator, tokenizer.module)
    return Loaded(generator, settings)


# ---------------------------------------------------------------------------------------------------------------------
# What trains
# ---------------------------------------------------------------------------------------------------------------------
def build_tokenizer_task(config: RunConfig, weights: Origin = "load") -> TokenizerTask:
    """A new tokenizer, as a tokenizer's config trains it; `weights` are of teachers, of the networks behind losses, and of
    what the tokenizer starts from."""
    assert config.objective is not None
    ready = weights == "load"
    settings = config.tokenizer if ready else untrained(TOKENIZERS, tokenizer_layout(config.tokenizer)[0])
    torch.manual_seed(hash64(config.seed, "teachers") % 2**63)  # for toys, whose teachers are random
    teachers = build_teachers(config, settings, pretrained=ready)
    torch.manual_seed(hash64(config.seed, "init") % 2**63)
    tokenizer: Tokenizer = build("tokenizer", settings)
    losses: dict[str, Any] = dict(config.objective)
    if not ready and losses.get("perceptual"):
        losses["perceptual"] = {
            name: {**(part if isinstance(part, dict) else {"weight": part}), "pretrained": False}
            for name, part in losses["perceptual"].items()
        }
    objective = OBJECTIVES.build(losses)
    discriminator = None
    if config.discriminator:
        discriminator = DISCRIMINATORS.build(
            config.discriminator if ready else untrained(DISCRIMINATORS, config.discriminator),
            sync=ready and config.train.sync_batch_norm,
            image_size=tokenizer.image_size,
        )
    objective.check_terms(tokenizer.term_names, bool(teachers), discriminator is not None)
    return TokenizerTask(tokenizer, objective, discriminator, teachers)


def build_teachers(
    config: RunConfig, tokenizer_settings: dict[str, Any], pretrained: bool = True
) -> dict[str, nn.Module]:
    """Teachers on the tokenizer's grid, whose settings are told how wide the teachers' features are."""
    defaults = TOKENIZERS.signature(tokenizer_settings["name"])
    if config.teachers and "semantic" not in defaults:
        raise UserError(
            f'teachers: the tokenizer "{tokenizer_settings["name"]}" predicts no features of a teacher (its constructor has no '
            "`semantic`): leave out the teachers, or set teachers: null over a base that has some."
        )
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


def untrained(registry: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The same without published weights to start from."""
    return {**settings, "pretrained": False} if "pretrained" in registry.signature(settings["name"]) else settings


def random_task(
    config: RunConfig,
    device: torch.device,
    guide: RunConfig | None = None,
    num_classes: int = IMAGENET_CLASSES,
    sources: dict[str, Source] | None = None,
) -> TokenizerTask | GeneratorTask:
    """The config's task without weights on `device`, which may be meta. A tokenizer that is not on this machine is laid
    out as its config, its file or the table of released files says."""
    weights: Origin = "meta" if device.type == "meta" else "random"
    torch.manual_seed(0)
    with torch.device(device):  # where random numbers are drawn fast
        if config.task == "generator":
            pair = build_pair(config, weights, sources, guide, num_classes)
            task = pair.task(num_classes, config.sample)
        else:
            task = build_tokenizer_task(config, weights)
    for network in networks_of(task):
        network.to(device)  # tables are made on the CPU whatever the context says
    return task


def networks_of(task: TokenizerTask | GeneratorTask) -> list[nn.Module]:
    """All that take part, once each."""
    every = [*task.networks().values(), *task.frozen().values(), task.tokenizer]
    return [*{id(network): network for network in every}.values()]
