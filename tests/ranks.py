"""Several ranks in one test: as threads of this process, which is quick, or as processes that really talk to each other."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing

from core import dist
from core.dist import OtherRankFailed, World


class ThreadRank(World):
    """A rank whose peers are threads; every collective is one exchange of values."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, values: list):
        super().__init__(rank, size, rank, torch.device("cpu"))
        object.__setattr__(self, "exchanged", (barrier, values))

    def exchange(self, value: Any) -> list[Any]:
        barrier, values = self.exchanged
        values[self.rank] = value
        barrier.wait(60)
        everyone = list(values)
        barrier.wait(60)  # nobody writes the next value before all have read this one
        return everyone

    def barrier(self) -> None:
        self.exchange(None)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.copy_(torch.stack(self.exchange(values.clone())).sum(0))

    def together(self, work: Callable[[], Any]) -> Any:
        result = error = None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        failed = [rank for rank, bad in enumerate(self.exchange(error is not None)) if bad]
        if error is not None:
            raise error
        if failed:
            raise OtherRankFailed(f"rank {failed[-1]} failed; its message says why.")
        return result

    def on_main(self, work: Callable[[], Any]) -> Any:
        return self.exchange(self.together(lambda: work() if self.is_main else None))[0]

    def to_main(self, value: Any) -> Any:
        everyone = self.exchange(value)
        return next((v for v in everyone if v is not None), None) if self.is_main else None


def thread_ranks(size: int) -> list[ThreadRank]:
    barrier, values = threading.Barrier(size), [None] * size
    return [ThreadRank(rank, size, barrier, values) for rank in range(size)]


def in_threads(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What `work` returns on each of `size` ranks, or the exception that it raises."""
    results: list[Any] = [None] * size

    def one(world: ThreadRank) -> None:
        try:
            results[world.rank] = work(world)
        except BaseException as error:
            results[world.rank] = error

    threads = [threading.Thread(target=one, args=(world,)) for world in thread_ranks(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return results


def _process(rank: int, size: int, port: int, work: Callable, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with dist.start("cpu") as world:
        work(world, *arguments)


def in_processes(size: int, work: Callable, *arguments: Any, method: str = "fork") -> list[int]:
    """Call work(world, *arguments) on `size` ranks that are processes; their exit codes, 1 for an exception.

    Args:
        method: "spawn" where gradients are computed, which forks refuse once another test has had some on a device.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = multiprocessing.get_context(method)
    processes: list[Any] = [
        begin.Process(target=_process, args=(rank, size, port, work, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} of {size} ranks wait for ever"
    return [process.exitcode for process in processes]
