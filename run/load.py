"""From a checked config to networks, new or with weights: the one place that sees all of them.

    load_config                         YAML and overrides -> RunConfig
    read_tokenizer, read_generator      finished networks from a run of ours, a released file or an address
    build_pair                          tokenizer, generator and guide of a generator's config, whatever they are for
    build_tokenizer_task                a new tokenizer with teachers, objective and discriminator
    random_task                         the same without any weights: of the benchmark and --dry-run, sizes alone count

`weights` says where weights come from: "load" those that a config names, "random" none, "meta" not even memory for them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from core import config as config_module
from core.config import RESERVED
from core.dist import World, group_size
from core.errors import UserError
from core.rng import hash64
from core.schema import RunConfig, SampleConfig
from core.specs import Codes, Continuous, Generator, Guidance, LatentSpec, MultiScale, Tokenizer
from core.train.checkpoint import Checkpoint
from core.weights import files as weight_files
from core.weights import hub, released
from core.weights.adapter import describe_differences, merged, recognise, unusable
from core.weights.encoding import encoding_fingerprint
from generator import GENERATORS
from generator.adapters import ADAPTERS as GENERATOR_ADAPTERS
from generator.guidance import per_branch
from generator.task import GeneratorTask
from run import translate
from run.recipes import recipe_of
from tokenizer import TOKENIZERS
from tokenizer.adapters import ADAPTERS as TOKENIZER_ADAPTERS
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
ADAPTERS = {"tokenizer": TOKENIZER_ADAPTERS, "generator": GENERATOR_ADAPTERS}
IMAGENET_CLASSES = 1000

Origin = Literal["load", "random", "meta"]
Network = TypeVar("Network", bound=nn.Module)


def load_config(path: str, overrides: list[str]) -> RunConfig:
    """A checked config from a YAML file of ours, or one of an original's that run/translate.py can translate."""
    return config_module.load(*translate.translate(path, overrides), REGISTRIES)


def constructor_arguments(section: dict[str, Any]) -> dict[str, Any]:
    """Of a component's config section: its name and what its constructor takes."""
    return {key: value for key, value in section.items() if key not in RESERVED - {"name"}}


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------
class Source:
    """Where weights are. It is resolved, checked and opened once, however many questions are asked of it.

    Args:
        reference: run folder, checkpoint folder, file, file name in pretrained_models/, or hf://owner/repo/file.
        kind: "tokenizer" or "generator", where it decides between the files of a folder or a repository.
    """

    def __init__(self, reference: str, kind: str | None = None):
        self.reference, self.kind, self.path = reference, kind, released.resolve(reference, kind)

    @functools.cached_property
    def content(self) -> Checkpoint | weight_files.WeightFile | dict[str, Any]:
        """A checkpoint of ours, a file of ours, or what another program wrote; tensors are mapped from disk."""
        while self.path.is_dir() or not self.path.exists():
            try:
                return Checkpoint(self.path).hold()
            except UserError:
                if self.path.is_dir():
                    raise
                # The trainer of a living run has deleted it meanwhile: it has newer ones.
                self.path = released.resolve(self.reference, self.kind)
        return weight_files.read(self.path) or hub.load_tensors(self.path)

    def follow(self, world: World) -> None:
        """Take what the main rank takes: beside a running trainer another rank may have found a newer checkpoint. Collective."""
        if world.size == 1:
            return
        while True:
            path = world.on_main(self._opened)
            if path != str(self.path):
                self.close()
                self.path = Path(path)
            other = world.together(self._opened) != path  # it was deleted before this rank had opened it
            if not world.sum(torch.tensor([int(other)])):
                return
            if world.is_main:
                self.close()
                self.path = released.resolve(self.reference, self.kind)

    def _opened(self) -> str:
        """The place of what is held from now on. Files are not deleted by a trainer, and opened when they are read."""
        if not self.path.is_file():
            _ = self.content
        return str(self.path)

    def close(self) -> None:
        """Let go of the file."""
        self.__dict__.pop("content", None)


def open_weights(reference: str, kind: str, world: World | None) -> Source:
    """The same weights on all ranks. Collective where there are several; `world` is None where this is the only one."""
    if world is None:
        assert group_size() == 1, f"{reference}: each rank might take another checkpoint of a living run"
        return Source(reference, kind)
    source = world.together(lambda: Source(reference, kind))
    source.follow(world)
    return source


def kinds_of(reference: str) -> set[str]:
    """What the weights of a reference are of: {"tokenizer"} or {"generator"}, or both for a folder with a file of each.
    UserError where there are none."""
    source = Source(reference, "generator")
    beside = source.path.with_name("tokenizer.safetensors")
    if source.path.name == "generator.safetensors" != Path(reference).name and beside.is_file():
        return {"tokenizer", "generator"}
    try:
        if isinstance(source.content, Checkpoint):
            return {source.content.state["primary"]}
        if isinstance(source.content, weight_files.WeightFile):
            return {source.content.kind}
        return {"generator" if recognise(ADAPTERS["generator"], source.content) else "tokenizer"}
    finally:
        source.close()


@dataclass
class Weights:
    """Weights of one network, from a run of ours or a released file.

    Attributes:
        kind: "tokenizer" or "generator".
        settings: name and constructor arguments of the network.
        tensors: averaged? -> state dict under our names; None for a released file, which its adapter translates.
        official: contents of a released file.
        constants: latent statistics and the like.
        about: what a file of ours says beside its weights, see run/sharing.py.
        trained: the config of a run of ours.
    """

    kind: str
    path: Path
    settings: dict[str, Any]
    tensors: Callable[[bool], dict[str, Tensor]] | None = None
    official: dict[str, Any] | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    trained: dict[str, Any] | None = None

    def read(
        self,
        network: nn.Module,
        averaged: bool = True,
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state,
    ) -> dict[str, Tensor]:
        """A state dict that fits `network` exactly, after `change` of one under our names; UserError where there is none."""
        adapter = ADAPTERS[self.kind].get(self.settings["name"])  # one that nobody published weights of has none
        if adapter is not None:
            fit = adapter.fit
            adapter = replace(adapter, fit=lambda state, model: change(fit(state, model)))
        if self.tensors is None:
            assert adapter is not None and self.official is not None
            with _naming(self.path):
                return adapter.convert(network, self.official, averaged)
        state = self.tensors(averaged)
        state = adapter.completed(adapter.fit(state, network), network) if adapter else change(state)
        if problems := describe_differences(state, network.state_dict()):
            raise UserError(f"{self.path} does not fit {type(network).__name__}: {'; '.join(problems)}")
        if problem := unusable(state, network.state_dict()):
            raise UserError(f"{self.path}: {problem}")
        return state

    def load(self, network: nn.Module, averaged: bool = True) -> None:
        network.load_state_dict(self.read(network, averaged))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Mistakes are told with the name of the file that they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_weights(kind: str, source: str | Source, known: dict[str, Any] | None = None) -> Weights:
    """Find the weights of a tokenizer or generator.

    Args:
        kind: "tokenizer" or "generator".
        source: an opened one, or what `Source` takes.
        known: settings that the user states; they answer what a released file does not tell (numbers of heads).
    """
    source = Source(source, kind) if isinstance(source, str) else source
    content = source.content
    if isinstance(content, dict):
        return _released(kind, source.path, content, known)
    held = content.state["primary"] if isinstance(content, Checkpoint) else content.kind
    if held != kind:
        raise UserError(f"{source.path} holds a {held}, a {kind} was asked for.")
    if isinstance(content, Checkpoint):
        return _checkpoint(kind, content)

    def tensors(averaged: bool) -> dict[str, Tensor]:
        return content.weights if averaged or not content.raw else content.raw

    about = content.provenance, content.about
    return Weights(kind, source.path, content.settings, tensors, None, content.constants, *about)


def _checkpoint(kind: str, checkpoint: Checkpoint) -> Weights:
    state = checkpoint.state

    def tensors(averaged: bool) -> dict[str, Tensor]:
        return checkpoint.tensors(f"{kind}.ema_{state['ema'][0]}" if averaged and state["ema"] else kind)

    settings = constructor_arguments(state["config"][kind])
    constants = checkpoint.tensors("constants") if "constants.safetensors" in checkpoint.files else {}
    return Weights(
        kind, checkpoint.path, settings, tensors, None, constants, state["provenance"], trained=state["config"]
    )


def _released(kind: str, path: Path, content: dict[str, Any], known: dict[str, Any] | None) -> Weights:
    """A released file, read by the adapter that recognises it."""
    name = recognise(ADAPTERS[kind], content)
    if name is None:
        other = next((a[n].title for a in ADAPTERS.values() if (n := recognise(a, content))), None)
        raise UserError(
            f"{path} holds {other}, a {kind} was asked for."
            if other
            else f"{path}: these are not the weights of any {kind} that is known "
            f"({', '.join(a.title.removeprefix('the ') for a in ADAPTERS[kind].values())})."
        )
    with _naming(path):
        settings = ADAPTERS[kind][name].describe(content, known)
    return Weights(kind, path, {"name": name, **settings}, official=content)


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
    Where it is not to be `filled`, only the sizes of the weights count."""
    settings = constructor_arguments(section)
    if weights is None:
        return REGISTRIES[kind].build(settings, **defaults)
    known = weights.settings
    if settings.get("name", known["name"]) != known["name"]:
        raise UserError(f'{weights.path} holds the {kind} "{known["name"]}", not "{settings["name"]}".')
    settings = merged(known, settings)
    if "pretrained" in REGISTRIES[kind].signature(settings["name"]):
        settings["pretrained"] = False  # what it would start from is about to be replaced
    network = REGISTRIES[kind].build(settings, **defaults)
    if not filled:
        return network
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


def make_guidance(settings: SampleConfig, guide: nn.Module | None = None) -> Guidance:
    scale = tuple(settings.scale) if isinstance(settings.scale, list) else cast(float, settings.scale)  # no text by now
    low, high = settings.interval
    return Guidance(scale, settings.guidance, (low, high), guide, settings.schedule, settings.start, settings.power)


def guide_of(settings: SampleConfig) -> str | None:
    """The weaker model of autoguidance, where sampling uses one."""
    return settings.guide if settings.guidance == "auto" and make_guidance(settings).active else None


def sample_options(settings: SampleConfig, generator: Generator) -> dict[str, Any]:
    """Keyword arguments of generator.sample from the config; UserError for one that it does not take."""
    accepted = list(inspect.signature(generator.sample).parameters)[3:]  # after labels, draws, guidance
    options = settings.options()
    for name in options:
        if name not in accepted:
            raise UserError(
                f"sample.{name}: {type(generator).__name__} has no such sampling option; it takes "
                f"{', '.join(accepted) or 'none'}."
            )
    return options


def sampling_of(
    settings: SampleConfig, generator: Generator, spec: LatentSpec, guide: nn.Module | None
) -> tuple[Guidance, dict[str, Any]]:
    """(guidance, keyword arguments of generator.sample); UserError for what this generator cannot do."""
    guidance = make_guidance(settings, guide)
    if wrong := generator.guides(guidance):
        raise UserError(f"sample: {type(generator).__name__} {wrong}.")
    if isinstance(spec, (Codes, MultiScale)):
        for name in ("scale", "temperature", "top_k", "top_p"):
            per_branch(getattr(settings, name), spec.branches, name)
    if guidance.kind == "auto" and guidance.guide is None:  # guidance is off, or only sizes count
        guidance = Guidance()
    return guidance, sample_options(settings, generator)


@dataclass
class Pair:
    """A generator, the tokenizer whose latents it models, and the weaker generator that guides it, if one does."""

    tokenizer: Loaded[Tokenizer]
    generator: Loaded[Generator]
    guide: Loaded[Generator] | None = None

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
            tokenizer = laid_out(config.tokenizer, sources.get("tokenizer.weights"))
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
        network = build("generator", {}, weights, filled=False, **sizes).to("meta")
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
    generator: Generator = build("generator", settings).to(torch.get_default_device())  # see laid_out
    introduce(generator, tokenizer.module)
    return Loaded(generator, settings)


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
            paired = load_config(str(released.ROOT / file.recipe), []).tokenizer
            known, place = constructor_arguments(paired), file.recipe
            if "name" not in known:  # a file with both networks: the recipe names the tokenizer's own
                known = tokenizer_layout(paired)[0]
        return {**known, **settings}, f"{file.name} is not here; its sizes are those of {place}"
    if made := recipe_of(reference):
        known = constructor_arguments(load_config(str(released.ROOT / made[0]), []).tokenizer)
        return {**known, **settings}, f"{reference} is not here; its sizes are those of {made[0]}"
    if "name" in settings:
        return settings, f"{reference} is not here; its sizes are the defaults of {settings['name']}"
    raise UserError(
        f"{problem} Only the tokenizer's sizes are needed here: give tokenizer.name=... and its settings, or "
        "--tokenizer-config CONFIG to the benchmark."
    )


def lay_out_tokenizer(section: dict[str, Any], source: Source | None = None) -> Loaded[Tokenizer]:
    """The tokenizer that `read_tokenizer` makes of finished weights, on the meta device; their values are not read."""
    weights = read_weights("tokenizer", source or section["weights"], section)
    with torch.device("meta"):
        network = build("tokenizer", section, weights, filled=False).to("meta")  # tables are made on the CPU
        return Loaded(view(network, section.get("view")).eval(), weights.settings)


def laid_out(section: dict[str, Any], source: Source | None = None) -> Loaded[Tokenizer]:
    """A tokenizer without weights, on the current default device."""
    settings = _untrained(TOKENIZERS, tokenizer_layout(section, source)[0])
    tokenizer = TOKENIZERS.build(settings)
    tokenizer.to(torch.get_default_device())  # tables are made on the CPU whatever the context says, and views compute
    return Loaded(view(tokenizer, section.get("view")).eval().requires_grad_(False), settings)


# ---------------------------------------------------------------------------------------------------------------------
# What trains
# ---------------------------------------------------------------------------------------------------------------------
def build_tokenizer_task(config: RunConfig, weights: Origin = "load") -> TokenizerTask:
    """A new tokenizer, as a tokenizer's config trains it; `weights` are of teachers, of the networks behind losses, and of
    what the tokenizer starts from."""
    assert config.objective is not None
    ready = weights == "load"
    settings = config.tokenizer if ready else _untrained(TOKENIZERS, tokenizer_layout(config.tokenizer)[0])
    torch.manual_seed(hash64(config.seed, "teachers") % 2**63)  # for toys, whose teachers are random
    teachers = semantic_widths(config, settings, pretrained=ready)
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
            config.discriminator if ready else _untrained(DISCRIMINATORS, config.discriminator),
            sync=ready and config.train.sync_batch_norm,
            image_size=tokenizer.image_size,
        )
    objective.check_terms(tokenizer.term_names, bool(teachers), discriminator is not None)
    return TokenizerTask(tokenizer, objective, discriminator, teachers)


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


def _untrained(registry: Any, settings: dict[str, Any]) -> dict[str, Any]:
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
