"""Low-rank adaptation of linear layers (Hu et al. 2022): a frozen weight W plus a trained B A of small rank.

    adapt(trunk, ["mlp.fc1", "mlp.fc2"], rank=8, alpha=8)

B starts at zero, so an adapted network computes what it did before.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from core.nn.linear import Linear


class LoRALinear(Linear):
    """y = x W^T + bias + (alpha / rank) x A^T B^T, with W and bias frozen."""

    scaling: Tensor

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        # saved with the weights, so that whoever merges the adapter knows it
        self.register_buffer("scaling", torch.tensor(alpha / rank, device="cpu"))
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


class TunedLayerNorm(nn.LayerNorm):
    """A LayerNorm trained in full beside adapters; keeps what it started from, for files that want both."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__(list(norm.normalized_shape), eps=norm.eps)
        with torch.no_grad():
            self.weight.copy_(norm.weight)
            self.bias.copy_(norm.bias)
        self.register_buffer("original_weight", norm.weight.detach().clone())
        self.register_buffer("original_bias", norm.bias.detach().clone())


def adapt(network: nn.Module, endings: tuple[str, ...], rank: int, alpha: float) -> None:
    """Put adapters on every linear layer whose name ends so; everything else of `network` keeps its state."""
    if rank < 1:
        raise UserError(
            f"lora_rank is {rank}: an adapter needs a rank of at least 1. To train no adapter, "
            "set the tuning method to frozen."
        )
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(endings):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, LoRALinear(module, rank, alpha))
