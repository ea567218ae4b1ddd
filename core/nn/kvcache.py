"""Keys and values of earlier positions, for step-by-step sampling.

    cache = KVCache(layers=24, batch=2 * B, heads=16, length=256, head_dim=64, device=device, dtype=torch.bfloat16)
    for t in range(256):
        cache.seek(t)
        layers = cache.open(1)                    # one new position
        for block, layer in zip(blocks, layers):
            x = block(x, cache=layer)

Memory is allocated once, for the length that is needed, and belongs to a call of `sample`, never to a module: it is in
no state dict. There are two ways to attend:

- a slice of what is filled (default): shapes grow from step to step, nothing is masked;
- `static=True`: writes go to a position that lies on the device and attention sees the first `span` places under a
  mask, so every step runs the same kernels on the same addresses and can be captured as a CUDA graph. Raising `span` in
  a few strides keeps most steps from reading the whole length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.nn.rope import Rope


class LayerCache:
    """One layer of a KVCache, handed to its attention."""

    def __init__(self, cache: "KVCache", index: int):
        self.cache, self.index = cache, index

    @property
    def mask(self) -> Tensor | None:
        return self.cache.mask

    @property
    def causal(self) -> bool:
        return self.cache.causal

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, heads, n, d) of the new positions; returns keys and values of all positions to attend to."""
        return self.cache.update(self.index, k, v)


class KVCache:
    """
    Args:
        layers, batch, heads, length, head_dim: `heads` of keys and values, `length` in positions; with guidance `batch`
            is twice the number of samples.
        static: see above.
    """

    def __init__(self, layers: int, batch: int, heads: int, length: int, head_dim: int, *,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, static: bool = False):
        shape = (layers, batch, heads, length, head_dim)
        # Zeros, since a masked place still takes part in the sum, with weight 0, and 0 * NaN is NaN.
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length, self.static, self.span = length, static, length
        self.start = 0  # place of the first new position
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # the same, on the device
        self.count = 1  # new positions of this step
        self.mask: Tensor | None = None
        self.causal = False
        self.layers = [LayerCache(self, index) for index in range(layers)]

    def seek(self, start: int) -> None:
        """The next step begins at this place; what lies behind it is forgotten. seek(0) reuses the cache."""
        self.start = start
        self.position.fill_(start)

    def open(self, count: int, causal: bool = True) -> list[LayerCache]:
        """Begin a step of `count` new positions, which see each other in order (`causal`) or all (VAR's scales)."""
        if self.start + count > self.length:
            raise ValueError(f"positions {self.start}..{self.start + count - 1} in a cache of length {self.length}")
        self.count, self.mask, self.causal = count, None, False
        device = self.position.device
        if self.static:
            seen = self.position + torch.arange(count, device=device)[:, None] if causal else self.position + count - 1
            self.mask = torch.arange(self.span, device=device)[None] <= seen  # (count or 1, span)
        elif causal and count > 1:
            self.causal = self.start == 0
            if not self.causal:
                self.mask = torch.ones(count, self.start + count, dtype=torch.bool, device=device).tril(self.start)
        return self.layers

    def places(self) -> Tensor:
        """(count,) int64 on the device: where the new positions lie."""
        return self.position + torch.arange(self.count, device=self.position.device)

    def rope(self, table: Rope) -> Rope:
        """The rows of a rotary table (length, d) for the new positions."""
        if self.static:
            return table[0].index_select(0, self.places()), table[1].index_select(0, self.places())
        stop = self.start + self.count
        return table[0][self.start : stop], table[1][self.start : stop]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        if self.static:
            keys.index_copy_(2, self.places(), k.to(keys.dtype))
            values.index_copy_(2, self.places(), v.to(values.dtype))
            return keys[:, :, : self.span], values[:, :, : self.span]
        stop = self.start + self.count
        keys[:, :, self.start : stop], values[:, :, self.start : stop] = k, v
        return keys[:, :, :stop], values[:, :, :stop]


def activation_dtype(weight: Tensor) -> torch.dtype:
    """What a matrix product with this weight gives: autocast's type inside autocast, else the weight's."""
    kind = weight.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype
