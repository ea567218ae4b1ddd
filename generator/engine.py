"""What all samplers of codes share: weights in the precision of the products, and state that outlives a call.

Under autocast every product casts its weights anew. That costs little when thousands of tokens share them and more than
the product itself when a step has one token per sample. So sampling works on copies of the modules whose matrices were
cast once (`Weights`), outside of autocast, and keeps them with its caches and CUDA graphs from call to call (`Sampled`).
In full precision nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.nn.cuda_graph import Kept, addresses
from core.nn.decode_attention import decode_attention, fuses
from core.nn.kvcache import LayerCache, activation_dtype
from core.nn.linear import Linear
from core.nn.mlp import SwiGLU
from core.nn.norms import RMSNorm
from core.specs import Generator, LatentSpec


class _Linear(Linear):
    """Takes its input as autocast would: in the type of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class _Conv2d(nn.Conv2d):
    """The same of a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x.to(self.weight.dtype), self.weight, self.bias)


CASTING: dict[type, type] = {nn.Linear: _Linear, Linear: _Linear, nn.Conv2d: _Conv2d}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Weights:
    """Modules of `model` with their matrices in `dtype`.

    Args:
        model: whose parameters are followed by `refresh`.
        dtype: of the products.
        kinds: modules whose parameters are cast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, kinds: tuple[type, ...]):
        self.dtype, self.kinds = dtype, kinds
        self._followed = list(model.parameters())
        self._storages = [p.untyped_storage() for p in self._followed]  # kept, so that no other gets their address
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}  # by the identity of what was cast
        self._copies: dict[int, tuple[nn.Module, nn.Module]] = {}
        self._derived: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {}
        self._versions = self._now()

    def _now(self) -> list[int]:
        return [_version(p) for p in self._followed]

    def cast(self, weight: Tensor) -> Tensor:
        """`weight` in `dtype`; itself where it has it already."""
        if weight.dtype == self.dtype:
            return weight
        if id(weight) not in self._casts:
            self._casts[id(weight)] = weight, weight.detach().to(self.dtype)
        return self._casts[id(weight)][1]

    def derive(self, name: str, function: Callable[[], Tensor]) -> Tensor:
        """function(), computed once, and again in the same place when weights have changed. It is kept as long as this: it must
        hold nothing of one batch."""
        if name not in self._derived:
            self._derived[name] = function(), function
        return self._derived[name][0]

    def copy(self, module: nn.Module) -> nn.Module:
        """A copy that shares all parameters with `module` but those that are cast, without what wraps its forward."""
        if id(module) not in self._copies:
            self._copies[id(module)] = module, self._copy(module)
        return self._copies[id(module)][1]

    def _copy(self, module: nn.Module) -> nn.Module:
        kind = CASTING.get(type(module), type(module))
        copied = kind.__new__(kind)
        copied.__dict__.update(module.__dict__)
        copied.__dict__.pop("forward", None)
        copied.__dict__["_compiled_call_impl"] = None
        copied.__dict__["_modules"] = {name: child and self.copy(child) for name, child in module._modules.items()}
        if isinstance(module, self.kinds):
            copied.__dict__["_parameters"] = {
                name: p if p is None else self.cast(p) for name, p in module._parameters.items()
            }
        if isinstance(module, SwiGLU) and module.is_padded(module.w12.weight.device):
            self._pad(module, copied)
        return copied

    def _pad(self, module: SwiGLU, copied: Any) -> None:
        """Give the copy the padded weights that the original makes for every call."""
        parts, dtype = zip(("w12", "w12", "w3"), ("weight", "bias", "weight"), range(3)), self.dtype
        for layer, name, index in parts:
            if getattr(module, layer)._parameters[name] is not None:
                padded = self.derive(
                    f"{layer}.{name} of {id(module)}", lambda index=index: module.padded(dtype)[index].detach()
                )
                copied._modules[layer]._parameters[name] = padded
        copied.hidden = copied.w3.weight.shape[1]

    def refresh(self) -> None:
        """Follow parameters that were changed in place: by an optimiser, by loading."""
        now = self._now()
        if now != self._versions:
            for weight, cast in self._casts.values():
                cast.copy_(weight)
            for derived, function in self._derived.values():
                derived.copy_(function())
            self._versions = now


class Sampled(Generator):
    """A generator that keeps what sampling needs from call to call, until it is trained or its weights are replaced.

    Attributes:
        cast: kinds of modules that take and give the precision of the products.
        compiled: whether torch.compile shall take part where a step is large.
    """

    compiled = False
    cast: tuple[type, ...] = (nn.Linear, RMSNorm)

    def __init__(self):
        super().__init__()
        self._weights, self._state = Kept(), Kept()

    def train(self, mode: bool = True):
        if mode:  # gives the memory back
            self._weights.clear(), self._state.clear()
        return super().train(mode)

    def weights(self, like: Tensor) -> Weights:
        """In the precision that a product with the parameter `like` has here."""
        dtype = activation_dtype(like)

        def make() -> Weights:
            self._state.clear()  # it reads the weights of before
            return Weights(self, dtype, self.cast)

        weights = self._weights.get((dtype, self.compiled, addresses(self)), make)
        weights.refresh()
        return weights

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), or what it gave when it was last called with this key and the present `weights`."""
        return self._state.get(key, make)


def mismatches(generator: nn.Module, spec: LatentSpec, *names: str) -> list[str]:
    """A sentence for each of these sizes of the latents that the generator has not."""
    sizes = spec.sizes()
    ours = {name: getattr(generator, name) for name in names}
    ours = {name: list(value) if isinstance(value, tuple) else value for name, value in ours.items()}
    return [
        f"generator.{name} is {ours[name]}, the tokenizer has {sizes[name]}"
        for name in names
        if ours[name] != sizes[name]
    ]


# -- a step in few kernels: one position, rows (R, D) of samples and their unguided twins ----------------------------------
def add_product(x: Tensor, h: Tensor, linear: nn.Linear) -> Tensor:
    """x + linear(h), in one kernel where there is no bias."""
    return torch.addmm(x, h, linear.weight.t()) if linear.bias is None and x.dtype == h.dtype else x + linear(h)


def gelu_product(x: Tensor, linear: nn.Linear) -> Tensor:
    """gelu(linear(x)) by its tanh, in the type of the weights; on a GPU of NVIDIA the product's own kernel ends with it."""
    if x.device.type != "cuda" or torch.version.hip:
        return F.gelu(linear(x), approximate="tanh")
    rows, weight = x.flatten(0, -2), linear.weight.t()
    return torch.ops.aten._addmm_activation(linear.bias, rows, weight, use_gelu=True).unflatten(0, x.shape[:-1])


def turning(cos: Tensor, sin: Tensor) -> Tensor:
    """A rotary table as `turn` wants it, (length, 2, d): the signs of the swapped pairs go with the sines."""
    return torch.stack((cos, torch.stack((-sin[:, ::2], sin[:, 1::2]), -1).flatten(1)), dim=1)


def turn(x: Tensor, row: Tensor) -> None:
    """Rotate the channel pairs of x (R, heads, d) in place; `row` (2, d) of `turning`. As core.nn.rope.apply_rope."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    torch.addcmul(swapped * row[1], x, row[0], out=x)


def attend(
    heads: Tensor,
    layer: LayerCache,
    scale: float | None = None,
    affine: Tensor | None = None,
    eps: float = 0.0,
    row: Tensor | None = None,
) -> Tensor:
    """Store one new position and attend from it: (R, heads + 2 kv_heads, d) queries, keys, values -> (R, heads d).

    Args:
        affine, eps, row: as in core.nn.decode_attention; `heads` is written over.
    """
    cache = layer.cache
    if fuses(heads.device):
        memory = cache.memory[layer.index, :, :, : cache.seen]
        return decode_attention(heads, memory, cache.position, scale, affine, eps, row)
    turned = heads[:, : -cache.heads]  # queries and keys
    if affine is not None:
        # One norm of queries, keys and values, which is not used for the values: it saves two kernels.
        normed = F.layer_norm(heads, heads.shape[-1:], eps=eps)[:, : -cache.heads]
        torch.addcmul(affine[1], normed, affine[0], out=turned)
    if row is not None:
        turn(turned, row)
    k, v = layer.update(heads[:, -2 * cache.heads :, None])  # (R, kv_heads, span, d)
    q = heads[:, : -2 * cache.heads].unflatten(1, (cache.heads, -1))  # the queries of a group become positions
    return fused_attention(q, k, v, cache.mask, scale).flatten(1)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention over (R, heads, n, d); `mask` (n or 1, m) additive. On a GPU by name: the general entry lays masks out
    anew for every layer."""
    if q.device.type != "cuda" or torch.version.hip or q.shape[-1] % 8:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    bias = None if mask is None else mask.expand(*q.shape[:3], -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, scale=scale)[0]
