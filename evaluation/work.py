"""A long evaluation as pieces: shared between ranks, kept in a folder, continued after a kill.

Indices 0 ... N - 1 are cut into chunks of fixed size. A chunk's result is a dictionary of tensors that depends on the
chunk alone, so neither the number of ranks nor a restart changes a bit of it. With a folder every finished chunk is one
file, written atomically; without one it stays in memory and travels to the main rank at the end.

The folder holds everything that is unfinished; results leave it whole. A killed job, a full disk or the death of
another rank leave it to be continued. A refusal (torn or unequal pictures, values that are not finite) deletes it: the
same command would be refused again, and a corrected one is another job.

In a result, a tensor named "sum/..." is added over chunks (codebook counts), one named "chunk/..." stays with its chunk
(moments, read through `chunks`); every other one has a row per index and is put together in index order.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from core.dist import OtherRankFailed, World
from core.errors import UserError
from core.files import explain_os_errors, is_machines_fault, read_json, write_atomic, write_json

LARGEST_CHUNK, SMALLEST_CHUNK = 256, 16
SUM, OWN = "sum/", "chunk/"
Chunk = dict[str, Tensor]


def default_chunk(count: int) -> int:
    """A function of the count alone, so that ranks and restarts agree."""
    return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, 1 << (count // 16).bit_length() - 1 if count >= 16 else 0))


class Work:
    """The chunks of one job. Use as a context manager around all that may be refused.

    Args:
        count: N.
        world: this rank; chunks go round and round the ranks.
        folder: where finished chunks are kept; None keeps them in memory.
        job: JSON facts that decide the results (weights, seed, protocol ...). A folder with other facts is refused.
        chunk: indices per chunk; 0: a power of two that gives every rank something. A folder that is continued keeps
            the size it began with.
    """

    def __init__(
        self,
        count: int,
        world: World,
        folder: str | Path | None = None,
        job: dict[str, Any] | None = None,
        chunk: int = 0,
    ):
        if count < 1:
            raise UserError(f"There is nothing to evaluate: {count} pictures.")
        self.count, self.world, self.chunk = count, world, chunk or default_chunk(count)
        self.folder = Path(folder) if folder is not None else None
        self.kept: dict[int, Chunk] = {}
        self.made_parent = self.folder is not None and not self.folder.parent.exists()
        if self.folder is not None:
            self.chunk = world.on_main(lambda: self._open({**(job or {}), "count": count}))
        self.done: set[int] = set(world.on_main(lambda: [c for c in range(self.num_chunks) if self._is_whole(c)]))

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind, error, _) -> None:
        if isinstance(error, UserError) and not isinstance(error, OtherRankFailed) and not is_machines_fault(error):
            self._delete()

    def keep_only(self, holds: Callable[[range], bool]) -> None:
        """Do again the finished chunks for whose indices something else is missing (their pictures). Collective."""
        self.done = set(self.world.on_main(lambda: [c for c in self.done if holds(self.indices(c))]))

    @property
    def num_chunks(self) -> int:
        return -(-self.count // self.chunk)

    def indices(self, chunk: int) -> range:
        return range(chunk * self.chunk, min(self.count, (chunk + 1) * self.chunk))

    def path(self, chunk: int) -> Path:
        return self.folder / f"chunk_{chunk:06d}.safetensors"

    def _open(self, job: dict[str, Any]) -> int:
        """Make the folder or check that it is of this job; returns its chunk size."""
        record = self.folder / "job.json"
        if record.is_file():
            before = read_json(record)
            chunk = before.pop("chunk")
            changed = [
                f"{k} was {before.get(k)!r}, now {job.get(k)!r}"
                for k in sorted(before.keys() | job.keys())
                if before.get(k) != job.get(k)
            ]
            if changed:
                raise UserError(
                    f"{self.folder} holds the unfinished work of another evaluation ({'; '.join(changed)}). "
                    "Delete that folder, or write this one elsewhere with --out."
                )
            return chunk
        with explain_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(record, {**job, "chunk": self.chunk})
        return self.chunk

    def _is_whole(self, chunk: int) -> bool:
        if self.folder is None or not self.path(chunk).is_file():
            return False
        try:
            with safe_open(self.path(chunk), "pt"):  # checks the length against the header
                return True
        except SafetensorError:
            return False

    def mine(self) -> list[int]:
        """Chunks that this rank still has to do."""
        return [c for c in range(self.num_chunks) if c not in self.done][self.world.rank :: self.world.size]

    def run(self, compute: Callable[[range], Chunk], progress: Callable[[int], None] | None = None) -> None:
        """Do what is missing of this rank's share. Collective: if one rank fails, all of them raise.

        Args:
            compute: indices -> result.
            progress: called with an estimate of the indices done over all ranks.
        """
        done = sum(len(self.indices(c)) for c in self.done)

        def work() -> None:
            nonlocal done
            for chunk in self.mine():
                indices = self.indices(chunk)
                result = {name: t.detach().cpu().contiguous() for name, t in compute(indices).items()}
                result["index"] = torch.arange(indices.start, indices.stop)
                self._check(result, indices)
                if self.folder is None:
                    self.kept[chunk] = result
                else:
                    write_atomic(self.path(chunk), to_bytes(result))
                done = min(self.count, done + len(indices) * self.world.size)
                if progress:
                    progress(done)

        self.world.together(work)
        self.done = set(range(self.num_chunks))

    @staticmethod
    def _check(result: Chunk, indices: range) -> None:
        for name, tensor in result.items():
            if not name.startswith((SUM, OWN)) and len(tensor) != len(indices):
                raise ValueError(f"{name} has {len(tensor)} rows for {len(indices)} pictures")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"{name} of pictures {indices.start} to {indices.stop - 1} is not finite. The weights or "
                    "the precision are at fault; nothing was kept of these pictures."
                )

    def chunks(self) -> Iterator[Chunk]:
        """Results in index order, on the main rank; nothing on the others. Collective when there is no folder."""
        for chunk in range(self.num_chunks):
            if self.folder is not None:
                if self.world.is_main:
                    yield load_file(self.path(chunk))
                continue
            result = self.world.to_main(self.kept.pop(chunk, None))
            if self.world.is_main:
                yield result

    def gather(self) -> Chunk | None:
        """Everything, on the main rank; None on the others. Collective. Asserts that each index came exactly once."""
        parts: dict[str, list[Tensor]] = {}
        sums: Chunk = {}
        for result in self.chunks():
            for name, tensor in result.items():
                if name.startswith(SUM):
                    sums[name] = sums[name] + tensor if name in sums else tensor
                elif not name.startswith(OWN):
                    parts.setdefault(name, []).append(tensor)
        if not self.world.is_main:
            return None
        index = torch.cat(parts.pop("index"))
        if not torch.equal(index, torch.arange(self.count)):
            raise UserError(
                f"{self.folder or 'the evaluation'}: the pictures are not exactly 0 to {self.count - 1}, each "
                "once. The folder was changed by hand; delete it and run again."
            )
        whole = {}
        for name in list(parts):
            whole[name] = torch.cat(parts.pop(name))
        return {**whole, **sums}

    def forget(self) -> None:
        """Delete the folder, on the main rank."""
        if self.world.is_main:
            self._delete()

    def _delete(self) -> None:
        if self.folder is None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.made_parent:
            with contextlib.suppress(OSError):  # other things are in it
                self.folder.parent.rmdir()
