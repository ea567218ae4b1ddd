"""What tokenizers with continuous latents share: the statistics that make latents unit variance, and a Gaussian posterior.

Shape letters: B batch, N tokens of the grid (h w, row by row), C channels.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from core.errors import UserError
from core.rng import Draws
from core.specs import Continuous, Tokenizer


class Posterior:
    """Diagonal Gaussian over latents from moments (..., 2C), in fp32."""

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.float().chunk(2, dim=-1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL to the standard normal, summed over tokens and channels: (B,)."""
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).sum(dim=(1, 2))


class ContinuousTokenizer(Tokenizer):
    """Keeps the statistics of its latents. A subclass calls `keep_latent_stats()` when it has set `self.spec`."""

    spec: Continuous
    latent_mean: Tensor  # (C,)
    latent_std: Tensor

    def keep_latent_stats(self) -> None:
        """Make the buffers, without effect until `set_latent_stats`. They are real also under torch.device("meta")."""
        for name, value in (("mean", 0.0), ("std", 1.0)):
            constant = torch.full((self.spec.channels,), value, device="cpu")
            self.register_buffer(f"latent_{name}", constant, persistent=False)

    def set_latent_stats(self, mean: Tensor, std: Tensor) -> None:
        """Per-channel (C,) or scalar statistics that make latents unit variance. They are not part of checkpoints."""
        channels = self.spec.channels
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value, dtype=torch.float32)
            if value.numel() not in (1, channels):
                raise UserError(f"latent statistics: {name} has {value.numel()} values for {channels} channels")
            if not value.isfinite().all() or (name == "std" and not (value > 0).all()):
                raise UserError(f"latent statistics: {name} cannot normalise a latent: {value.tolist()}")
            getattr(self, f"latent_{name}").copy_(value.flatten().expand(channels))

    @property
    def latent_stats_known(self) -> bool:
        """Whether `set_latent_stats` has been called; without, latents are not unit variance."""
        return bool((self.latent_std != 1).any() or (self.latent_mean != 0).any())

    def normalised(self, z: Tensor) -> Tensor:
        """Vectors of the tokens (B, N, C) -> latents (B, C, h, w) of unit variance."""
        z = (z - self.latent_mean) / self.latent_std
        return z.transpose(1, 2).unflatten(2, self.spec.grid)

    def restored(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> vectors of the tokens (B, N, C), as they were before `normalised`."""
        return latents.flatten(2).transpose(1, 2) * self.latent_std + self.latent_mean


class GaussianTokenizer(ContinuousTokenizer):
    """A tokenizer with a Gaussian posterior: everything but the networks and the training pass.

    Subclasses have `posterior_moments` and `paint`, and in `forward` draw `Posterior(moments).sample(draws.normal(...))`.
    """

    @abstractmethod
    def posterior_moments(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> means, then log variances of the tokens, (B, N, 2C)."""

    @abstractmethod
    def paint(self, z: Tensor) -> Tensor:
        """Vectors of the tokens (B, N, C), not normalised -> images (B, 3, H, W) in [-1, 1]."""

    def precompute(self, images: Tensor) -> Tensor:
        """Moments of the posterior, (B, N, 2C)."""
        return self.posterior_moments(images)

    def moments(self, stored: Tensor) -> Tensor:
        """What latent statistics are measured on, (B, N, 2C): here it is what is stored."""
        return stored

    def from_stored(self, stored: Tensor, draws: Draws | None = None) -> Tensor:
        posterior = Posterior(stored)
        if draws is None:
            return self.normalised(posterior.mean)
        return self.normalised(posterior.sample(draws.normal("posterior", posterior.mean.shape[1:])))

    def encode(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, h, w)."""
        return self.from_stored(self.precompute(images), draws)

    def decode(self, latents: Tensor, draws: Draws | None = None) -> Tensor:
        return self.paint(self.restored(latents))
