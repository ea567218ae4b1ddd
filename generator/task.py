"""One training step of a generator: latents from the frozen tokenizer (or from a cache), then its own loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from core.images import to_model_range
from core.promises import latents_as_promised, loss_as_promised
from core.rng import Draws
from core.schema import SampleConfig
from core.specs import Batch, Chart, Continuous, Generator, Guidance, Loss, Phase, Progress, Tokenizer
from generator.sampling import draw_latents
from generator.settings import sampling_of


class GeneratorTask:
    """Trains a generator on the latents of a frozen tokenizer.

    Args:
        tokenizer: with its latent statistics set.
        num_classes: of the data set.
        guidance: used for previews.
        sample_options: passed to generator.sample (number of steps ...).

    Attributes:
        class_names: captions of previews; [] for numbers.
    """

    primary = "generator"

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        num_classes: int,
        guidance: Guidance = Guidance(),
        sample_options: dict[str, Any] | None = None,
    ):
        self.generator, self.tokenizer = generator, tokenizer
        self.num_classes, self.guidance, self.sample_options = num_classes, guidance, sample_options or {}
        self.class_names: list[str] = []

    def tuned(self, settings: SampleConfig) -> GeneratorTask:
        """The same networks, which sample by other settings. UserError for what this generator cannot do."""
        sampling = sampling_of(settings, self.generator, self.tokenizer.spec, self.guidance.guide)
        return GeneratorTask(self.generator, self.tokenizer, self.num_classes, *sampling)

    def networks(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}

    def frozen(self) -> dict[str, nn.Module]:
        guide = {} if self.guidance.guide is None else {"guide": self.guidance.guide}
        return {"tokenizer": self.tokenizer, **guide}

    def constants(self) -> dict[str, Tensor]:
        """What a sampler needs beside the weights: the normalisation of the latents."""
        if not isinstance(self.tokenizer.spec, Continuous):
            return {}
        return {"mean": self.tokenizer.latent_mean, "std": self.tokenizer.latent_std}

    def phases(self, nets: dict[str, Any], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Phase]:
        with torch.no_grad():
            tokenizer_draws = draws.fork("tokenizer")
            if batch.stored is not None:
                latents = self.tokenizer.from_stored(batch.stored, tokenizer_draws)
            else:
                latents = self.tokenizer.encode(to_model_range(batch.images), tokenizer_draws)
        method = "encode" if batch.stored is None else "from_stored"
        latents_as_promised(self.tokenizer, self.tokenizer.spec, latents, method)
        loss = nets["generator"](latents, batch.labels, draws, progress)
        loss_as_promised(self.generator, loss)
        if not self.generator.charts:  # it leaves to us what is shown of it
            loss = Loss(loss.total, {"loss": loss.total.detach(), **loss.logs})
        yield Phase("generator", loss)

    def latents(self, labels: Tensor, draws: Draws, network: Any = None, **more: Any) -> Tensor:
        """Of the classes `labels`, by the task's own generator or by `network`; `more` goes to its `sample`."""
        network = self.generator if network is None else network
        latents = draw_latents(network, labels, draws, self.guidance, **self.sample_options, **more)
        latents_as_promised(network, self.tokenizer.spec, latents, "sample")
        return latents

    @torch.no_grad()
    def sample(self, network: Any, labels: Tensor, draws: Draws) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of the classes `labels`."""
        return self.tokenizer.decode(self.latents(labels, draws, network), draws.fork("decode")).float()

    def preview(self, network: nn.Module, draws: Draws, count: int) -> Tensor:
        """One picture per class, round and round."""
        labels = torch.arange(count, device=draws.positions.device) % self.num_classes
        return self.sample(network, labels, draws)

    def preview_groups(self, count: int) -> list[tuple[str, list[int]]]:
        """Each picture with the name of its class."""
        names = self.class_names or [str(label) for label in range(self.num_classes)]
        return [(names[i % self.num_classes], [i]) for i in range(count)]

    def looks_at_batches(self) -> bool:
        return False

    def charts(self) -> list[Chart]:
        return list(self.generator.charts) or [Chart("loss", ("loss",), live=True)]
