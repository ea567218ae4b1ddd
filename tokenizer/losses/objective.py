"""What an image autoencoder is trained on (RecTok, section on training losses).

    total = sum of weight[name] * term[name]

over reconstruction, perceptual, semantic (agreement with frozen teachers), gan (hinge, Lim & Ye 2017) and whatever
regularisers the tokenizer itself reports in Recon.terms ("kl", "commitment", ...). The networks that are trained, the
teachers and the optimiser do not live here. Everything is computed in fp32, whatever autocast the caller is under.

B batch, N tokens, D feature width, H x W pixels.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from core.errors import UserError, nearest
from core.images import to_unit_range
from core.specs import Loss, Progress, Recon
from tokenizer.losses.perceptual import Perceptual

_TERMS = ("reconstruction", "perceptual", "semantic", "gan")  # the others are the tokenizer's


class Objective(nn.Module):
    """Losses of the tokenizer and of its discriminator. Has no trained parameters.

    Args:
        weights: term -> factor. A term that is not named here counts 1 (reconstruction), 0.1 (gan, when there is a
            discriminator) or 0 (perceptual, semantic); a term of the tokenizer must be named.
            parity: RecTok's scripts ask for a gan weight of 0.5 that never arrives; 0.1 is what trained the release.
        perceptual: parts of the perceptual loss, see tokenizer.losses.perceptual; None for no such network.
        reconstruction: "mse" or "l1".
        semantic_loss: "cosine", "l1" or "l2", averaged over tokens and over teachers.
        semantic_target: "all" tokens, or only those "masked" from the encoder.
        gan_start_epoch: epochs before the discriminator and the gan term begin to count.
        log_variance: reconstruction is divided by its exponential. parity: a frozen scalar of the official loss, 0.
    """

    def __init__(
        self,
        weights: dict[str, float] | None = None,
        perceptual: dict[str, Any] | None = None,
        reconstruction: str = "mse",
        semantic_loss: str = "cosine",
        semantic_target: str = "all",
        gan_start_epoch: float = 0.0,
        log_variance: float = 0.0,
    ):
        super().__init__()
        _check("reconstruction", reconstruction, ("mse", "l1"))
        _check("semantic_loss", semantic_loss, ("cosine", "l1", "l2"))
        _check("semantic_target", semantic_target, ("all", "masked"))
        self.given = {name: float(weight) for name, weight in (weights or {}).items()}
        self.weights = {"reconstruction": 1.0, "perceptual": 0.0, "semantic": 0.0, "gan": 0.1, **self.given}
        if self.weights["perceptual"] and not perceptual:
            raise UserError(
                f"objective: weights.perceptual is {self.weights['perceptual']:g} but no perceptual network is configured."
                " Set perceptual: {lpips: 1.0} (or {lpips_squeeze: 1.0}, which needs no download), or the weight to 0."
            )
        self.perceptual = Perceptual(perceptual) if self.weights["perceptual"] else None
        self.reconstruction, self.log_variance = reconstruction, log_variance
        self.semantic_loss, self.semantic_target = semantic_loss, semantic_target
        self.gan_start_epoch = gan_start_epoch

    def gan_active(self, progress: Progress) -> bool:
        return progress.epoch >= self.gan_start_epoch

    def generator_loss(self, images: Tensor, recon: Recon, features: dict[str, Tensor],
                       discriminator: nn.Module | None, progress: Progress) -> Loss:
        """Loss of the tokenizer.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            recon: the tokenizer's training forward of `images`.
            features: teacher name -> (B, N, D), for every teacher that `recon` predicts.
            discriminator: None for none. Receives no gradient.
        """
        self.check_terms(recon.terms, bool(recon.predictions), discriminator is not None)
        with _fp32(images):
            target, found = to_unit_range(images.float()), to_unit_range(recon.images.float())  # not clamped
            variance = math.exp(self.log_variance)
            terms = {"reconstruction": (F.l1_loss if self.reconstruction == "l1" else F.mse_loss)(found, target) / variance}
            if self.perceptual is not None:
                terms["perceptual"] = self.perceptual(target, found).mean()
            if recon.predictions and (features or self.weights["semantic"]):
                terms["semantic"] = self._semantic(recon, features)
            terms |= {name: term.float() for name, term in recon.terms.items()}

            active = discriminator is not None and self.gan_active(progress)
            if active:
                with _frozen(discriminator) as judge:
                    terms["gan"] = -judge(found).mean()
            total = sum(self.weights[name] * term for name, term in terms.items())

        logs = {name: term.detach() for name, term in terms.items()}
        # Per picture, then averaged: the same however a batch is spread over ranks and micro-batches.
        logs["psnr"] = -10.0 * torch.log10((found.detach() - target).square().mean(dim=(1, 2, 3))).mean()
        if discriminator is not None:
            logs.setdefault("gan", torch.zeros_like(total))
            logs["gan_weight"] = torch.full_like(total, self.weights["gan"] if active else 0.0)
        logs["total"] = total.detach()
        return Loss(total, {name: value.detach() for name, value in logs.items()})

    def discriminator_loss(self, images: Tensor, recon_images: Tensor, discriminator: nn.Module,
                           progress: Progress) -> Loss:
        """Hinge loss of the discriminator on (B, 3, H, W) pictures in [-1, 1]; no gradient reaches `recon_images`.

        Before the start epoch the loss is exactly 0 with zero gradients.
        """
        with _fp32(images):
            # parity: two forwards, since a joint batch has other BatchNorm statistics.
            real = discriminator(to_unit_range(images.float()))
            fake = discriminator(to_unit_range(recon_images.detach().float()))
            hinge = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
            # parity: times 0 and not skipped, since Adam counts these steps and its first real one is smaller for it.
            total = hinge * float(self.gan_active(progress))
        logs = {"logits_real": real.mean(), "logits_fake": fake.mean(), "discriminator": total}
        return Loss(total, {name: value.detach() for name, value in logs.items()})

    def _semantic(self, recon: Recon, features: dict[str, Tensor]) -> Tensor:
        """Mean over teachers of the distance between predicted and true features."""
        losses = []
        for teacher, prediction in recon.predictions.items():
            if teacher not in features:
                raise UserError(f'the tokenizer predicts features of teacher "{teacher}", which is not configured.'
                                + nearest(teacher, features))
            prediction, target = prediction.float(), features[teacher].float()  # (B, N, D)
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
                raise UserError(f'objective: the tokenizer has a term "{name}" but weights.{name} is not set (0: ignore).')
        for name, weight in self.given.items():
            if name not in _TERMS and name not in terms:
                raise UserError(f"objective: weights.{name} names no term of this tokenizer.{nearest(name, (*_TERMS, *terms))}")
            if weight and name == "semantic" and not predicts:
                raise UserError("objective: weights.semantic is not 0 but the tokenizer predicts no teacher's features."
                                " Give it a teacher, or set weights.semantic: 0.")
            if weight and name == "gan" and not has_discriminator:
                raise UserError("objective: weights.gan is not 0 but there is no discriminator."
                                " Configure one, or set weights.gan: 0.")


def _check(setting: str, value: str, choices) -> None:
    if value not in choices:
        raise UserError(f'objective: {setting} is "{value}".{nearest(value, choices)}')


def _fp32(images: Tensor):
    return torch.autocast(images.device.type, enabled=False)


@contextlib.contextmanager
def _frozen(network: nn.Module) -> Iterator[nn.Module]:
    """`network` without DDP and with parameters that record no gradient while the block runs."""
    bare = network.module if isinstance(network, DistributedDataParallel) else network
    trained = [p for p in bare.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield bare
    finally:
        for p in trained:
            p.requires_grad_(True)
