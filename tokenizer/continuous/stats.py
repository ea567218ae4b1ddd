"""Latent statistics: mean and standard deviation over images and tokens, which make latents unit variance.

A file of ours names the tokenizer weights it belongs to; the official stats.pkl, which does not, is read too. As in RecTok
they are those of the posterior's MOMENTS (B, N, 2C); the first C belong to the mean, and the posterior's
own noise is not added to the standard deviation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from core.errors import UserError, nearest, plainly
from core.files import refuse_text, sorted_facts, write_atomic
from core.weights.pickles import load_pickle


@dataclass(frozen=True)
class LatentStats:
    """fp32. `images` is how many pictures they come from; 0: not known."""

    channel_mean: Tensor  # (2C,)
    channel_std: Tensor  # (2C,)
    single_mean: Tensor  # (): over all C channels of the posterior mean together
    single_std: Tensor  # ()
    images: int

    @property
    def mean(self) -> Tensor:
        """(C,), for `set_latent_stats`."""
        return self.channel_mean[: self.channel_mean.shape[0] // 2]

    @property
    def std(self) -> Tensor:
        """(C,), for `set_latent_stats`."""
        return self.channel_std[: self.channel_std.shape[0] // 2]


class StatsAccumulator:
    """Streaming sums in float64: feed it batches, on as many ranks as you like, then merge.

    Args:
        channels: C of the tokenizer.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        self.channels = channels
        # Rows: sum of values, sum of squares, number of values. One tensor, so that ranks can all-reduce it.
        self.sums = torch.zeros(3, 2 * channels, dtype=torch.float64, device=device)
        self.images = 0

    def update(self, moments: Tensor) -> None:
        """moments: (B, N, 2C), as `RecTok.precompute` returns them. Every image weighs the same."""
        values = moments.detach().to(self.sums.device).double().flatten(0, 1)  # (B N, 2C)
        count = torch.full_like(self.sums[2], values.shape[0])
        self.sums += torch.stack((values.sum(0), values.square().sum(0), count))
        self.images += moments.shape[0]

    def merge(self, other: StatsAccumulator) -> None:
        self.sums += other.sums.to(self.sums.device)
        self.images += other.images

    def compute(self) -> LatentStats:
        if not self.images:
            raise UserError("latent statistics: no image was given")
        mean, square, _ = (self.sums / self.sums[2]).cpu()

        def std(m: Tensor, s: Tensor) -> Tensor:
            return (s - m.square()).clamp_min(0).sqrt().float()

        single_mean, single_square = mean[: self.channels].mean(), square[: self.channels].mean()
        return LatentStats(
            channel_mean=mean.float(),
            channel_std=std(mean, square),
            single_mean=single_mean.float(),
            single_std=std(single_mean, single_square),
            images=self.images,
        )


def save_stats(path: str | Path, stats: LatentStats, fingerprint: str, encoding: str | None = None) -> None:
    """Write statistics atomically.

    Args:
        fingerprint: of the tokenizer's weights.
        encoding: of those of them that encode, core.weights.encoding.encoding_fingerprint.
    """
    tensors = {
        name: getattr(stats, name).contiguous() for name in ("channel_mean", "channel_std", "single_mean", "single_std")
    }
    metadata = {"format": "tessera latent statistics", "fingerprint": fingerprint, "images": str(stats.images)}
    metadata |= {"encoding": encoding} if encoding else {}
    write_atomic(path, sorted_facts(save(tensors, metadata)))


def default_place(weights: Path) -> Path | None:
    """Where the statistics of a weight file are looked for; None for a checkpoint folder, whose generators carry them."""
    return None if Path(weights).is_dir() else Path(weights).with_suffix(".latent_stats.safetensors")


def read_stats(
    reference: str, fingerprint: str | None = None, encoding: Callable[[], str] | None = None
) -> LatentStats:
    """Statistics from a file of `save_stats` or from the official pickle, "stats.pkl#KEY" where that holds several.

    `fingerprint` of the tokenizer in use, and `encoding` where it is another, are compared with a file of ours; an official
    one cannot tell.
    """
    path, mark, key = reference.rpartition("#")
    if not mark or Path(reference).exists():  # a folder may have that letter in its name
        path, key = reference, ""
    if path.endswith((".pkl", ".pickle")):
        return _from_official(Path(path), key)
    return load_stats(path, fingerprint, encoding)


def _from_official(path: Path, key: str) -> LatentStats:
    """{key: {"single": (mean, std), "channel": (mean (2C,), std (2C,))}}"""
    content = load_pickle(path)
    known = [name for name, value in content.items() if isinstance(value, dict) and {"single", "channel"} <= set(value)]
    if not known:
        raise UserError(f"{path}: not a file of latent statistics; it should hold a table with single and channel.")
    if (key and key not in known) or (not key and len(known) > 1):
        hint = nearest(key, known) if key else f" Known: {', '.join(sorted(known))}."
        raise UserError(f"{path} holds statistics of {len(known)} tokenizer(s): choose one with {path}#KEY.{hint}")
    entry = content[key or known[0]]
    (single_mean, single_std), (mean, std) = (
        [torch.as_tensor(v).float() for v in entry[n]] for n in ("single", "channel")
    )
    return LatentStats(mean.flatten(), std.flatten(), single_mean.reshape(()), single_std.reshape(()), images=0)


def load_stats(
    path: str | Path, fingerprint: str | None = None, encoding: Callable[[], str] | None = None
) -> LatentStats:
    """Read what `save_stats` wrote; UserError when it belongs to other tokenizer weights than `fingerprint`, and those
    encode otherwise than `encoding` says."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file of latent statistics")
    refuse_text(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    if metadata.get("format") != "tessera latent statistics":
        raise UserError(f"{path}: not a file of latent statistics")
    try:
        belongs, stats = metadata["fingerprint"], LatentStats(**tensors, images=int(metadata["images"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its header or its tensors are not those of latent statistics ({plainly(error)})"
        ) from error
    noted = metadata.get("encoding")
    encodes_alike = noted is not None and encoding is not None and noted == encoding()
    if fingerprint is not None and belongs != fingerprint and not encodes_alike:
        raise UserError(
            f"{path}: these statistics were computed with tokenizer weights {belongs}, "
            f"but the tokenizer in use has {fingerprint}. Compute them again for this tokenizer."
        )
    return stats
