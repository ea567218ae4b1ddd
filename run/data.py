"""The pictures that a config names, and what is computed of them once and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import dist
from core.errors import UserError
from core.images import to_model_range
from core.rng import hash64
from core.schema import RunConfig
from core.specs import Continuous, DataSource, Tokenizer
from core.train.log import ProgressLine
from data import tokens
from data.cache import FeatureCache, Pass, unfinished
from data.cache import build as build_cache
from data.checks import require_classes, require_labels
from data.sources import open_source
from data.token_files import MomentFiles
from data.tokens import TokenStore
from data.transforms import Transform
from evaluation import protocols
from run.load import IMAGENET_CLASSES, Loaded

IMAGENET_VAL = "folder://data/imagenet/val"  # what tokenizers are measured on where no pictures are named


def open_train(config: RunConfig) -> DataSource:
    """What the run trains on: pictures, or a TokenStore where data.url is tokens://."""
    source = open_source(config.data.url, config.data.split, config.data.exif)
    if config.task == "tokenizer" and isinstance(source, TokenStore):
        raise UserError(f"data.url={config.data.url} holds tokens; a tokenizer trains on pictures. Give those.")
    if config.task == "generator":
        assert config.generator is not None
        require_labels(source)
        require_classes(source, config.generator.get("num_classes"), config.data.url)
    return source


def open_pictures(config: RunConfig) -> DataSource | None:
    """The training pictures: data.pictures behind tokens://, else data.url; None when a run has tokens alone."""
    if config.data.url.startswith("tokens://"):
        if not config.data.pictures:
            return None
        return open_source(config.data.pictures, config.data.split, config.data.exif)
    return open_source(config.data.url, config.data.split, config.data.exif)


def class_names(config: RunConfig) -> list[str]:
    """Of the training data; [] where it is not on this machine."""
    try:
        return open_source(config.data.url, config.data.split).class_names
    except UserError:
        return []


def num_classes(config: RunConfig) -> int:
    """Of the training pictures; ImageNet's where they are not on this machine."""
    try:
        return open_train(config).num_classes
    except UserError:
        return IMAGENET_CLASSES


def open_moments(config: RunConfig, source: DataSource, tokenizer: Tokenizer) -> MomentFiles:
    """data.moments, for this tokenizer; UserError where it makes none, or where they are not there."""
    if not isinstance(tokenizer.spec, Continuous):
        raise UserError(
            f"data.moments={config.data.moments}: this tokenizer makes codes, which have no moments. Leave it out."
        )
    assert config.data.moments is not None
    stored = MomentFiles(config.data.moments, source, (tokenizer.spec.length, 2 * tokenizer.spec.channels))
    stored.check(source, make_transform(config, tokenizer.image_size))
    return stored


def make_transform(config: RunConfig, image_size: int) -> Transform:
    """The crop that a config describes."""
    data = config.data
    flip = data.flip and data.crop != "ten"  # which has its mirror images
    low, high = data.scale
    return Transform(
        image_size,
        data.crop,
        flip,
        (low, high),
        short_side=data.short_side,
        crop_range=data.crop_range,
        resample=data.resample,
    )


def open_val(config: RunConfig) -> DataSource | None:
    """Pictures to evaluate on, or None."""
    if config.data.val_url:
        return open_source(config.data.val_url, "val", config.data.exif)
    if config.data.url.startswith("embedded://"):
        return open_source(config.data.url, "val")
    return None


def asks_val_labels(config: RunConfig) -> bool:
    """Whether samples are asked for in the classes of the validation pictures while a generator trains."""
    labels = config.eval.labels or protocols.get(config.eval.protocol, "generation").labels
    return config.task == "generator" and config.train.eval_every != "never" and labels == "val"


def needed_val(config: RunConfig) -> DataSource | None:
    """open_val where the run uses those pictures for more than previews; else None, whether they are here or not.

    Raises UserError with what they are for where they are needed and missing.
    """
    uses, tokens_alone = [], config.data.url.startswith("tokens://") and not config.data.pictures
    if config.train.eval_every != "never" and (config.task == "tokenizer" or asks_val_labels(config) or tokens_alone):
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


def compute_once(
    config: RunConfig,
    label: str,
    network: nn.Module,
    world: dist.World,
    build: Callable[..., FeatureCache],
    precision: str,
    batch: int = 64,
) -> FeatureCache:
    """Call data.cache.build or data.tokens.build with `network` on the run's device and a progress line."""
    network.to(world.device).eval()
    line = ProgressLine(1, label=label) if world.is_main else None

    def progress(done: int, total: int) -> None:
        assert line is not None
        line.total = total
        line.update(done)

    how = Pass(
        world,
        batch,
        config.data.workers,
        config.data.on_corrupt,
        progress if line else None,
        max_corrupt=config.data.max_corrupt,
    )
    try:
        with torch.no_grad(), torch.autocast(world.device.type, torch.bfloat16, enabled=precision == "bf16"):
            cache = build(how=how)
    finally:
        if line:
            line.close()
    if how.replaced:
        world.say(
            f"unreadable pictures, for which the next one was taken: {len(how.replaced)} ({how.replaced.names()})"
        )
    return cache


def precomputed(
    config: RunConfig,
    name: str,
    source: DataSource,
    transform: Transform,
    network: Loaded,
    compute: Callable[[Tensor], Any],
    world: dist.World,
    encoding: str | None = None,
) -> FeatureCache:
    """What `compute` makes of every view of every picture, from the cache folder, where it is put the first time.

    Args:
        name: "features" of teachers, or "latents", which go into a token store.
        network: what computes; its fingerprint decides, with source and transform, which folder it is.
        compute: (B, 3, H, W) in [-1, 1] on the run's device -> what is kept.
        encoding: of a tokenizer: decides in the place of its fingerprint, but for folders of earlier versions.
    """
    if transform.views is None:
        raise UserError(
            f'data.cache_{name}: data.crop="{config.data.crop}" shows a new crop each time, so nothing can '
            "be kept. Use data.crop=center, or turn the cache off."
        )
    pictures = source.fingerprint(), repr(transform.describe())
    folder, shared = (
        Path(config.data.cache_dir) / f"{name}_{hash64(*pictures, maker):016x}"
        for maker in (network.fingerprint, f"encoding {encoding}")
    )
    if encoding and not world.on_main(lambda: folder.exists() or unfinished(folder).exists()):
        folder = shared
    if not folder.exists():
        world.say(f"computing {name} once for {len(source):,} pictures x {transform.views} views -> {folder}")

    def on_device(images: Tensor) -> Any:
        return compute(to_model_range(images.to(world.device)))

    if name == "features":
        build = functools.partial(build_cache, folder, source, transform, on_device, network.fingerprint)
    else:
        spec = network.module.spec
        build = functools.partial(
            tokens.build, folder, source, transform, spec, on_device, network.fingerprint, encoding=encoding
        )
    return compute_once(config, name, network.module, world, build, config.train.precision)
