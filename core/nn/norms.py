"""RMSNorm and the adaptive-norm modulation, shared by every transformer here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; fp32 inside, result in the input's dtype.

    Args:
        width: size of the last dimension.
        eps: None means the machine epsilon of fp32, as in torch.nn.RMSNorm.
    """

    def __init__(self, width: int, eps: float | None = 1e-6):
        super().__init__()
        self.eps = torch.finfo(torch.float32).eps if eps is None else eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive norm of DiT (Peebles & Xie 2022): shift and scale broadcast over tokens or are given per token."""
    return x * (1 + scale) + shift
