"""What a configuration costs, before anything runs: parameters, tokens, FLOPs and memory, on the meta device.

FLOPs are counted by torch's own counter over one forward pass (2 per multiply-add); a training step is taken as three
forwards. Activation memory is the size of what autograd would keep for backward, in the dtypes of the pass measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Cost:
    """Of one network."""

    name: str
    parameters: int
    trainable: int
    forward_flops: float  # per image
    activation_bytes: float  # per image, fp32

    def training_bytes(self, micro_batch: int, num_ema: int, half: bool) -> float:
        """Weights, gradients, two Adam moments and EMAs in fp32, plus activations (halved under bf16)."""
        fixed = 4 * self.parameters + 4 * self.trainable * (3 + num_ema)
        return fixed + self.activation_bytes * micro_batch * (0.5 if half else 1.0)


def measure(name: str, network: nn.Module, forward: Callable[[nn.Module], object], images: int = 1) -> Cost:
    """Cost of `forward(network)` over `images` images. The network may live on the meta device."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = forward(network)  # keeps the graph, and with it the storages counted above, alive until here
    del result
    parameters = sum(p.numel() for p in network.parameters())
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Cost(name, parameters, trainable, counter.get_total_flops() / images, sum(kept.values()) / images)


def number(value: float) -> str:
    """1.23 T, 45.6 M ..."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"
