"""Statistics of latents: by hand, and the same bits from any number of ranks."""

from __future__ import annotations

import pytest
import torch

from core.dist import World
from core.specs import Continuous
from data.sources import open_source
from run import latent_stats
from tests.ranks import in_threads


class Tokenizer(torch.nn.Module):
    """Latents are the pictures' mean colours, at two positions."""

    def __init__(self):
        super().__init__()
        self.spec, self.image_size = Continuous((1, 2), 3), 16

    def precompute(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))[:, None].expand(-1, 2, -1).repeat(1, 1, 2)

    def moments(self, stored: torch.Tensor) -> torch.Tensor:
        return stored


def measure(world: World, count: int) -> latent_stats.LatentStats:
    source = open_source("synthetic://?size=16&classes=4&count=40")
    return latent_stats.measure(Tokenizer(), source, count, torch.device("cpu"), workers=0, world=world)


@pytest.mark.parametrize("count", [0, 17, 3])
def test_any_number_of_ranks_measures_the_same(monkeypatch, count):
    """Also where a rank gets nothing."""
    monkeypatch.setattr(latent_stats, "BATCH", 4)
    alone = measure(latent_stats.ALONE, count)
    assert alone.images == (count or 40)
    for stats in (
        *in_threads(2, lambda world: measure(world, count)),
        *in_threads(3, lambda world: measure(world, count)),
    ):
        assert torch.equal(stats.channel_mean, alone.channel_mean) and torch.equal(stats.channel_std, alone.channel_std)
        assert stats.images == alone.images


def test_by_hand(monkeypatch):
    seen = []
    monkeypatch.setattr(Tokenizer, "moments", lambda self, stored: seen.append(stored) or stored)
    stats = measure(latent_stats.ALONE, 10)
    values = torch.cat(seen).flatten(0, 1).double()
    assert len(values) == 10 * 2  # pictures, positions
    torch.testing.assert_close(stats.channel_mean.double(), values.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(stats.channel_std.double(), values.std(0, correction=0), rtol=1e-4, atol=1e-6)
