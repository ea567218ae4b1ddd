"""Which weights of a tokenizer encoding reads: two with the same ones make the same latents, whatever their decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.rng import Draws
from core.specs import Tokenizer
from core.weights import hub


class _Reads(TorchDispatchMode):
    """Collects where the memory of every tensor lies that an operation is given."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.places.add(value.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def weights_read(network: nn.Module, compute: Callable[[], Any]) -> dict[str, Tensor]:
    """The parameters and stored buffers of `network`, by name, that `compute` reads, itself or through a view; not those of
    copies."""
    with _Reads() as reads:
        compute()
    return {n: t for n, t in network.state_dict().items() if t.untyped_storage().data_ptr() in reads.places}


def fingerprint_of(tokenizer: Tokenizer, compute: Callable[[Tensor], Any]) -> str:
    """Of the weights that `compute` reads of the tokenizer, asked with one picture (1, 3, H, W) in [-1, 1]."""
    device = next(tokenizer.parameters()).device
    image = torch.zeros(1, 3, tokenizer.image_size, tokenizer.image_size, device=device)
    return hub.fingerprint(weights_read(tokenizer, lambda: compute(image)))


def encoding_fingerprint(tokenizer: Tokenizer) -> str:
    """Of the weights that encoding reads: the same where only the decoder was trained on."""
    draws = Draws(0, torch.zeros(1, dtype=torch.int64, device=next(tokenizer.parameters()).device))
    return fingerprint_of(tokenizer, lambda image: tokenizer.encode(image, draws))
