"""Guidance: push a prediction away from a worse one.

Classifier-free guidance (Ho & Salimans 2022) takes the unconditional prediction as the worse one, autoguidance (Karras
et al. 2024) that of a weaker model; both only where t lies in an interval (Kynkaanniemi et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.specs import Guidance


def in_interval(t: Tensor, guidance: Guidance) -> Tensor:
    """Whether each time is guided; both ends are included."""
    low, high = guidance.interval
    return (t >= low) & (t <= high)


def guide(velocity: Tensor, worse: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
    """worse + scale (velocity - worse) for samples whose t (B,) lies in the interval, else velocity. In fp32."""
    velocity, worse = velocity.float(), worse.float()
    guided = worse + guidance.scale * (velocity - worse)  # (B, C, h, w)
    return torch.where(in_interval(t, guidance).view(-1, *[1] * (velocity.ndim - 1)), guided, velocity)
