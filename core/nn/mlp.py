"""The feed-forward layers of our transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError, nearest
from core.nn.dropout import dropout
from core.nn.linear import Linear

ALIGNMENT = 64  # matrix sizes that tensor cores like
PADDED_DEVICES = {"cuda"}  # where padding pays; a CPU gains nothing from it


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with [a | b] = w12(x) (Shazeer 2020).

    An odd hidden width (5461 for width 2048) would keep every matrix product here off the tensor cores. The weights are
    therefore padded with zeros, each half of w12 for itself, when they are used: the padded channels are silu(0) * 0 = 0,
    so results and gradients are the same. The parameters keep the published shapes, in training too: nothing has to be
    stripped from checkpoints, averages or optimiser states, and no padding can drift from zero. The copy is small against
    the products of thousands of tokens, and autocast casts the same weights anyway.

    Args:
        hidden: width of a and of b; default 2/3 of the usual 4 x width, so that parameters match a plain MLP.
    """

    def __init__(self, width: int, hidden: int | None = None, bias: bool = True):
        super().__init__()
        self.hidden = hidden or int(2 / 3 * 4 * width)
        self.w12 = Linear(width, 2 * self.hidden, bias=bias)
        self.w3 = Linear(self.hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_padded(x.device):
            kind = x.device.type
            half = torch.is_autocast_enabled(kind)
            w12, b12, w3 = self.padded(torch.get_autocast_dtype(kind) if half else self.w12.weight.dtype)
            gate, value = F.linear(x, w12, b12).chunk(2, dim=-1)  # (..., padded hidden) each
            return F.linear(F.silu(gate) * value, w3, self.w3.bias)
        gate, value = self.w12(x).chunk(2, dim=-1)  # (..., hidden) each
        return self.w3(F.silu(gate) * value)

    def is_padded(self, device: torch.device) -> bool:
        return self.hidden % 8 != 0 and device.type in PADDED_DEVICES

    def padded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        """Weight and bias of w12 and weight of w3 in `dtype`, with zeros up to a multiple of ALIGNMENT."""
        extra = -self.hidden % ALIGNMENT
        weight, bias, w3 = self.w12.weight, self.w12.bias, self.w3.weight
        weight = F.pad(weight.to(dtype).unflatten(0, (2, self.hidden)), (0, 0, 0, extra)).flatten(0, 1)
        if bias is not None:
            bias = F.pad(bias.to(dtype).unflatten(0, (2, self.hidden)), (0, extra)).flatten()
        return weight, bias, F.pad(w3.to(dtype), (0, extra))


ACTIVATIONS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU()}


class MLP(nn.Module):
    """fc2(activation(fc1(x))), biases included.

    Args:
        activation: "gelu" (exact), "gelu_tanh" or "silu".
        dropout: after the activation and after fc2, in training (core.nn.dropout).
    """

    def __init__(self, width: int, hidden: int, activation: str = "gelu", dropout: float = 0.0):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f'activation "{activation}" is not known.{nearest(activation, ACTIVATIONS)}')
        self.dropout = dropout
        self.fc1 = Linear(width, hidden)
        self.act = ACTIVATIONS[activation]
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        hidden = dropout(self.act(self.fc1(x)), self.dropout, keys, salt=8)
        return dropout(self.fc2(hidden), self.dropout, keys, salt=9)
