"""What a run will cost: --dry-run of scripts/train.py. Networks are built on the meta device; no weights, no GPU."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import nn

from core.config import RESERVED, RunConfig
from core.errors import UserError
from core.estimate import Cost, measure, number
from core.files import human_bytes
from core.rng import Draws
from core.train.parallel import accumulation

import assemble

PROBE = 2  # images in the forward pass that is measured


def _tokenizer(config: RunConfig) -> nn.Module:
    """The tokenizer of a config on the meta device; one that is only known by its weights lends their settings."""
    section = config.tokenizer
    settings = {k: v for k, v in section.items() if k not in RESERVED - {"name"}}
    if section.get("weights"):
        try:
            settings = {**assemble.read_weights("tokenizer", section["weights"], section).settings, **settings}
        except UserError:
            if "name" not in section:  # else the constructor's defaults say what the published weights are
                raise
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # weights are not wanted here
        assemble.semantic_widths(config, settings, pretrained=False)
        tokenizer = assemble.TOKENIZERS.build(settings)
    tokenizer = assemble.view(tokenizer, section.get("view"))
    return tokenizer.to("meta")  # tables are made on the CPU whatever the context says


def _generator(config: RunConfig, tokenizer: nn.Module) -> nn.Module:
    """The generator of a config on the meta device; UserError where it does not fit the tokenizer."""
    defaults: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # without the data the constructor's default stands
        defaults["num_classes"] = assemble.open_train(config).num_classes
    assemble.check_kind(config.generator["name"], tokenizer.spec)
    defaults |= tokenizer.spec.sizes()
    with torch.device("meta"):
        generator = assemble.GENERATORS.build(config.generator, **defaults).to("meta")
    assemble.pair(generator, tokenizer)
    return generator


def check_networks(config: RunConfig) -> None:
    """UserError where weights are of another network, or generator and tokenizer do not fit. Nothing is computed."""
    if config.tokenizer.get("weights"):
        assemble.read_weights("tokenizer", config.tokenizer["weights"], config.tokenizer)
    if config.train.init_from:
        assemble.read_weights(config.task, config.train.init_from, getattr(config, config.task))
    if config.task == "generator":
        _generator(config, _tokenizer(config))


def costs(config: RunConfig) -> tuple[nn.Module, list[Cost]]:
    """The tokenizer and the cost of every trained network, measured in one forward pass each."""
    tokenizer = _tokenizer(config)
    images = torch.zeros(PROBE, 3, tokenizer.image_size, tokenizer.image_size, device="meta")
    draws = Draws(0, torch.zeros(PROBE, dtype=torch.int64, device="meta"))
    if config.task == "tokenizer":
        more = ()
        if getattr(tokenizer, "reads_features", False):
            widths = tokenizer.semantic.teachers if tokenizer.semantic else {}
            more = ({name: torch.zeros(PROBE, 1, width, device="meta") for name, width in widths.items()},)
        found = [measure("tokenizer", tokenizer, lambda net: net(images, draws, *more), PROBE)]
        if config.discriminator:
            with torch.device("meta"):
                discriminator = assemble.DISCRIMINATORS.build(
                    config.discriminator, image_size=tokenizer.image_size, pretrained=False).to("meta")
            found.append(measure("discriminator", discriminator, lambda net: net(images), PROBE))
        return tokenizer, found
    generator = _generator(config, tokenizer)
    latents = tokenizer.encode(images)
    labels = torch.zeros(PROBE, dtype=torch.int64, device="meta")
    return tokenizer, [measure("generator", generator, lambda net: net(latents, labels, draws), PROBE)]


def describe(config: RunConfig) -> str:
    """A table for the terminal."""
    tokenizer, found = costs(config)
    train = config.train
    micro = train.global_batch // accumulation(train.global_batch, train.micro_batch)
    half = train.precision == "bf16"
    lines = [f"latents        {tokenizer.spec}",
             f"global batch   {train.global_batch} pictures, {micro} per rank and pass if one rank has them all"]
    for cost in found:
        ema = len(train.ema) if cost.name == config.task else 0
        lines += [
            f"{cost.name}",
            f"  parameters   {cost.parameters:,} ({cost.trainable:,} trained)",
            f"  forward      {number(cost.forward_flops)}FLOPs per image; a training step about "
            f"{number(3 * cost.forward_flops)}FLOPs per image, {number(3 * cost.forward_flops * train.global_batch)}FLOPs in all",
            f"  memory       about {human_bytes(int(cost.training_bytes(micro, ema, half)))} for {micro} pictures in "
            f"{train.precision}: weights, gradients, AdamW, {ema} EMA and {human_bytes(int(cost.activation_bytes))} of fp32 "
            "activations per picture",
        ]
    try:
        per_epoch = len(assemble.open_train(config))
        total = train.duration.images(per_epoch, train.global_batch)
        work = 3 * sum(c.forward_flops for c in found) * total
        lines.append(f"run            {total:,} images, {total // train.global_batch:,} steps, {number(work)}FLOPs without frozen "
                     "networks")
    except UserError as error:
        lines.append(f"run            length unknown: {error}")
    return "\n".join(lines)
