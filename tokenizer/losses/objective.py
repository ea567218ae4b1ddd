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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from core.config import Duration
from core.dist import mean_over_ranks
from core.errors import UserError, nearest
from core.images import to_unit_range
from core.nn.precision import no_autocast
from core.rng import Draws
from core.specs import Loss, Progress, Recon
from core.weights.released import needs
from tokenizer.losses.contrastive import info_nce
from tokenizer.losses.diffaug import DiffAugment
from tokenizer.losses.perceptual import Perceptual, helpers_of

_TERMS = ("reconstruction", "perceptual", "semantic", "gan", "discriminator")  # the others are the tokenizer's


@needs(helpers_of)
class Objective(nn.Module):
    """Losses of the tokenizer and of its discriminator. Has no trained parameters.

    Args:
        weights: term -> factor. A term that is not named here counts 1 (reconstruction; discriminator: its own loss),
            0.1 (gan, when there is a discriminator) or 0 (perceptual, semantic); a term of the tokenizer must be named.
            null takes a name back that a base config gives.
            parity: RecTok's scripts ask for a gan weight of 0.5 that never arrives; 0.1 is what trained the release.
        perceptual: parts of the perceptual loss, see tokenizer.losses.perceptual; None for no such network.
        reconstruction: "mse" or "l1".
        pixels: what reconstruction and discriminator see, "unit" for [0, 1] (RecTok) or "signed" for [-1, 1] (VQGAN's
            descendants; a squared error is 4 times larger there).
        semantic_loss: "cosine", "l1" or "l2", averaged over tokens, or "infonce" over the pictures of a batch
            (tokenizer.losses.contrastive); averaged over teachers.
        semantic_target: "all" tokens, or only those "masked" from the encoder.
        contrast_group: "infonce" tells apart this many consecutive pictures of the batch, as if each such group were on
            a rank of its own; 0 for the whole batch.
        gan_start_epoch: epochs before the discriminator and the gan term begin to count.
        gan_start: the same with a unit ("20000step"), in place of gan_start_epoch.
        gan_loss: of the tokenizer, "hinge" (-D) or "non_saturating" (softplus(-D), Goodfellow et al. 2014).
        discriminator_loss: "hinge", or "vanilla" (softplus: cross-entropy).
        adaptive_weight: multiply the gan term by the ratio of gradients at the layer that paints the pixels,
            |d (reconstruction + perceptual)| / (|d gan| + 1e-4), at most 1e4 (VQGAN, Esser et al. 2021, eq. 7).
        augment: change real and false pictures alike before the discriminator, see tokenizer.losses.diffaug.DiffAugment
            for the settings; None: not at all.
        lecam: weight of LeCAM (Tseng et al. 2021) inside the discriminator's loss: its logits stay near running means.
        skip_idle: until its start the discriminator sees nothing, which saves its passes. Otherwise it counts 0 times.
        across_ranks: "infonce" and the adaptive weight over the batch of all ranks, so that the rank count changes
            nothing. parity: False is each rank's share, what the official codes train with.
        log_variance: reconstruction is divided by its exponential. parity: a frozen scalar of the official loss, 0.
    """

    def __init__(
        self,
        weights: dict[str, float | None] | None = None,
        perceptual: dict[str, Any] | None = None,
        reconstruction: str = "mse",
        pixels: str = "unit",
        semantic_loss: str = "cosine",
        semantic_target: str = "all",
        contrast_group: int = 0,
        gan_start_epoch: float = 0.0,
        gan_start: Duration | None = None,
        gan_loss: str = "hinge",
        discriminator_loss: str = "hinge",
        adaptive_weight: bool = False,
        augment: dict[str, Any] | None = None,
        lecam: float = 0.0,
        skip_idle: bool = False,
        across_ranks: bool = True,
        log_variance: float = 0.0,
    ):
        super().__init__()
        _check("reconstruction", reconstruction, ("mse", "l1"))
        _check("pixels", pixels, ("unit", "signed"))
        _check("gan_loss", gan_loss, ("hinge", "non_saturating"))
        _check("discriminator_loss", discriminator_loss, ("hinge", "vanilla"))
        _check("semantic_loss", semantic_loss, ("cosine", "l1", "l2", "infonce"))
        _check("semantic_target", semantic_target, ("all", "masked"))
        self.given = {name: float(weight) for name, weight in (weights or {}).items() if weight is not None}
        self.weights = {
            "reconstruction": 1.0,
            "perceptual": 0.0,
            "semantic": 0.0,
            "gan": 0.1,
            "discriminator": 1.0,
            **self.given,
        }
        if self.weights["perceptual"] and not perceptual:
            raise UserError(
                f"objective: weights.perceptual is {self.weights['perceptual']:g} but no perceptual network is configured."
                " Set perceptual: {lpips: 1.0} (or {lpips_squeeze: 1.0}, which needs no download), or the weight to 0."
            )
        self.perceptual = Perceptual(perceptual) if self.weights["perceptual"] else None
        self.reconstruction, self.log_variance = reconstruction, log_variance
        self.semantic_loss, self.semantic_target, self.contrast_group = semantic_loss, semantic_target, contrast_group
        self.pixels, self.gan_loss, self.d_loss = pixels, gan_loss, discriminator_loss
        self.adaptive_weight, self.across_ranks = adaptive_weight, across_ranks
        self.augment = None if augment is None else _build_augment(augment)
        self.lecam, self.skip_idle = lecam, skip_idle
        if lecam:
            self.register_buffer("lecam_means", torch.zeros(2))  # running means of real and false logits
        self.gan_start_epoch, self.gan_start = gan_start_epoch, None if gan_start is None else Duration.parse(gan_start)

    def gan_active(self, progress: Progress) -> bool:
        if self.gan_start is not None:
            return self.gan_start.reached(progress)
        return progress.epoch >= self.gan_start_epoch

    def constants(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs, themselves and not copies."""
        return {"lecam_means": self.lecam_means} if self.lecam else {}

    def _since_start(self, progress: Progress) -> float:
        """Pictures since the discriminator began; negative before."""
        batch = progress.images_seen // progress.step if progress.step else 1
        start = (
            self.gan_start_epoch * progress.images_per_epoch
            if self.gan_start is None
            else self.gan_start.images(progress.images_per_epoch, batch)
        )
        return progress.images_seen - start if self.gan_active(progress) else min(-1.0, progress.images_seen - start)

    def _judge(self, discriminator: nn.Module, pictures: Tensor, use: str, draws: Draws, progress: Progress) -> Tensor:
        """Logits of (augmented) pictures. `use` keys the draws: real and false pictures get draws of their own."""
        draws = draws.fork(use) if draws is not None else None
        if self.augment is not None:
            pictures = self.augment(pictures, draws, self.augment.blur_amount(self._since_start(progress), progress))
        takes_draws = getattr(_bare(discriminator), "takes_draws", False)
        return discriminator(pictures, draws) if takes_draws else discriminator(pictures)

    def _seen(self, images: Tensor) -> Tensor:
        """Pictures in [-1, 1] as reconstruction and discriminator see them, fp32."""
        return to_unit_range(images.float()) if self.pixels == "unit" else images.float()

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
            draws: core.rng.Draws for what is random before the discriminator.
        """
        self.check_terms(recon.terms, bool(recon.predictions), discriminator is not None)
        active = discriminator is not None and self.gan_active(progress)
        with no_autocast(images):
            # With adaptive weights the losses of the pictures are differentiated here, once, as far as the pictures.
            pictures = recon.images.detach().requires_grad_() if active and self.adaptive_weight else recon.images
            target, found = self._seen(images), self._seen(pictures)  # not clamped
            target01, found01 = to_unit_range(images.float()), to_unit_range(pictures.float())
            variance = math.exp(self.log_variance)
            terms = {
                "reconstruction": (F.l1_loss if self.reconstruction == "l1" else F.mse_loss)(found, target) / variance
            }
            if self.perceptual is not None:
                distance = self.perceptual(target01, found01)  # (B,)
                if recon.perceptual_weights is not None:
                    distance = distance * recon.perceptual_weights
                terms["perceptual"] = distance.mean()
            if recon.predictions and (features or self.weights["semantic"]):
                terms["semantic"] = self._semantic(recon, features)
            terms |= {name: term.float() for name, term in recon.terms.items()}

            weights = dict(self.weights)
            if active:
                with _frozen(discriminator) as judge:
                    logits = self._judge(judge, found, "generator", draws, progress)
                terms["gan"] = -logits.mean() if self.gan_loss == "hinge" else F.softplus(-logits).mean()
            if pictures is recon.images:
                total = sum(weights[name] * term for name, term in terms.items())
            else:
                total, weights["gan"] = self._balanced(terms, pictures, recon)

        logs = {name: term.detach() for name, term in terms.items()}
        # Per picture, then averaged: the same however a batch is spread over ranks and micro-batches.
        logs["psnr"] = -10.0 * torch.log10((found01.detach() - target01).square().mean(dim=(1, 2, 3))).mean()
        if discriminator is not None:
            logs.setdefault("gan", torch.zeros_like(total))
            logs["gan_weight"] = torch.zeros_like(total) + (weights["gan"] if active else 0.0)
        logs |= recon.logs
        logs["total"] = total.detach()
        return Loss(total, {name: value.detach() for name, value in logs.items()})

    def discriminator_loss(
        self,
        images: Tensor,
        recon_images: Tensor,
        discriminator: nn.Module,
        progress: Progress,
        draws: Draws | None = None,
    ) -> Loss:
        """Loss of the discriminator on (B, 3, H, W) pictures in [-1, 1]; no gradient reaches `recon_images`.

        Before the start epoch the loss is exactly 0 with zero gradients.
        """
        with no_autocast(images):
            # parity: two forwards, since a joint batch has other BatchNorm statistics; networks that remember earlier
            # batches say in which order they were published.
            seen = {"real": self._seen(images), "fake": self._seen(recon_images.detach())}
            order = ("fake", "real") if getattr(_bare(discriminator), "fake_first", False) else ("real", "fake")
            logits = {use: self._judge(discriminator, seen[use], use, draws, progress) for use in order}
            real, fake = logits["real"], logits["fake"]
            if self.d_loss == "hinge":
                loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
            else:
                loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
            if self.lecam:
                loss = loss + self.lecam * self._lecam(real, fake)
            # parity: times 0 and not skipped, since Adam counts these steps and its first real one is smaller for it.
            total = loss * (self.weights["discriminator"] * self.gan_active(progress))
        logs = {"logits_real": real.mean(), "logits_fake": fake.mean(), "discriminator": total}
        return Loss(total, {name: value.detach() for name, value in logs.items()})

    def _lecam(self, real: Tensor, fake: Tensor, decay: float = 0.999) -> Tensor:
        """Squared distance of real logits above the mean of false ones, and of false ones below that of real ones. The
        running means begin at 0 and take this batch in first, unless it is not finite: such a step is skipped, and must
        not stay in the means of all that follow."""
        batch = mean_over_ranks(torch.stack((real.detach().mean(), fake.detach().mean())))
        taken_in = torch.lerp(self.lecam_means, batch.float(), 1 - decay)
        self.lecam_means.copy_(torch.where(batch.isfinite().all(), taken_in, self.lecam_means))
        mean_real, mean_fake = self.lecam_means.clone().unbind()
        return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()

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
        weights, images = self.weights, recon.images
        supervised = sum(weights[name] * terms[name] for name in ("reconstruction", "perceptual") if name in terms)
        gradients = [torch.autograd.grad(loss, pictures, retain_graph=True)[0] for loss in (supervised, terms["gan"])]
        norms = []
        for gradient in gradients:
            at_layer = torch.autograd.grad(images, recon.last_layer, gradient, retain_graph=True)[0].float()
            norms.append((mean_over_ranks(at_layer) if self.across_ranks else at_layer).norm())
        weight = weights["gan"] * (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4)
        # It has the gradients of both losses, but not their value.
        carrier = (images.float() * (gradients[0] + weight * gradients[1]).float()).sum()
        value = supervised.detach() + weight * terms["gan"].detach()
        rest = sum(
            weights[name] * term for name, term in terms.items() if name not in ("reconstruction", "perceptual", "gan")
        )
        return rest + carrier + (value - carrier).detach(), weight

    def _semantic(self, recon: Recon, features: dict[str, Tensor]) -> Tensor:
        """Mean over teachers of the distance between predicted and true features."""
        losses = []
        for teacher, prediction in recon.predictions.items():
            if teacher not in features:
                raise UserError(
                    f'the tokenizer predicts features of teacher "{teacher}", which is not configured.'
                    + nearest(teacher, features)
                )
            prediction, target = prediction.float(), features[teacher].float()  # (B, N, D)
            if self.semantic_loss == "infonce":
                losses.append(
                    info_nce(
                        prediction.flatten(1),
                        target.flatten(1),
                        group=self.contrast_group,
                        across_ranks=self.across_ranks,
                    )
                )
                continue
            if self.semantic_loss == "cosine":
                per_token = 1.0 - F.cosine_similarity(prediction, target, dim=-1)  # (B, N)
            elif self.semantic_loss == "l2":
                per_token = (prediction - target).square().mean(-1)
            else:
                per_token = (prediction - target).abs().mean(-1)
            counted = torch.ones_like(per_token)
            if self.semantic_target == "masked":  # 0 without gradient, and no NaN, when nothing is masked
                counted = torch.zeros_like(per_token) if recon.masked is None else recon.masked.float()
            losses.append((per_token * counted).sum() / counted.sum().clamp(min=1.0))
        return torch.stack(losses).mean()

    def check_terms(self, terms: Collection[str], predicts: bool, has_discriminator: bool) -> None:
        """UserError unless every term has a weight and every weight a term.

        Args:
            terms: names that the tokenizer reports in Recon.terms.
            predicts: whether it predicts features of teachers.
        """
        for name in terms:
            if name in _TERMS:
                raise ValueError(f'Recon.terms may not be called "{name}": the objective computes that itself')
            if name not in self.given:
                raise UserError(
                    f'objective: the tokenizer has a term "{name}" but weights.{name} is not set (0: ignore).'
                )
        for name, weight in self.given.items():
            if weight and name not in _TERMS and name not in terms:
                raise UserError(
                    f"objective: weights.{name} names no term of this tokenizer.{nearest(name, (*_TERMS, *terms))}"
                )
            if weight and name == "semantic" and not predicts:
                raise UserError(
                    "objective: weights.semantic is not 0 but the tokenizer predicts no teacher's features."
                    " Give it a teacher, or set weights.semantic: 0."
                )
            if weight and name == "gan" and not has_discriminator:
                raise UserError(
                    "objective: weights.gan is not 0 but there is no discriminator."
                    " Configure one, or set weights.gan: 0."
                )


def _build_augment(settings: dict[str, Any]) -> DiffAugment:
    known = ("probability", "cutout", "fade")
    if unknown := [key for key in settings if key not in known]:
        raise UserError(f'objective.augment has no setting "{unknown[0]}".{nearest(unknown[0], known)}')
    return DiffAugment(**settings)


def _check(setting: str, value: str, choices) -> None:
    if value not in choices:
        raise UserError(f'objective: {setting} is "{value}".{nearest(value, choices)}')


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
