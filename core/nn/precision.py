"""Precision of products: bfloat16 for networks where a config says so, never for distances, softmax over logits, losses."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def bf16_products(device: torch.device, enabled: bool):
    """Context in which matrix products on `device` happen in bfloat16, if `enabled`."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def no_autocast(like: Tensor):
    """Context in which products on the device of `like` stay in the precision of their inputs."""
    if like.is_meta:  # nothing is computed there, and torch knows no autocast for it
        return contextlib.nullcontext()
    return torch.autocast(like.device.type, enabled=False)
