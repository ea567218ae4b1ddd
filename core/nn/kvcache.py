"""Keys and values of earlier positions, for step-by-step sampling.

    cache = KVCache(layers=24, batch=2 * B, heads=16, length=256, head_dim=64, device=device, dtype=torch.bfloat16)
    for t in range(256):
        cache.seek(t)
        layers = cache.open(1)                    # one new position
        for block, layer in zip(blocks, layers):
            x = block(x, cache=layer)

Memory is allocated once, for the length that is needed, and is in no state dict. There are two ways to attend:

- a slice of what is filled (default): shapes grow from step to step, nothing is masked;
- `static=True`: writes go to a place that lies on the device and attention sees the first `span` places under a mask,
  so every step runs the same kernels on the same addresses and can be recorded as a CUDA graph. The span grows in
  BUCKETS strides, which keeps most steps from reading the whole length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.nn.rope import Rope

BUCKETS = 4  # spans of a static cache, and so recordings of a sampler
ALIGNED = 16  # fused attention reads masks in vectors: their rows begin at multiples of this


class LayerCache:
    """One layer of a KVCache, handed to its attention."""

    def __init__(self, cache: KVCache, index: int):
        self.cache, self.index = cache, index

    @property
    def mask(self) -> Tensor | None:
        return self.cache.mask

    @property
    def causal(self) -> bool:
        return self.cache.causal

    def update(self, k: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See KVCache.update."""
        return self.cache.update(self.index, k, v)


class KVCache:
    """
    Args:
        layers, batch, heads, length, head_dim: `heads` of keys and values, `length` in positions; with guidance `batch`
            is twice the number of samples.
        static: see above.
        masked: False where attention is told the position and asks for no mask, see core.nn.decode_attention.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_dim: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        static: bool = False,
        masked: bool = True,
    ):
        self.length, self.static, self.heads = length, static, heads
        self.stride = -(-length // BUCKETS)
        # Keys of all heads, then values of all heads: both are stored in one go. Zeros, since a masked place still takes
        # part in the sum, with weight 0, and 0 * NaN is NaN.
        self.memory = torch.zeros(layers, batch, 2 * heads, length, head_dim, device=device, dtype=dtype)
        self.start = 0  # place of the first new position
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # the same, on the device
        self.count = 1  # new positions of this step
        self.mask: Tensor | None = None
        self.causal = False
        shape = (length, -(-length // ALIGNED) * ALIGNED)
        masked = masked and static
        self.hidden = torch.full(shape, -torch.inf, device=device, dtype=dtype).triu(1) if masked else None
        self.depth = layers

    def seek(self, start: int) -> None:
        """The next step begins at this place; what lies behind it is forgotten. seek(0) reuses the cache."""
        self.start = start
        self.position.fill_(start)

    def span(self, stop: int) -> int:
        """How many places attention reads once `stop` are filled."""
        return min(self.length, -(-stop // self.stride) * self.stride) if self.static else stop

    def open(self, count: int = 1, causal: bool = True) -> list[LayerCache]:
        """Begin a step of `count` new positions, which see each other in order (`causal`) or all (VAR's scales)."""
        stop = self.start + count
        if stop > self.length:
            raise ValueError(f"positions {self.start}..{stop - 1} in a cache of length {self.length}")
        self.count, self.mask, self.causal, self.seen = count, None, False, self.span(stop)
        device = self.position.device
        if self.static:
            self.places = self.position if count == 1 else self.position + torch.arange(count, device=device)
        if self.hidden is not None:  # once per step, not once per layer
            rows = self.hidden.index_select(0, self.places if causal else self.places[-1:])
            self.mask = rows[:, : self.seen]  # (count or 1, span), additive
        elif causal and count > 1 and not self.static:
            self.causal = self.start == 0
            if not self.causal:
                self.mask = torch.ones(count, stop, dtype=torch.bool, device=device).tril(self.start)
        return [LayerCache(self, index) for index in range(self.depth)]  # kept, they would keep this cache

    def rope(self, table: Rope) -> Rope:
        """The rows of a rotary table (length, d) for the new positions."""
        if self.static:
            return table[0].index_select(0, self.places), table[1].index_select(0, self.places)
        stop = self.start + self.count
        return table[0][self.start : stop], table[1][self.start : stop]

    def update(self, layer: int, k: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Store (B, heads, n, d) of the new positions; returns keys and values of all positions to attend to.

        Args:
            v: None where `k` (B, 2 heads, n, d) holds the values behind the keys.
        """
        whole, half = slice(None), (slice(self.heads), slice(self.heads, None))
        for heads, new in ((whole, k),) if v is None else ((half[0], k), (half[1], v)):
            place = self.memory[layer, :, heads]
            if self.static:
                place.index_copy_(2, self.places, new.to(place.dtype))
            else:
                place[:, :, self.start : self.start + self.count] = new
        memory = self.memory[layer]
        return memory[:, : self.heads, : self.seen], memory[:, self.heads :, : self.seen]


def activation_dtype(weight: Tensor) -> torch.dtype:
    """What a matrix product with this weight gives: autocast's type inside autocast, else the weight's."""
    kind = weight.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype
