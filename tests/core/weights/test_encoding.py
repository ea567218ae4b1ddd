"""core/weights/encoding.py: which weights a computation reads."""

from __future__ import annotations

import torch
from torch import nn

from core.weights.encoding import weights_read


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.whole, self.part, self.unread = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))
        self.register_buffer("codebook", torch.ones(4))
        self.register_buffer("counts", torch.ones(4))
        self.register_buffer("table", torch.ones(4), persistent=False)

    def forward(self) -> torch.Tensor:
        return (self.whole @ self.part[:, 1:].half().float()).sum() + (self.codebook + self.table).sum()


def test_weights_that_are_read():
    """Also through a view and a cast; a table that is computed from settings is no weight."""
    network = Network()
    assert weights_read(network, network).keys() == {"whole", "part", "codebook"}
