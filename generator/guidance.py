"""Guidance: push a prediction away from a worse one; for velocities and for logits.

Classifier-free guidance (Ho & Salimans 2022) takes the unconditional prediction as the worse one, autoguidance (Karras
et al. 2024) that of a weaker model; both only where t lies in an interval (Kynkaanniemi et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError, nearest
from core.specs import Guidance

SCHEDULES = ("constant", "linear", "cosine")


def per_branch(value: float | Sequence[float], branches: int, name: str) -> list:
    """One setting per codebook, from one number for all or a list."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * branches
    if len(values) != branches:
        raise UserError(
            f"sample.{name} has {len(values)} numbers but the tokenizer has {branches} codebook(s): give one "
            "number, or one per codebook."
        )
    return values


def scales(guidance: Guidance, steps: int, branches: int = 1) -> Tensor:
    """(steps, branches) fp32 on the CPU: the guidance scale of every sampled token (or scale) and codebook.

    Step k knows the share t = k / steps of the sequence; outside guidance.interval the scale is 1. "linear" reaches
    `scale` at the last step. Inactive guidance gives ones, as does a codebook whose constant scale is not above
    guidance.floor.
    """
    if guidance.schedule not in SCHEDULES:
        raise UserError(f'guidance schedule "{guidance.schedule}" is not known.{nearest(guidance.schedule, SCHEDULES)}')
    by_branch = per_branch(guidance.scale, branches, "scale")
    if not guidance.active:
        return torch.ones(steps, branches, device="cpu")
    full = torch.tensor(by_branch, dtype=torch.float32, device="cpu")[None]  # (1, K)
    t = torch.arange(steps, device="cpu")[:, None] / steps  # (steps, 1)
    if guidance.schedule == "linear":
        table = guidance.start + (full - guidance.start) * torch.linspace(0, 1, steps, device="cpu")[:, None]
    elif guidance.schedule == "cosine":
        # parity: this order of operations, k / N in double precision before the power, is RAR's bit for bit
        ramp = torch.stack(
            [(1 - torch.cos((k / steps) ** torch.tensor(guidance.power) * math.pi)) * 0.5 for k in range(steps)]
        )[:, None]
        table = ramp * (full - 1) + 1
    else:
        table = torch.where(full > guidance.floor, full, 1.0).expand(steps, -1)
    return torch.where(in_interval(t, guidance), table, 1.0).contiguous()


def guide_logits(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """unconditional + scale (conditional - unconditional), fp32; `scale` broadcasts against (B, V)."""
    conditional, unconditional = conditional.float(), unconditional.float()
    return torch.addcmul(unconditional, scale, conditional - unconditional)


def in_interval(t: Tensor, guidance: Guidance) -> Tensor:
    """Whether each time is guided; both ends are included."""
    low, high = guidance.interval
    return (t >= low) & (t <= high)


def is_guided(t: float, guidance: Guidance) -> bool:
    """The same of one number, in fp32 like a tensor's."""
    low, high = np.float32(guidance.interval)
    return bool(low <= np.float32(t) <= high)


def guide(velocity: Tensor, worse: Tensor, t: Tensor | None, guidance: Guidance) -> Tensor:
    """worse + scale (velocity - worse) for samples whose t (B,) lies in the interval (None: for all), else velocity. fp32."""
    velocity, worse = velocity.float(), worse.float()
    guided = worse + guidance.scale * (velocity - worse)  # (B, C, h, w)
    if t is None:
        return guided
    return torch.where(in_interval(t, guidance).view(-1, *[1] * (velocity.ndim - 1)), guided, velocity)
