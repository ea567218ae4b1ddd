"""Data parallelism, compilation and activation checkpointing, applied to a finished model from outside.

A network's repeated blocks are the elements of its nn.ModuleLists; nothing in a model knows that it is compiled,
checkpointed or replicated, and parameter names stay what they are.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.dist import World


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks: outermost elements of nn.ModuleLists."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(child)
            else:
                visit(child)

    visit(network)
    return found


def checkpoint_activations(network: nn.Module) -> None:
    """Recompute every block in backward instead of keeping its activations."""
    for block in blocks_of(network):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Compile block by block: one short compilation serves all blocks of a kind."""
    for block in blocks_of(network) or [network]:
        block.compile(backend=backend)


def replicate(network: nn.Module, world: World) -> nn.Module:
    """DDP around `network` when there are several ranks. Buffers are not broadcast: nothing here trains buffers."""
    if world.size == 1 or not any(p.requires_grad for p in network.parameters()):
        return network
    ddp = nn.parallel.DistributedDataParallel
    devices = [world.device.index] if world.device.type == "cuda" else None
    # torch 2.15 renamed the switch.
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(ddp).parameters else "broadcast_buffers"
    return ddp(network, device_ids=devices, gradient_as_bucket_view=True, **{no_sync: False})


def set_determinism(on: bool) -> None:
    """Bit-equal reruns on a GPU: deterministic kernels and fixed cuBLAS workspaces."""
    if on:
        import os

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
