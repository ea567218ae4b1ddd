"""Which weights of a network a computation reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
def parameters_read(network: nn.Module, compute: Callable[[], Any]) -> dict[str, Tensor]:
    """The parameters of `network`, by name, that `compute` reads, itself or through a view; not those of copies."""
    with _Reads() as reads:
        compute()
    return {n: p for n, p in network.named_parameters() if p.untyped_storage().data_ptr() in reads.places}
