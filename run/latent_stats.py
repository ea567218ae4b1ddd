"""Mean and standard deviation of a tokenizer's latents, measured on pictures, so that generators see unit variance."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from core import dist
from core.images import to_model_range
from core.rng import hash64, permutation
from core.schema import RunConfig
from core.specs import Batch, Continuous, DataSource, Tokenizer
from core.train.log import ProgressLine
from data.loader import ordered_batches
from data.tokens import TokenStore
from data.transforms import Transform
from run.load import Loaded
from tokenizer.continuous.stats import LatentStats, StatsAccumulator, read_stats, save_stats

BATCH = 64


def measure(
    tokenizer: Tokenizer,
    source: DataSource,
    count: int,
    device: torch.device,
    workers: int = 4,
    on_corrupt: str = "replace",
) -> LatentStats:
    """Of `count` pictures (0: all) spread over `source`, not mirrored; a TokenStore gives what it stored of them."""
    count = min(count or len(source), len(source))
    chosen = sorted(permutation(len(source), "latent statistics")[:count].tolist())  # from all classes alike
    assert isinstance(tokenizer.spec, Continuous)
    accumulator = StatsAccumulator(tokenizer.spec.channels)
    tokenizer.to(device).eval()

    def compute(batch: Batch) -> Tensor:
        assert batch.images is not None
        return tokenizer.precompute(to_model_range(batch.images.to(device)))

    if isinstance(source, TokenStore):
        parts = (chosen[i : i + BATCH] for i in range(0, count, BATCH))
        stored = (source.tokens(part, [0] * len(part)) for part in parts)
    else:
        transform = Transform(image_size=tokenizer.image_size)
        batches = ordered_batches(source, transform, BATCH, workers=workers, on_corrupt=on_corrupt, chosen=chosen)
        stored = map(compute, batches)
    line = ProgressLine(count, label="latent statistics")
    try:
        with torch.no_grad():
            for part in stored:
                accumulator.update(tokenizer.moments(part.to(device)))
                line.update(accumulator.images)
    finally:
        line.close()
    return accumulator.compute()


def measure_once(config: RunConfig, tokenizer: Loaded[Tokenizer], source: DataSource, world: dist.World) -> None:
    """Set the tokenizer's statistics, from the cache folder or by one pass over (part of) the pictures. Collective."""
    module, data = tokenizer.module, config.data
    count = min(len(source), data.stats_images or len(source))
    key = f"{hash64(source.fingerprint(), tokenizer.image_size, count, tokenizer.fingerprint):016x}"
    path = Path(data.cache_dir) / f"latent_stats_{key}.safetensors"

    def on_main() -> None:
        if not path.is_file():
            world.say(f"measuring latent statistics on {count:,} pictures -> {path}")
            stats = measure(module, source, count, world.device, data.workers, data.on_corrupt)
            save_stats(path, stats, tokenizer.fingerprint)

    world.on_main(on_main)
    stats = read_stats(str(path), tokenizer.fingerprint)
    module.set_latent_stats(stats.mean, stats.std)
