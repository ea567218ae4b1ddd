"""A long evaluation in chunks (core/chunks.py): results that are kept in a folder, or in memory, and put together.

A chunk's result is a dictionary of tensors. With a folder every finished chunk is one file, written atomically; without
one it stays in memory and travels to the main rank at the end.

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

from core.chunks import Chunks, enter, require_same_job
from core.dist import OtherRankFailed, World
from core.errors import UserError
from core.files import is_machines_fault, write_atomic
from core.lock import Lock

LARGEST_CHUNK, SMALLEST_CHUNK = 256, 16
SUM, OWN = "sum/", "chunk/"
Chunk = dict[str, Tensor]


def default_chunk(count: int) -> int:
    """A function of the count alone, so that ranks and restarts agree: a sixteenth as a power of two, within limits."""
    return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, 1 << (count // 16).bit_length() - 1 if count >= 16 else 0))


class Work(Chunks):
    """The chunks of one evaluation. Use as a context manager around all that may be refused.

    Args:
        count: how many pictures.
        world: this rank.
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
        size = chunk or default_chunk(count)
        self.folder = Path(folder) if folder is not None else None
        self.kept: dict[int, Chunk] = {}  # without a folder
        self.made_parent = self.folder is not None and not self.folder.parent.exists()
        if self.folder is not None:
            facts = {**(job or {}), "count": count, "chunk": size}
            require_same_job(world, facts)
            self.lock = Lock(self.folder)  # of the main rank, for all of them
            size = world.on_main(lambda: self._enter(facts)["chunk"])
        super().__init__(count, size, world, self._is_whole)

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind, error, _) -> None:
        if error is not None:
            self.leave()
        if isinstance(error, UserError) and not isinstance(error, OtherRankFailed) and not is_machines_fault(error):
            self._delete()

    def _enter(self, facts: dict[str, Any]) -> dict[str, Any]:
        assert self.folder is not None
        self.lock.take()
        return enter(
            self.folder / "job.json",
            facts,
            "the unfinished work of another evaluation",
            "Delete that folder, or write this one elsewhere with --out.",
            ("chunk",),
        )

    def keep_only(self, holds: Callable[[range], bool]) -> None:
        """Do again the finished chunks for whose indices something else is missing (their pictures). Collective."""
        done = self.done
        self.look(lambda chunk: chunk in done and holds(self.indices(chunk)))

    def path(self, chunk: int) -> Path:
        return self.folder / f"chunk_{chunk:06d}.safetensors"

    def _is_whole(self, chunk: int) -> bool:
        if self.folder is None or not self.path(chunk).is_file():
            return False
        try:
            with safe_open(self.path(chunk), "pt"):  # checks the length against the header
                return True
        except SafetensorError:
            return False

    def compute(self, compute: Callable[[range], Chunk], progress: Callable[[int], None] | None = None) -> None:
        """Do what is missing of this rank's share. Collective: if one rank fails, all of them raise.

        Args:
            compute: indices -> result.
            progress: called with an estimate of the indices done over all ranks.
        """

        def share(mine: list[int]) -> None:
            for chunk in mine:
                indices = self.indices(chunk)
                result = {name: t.detach().cpu().contiguous() for name, t in compute(indices).items()}
                result["index"] = torch.arange(indices.start, indices.stop)
                self._check(result, indices)
                if self.folder is None:
                    self.kept[chunk] = result
                else:
                    write_atomic(self.path(chunk), to_bytes(result))
                self.advance(len(indices))

        self.run(share, progress)

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

    def leave(self) -> None:
        """Let other programs into the folder, which stays."""
        if self.folder is not None:
            self.lock.release()

    def forget(self) -> None:
        """Delete the folder, on the main rank."""
        if self.world.is_main:
            self._delete()

    def _delete(self) -> None:
        if self.folder is None:
            return
        self.lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.made_parent:
            with contextlib.suppress(OSError):  # other things are in it
                self.folder.parent.rmdir()


def forget_left(folder: Path) -> None:
    """Delete what is left of work whose result is there: its program was killed before it did. Not while one is in it."""
    if folder.is_dir():
        lock = Lock(folder)
        with contextlib.suppress(UserError):
            lock.take()
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)
