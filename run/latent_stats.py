"""Mean and standard deviation of a tokenizer's latents, measured on pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from core import dist
from core.config import RunConfig
from core.images import to_model_range
from core.rng import hash64, permutation
from core.specs import DataSource
from core.train.log import ProgressLine
from data.loader import ordered_batches
from data.tokens import TokenStore
from data.transforms import Transform
from tokenizer.continuous.stats import StatsAccumulator, read_stats, save_stats


def measured(tokenizer, source, count: int, device, workers: int = 4, on_corrupt: str = "replace"):
    """LatentStats of `count` pictures (0: all) spread over `source`, not mirrored.

    A TokenStore gives what it stored of them.
    """
    count = min(count or len(source), len(source))
    chosen = sorted(permutation(len(source), "latent statistics")[:count].tolist())  # from all classes alike
    accumulator = StatsAccumulator(tokenizer.spec.channels)
    tokenizer.to(device).eval()
    if isinstance(source, TokenStore):
        stored = (source.tokens(chosen[i : i + 64], [0] * len(chosen[i : i + 64])) for i in range(0, count, 64))
    else:
        batches = ordered_batches(
            source,
            Transform(image_size=tokenizer.image_size),
            64,
            workers=workers,
            on_corrupt=on_corrupt,
            chosen=chosen,
        )
        stored = (tokenizer.precompute(to_model_range(batch.images.to(device))) for batch in batches)
    line = ProgressLine(count, label="latent statistics")
    try:
        with torch.no_grad():
            for part in stored:
                accumulator.update(tokenizer.moments(part.to(device)))
                line.update(accumulator.images)
    finally:
        line.close()
    return accumulator.compute()


def latent_statistics(
    config: RunConfig,
    tokenizer: nn.Module,
    fingerprint: str,
    source: DataSource,
    world: dist.World,
    log: Callable[[str], None],
) -> None:
    """Set the tokenizer's normalisation, from the cache folder or by one pass over (part of) the pictures."""
    count = min(len(source), config.data.stats_images or len(source))
    key = f"{hash64(source.fingerprint(), tokenizer.image_size, count, fingerprint):016x}"
    path = Path(config.data.cache_dir) / f"latent_stats_{key}.safetensors"
    if not path.is_file() and world.is_main:
        log(f"measuring latent statistics on {count:,} pictures -> {path}")
        found = measured(tokenizer, source, count, world.device, config.data.workers, config.data.on_corrupt)
        save_stats(path, found, fingerprint)
    world.barrier()
    stats = read_stats(str(path), fingerprint)
    tokenizer.set_latent_stats(stats.mean, stats.std)
