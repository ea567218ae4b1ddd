"""The task of a config with networks that have no weights: what the benchmark and --dry-run look at.

Only sizes count there, so a tokenizer that is not on this machine is laid out as its config, its file or the table of
released files says. On the meta device nothing is allocated.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from core.config import RESERVED, RunConfig
from core.errors import UserError
from core.specs import Guidance
from core.weights import released
from generator.task import GeneratorTask
from run import assemble
from tokenizer.task import TokenizerTask

IMAGENET_CLASSES = 1000


def layout(section: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
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
            return {**assemble.read_weights("tokenizer", reference, section).settings, **settings}, None
        except UserError as error:
            problem = str(error)
    file = released.find(reference)
    if file is not None and (file.network or file.recipe):
        known = file.network or {
            k: v for k, v in assemble.load_config(file.recipe, []).tokenizer.items() if k not in RESERVED - {"name"}
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
    tokenizer = assemble.TOKENIZERS.build(layout(config.tokenizer)[0])
    tokenizer.to(torch.get_default_device())  # tables are made on the CPU whatever the context says, and views compute
    return assemble.view(tokenizer, config.tokenizer.get("view"))


def generator_of(config: RunConfig, tokenizer: nn.Module, num_classes: int = IMAGENET_CLASSES) -> nn.Module:
    """The generator of a config; UserError where it does not fit the tokenizer."""
    assemble.check_kind(config.generator["name"], tokenizer.spec)
    generator = assemble.GENERATORS.build(config.generator, **tokenizer.spec.sizes(), num_classes=num_classes)
    assemble.pair(generator, tokenizer)
    return generator


def make_task(
    config: RunConfig, guide_config: RunConfig | None, device: torch.device, num_classes: int = IMAGENET_CLASSES
) -> TokenizerTask | GeneratorTask:
    """The config's task with random weights on `device`, which may be meta."""
    torch.manual_seed(0)
    with torch.device("meta") if device.type == "meta" else contextlib.nullcontext():
        task = (
            _tokenizer_task(config)
            if config.task == "tokenizer"
            else _generator_task(config, guide_config, num_classes)
        )
    for network in networks_of(task):
        network.to(device)  # tables are made on the CPU whatever the context says
    if config.task == "generator":
        task.tokenizer.eval().requires_grad_(False)
    return task


def _tokenizer_task(config: RunConfig) -> TokenizerTask:
    settings = layout(config.tokenizer)[0]
    teachers = assemble.semantic_widths(config, settings, pretrained=False)
    tokenizer = assemble.TOKENIZERS.build(settings)
    discriminator = config.discriminator and assemble.DISCRIMINATORS.build(
        config.discriminator, sync=False, image_size=tokenizer.image_size, pretrained=False
    )
    objective = dict(config.objective)
    if objective.get("perceptual"):  # the networks behind perceptual losses too start from random weights
        objective["perceptual"] = {
            name: {**(part if isinstance(part, dict) else {"weight": part}), "pretrained": False}
            for name, part in objective["perceptual"].items()
        }
    return TokenizerTask(tokenizer, assemble.OBJECTIVES.build(objective), discriminator, teachers)


def _generator_task(config: RunConfig, guide_config: RunConfig | None, num_classes: int) -> GeneratorTask:
    tokenizer = tokenizer_of(config)
    generator, *guides = [generator_of(c, tokenizer, num_classes) for c in (config, guide_config) if c is not None]
    guide = guides[0].eval().requires_grad_(False) if guides else None
    guidance = assemble.make_guidance(config.sample, guide)
    if guidance.kind == "auto" and guide is None:
        guidance = Guidance()
    return GeneratorTask(generator, tokenizer, num_classes, guidance, assemble.sample_options(config.sample, generator))


def networks_of(task: TokenizerTask | GeneratorTask) -> list[nn.Module]:
    """All that take part, once each."""
    every = [*task.networks().values(), *task.frozen().values(), task.tokenizer]
    return [*{id(network): network for network in every}.values()]
