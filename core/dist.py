"""One process or many: the few collective operations that the harness needs. Runs unchanged on one CPU.

Which rank this is comes from the environment (core/launch.py).
CPU tensors travel over gloo and CUDA tensors over NCCL, so a flag can be agreed upon without touching the GPU.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from core import launch
from core.errors import UserError, first_line
from core.files import ROOT
from core.peers import OtherRankFailed, Peers
from core.signals import Stopped

T = TypeVar("T")
PACKAGES = ("torch", "torchvision", "numpy", "pillow")  # that compute, or decode pictures


SHOWN = 5  # differences between ranks that a message tells


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys with different values."""
    return [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: Any) -> None:
        """Leave the others."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, message: str) -> None:
        """Print on the main rank."""
        if self.is_main:
            print(message, flush=True)

    def barrier(self) -> None:
        """Wait for all ranks, however long they are at work."""
        if self.size > 1:
            if _peers:
                _peers.meet()
            dist.all_reduce(torch.zeros(1))  # nobody leaves, and takes the store along, before all have seen it

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, mine: bool) -> bool:
        """Whether some rank says so."""
        return bool(self.sum(torch.tensor([int(mine)])))

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
        result: Any = None
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        stopped = isinstance(error, Stopped)
        failed = torch.tensor([-1 if error is None else self.rank if stopped else self.size + self.rank])
        try:
            if not isinstance(error, (KeyboardInterrupt, SystemExit)):
                if _peers:
                    _peers.meet()  # the others may be at work for longer than a collective waits
                dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        finally:  # the others may be at work for longer than a collective waits: our own reason is what counts
            if error:
                raise error
        if failed >= self.size:
            raise OtherRankFailed(f"rank {int(failed) - self.size} failed; its message says why.")
        if failed >= 0:
            raise Stopped(f"rank {int(failed)} was asked to stop")
        return result

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main rank, on every rank; if it fails there, all of them raise."""
        if self.size == 1:
            return work()
        holder: list[Any] = [self.together(lambda: work() if self.is_main else None)]
        dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        return holder[0]

    def require_same(
        self,
        facts: dict[str, Any],
        advice: str,
        changed: Callable[[dict[str, Any], dict[str, Any]], list[str]] = changed_keys,
    ) -> None:
        """UserError that names a rank whose facts are not those of the main one, on all ranks. Collective.

        Args:
            facts: plain values.
            changed: (facts of the main rank, ours) -> names of those in which they differ.
        """
        if self.size == 1:
            return
        here = os.uname().nodename
        there, main = self.on_main(lambda: (here, facts))
        told = "; ".join(f"{k} is {facts.get(k)!r} and there {main.get(k)!r}" for k in changed(main, facts)[:SHOWN])
        problem = self.to_main(
            f"rank {self.rank} on {here} differs from rank 0 on {there}: {told}. {advice}" if told else None
        )
        if (problem := self.on_main(lambda: problem)) is not None:
            raise UserError(problem)

    def to_main(self, value: T | None) -> T | None:
        """What the one rank holds that has something other than None, on the main rank; None elsewhere."""
        if self.size == 1:
            return value
        gathered: list[Any] = [None] * self.size
        dist.gather_object(value, gathered if self.is_main else None, dst=0)
        return next((v for v in gathered if v is not None), None)


def pick_device(wanted: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> this rank's device.

    UserError where CUDA is asked for and absent, where GPUs are there but torch cannot use them ("auto" would quietly
    take hundreds of times as long), and where there are more ranks than GPUs.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise UserError(
                f"train.device=cuda, but torch sees no CUDA device here (torch {torch.__version__}, "
                f"CUDA_VISIBLE_DEVICES={'unset' if visible is None else visible}). Use train.device=cpu, or "
                "check the driver with nvidia-smi."
            )
        if visible not in ("", "-1") and (count := len([g for g in _ask_nvidia("-L") if g.startswith("GPU ")])):
            driver = (*_ask_nvidia("--query-gpu=driver_version", "--format=csv,noheader"), "unknown")[0]
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            raise UserError(
                f"nvidia-smi lists {count} GPU(s) (driver {driver}), but torch {torch.__version__}, {built}, "
                "cannot use them. Delete .venv and start again on this machine, which takes the torch for its driver (of your "
                "own environment: pytorch.org), or update the driver; "
                "to compute on the CPU all the same: CUDA_VISIBLE_DEVICES= in front of the command."
            )
        return torch.device("cpu")
    local, count = launch.ranks().local, torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"process {local} of this machine finds no GPU: torch sees {count}, and every process needs its "
            f"own. Start at most {count} (NPROC={count}), or show more GPUs in CUDA_VISIBLE_DEVICES."
        )
    return torch.device("cuda", local)


def _ask_nvidia(*words: str) -> list[str]:
    """Lines of nvidia-smi's answer; none where it is not there or fails."""
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    try:
        answer = subprocess.run([program, *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.splitlines() if answer.returncode == 0 else []


def cpu_multiplies_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices in tiles (AMX). Elsewhere bf16 is slower on a CPU than fp32: with
    avx512_bf16 alone a small FAR trains at 27 instead of 41 pictures per second."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "amx_bf16" in flags


_peers: Peers | None = None  # of this process, once it has met them
_MEETING_MINUTES = 15.0  # for which ranks wait for each other at the beginning


def peers() -> Peers | None:
    """What this process knows of the other ranks; None where there are none."""
    return _peers


def start(device: str = "auto", timeout_minutes: float = 5.0) -> World:
    """Join the other ranks, if any, for a `with` block; UserError where they cannot be reached.

    Args:
        timeout_minutes: for which a collective waits for a rank that does not come.
    """
    global _peers
    ranks = launch.ranks()
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if ranks.size > 1:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=_MEETING_MINUTES)))
            dist.init_process_group(
                backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=timedelta(minutes=timeout_minutes)
            )
            store = dist.PrefixStore("peers", store)  # pyright: ignore[reportPrivateImportUsage]  torch documents it
            _peers = Peers(store, ranks.rank, ranks.size, timeout_minutes)
        except dist.DistError as error:  # a busy port, a wrong address, ranks that never come
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"{ranks.size} ranks could not meet at {place} ({first_line(error)}). Choose a free MASTER_PORT, see that MASTER_ADDR is the first machine, and that "
                "all ranks were started."
            ) from error
    world = World(ranks.rank, ranks.size, ranks.local, chosen)
    if ranks.size > 1:
        world.require_same(program(), "Bring all machines to the same version of Tessera and of these packages.")
    return world


def program() -> dict[str, str]:
    """What decides results and may not be the same on two machines: our code, as a digest, and versions of packages."""
    code = hashlib.sha256()
    packages = [file.parent for file in ROOT.glob("*/__init__.py") if file.parent.name != "tests"]
    for file in sorted(file for package in packages for file in package.rglob("*.py")):
        code.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return {"the code": code.hexdigest()[:12], **{name: str(version_of(name)) for name in PACKAGES}}


def version_of(package: str) -> str | None:
    """Of an installed one; None where it does not tell."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
        if _peers:
            _peers.reached += 1
        self.value = torch.tensor([mine], dtype=torch.int64)
        self.work = dist.all_reduce(self.value, op=dist.ReduceOp.MAX, async_op=True)
        return agreed

    def drain(self) -> None:
        """Finish the exchange in flight, before the group is torn down."""
        if self.work is not None:
            self.work.wait()
            self.work = None
