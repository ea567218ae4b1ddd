"""Where arithmetic must not follow the caller's autocast: distances, softmax over logits, losses."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def no_autocast(like: Tensor):
    """Context in which products on the device of `like` stay in the precision of their inputs."""
    if like.is_meta:  # nothing is computed there, and torch knows no autocast for it
        return contextlib.nullcontext()
    return torch.autocast(like.device.type, enabled=False)
