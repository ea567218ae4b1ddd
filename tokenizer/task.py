"""One training step of a tokenizer: reconstruct, score, and, with a discriminator, a second phase for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from core.images import to_model_range
from core.promises import recon_as_promised
from core.rng import Draws
from core.specs import Batch, Chart, Discriminator, Phase, Progress, Tokenizer
from tokenizer.losses.objective import Objective

PREVIEW_COLUMNS = 8


class TokenizerTask:
    """Trains a tokenizer, and its discriminator if there is one.

    Args:
        discriminator: trained in a second phase on the same reconstructions; None for no GAN.
        teachers: frozen feature networks by name, for the semantic terms.
        preview_images: (M, 3, H, W) uint8, the pictures shown in every sample grid.
    """

    primary = "tokenizer"

    def __init__(
        self,
        tokenizer: Tokenizer,
        objective: Objective,
        discriminator: Discriminator | None = None,
        teachers: dict[str, nn.Module] | None = None,
        preview_images: Tensor | None = None,
    ):
        self.tokenizer, self.objective, self.discriminator = tokenizer, objective, discriminator
        self.teachers = teachers or {}
        self.preview_images = preview_images

    def networks(self) -> dict[str, nn.Module]:
        trained = {"tokenizer": self.tokenizer}
        if self.discriminator is not None:
            trained["discriminator"] = self.discriminator
        return trained

    def frozen(self) -> dict[str, nn.Module]:
        looked_through = self.discriminator.frozen() if self.discriminator is not None else {}
        return {
            "objective": self.objective,
            **{f"teacher.{name}": net for name, net in self.teachers.items()},
            **{f"discriminator.{name}": net for name, net in looked_through.items()},
        }

    def constants(self) -> dict[str, Tensor]:
        return self.objective.constants()

    def phases(self, nets: dict[str, Any], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Phase]:
        images = to_model_range(batch.images)  # (B, 3, H, W)
        features = {
            name: batch.features[name].float() if name in batch.features else teacher(images, draws)
            for name, teacher in self.teachers.items()
        }
        if self.tokenizer.reads_features:  # its teacher's features meet layers of its own
            recon = nets["tokenizer"](images, draws, features, progress)
        else:
            recon = nets["tokenizer"](images, draws)
        recon_as_promised(self.tokenizer, images, recon)
        if self.discriminator is not None:
            # The generator's pass must not leave gradients in the discriminator, whose own phase follows.
            self.discriminator.requires_grad_(False)
        random = draws.fork("gan")
        yield Phase(
            "tokenizer", self.objective.generator_loss(images, recon, features, self.discriminator, progress, random)
        )
        if self.discriminator is not None:
            self.discriminator.requires_grad_(True)
            if self.objective.settings.skip_idle and not self.objective.gan_active(progress):
                return
            fake, judge, order = recon.images.detach(), nets["discriminator"], self.discriminator.fake_first
            loss = self.objective.discriminator_loss(images, fake, judge, progress, random, order)
            yield Phase("discriminator", loss)

    def looks_at_batches(self) -> bool:
        """Batch statistics and the adaptive weight of a GAN, entropies and contrasts of codes."""
        return self.discriminator is not None or any(hasattr(m, "across_ranks") for m in self.tokenizer.modules())

    @torch.no_grad()
    def preview(self, network: nn.Module, draws: Draws, count: int) -> Tensor:
        """Originals in one row, their reconstructions in the next, eight columns."""
        device = next(network.parameters()).device
        originals = to_model_range(self.preview_images[:count].to(device))
        rebuilt = network.decode(network.encode(originals)).float()
        rows = [torch.cat(pair) for pair in zip(originals.split(PREVIEW_COLUMNS), rebuilt.split(PREVIEW_COLUMNS))]
        return torch.cat(rows)

    def preview_groups(self, count: int) -> list[tuple[str, list[int]]]:
        """Each picture with its reconstruction."""
        count = min(count, 0 if self.preview_images is None else len(self.preview_images))
        rows = torch.arange(2 * count).split(2 * PREVIEW_COLUMNS)
        return [("", list(pair)) for row in rows for pair in zip(*(part.tolist() for part in row.chunk(2)))]

    def charts(self) -> list[Chart]:
        terms = ("reconstruction", "perceptual", "semantic", *self.tokenizer.term_names)
        charts = [
            Chart("loss", ("total",), live=True),
            Chart("PSNR of the training batch, dB", ("psnr",), live=True),
            Chart("terms of the loss", terms),
        ]
        if self.discriminator is not None:
            charts += [
                Chart("tokenizer against discriminator", ("gan", "discriminator")),
                Chart("discriminator's logits", ("logits_real", "logits_fake")),
                Chart("weight of the GAN term", ("gan_weight",)),
            ]
        return charts + list(self.tokenizer.charts)
