"""The gated feed-forward layer of our transformers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with [a | b] = w12(x) (Shazeer 2020), biases included.

    Args:
        hidden: width of a and of b; default 2/3 of the usual 4 x width, so that parameters match a plain MLP.
    """

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)  # (..., hidden) each
        return self.w3(F.silu(gate) * value)
