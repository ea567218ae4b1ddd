"""A small network in place of FID's, a small tokenizer and generator, and what commands wrote."""

from __future__ import annotations

import json

import pytest
import torch

from core.dist import World
from core.errors import UserError
from core.specs import Codes, Recon, Tokenizer
from evaluation import images, measure, networks
from evaluation.distances import Moments
from evaluation.networks import FeatureNet
from evaluation.references import Facts, Statistics

CPU = torch.device("cpu")
ONE = World(0, 1, 0, CPU)


class SmallInception(FeatureNet):
    """The taps of FID's network from a fixed random projection of a thumbnail."""

    name, preprocess, is_published = "inception", "tf1", True
    dims = {"pool": 12, "spatial": 7, "logits": 5}

    def __init__(self):
        super().__init__()
        random_numbers = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(48, 24, generator=random_numbers), requires_grad=False)

    def distance_name(self, tap):
        return {"pool": "fid", "spatial": "sfid"}.get(tap, f"fd_small_{tap}")

    def taps(self, pixels):
        x = torch.nn.functional.adaptive_avg_pool2d(pixels / 255.0, 4).flatten(1) @ self.weight
        return {"pool": x[:, :12], "spatial": x[:, 12:19], "logits": x[:, 19:]}


class ColourNet(FeatureNet):
    """Means and spreads of the colours: enough to tell pictures apart in microseconds."""

    name = "colours"
    dims = {"block4": 3, "penultimate": 6}

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def taps(self, pixels):
        mean, spread = pixels.mean((2, 3)) / 255, pixels.std((2, 3)) / 255
        return {"block4": mean, "penultimate": torch.cat((mean, spread), 1)}


def coloured(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise whose brightest channel is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 128, (count, 3, 12, 12), generator=generator)
    images[torch.arange(count), labels] += 100
    return images.to(torch.uint8), labels


class OneCode(Tokenizer):
    """A tokenizer with codes: every 8 x 8 block becomes one of 16 greys, twice."""

    spec, image_size, term_names = Codes(16, 2, 16, 1, (4, 4), ("mean", "peak")), 32, ()

    def encode(self, images, draws=None):
        pools = torch.nn.functional.avg_pool2d, torch.nn.functional.max_pool2d
        grey = torch.stack([pool(images.mean(1, keepdim=True), 8).flatten(1) for pool in pools], -1)
        return ((grey + 1) * 8).long().clamp(0, 15)

    def precompute(self, images):
        return self.encode(images)

    def from_stored(self, stored, draws=None):
        return stored

    def forward(self, images, draws):
        return Recon(self.decode(self.encode(images), draws))

    def embed(self, codes):
        return codes[..., None].float()

    def decode(self, latents, draws=None):
        grey = (latents.float().mean(-1) / 8 - 1).view(-1, 1, 4, 4)
        noise = 0.01 * draws.normal("pixels", (3, 32, 32))
        return torch.nn.functional.interpolate(grey, scale_factor=8).expand(-1, 3, -1, -1) + noise


def sample(labels, draws):
    """A generator: colour by label, texture by chance."""
    shade = torch.stack([labels % 3, labels % 5, labels % 7], 1).float()[:, :, None, None] / 4 - 0.7
    return shade + 0.5 * draws.normal("x", (3, 16, 16))


def real(count: int = 60) -> Statistics:
    pictures = measure.producer(sample, torch.arange(count) % 10, 99, 8, CPU)(range(count))
    features = SmallInception()(pictures)
    moments = {tap: Moments.of(features[tap]) for tap in ("pool", "spatial")}
    return Statistics({tap: (m.mean, m.covariance) for tap, m in moments.items()}, Facts(), "real")


def metrics(folder) -> dict[str, float]:
    return {k: v["value"] for k, v in json.loads((folder / "metrics.json").read_text())["metrics"].items()}


@pytest.fixture
def small_net(monkeypatch):
    """The small network in place of FID's, and no download for LPIPS."""

    def absent(**_):
        raise UserError("vgg16 is not here")

    monkeypatch.setattr(images, "lpips_metric", absent)
    monkeypatch.setattr(networks, "feature_net", lambda *a, **k: SmallInception())
