"""One process or many: the few collective operations that the harness needs. Runs unchanged on one CPU.

torchrun and accelerate set RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous address; without them there is one rank.
CPU tensors travel over gloo and CUDA tensors over NCCL, so a flag can be agreed upon without touching the GPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Callable, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import UserError

T = TypeVar("T")


class OtherRankFailed(UserError):
    """This rank is well; another one has said what is wrong."""


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

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Average over ranks, in place."""
        return self.sum(values).div_(self.size) if self.size > 1 else values

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in rank order, (N, ...) from (n, ...) each; n may differ."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = rows.shape[0]
        counts = self.sum(counts).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; if it fails on one, all of them raise, so that none waits for the dead."""
        if self.size == 1:
            return work()
        result = error = None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        failed = torch.tensor([self.rank if error else -1])
        try:
            if not isinstance(error, (KeyboardInterrupt, SystemExit)):
                dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        finally:  # the others may be at work for longer than a collective waits: our own reason is what counts
            if error:
                raise error
        if failed >= 0:
            raise OtherRankFailed(f"rank {int(failed)} failed; its message says why.")
        return result

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main rank, on every rank; if it fails there, all of them raise."""
        result = self.together(lambda: work() if self.is_main else None)
        if self.size == 1:
            return result
        holder = [result]
        dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        return holder[0]

    def to_main(self, value: T | None) -> T | None:
        """What the one rank holds that has something other than None, on the main rank; None elsewhere."""
        if self.size == 1:
            return value
        gathered = [None] * self.size if self.is_main else None
        dist.gather_object(value, gathered, dst=0)
        return next((v for v in gathered if v is not None), None) if self.is_main else None

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


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def group_rank() -> int:
    """This process among those that collectives reach."""
    return dist.get_rank() if _several_ranks() else 0


def group_size() -> int:
    """How many processes collectives reach."""
    return dist.get_world_size() if _several_ranks() else 1


class _SumOverRanks(torch.autograd.Function):
    """All-reduce in both directions: every rank's loss depends on every rank's contribution."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of every rank's `x`, with gradients between ranks; `x` itself where there is one rank."""
    return _SumOverRanks.apply(x) if _several_ranks() else x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of every rank's `x`, with gradients between ranks."""
    return sum_over_ranks(x) / dist.get_world_size() if _several_ranks() else x


def gather_over_ranks(x: Tensor) -> Tensor:
    """(B, ...) of every rank, one after the other, (ranks * B, ...), with gradients between ranks.

    Every rank fills its own rows of one table, so that one sum does.
    """
    if not _several_ranks():
        return x
    before, after = dist.get_rank() * len(x), (dist.get_world_size() - 1 - dist.get_rank()) * len(x)
    rows = [x.new_zeros(before, *x.shape[1:]), x, x.new_zeros(after, *x.shape[1:])]
    return sum_over_ranks(torch.cat(rows))


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
