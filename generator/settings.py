"""From a config's `sample` section to what a generator's `sample` takes: guidance and keyword arguments."""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import nn

from core.errors import UserError
from core.schema import SampleConfig
from core.specs import Codes, Generator, Guidance, LatentSpec, MultiScale
from generator.guidance import per_branch


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
