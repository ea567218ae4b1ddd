"""What a quickstart shows: models whose samples and reconstructions are drawn, and what they are measured against."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from core import dist
from core import images as image_tools
from core.devices import pictures_at_once
from core.files import write_atomic
from core.rng import Draws, hash64
from core.schema import EvalConfig, RunConfig
from core.specs import DataSource, Previews
from core.train.checkpoint import read_tensors
from core.train.log import ProgressLine
from data.base import spread
from evaluation import measure, networks, toy
from evaluation.chunks import Work
from evaluation.measure import Evaluation
from evaluation.networks import FeatureNet
from evaluation.pictures import SourcePictures
from evaluation.protocols import make_labels
from generator.task import GeneratorTask
from run import streaming
from run.data import open_train, open_val
from run.load import Pair

SHOWN_PER_CLASS = 8
SHOWN_STAGES = 8  # pictures whose stages are shown, as many unseen ones as samples


@dataclass
class Variant:
    """Samples drawn in one way. `name` says of which model and how."""

    name: str
    task: GeneratorTask
    pictures: Tensor  # (N, 3, H, W) uint8, on the CPU
    samples: toy.Labelled
    metrics: dict[str, Any]


class Standard:
    """Real pictures at one size, their features, and a classifier of them, which are computed when they are first needed; the
    network is on the device."""

    def __init__(self, config: RunConfig, size: int):
        self.config, self.size, self.device = config, size, dist.pick_device("auto")
        val = open_val(config)
        assert val is not None  # the pictures of all quickstarts come with such ones
        self.source, self.val = open_train(config), val

    @functools.cached_property
    def net(self) -> FeatureNet:
        return networks.feature_net(self.device)

    @functools.cached_property
    def train(self) -> toy.Labelled:
        return real_features(self.pictures(self.source), self.net, self.config)

    @functools.cached_property
    def unseen(self) -> toy.Labelled:
        return real_features(self.pictures(self.val), self.net, self.config)

    @functools.cached_property
    def classifier(self) -> toy.LinearClassifier:
        return toy.fit(self.train.features[toy.CLASS_TAP], self.train.labels, self.source.num_classes)

    def pictures(self, source: DataSource) -> SourcePictures:
        return SourcePictures(source, self.size, self.config.data.workers)


class Shown:
    """A tokenizer and a generator, on the device.

    Args:
        name: of the model on the page, where several are shown.
        pair: with the guide, where some variant needs one.
        config: of the generator: its data, seed and way to sample.
        standard: that it is measured against.
        samples_per_class: drawn for each variant.
    """

    def __init__(self, name: str, pair: Pair, config: RunConfig, standard: Standard, samples_per_class: int):
        self.name, self.pair, self.config, self.standard = name, pair, config, standard
        self.samples_per_class, self.device = samples_per_class, standard.device
        pair.to(self.device)
        self.tokenizer = pair.tokenizer.module
        self.variants: list[Variant] = []  # drawn so far; the first one is shown in full

    def task(self, changes: dict[str, Any]) -> GeneratorTask:
        """One way to sample: the config's, with some settings changed."""
        sampling = dataclasses.replace(self.config.sample, **changes)
        guide = self.pair.guide if sampling.guidance == "auto" else None
        return dataclasses.replace(self.pair, guide=guide).task(self.standard.source.num_classes, sampling)

    def sample(self, label: str, **changes: Any) -> Variant:
        """Draw and measure the pictures of one way to sample, called `label`."""
        standard, name = self.standard, f"{self.name}, {label}" if self.name else label
        task, batch = self.task(changes), pictures_at_once(self.config.eval.batch, self.device)
        labels = make_labels("balanced", self.samples_per_class * task.num_classes, task.num_classes)
        line, kept = ProgressLine(len(labels), label=f"samples, {name}"), Kept([])
        produce = measure.producer(
            lambda part, draws: task.sample(task.generator, part, draws), labels, self.config.seed, batch, self.device
        )
        how = Evaluation(toy.FRECHET, standard.net, measure.alone(self.device), batch, real=standard.train.features)
        result = how.of_samples(produce, Work(len(labels), how.world, chunk=batch), (kept,), line.update)
        line.close()
        assert result is not None  # on one rank
        samples, names = toy.Labelled(result.features, labels), standard.source.class_names
        metrics = toy.compare(samples, standard.train, standard.unseen, standard.net, standard.classifier, names)
        variant = Variant(name, task, torch.cat(kept.pictures), samples, metrics)
        self.variants.append(variant)
        return variant

    def sample_all(self, variants: Sequence[dict[str, Any]]) -> None:
        """`sample` in each of these ways, the first of which is shown in full."""
        for variant in variants:
            self.sample(**variant)

    @torch.no_grad()
    def look(self, label: str, **changes: Any) -> Tensor:
        """(3, H, W) uint8: a few samples, a class in each row, drawn in the way called `label`; nothing is measured."""
        task, classes = self.task(changes), self.standard.source.num_classes
        line, drawn = ProgressLine(classes * SHOWN_PER_CLASS, label=f"samples, {label}"), []
        for c in range(classes):
            numbers = torch.arange(c * SHOWN_PER_CLASS, (c + 1) * SHOWN_PER_CLASS, device=self.device)
            images = task.sample(
                task.generator, torch.full_like(numbers, c), Draws(hash64(self.config.seed, "look"), numbers)
            )
            drawn.append(image_tools.finite_uint8(images.float(), "nearest", numbers).cpu())
            line.update(len(drawn) * SHOWN_PER_CLASS)
        line.close()
        return image_tools.grid(torch.cat(drawn), columns=SHOWN_PER_CLASS)

    def by_class(self, labels: Tensor) -> list[Tensor]:
        """Indices of the samples that are shown of each class: its first ones."""
        return [(labels == c).nonzero().flatten()[:SHOWN_PER_CLASS] for c in range(self.standard.source.num_classes)]

    def grid(self, variant: Variant) -> Tensor:
        """(3, H, W) uint8: a row of samples for each class."""
        chosen = torch.cat(self.by_class(variant.samples.labels))
        return image_tools.grid(variant.pictures[chosen], columns=SHOWN_PER_CLASS)

    @functools.cached_property
    def rebuilt(self) -> dict[str, float]:
        """Metrics of reconstructed pictures that were not trained on."""
        standard = self.standard
        return measure.reconstruction(
            self.tokenizer, standard.val, standard.size, EvalConfig(), self.device, standard.net
        )

    @functools.cached_property
    def reconstructions(self) -> Tensor:
        """(3, H, W) uint8: unseen pictures, below each row its reconstruction."""
        pictures = self.standard.pictures(self.standard.val)
        return measure.reconstruction_grid(self.tokenizer, pictures, self.device)

    @torch.no_grad()
    def stages(self, task: GeneratorTask) -> Tensor | None:
        """What each part of the codes adds, (3, H, W) uint8: a row per picture, first unseen ones, last in their row the
        pictures themselves, then samples. None where codes have no order."""
        if not isinstance(self.tokenizer, Previews):
            return None
        pictures = self.standard.pictures(self.standard.val)
        originals = torch.cat([pictures.read(i, i + 1) for i in spread(len(pictures), SHOWN_STAGES)])
        count = len(originals)
        draws = Draws(hash64(self.config.seed, "stages"), torch.arange(count, device=self.device))
        labels = torch.arange(count, device=self.device) % task.num_classes
        sampled = task.latents(labels, draws)
        encoded = self.tokenizer.encode(image_tools.to_model_range(originals.to(self.device)))
        strips = [
            streaming.filmstrip(self.tokenizer.previews(latents, draws), last)
            for latents, last in ((encoded, originals), (sampled, torch.full_like(originals, 255)))
        ]
        return torch.cat(strips, dim=1)


def real_features(pictures: SourcePictures, net: FeatureNet, config: RunConfig) -> toy.Labelled:
    """Features of real pictures, computed once and kept in the cache folder of `config`."""
    sizes = pictures.file_sizes()
    key = pictures.fingerprint() + (f"_{sizes[:8]}" if sizes else "")
    path = Path(config.data.cache_dir) / f"real_{net.name}_{key}.safetensors"
    if not path.is_file():
        device = next(net.parameters()).device
        features = measure.picture_features(
            pictures, net, measure.alone(device), pictures_at_once(config.eval.batch, device)
        )
        assert features is not None  # on one rank
        labels = torch.tensor(measure.source_labels(pictures.source))
        write_atomic(path, to_bytes({**features, "labels": labels}))
    features = read_tensors(path)
    return toy.Labelled(features, features.pop("labels"))


@dataclass
class Kept:
    """A writer that keeps pictures in memory."""

    pictures: list[Tensor]

    def write(self, start: int, images: Tensor) -> None:
        self.pictures.append(images.cpu())

    def flush(self) -> None:
        """Nothing waits."""
