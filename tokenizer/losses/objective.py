"""What an image autoencoder is trained on (RecTok, section on training losses).

    total = sum of weight[name] * term[name]

over reconstruction, perceptual, semantic (agreement with frozen teachers), gan (hinge, Lim & Ye 2017, and others) and
whatever regularisers the tokenizer itself reports in Recon.terms ("kl", "commitment", ...). The networks that are
trained, the teachers and the optimiser do not live here. Everything is computed in fp32, whatever autocast the caller
is under.

B batch, N tokens, D feature width, H x W pixels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from core.config import parse_section
from core.dist import mean_over_ranks
from core.errors import UserError, nearest
from core.images import to_unit_range
from core.limits import Factor, Whole
from core.nn.precision import no_autocast
from core.rng import Draws
from core.schema import Duration
from core.specs import Loss, Progress, Recon
from core.weights.released import needs
from tokenizer.losses.contrastive import info_nce
from tokenizer.losses.diffaug import DiffAugment
from tokenizer.losses.perceptual import Perceptual, helpers_of

# What a term of the objective itself counts where `weights` does not name it; the tokenizer's own terms must be named.
# parity: RecTok's scripts ask for a gan weight of 0.5 that never arrives; 0.1 is what trained the release.
DEFAULT_WEIGHTS = {"reconstruction": 1.0, "perceptual": 0.0, "semantic": 0.0, "gan": 0.1, "discriminator": 1.0}

PIXEL_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}
FEATURE_DISTANCES = {  # (B, N, D) twice -> (B, N)
    "cosine": lambda predicted, true: 1.0 - F.cosine_similarity(predicted, true, dim=-1),
    "l1": lambda predicted, true: (predicted - true).abs().mean(-1),
    "l2": lambda predicted, true: (predicted - true).square().mean(-1),
}
GAN_LOSSES = {  # what the logits of reconstructions cost the tokenizer (Goodfellow et al. 2014 for the second)
    "hinge": lambda logits: -logits.mean(),
    "non_saturating": lambda logits: F.softplus(-logits).mean(),
}
JUDGEMENT_LOSSES = {  # what the logits of real pictures, and minus those of reconstructions, cost the discriminator
    "hinge": lambda logits: F.relu(1.0 - logits).mean(),
    "vanilla": lambda logits: F.softplus(-logits).mean(),  # cross-entropy
}


@dataclass(frozen=True)
class Settings:
    """The `objective` section of a config.

    Attributes:
        weights: term -> factor; DEFAULT_WEIGHTS holds for what is not named. null takes a name back that a base config
            gives.
        perceptual: parts of the perceptual loss, see tokenizer.losses.perceptual; None for no such network.
        reconstruction: a squared or an absolute error.
        pixels: what reconstruction and discriminator see, "unit" for [0, 1] (RecTok) or "signed" for [-1, 1] (VQGAN's
            descendants; a squared error is 4 times larger there).
        log_variance: reconstruction is divided by its exponential. parity: a frozen scalar of the official loss, 0.
        semantic_loss: a distance per token, averaged over tokens, or "infonce" over the pictures of a batch
            (tokenizer.losses.contrastive); averaged over teachers.
        semantic_target: "all" tokens, or only those "masked" from the encoder.
        contrast_group: "infonce" tells apart this many consecutive pictures of the batch, as if each such group were on
            a rank of its own; 0 for the whole batch.
        gan_start_epoch: epochs before the discriminator and the gan term begin to count.
        gan_start: the same with a unit ("20000step"), in place of gan_start_epoch.
        gan_loss: of the tokenizer, see GAN_LOSSES.
        discriminator_loss: see JUDGEMENT_LOSSES.
        adaptive_weight: multiply the gan term by the ratio of gradients at the layer that paints the pixels,
            |d (reconstruction + perceptual)| / (|d gan| + 1e-4), at most 1e4 (VQGAN, Esser et al. 2021, eq. 7).
        augment: change real and false pictures alike before the discriminator, see tokenizer.losses.diffaug.DiffAugment
            for the settings; None: not at all.
        lecam: weight of LeCAM (Tseng et al. 2021) inside the discriminator's loss: its logits stay near running means.
        skip_idle: until its start the discriminator sees nothing, which saves its passes. Otherwise it counts 0 times.
        across_ranks: "infonce" and the adaptive weight over the batch of all ranks, so that the rank count changes
            nothing. parity: False is each rank's share, what the official codes train with.
    """

    weights: dict[str, Factor | None] | None = None
    perceptual: dict[str, Any] | None = None
    reconstruction: Literal["mse", "l1"] = "mse"
    pixels: Literal["unit", "signed"] = "unit"
    log_variance: float = 0.0
    semantic_loss: Literal["cosine", "l1", "l2", "infonce"] = "cosine"
    semantic_target: Literal["all", "masked"] = "all"
    contrast_group: Whole = 0
    gan_start_epoch: Factor = 0.0
    gan_start: Duration | None = None
    gan_loss: Literal["hinge", "non_saturating"] = "hinge"
    discriminator_loss: Literal["hinge", "vanilla"] = "hinge"
    adaptive_weight: bool = False
    augment: Annotated[dict, DiffAugment] | None = None
    lecam: Factor = 0.0
    skip_idle: bool = False
    across_ranks: bool = True

    @property
    def start(self) -> Duration:
        """When the discriminator and the gan term begin to count."""
        return self.gan_start or Duration(f"{self.gan_start_epoch:.12f}ep")


@needs(helpers_of)
class Objective(nn.Module):
    """Losses of the tokenizer and of its discriminator. Has no trained parameters.

    Args:
        settings: the fields of Settings, by name.
    """

    Settings = Settings  # for core.registry

    def __init__(self, **settings: Any):
        super().__init__()
        self.settings = parse_section("objective", settings, Settings)
        self.start = self.settings.start
        weights = self.settings.weights or {}
        self.named_weights = {name: float(weight) for name, weight in weights.items() if weight is not None}
        self.weights = {**DEFAULT_WEIGHTS, **self.named_weights}
        if self.weights["perceptual"] and not self.settings.perceptual:
            raise UserError(
                f"objective: weights.perceptual is {self.weights['perceptual']:g} but no perceptual network is configured."
                " Set perceptual: {lpips: 1.0} (or {lpips_squeeze: 1.0}, which needs no download), or the weight to 0."
            )
        self.perceptual = Perceptual(self.settings.perceptual) if self.weights["perceptual"] else None
        augment = self.settings.augment
        self.augment = None if augment is None else parse_section("objective.augment", augment, DiffAugment)
        if self.settings.lecam:
            self.register_buffer("lecam_means", torch.zeros(2))  # running means of real and false logits

    def constants(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs, themselves and not copies."""
        return {"lecam_means": self.lecam_means} if self.settings.lecam else {}

    def _seen(self, images: Tensor) -> Tensor:
        """Pictures in [-1, 1] as reconstruction and discriminator see them, fp32."""
        return to_unit_range(images.float()) if self.settings.pixels == "unit" else images.float()

    # -- the tokenizer --------------------------------------------------------------------------------------------------
    def generator_loss(
        self,
        images: Tensor,
        recon: Recon,
        features: dict[str, Tensor],
        discriminator: nn.Module | None,
        progress: Progress,
        draws: Draws | None = None,
    ) -> Loss:
        """Loss of the tokenizer.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            recon: the tokenizer's training forward of `images`.
            features: teacher name -> (B, N, D), for every teacher that `recon` predicts.
            discriminator: None for none. Receives no gradient.
            draws: for what is random before the discriminator.
        """
        self.check_terms(recon.terms, bool(recon.predictions), discriminator is not None)
        active = discriminator is not None and self.gan_active(progress)
        adaptive = active and self.settings.adaptive_weight
        weights = dict(self.weights)
        with no_autocast(images):
            # With adaptive weights the losses of the pictures are differentiated here, once, as far as the pictures.
            pictures = recon.images.detach().requires_grad_() if adaptive else recon.images
            seen, target = self._seen(pictures), self._seen(images)  # not clamped
            pictures01, target01 = to_unit_range(pictures.float()), to_unit_range(images.float())
            error = PIXEL_LOSSES[self.settings.reconstruction](seen, target)
            terms = {"reconstruction": error / math.exp(self.settings.log_variance)}
            if self.perceptual is not None:
                distance = self.perceptual(target01, pictures01)  # (B,)
                if recon.perceptual_weights is not None:
                    distance = distance * recon.perceptual_weights
                terms["perceptual"] = distance.mean()
            if recon.predictions and (features or weights["semantic"]):
                terms["semantic"] = self._semantic(recon, features)
            terms |= {name: term.float() for name, term in recon.terms.items()}
            if active:
                # Under adaptive weights every loss has a graph of its own, which its one backward pass may free.
                judged = self._seen(pictures) if adaptive else seen
                with _frozen(discriminator) as judge:
                    logits = self._judge(judge, judged, "generator", draws, progress)
                terms["gan"] = GAN_LOSSES[self.settings.gan_loss](logits)
            if adaptive:
                total, weights["gan"] = self._balanced(terms, pictures, recon)
            else:
                total = sum(weights[name] * term for name, term in terms.items())

        logs = dict(terms)
        # Per picture, then averaged: the same however a batch is spread over ranks and micro-batches.
        logs["psnr"] = -10.0 * torch.log10((pictures01.detach() - target01).square().mean(dim=(1, 2, 3))).mean()
        if discriminator is not None:
            logs.setdefault("gan", torch.zeros_like(total))
            logs["gan_weight"] = torch.zeros_like(total) + (weights["gan"] if active else 0.0)
        logs |= recon.logs
        logs["total"] = total
        return Loss(total, {name: value.detach() for name, value in logs.items()})

    def _semantic(self, recon: Recon, features: dict[str, Tensor]) -> Tensor:
        """Mean over teachers of the distance between predicted and true features."""
        settings, losses = self.settings, []
        for teacher, predicted in recon.predictions.items():
            if teacher not in features:
                raise UserError(
                    f'the tokenizer predicts features of teacher "{teacher}", which is not configured.'
                    + nearest(teacher, features)
                )
            predicted, true = predicted.float(), features[teacher].float()  # (B, N, D)
            if settings.semantic_loss == "infonce":
                group, across_ranks = settings.contrast_group, settings.across_ranks
                losses.append(info_nce(predicted.flatten(1), true.flatten(1), group=group, across_ranks=across_ranks))
                continue
            per_token = FEATURE_DISTANCES[settings.semantic_loss](predicted, true)  # (B, N)
            counted = torch.ones_like(per_token)
            if settings.semantic_target == "masked":  # 0 without gradient, and no NaN, when nothing is masked
                counted = torch.zeros_like(per_token) if recon.masked is None else recon.masked.float()
            losses.append((per_token * counted).sum() / counted.sum().clamp(min=1.0))
        return torch.stack(losses).mean()

    def _balanced(self, terms: dict[str, Tensor], pictures: Tensor, recon: Recon) -> tuple[Tensor, Tensor]:
        """(total loss, weight of its gan term) with the adaptive factor.

        `terms` depend on `pictures`, a detached copy of recon.images. Their gradients there serve both the factor and
        the backward pass, which need not go through the perceptual network and the discriminator again.
        """
        if recon.last_layer is None:
            raise UserError(
                "objective: adaptive_weight needs a tokenizer that names the layer which paints its pixels;"
                " this one does not. Set adaptive_weight: false."
            )
        weighted = {name: self.weights[name] * term for name, term in terms.items() if name != "gan"}
        supervised = sum(weighted.pop(name) for name in ("reconstruction", "perceptual") if name in weighted)
        gradients = [torch.autograd.grad(loss, pictures)[0] for loss in (supervised, terms["gan"])]
        norms = []
        for gradient in gradients:
            at_layer = torch.autograd.grad(recon.images, recon.last_layer, gradient, retain_graph=True)[0].float()
            norms.append((mean_over_ranks(at_layer) if self.settings.across_ranks else at_layer).norm())
        weight = self.weights["gan"] * (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4)
        # It has the gradients of both losses, but not their value.
        carrier = (recon.images.float() * (gradients[0] + weight * gradients[1]).float()).sum()
        value = supervised.detach() + weight * terms["gan"].detach()
        return sum(weighted.values()) + carrier + (value - carrier).detach(), weight

    # -- the discriminator ----------------------------------------------------------------------------------------------
    def gan_active(self, progress: Progress) -> bool:
        return self.start.reached(progress)

    def _judge(
        self, discriminator: nn.Module, pictures: Tensor, use: str, draws: Draws | None, progress: Progress
    ) -> Tensor:
        """Logits of (augmented) pictures. `use` keys the draws: real and false pictures get draws of their own."""
        draws = draws.fork(use) if draws is not None else None
        if self.augment is not None:
            since = progress.images_seen - self.start.images(progress.images_per_epoch, progress.global_batch)
            since = since if self.gan_active(progress) else min(-1, since)
            pictures = self.augment(pictures, draws, self.augment.blur_amount(since, progress))
        return discriminator(pictures, draws)

    def discriminator_loss(
        self,
        images: Tensor,
        recon_images: Tensor,
        discriminator: nn.Module,
        progress: Progress,
        draws: Draws | None = None,
        fake_first: bool = False,
    ) -> Loss:
        """Loss of the discriminator on (B, 3, H, W) pictures in [-1, 1]; no gradient reaches `recon_images`.

        Before the start epoch the loss is exactly 0 with zero gradients. `fake_first`: see core.specs.Discriminator.
        """
        with no_autocast(images):
            # parity: two forwards, since a joint batch has other BatchNorm statistics.
            seen = {"real": self._seen(images), "fake": self._seen(recon_images.detach())}
            order = ("fake", "real") if fake_first else ("real", "fake")
            logits = {use: self._judge(discriminator, seen[use], use, draws, progress) for use in order}
            real, fake = logits["real"], logits["fake"]
            cost = JUDGEMENT_LOSSES[self.settings.discriminator_loss]
            loss = 0.5 * (cost(real) + cost(-fake))
            if self.settings.lecam:
                loss = loss + self.settings.lecam * self._lecam(real, fake)
            # parity: times 0 and not skipped, since Adam counts these steps and its first real one is smaller for it.
            total = loss * (self.weights["discriminator"] * self.gan_active(progress))
        logs = {"logits_real": real.mean(), "logits_fake": fake.mean(), "discriminator": total}
        return Loss(total, {name: value.detach() for name, value in logs.items()})

    def _lecam(self, real: Tensor, fake: Tensor, decay: float = 0.999) -> Tensor:
        """Squared distance of real logits above the mean of false ones, and of false ones below that of real ones. The
        running means begin at 0 and take this batch in first, unless it is not finite: such a step is skipped, and must
        not stay in the means of all that follow."""
        batch = mean_over_ranks(torch.stack((real.detach().mean(), fake.detach().mean())))
        moved = torch.lerp(self.lecam_means, batch.float(), 1 - decay)
        self.lecam_means.copy_(torch.where(batch.isfinite().all(), moved, self.lecam_means))
        mean_real, mean_fake = self.lecam_means.clone().unbind()
        return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()

    # -- checks ---------------------------------------------------------------------------------------------------------
    def check_terms(self, terms: Collection[str], predicts: bool, has_discriminator: bool) -> None:
        """UserError unless every term has a weight and every weight a term.

        Args:
            terms: names that the tokenizer reports in Recon.terms.
            predicts: whether it predicts features of teachers.
        """
        for name in terms:
            if name in DEFAULT_WEIGHTS:
                raise ValueError(f'Recon.terms may not be called "{name}": the objective computes that itself')
            if name not in self.named_weights:
                raise UserError(
                    f'objective: the tokenizer has a term "{name}" but weights.{name} is not set (0: ignore).'
                )
        for name in (name for name, weight in self.named_weights.items() if weight):
            if name not in DEFAULT_WEIGHTS and name not in terms:
                raise UserError(
                    f"objective: weights.{name} names no term of this tokenizer."
                    + nearest(name, (*DEFAULT_WEIGHTS, *terms))
                )
            if name == "semantic" and not predicts:
                raise UserError(
                    "objective: weights.semantic is not 0 but the tokenizer predicts no teacher's features."
                    " Give it a teacher, or set weights.semantic: 0."
                )
            if name == "gan" and not has_discriminator:
                raise UserError(
                    "objective: weights.gan is not 0 but there is no discriminator."
                    " Configure one, or set weights.gan: 0."
                )


def _bare(network: nn.Module) -> nn.Module:
    """`network` without DDP."""
    return network.module if isinstance(network, DistributedDataParallel) else network


@contextlib.contextmanager
def _frozen(network: nn.Module) -> Iterator[nn.Module]:
    """`network` without DDP and with parameters that record no gradient while the block runs."""
    bare = _bare(network)
    trained = [p for p in bare.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield bare
    finally:
        for p in trained:
            p.requires_grad_(True)
