"""Data parallelism (DDP, FSDP2), compilation and activation checkpointing, applied to a finished model from outside.

A network's repeated blocks are the elements of its nn.ModuleLists; nothing in a model knows that it is compiled,
checkpointed or replicated, and parameter names stay what they are.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from core.dist import World


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks: outermost elements of nn.ModuleLists, single layers left out."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(block for block in child if any(block.children()))
            else:
                visit(child)

    visit(network)
    return blocks


def accumulation(per_rank: int, largest: int) -> int:
    """Into how many equal micro-batches a rank cuts its `per_rank` pictures so that none exceeds `largest` (0: one).

    Equal parts weigh the same in the mean of their gradients. So one value, chosen for the memory of a GPU, suits any
    number of GPUs: of 1024 pictures in parts of at most 64, one rank makes 16 parts of 64 and each of eight makes 2.
    """
    return next(
        parts
        for parts in range(1, per_rank + 1)
        if per_rank % parts == 0 and (not largest or per_rank // parts <= largest)
    )


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The block's own forward, computed again in backward. It draws nothing from a generator whose state would count."""
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def checkpoint_activations(network: nn.Module) -> None:
    """Recompute every block in backward instead of keeping its activations. Blocks must change no buffer.

    A method and not a functools.partial, which the compiler would not look into: it would leave the block uncompiled.
    """
    for block in blocks_of(network):
        block.forward = types.MethodType(_recomputed, block)


def compiled_parts(network: nn.Module) -> list[nn.Module]:
    """What is compiled, each for itself: repeated blocks, and networks that say `compiled_whole`; without any, all.

    Blocks are the elements of nn.ModuleLists, and those of an nn.Sequential that holds several of a class.
    """
    parts: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if getattr(child, "compiled_whole", False):
                parts.append(child)
                continue
            blocks: list[nn.Module] = []
            if isinstance(child, (nn.ModuleList, nn.Sequential)):
                blocks = [block for block in child if any(block.children())]
            if isinstance(child, nn.Sequential):  # it may be one of different things
                kinds = [type(block) for block in blocks if type(block) is not nn.Sequential]
                blocks = [block for block in blocks if kinds.count(type(block)) > 1]
            parts.extend(blocks)
            if not blocks:
                visit(child)

    visit(network)
    return parts or [network]


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Compile part by part: one short compilation serves all blocks of a kind.

    They share one cache: a variant per width, training or not, and batch size (fixed, then any). Autoguidance alone needs
    more than torch's limit of 8, beyond which it would run the rest uncompiled.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for part in compiled_parts(network):
        part.compile(backend=backend)


def replicate(network: nn.Module, world: World) -> nn.Module:
    """DDP around `network` when there are several ranks. Buffers are not broadcast: nothing here trains buffers."""
    if world.size == 1 or not any(p.requires_grad for p in network.parameters()):
        return network
    ddp = nn.parallel.DistributedDataParallel
    devices = [world.device.index] if world.device.type == "cuda" else None
    # torch 2.15 renamed the switch.
    no_sync = (
        "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(ddp).parameters else "broadcast_buffers"
    )
    options: dict[str, Any] = {no_sync: False}
    return ddp(network, device_ids=devices, gradient_as_bucket_view=True, **options)


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2: every rank keeps a part of each parameter, its gradient, moments and averages
# ---------------------------------------------------------------------------------------------------------------------
def shard(network: nn.Module, world: World) -> None:
    """Replace the parameters of `network` by their shards (DTensors), block by block; in place.

    The whole weights of one block exist only while it computes. `whole` and `place` translate between whole tensors
    and shards.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks_of(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks; every rank must call it. Ordinary tensors are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place(value: Tensor, like: Tensor) -> Tensor:
    """`value`, whole and equal on all ranks, as `like` is: this rank's part of it where `like` is sharded."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def unsynced(networks: list[nn.Module]) -> Iterator[None]:
    """Inside, backward adds to the gradients of this rank alone: for all micro-batches but the last."""
    with contextlib.ExitStack() as stack:
        for network in networks:
            if isinstance(network, nn.parallel.DistributedDataParallel):
                stack.enter_context(network.no_sync())
            elif isinstance(network, FSDPModule):
                network.set_requires_gradient_sync(False)
                stack.callback(network.set_requires_gradient_sync, True)
        yield


def skeleton(network: nn.Module, shared: list[nn.Module]) -> nn.Module:
    """A copy of `network` without weights (they are on the meta device), for `flesh_out`.

    Args:
        shared: modules that it refers to without owning them; the copy refers to the same ones.
    """
    memo: dict[int, Any] = {id(module): module for module in shared}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(network, memo)


def flesh_out(bare: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Give a skeleton these weights, without copying them. Buffers that are not in `state` stay what they are."""
    bare.load_state_dict(state, strict=False, assign=True)
    return bare.requires_grad_(False)


def set_determinism(on: bool) -> None:
    """Bit-equal reruns on a GPU: deterministic kernels and fixed cuBLAS workspaces."""
    if on:
        import os

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
