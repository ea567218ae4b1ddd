"""From a checked config to networks, new or with weights: the one place that sees all of them.

Programs call `load_config`, then `load_tokenizer` / `load_generator` for finished weights, or `make_task` for networks
without weights, of which only sizes count (the benchmark, --dry-run): a tokenizer that is not on this machine is then laid
out as its config, its file or the table of released files says. On the meta device nothing is allocated.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import config as config_module
from core.config import RESERVED, RunConfig, SampleConfig
from core.errors import UserError
from core.specs import Codes, Continuous, Guidance, LatentSpec, MultiScale
from core.train.checkpoint import Checkpoint
from core.weights import files as weight_files
from core.weights import hub, released
from core.weights.adapter import describe_differences, merged, recognise, unusable
from generator import GENERATORS
from generator.adapters import ADAPTERS as GENERATOR_ADAPTERS
from generator.task import GeneratorTask
from run import translate
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


def build(kind: str, component: dict[str, Any], weights: Weights | None, **defaults: Any) -> nn.Module:
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
    tokenizer = view(build("tokenizer", component, weights), component.get("view")).eval().requires_grad_(False)
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
    generator = build("generator", {"use_ema": use_ema}, weights, **sizes).eval().requires_grad_(False)
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
        elif not tokenizer.latent_stats_known:
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


# ---------------------------------------------------------------------------------------------------------------------
# Networks without weights
# ---------------------------------------------------------------------------------------------------------------------
IMAGENET_CLASSES = 1000


def tokenizer_layout(section: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """(constructor arguments of a tokenizer, where they come from if not from the section itself or its weights).

    Nothing is downloaded. UserError where neither the section, nor its file, nor the table of released files tells.
    """
    settings = {k: v for k, v in section.items() if k not in RESERVED - {"name"}}
    reference = section.get("weights")
    if not reference:
        return settings, None
    problem = f"{reference} is not on this machine."
    if "://" not in reference:
        try:
            return {**read_weights("tokenizer", reference, section).settings, **settings}, None
        except UserError as error:
            problem = str(error)
    file = released.find(reference)
    if file is not None and (file.network or file.recipe):
        known = file.network or {
            k: v for k, v in load_config(file.recipe, []).tokenizer.items() if k not in RESERVED - {"name"}
        }
        place = "the table of released files" if file.network else file.recipe
        return {**known, **settings}, f"{file.name} is not here; its sizes are those of {place}"
    if "name" in settings:
        return settings, f"{reference} is not here; its sizes are the defaults of {settings['name']}"
    raise UserError(
        f"{problem} Only the tokenizer's sizes are needed here: give tokenizer.name=... and its settings, or "
        "--tokenizer-config CONFIG to the benchmark."
    )


def tokenizer_of(config: RunConfig) -> nn.Module:
    """The tokenizer that a generator's config models, seen as it sees it, on the current default device."""
    tokenizer = TOKENIZERS.build(tokenizer_layout(config.tokenizer)[0])
    tokenizer.to(torch.get_default_device())  # tables are made on the CPU whatever the context says, and views compute
    return view(tokenizer, config.tokenizer.get("view"))


def generator_of(config: RunConfig, tokenizer: nn.Module, num_classes: int = IMAGENET_CLASSES) -> nn.Module:
    """The generator of a config; UserError where it does not fit the tokenizer."""
    check_kind(config.generator["name"], tokenizer.spec)
    generator = GENERATORS.build(config.generator, **tokenizer.spec.sizes(), num_classes=num_classes)
    pair(generator, tokenizer)
    return generator


def make_task(
    config: RunConfig, guide_config: RunConfig | None, device: torch.device, num_classes: int = IMAGENET_CLASSES
) -> TokenizerTask | GeneratorTask:
    """The config's task with random weights on `device`, which may be meta."""
    torch.manual_seed(0)
    with torch.device("meta") if device.type == "meta" else contextlib.nullcontext():
        task = (
            _random_tokenizer_task(config)
            if config.task == "tokenizer"
            else _random_generator_task(config, guide_config, num_classes)
        )
    for network in networks_of(task):
        network.to(device)  # tables are made on the CPU whatever the context says
    if config.task == "generator":
        task.tokenizer.eval().requires_grad_(False)
    return task


def _random_tokenizer_task(config: RunConfig) -> TokenizerTask:
    settings = tokenizer_layout(config.tokenizer)[0]
    teachers = semantic_widths(config, settings, pretrained=False)
    tokenizer = TOKENIZERS.build(settings)
    discriminator = config.discriminator and DISCRIMINATORS.build(
        config.discriminator, sync=False, image_size=tokenizer.image_size, pretrained=False
    )
    objective = dict(config.objective)
    if objective.get("perceptual"):  # the networks behind perceptual losses too start from random weights
        objective["perceptual"] = {
            name: {**(part if isinstance(part, dict) else {"weight": part}), "pretrained": False}
            for name, part in objective["perceptual"].items()
        }
    return TokenizerTask(tokenizer, OBJECTIVES.build(objective), discriminator, teachers)


def _random_generator_task(config: RunConfig, guide_config: RunConfig | None, num_classes: int) -> GeneratorTask:
    tokenizer = tokenizer_of(config)
    generator, *guides = [generator_of(c, tokenizer, num_classes) for c in (config, guide_config) if c is not None]
    guide = guides[0].eval().requires_grad_(False) if guides else None
    guidance = make_guidance(config.sample, guide)
    if guidance.kind == "auto" and guide is None:
        guidance = Guidance()
    return GeneratorTask(generator, tokenizer, num_classes, guidance, sample_options(config.sample, generator))


def networks_of(task: TokenizerTask | GeneratorTask) -> list[nn.Module]:
    """All that take part, once each."""
    every = [*task.networks().values(), *task.frozen().values(), task.tokenizer]
    return [*{id(network): network for network in every}.values()]
