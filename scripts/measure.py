"""Measurements on live networks: pictures from data, tokenizer and generator, handed to the evaluation package."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor, nn

from core.config import EvalConfig, RunConfig
from core.dist import World
from core.images import grid, to_model_range, to_uint8
from core.rng import Draws, hash64
from core.specs import DataSource
from data.loader import ordered_batches
from data.transforms import Transform
from evaluation.features import EfficientNetLite0, FeatureNet
from evaluation.generation import evaluate_samples
from evaluation.reconstruction import evaluate_reconstruction
from evaluation.reference import Reference

FEATURE_SIZE = 128  # pixels the feature network sees; nearly four times quicker than its own 224


def feature_net(device: torch.device) -> FeatureNet:
    return EfficientNetLite0(FEATURE_SIZE).to(device)


def real_features(config: RunConfig, source: DataSource, image_size: int, net: FeatureNet) -> Reference:
    """Features of all pictures of `source`, computed once and kept in the cache folder."""
    transform = Transform(image_size=image_size)
    fingerprint = f"{hash64(source.fingerprint(), repr(transform.describe())):016x}"

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in ordered_batches(source, transform, 64, workers=config.data.workers):
            yield batch.images, batch.labels

    path = Path(config.data.cache_dir) / f"real_{net.name}_{fingerprint}.safetensors"
    return Reference.cached(path, net, batches, fingerprint)


@torch.no_grad()
def reconstruction(tokenizer: nn.Module, source: DataSource, image_size: int, settings: EvalConfig,
                   device: torch.device, net: FeatureNet | None = None) -> dict[str, float]:
    """PSNR, SSIM and, with `net`, a Frechet distance of the first settings.num_images pictures."""
    wanted = min(settings.num_images or len(source), len(source))

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        seen = 0
        for batch in ordered_batches(source, Transform(image_size=image_size), settings.batch):
            images = batch.images[: wanted - seen].to(device)
            seen += images.shape[0]
            yield images, tokenizer.decode(tokenizer.encode(to_model_range(images))).float()
            if seen >= wanted:
                return

    return evaluate_reconstruction(pairs(), net)


SHOWN = 24


@torch.no_grad()
def reconstruction_grid(tokenizer: nn.Module, source: DataSource, device: torch.device) -> Tensor:
    """Pictures spread over `source`, twelve a row, below each row its reconstructions: (3, H, W) uint8."""
    transform, count = Transform(image_size=tokenizer.image_size), min(SHOWN, len(source))
    chosen = torch.stack([transform.apply_view(source[i * len(source) // count].image, 0) for i in range(count)]).to(device)
    rebuilt = to_uint8(tokenizer.decode(tokenizer.encode(to_model_range(chosen))).float(), "nearest")
    rows = [torch.cat(pair) for pair in zip(chosen.split(12), rebuilt.split(12))]
    return grid(torch.cat(rows), columns=12)


def labels_for(count: int, num_classes: int) -> Tensor:
    """Balanced: 0, 1, ... and round again, (count,) int64."""
    return torch.arange(count) % num_classes


@torch.no_grad()
def samples(sample: Callable[[Tensor, Draws], Tensor], labels: Tensor, seed: int, batch: int, device: torch.device,
            progress: Callable[[int], None] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """(uint8 images, labels) batches. Picture i depends on (seed, labels[i], i) alone, whatever the batch size."""
    for start in range(0, len(labels), batch):
        part = labels[start : start + batch].to(device)
        positions = torch.arange(start, start + len(part), device=device)
        yield to_uint8(sample(part, Draws(hash64(seed, "samples"), positions)), "nearest"), part
        if progress:
            progress(start + len(part))


def generation(task, network: nn.Module, config: RunConfig, train: DataSource, val: DataSource | None, image_size: int,
               world: World) -> dict[str, float]:
    """Frechet distance on the offline feature network, of config.eval.num_images samples, while training."""
    net = feature_net(world.device)
    labels = labels_for(config.eval.num_images or 512, train.num_classes)
    pictures = samples(lambda part, draws: task.sample(network, part, draws), labels, config.seed, config.eval.batch,
                       world.device)
    result = evaluate_samples(pictures, net, real_features(config, train, image_size, net),
                              real_features(config, val, image_size, net) if val else None)
    return {name: value for name, value in result.items() if isinstance(value, float)}
