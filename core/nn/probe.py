"""The classifier of linear probing: how much of the class can be read off frozen features by a linear layer."""

from __future__ import annotations

from torch import Tensor, nn


class LinearProbe(nn.Module):
    """Mean over tokens, BatchNorm without affine parameters, one linear layer.

    Args:
        width: of a feature.
        num_classes: how many logits.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """(B, N, width) -> logits (B, num_classes)."""
        return self.linear(self.bn(features.float().mean(1)))
