"""One process or many: the few collective operations that the harness needs. Runs unchanged on one CPU.

torchrun and accelerate set RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous address; without them there is one rank.
CPU tensors travel over gloo and CUDA tensors over NCCL, so a flag can be agreed upon without touching the GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """Average over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def stop(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def rank_from_environment() -> int:
    return int(os.environ.get("RANK", 0))


def pick_device(wanted: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> a device; UserError where CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("train.device=cuda, but torch sees no CUDA device here (torch "
                        f"{torch.__version__}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}). "
                        "Use train.device=cpu, or check the driver with nvidia-smi.")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def cpu_multiplies_bf16() -> bool:
    """Whether this processor has bf16 matrix products in hardware; elsewhere bf16 on the CPU is slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def start(device: str = "auto", timeout_minutes: float = 15.0) -> World:
    """Join the other ranks, if any."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    return World(rank_from_environment(), size, local_rank, chosen)


class AgreedFlag:
    """A small integer on which all ranks agree one step later, without waiting for a GPU.

    Every rank posts its value each step (asynchronously, over gloo) and reads the largest value posted by any rank
    in the step before. All ranks therefore act on a signal at the same step.
    """

    def __init__(self, world: World):
        self.world = world
        self.value = torch.zeros(1, dtype=torch.int64)
        self.work = None

    def exchange(self, mine: int) -> int:
        if self.world.size == 1:
            return mine
        agreed = 0
        if self.work is not None:
            self.work.wait()
            agreed = int(self.value)
        self.value = torch.tensor([mine], dtype=torch.int64)
        self.work = dist.all_reduce(self.value, op=dist.ReduceOp.MAX, async_op=True)
        return agreed

    def drain(self) -> None:
        """Finish the exchange in flight, before the group is torn down."""
        if self.work is not None:
            self.work.wait()
            self.work = None
