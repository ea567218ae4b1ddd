"""Mean and standard deviation of a tokenizer's latents, measured on pictures, so that generators see unit variance."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from core.chunks import ALONE
from core.dist import World
from core.images import to_model_range
from core.rng import hash64, permutation
from core.schema import RunConfig
from core.specs import Batch, Continuous, DataSource, Tokenizer
from core.train.log import ProgressLine
from core.weights.encoding import encoding_fingerprint
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
    *,
    workers: int = 4,
    on_corrupt: str = "replace",
    world: World = ALONE,
) -> LatentStats:
    """Of `count` pictures (0: all) spread over `source`, not mirrored; a TokenStore gives what it stored of them.

    Collective: ranks take batches in turn. Their sums are added in the order of the pictures, so that the number of ranks
    changes no bit.
    """
    count = min(count or len(source), len(source))
    chosen = sorted(permutation(len(source), "latent statistics")[:count].tolist())  # from all classes alike
    assert isinstance(tokenizer.spec, Continuous)
    total = StatsAccumulator(tokenizer.spec.channels)
    batches = [chosen[i : i + BATCH] for i in range(0, count, BATCH)]
    sums = torch.zeros(len(batches), *total.sums.shape, dtype=total.sums.dtype)  # a row of each rank's own
    tokenizer.to(device).eval()

    def compute(batch: Batch) -> Tensor:
        assert batch.images is not None
        return tokenizer.precompute(to_model_range(batch.images.to(device)))

    def work() -> None:
        mine = batches[world.rank :: world.size]
        pictures = [index for batch in mine for index in batch]
        if isinstance(source, TokenStore):
            stored = (source.tokens(batch, [0] * len(batch)) for batch in mine)
        else:
            transform = Transform(image_size=tokenizer.image_size)
            options = {"workers": workers, "on_corrupt": on_corrupt, "chosen": pictures}
            stored = map(compute, ordered_batches(source, transform, BATCH, **options))
        line = ProgressLine(len(pictures), label="latent statistics") if world.is_main else None
        try:
            with torch.no_grad():
                for number, part in enumerate(stored):
                    one = StatsAccumulator(total.channels)
                    one.update(tokenizer.moments(part.to(device)))
                    sums[world.rank + number * world.size] = one.sums
                    if line:
                        line.update(min((number + 1) * BATCH, len(pictures)))
        finally:
            if line:
                line.close()

    world.together(work)
    for row in world.sum(sums):
        total.sums += row
    total.images = count
    return total.compute()


def measure_once(config: RunConfig, tokenizer: Loaded[Tokenizer], source: DataSource, world: World) -> None:
    """Set the tokenizer's statistics, from the cache folder or by one pass over (part of) the pictures. Collective."""
    module, data = tokenizer.module, config.data
    count = min(len(source), data.stats_images or len(source))
    sizes = world.on_main(source.file_sizes)
    encoding = encoding_fingerprint(module)
    path, shared = (
        Path(data.cache_dir)
        / f"latent_stats_{hash64(source.fingerprint(), tokenizer.image_size, count, maker, *([sizes] if sizes else [])):016x}.safetensors"
        for maker in (tokenizer.fingerprint, f"encoding {encoding}")
    )
    if not world.on_main(path.is_file):  # which earlier versions wrote
        path = shared
    if not world.on_main(path.is_file):
        world.say(f"measuring latent statistics on {count:,} pictures -> {path}")
        options = {"workers": data.workers, "on_corrupt": data.on_corrupt, "world": world}
        stats = measure(module, source, count, world.device, **options)
        world.on_main(lambda: save_stats(path, stats, tokenizer.fingerprint, encoding))
    stats = read_stats(str(path), tokenizer.fingerprint, lambda: encoding)
    module.set_latent_stats(stats.mean, stats.std)
