"""Checkpoints of weights that are in parts: every rank writes its own, any number of ranks reads them.

    generator.part-00000-of-00008.safetensors ...        instead of generator.safetensors

torch.distributed.checkpoint plans who writes what and which pieces a rank reads; what lies on the disk is safetensors, so
that nothing is pickled. The header entry "parts" is JSON: name -> [where the piece begins, shape of the whole tensor].
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.futures import Future

from core.dist import World
from core.errors import UserError
from core.files import explain_os_errors
from core.train import checkpoint

T = TypeVar("T")
HEADER = "parts"
_PATIENCE = timedelta(hours=6)  # for which ranks wait for each other's disks; a dead one ends all of them at once


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


class _AsPlanned:
    """What torch.distributed.checkpoint asks of readers and of writers: these take its plans as they are."""

    def reset(self, checkpoint_id=None) -> None:
        pass

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
class _Reader(_AsPlanned, StorageReader):
    """The parts of one file. `read` lays them out as the ranks of now want them."""

    def __init__(self, files: Iterable[Any]):
        self.pieces: dict[MetadataIndex, Tensor] = {}  # mapped from disk
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, (offset, shape) in json.loads(file.metadata()[HEADER]).items():
                self.shapes[name] = tuple(shape)
                self.pieces[MetadataIndex(name, torch.Size(offset))] = file.get_tensor(name)

    def read(self, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """All tensors: as DTensors of their own where `like` has such ones of the same shape, else whole on the CPU."""
        wanted = {}
        for index, piece in self.pieces.items():
            shape, model = self.shapes[index.fqn], like(index.fqn)
            if isinstance(model, DTensor) and tuple(model.shape) == shape:
                wanted[index.fqn] = torch.empty_like(model, dtype=piece.dtype, requires_grad=False)
            else:
                wanted[index.fqn] = torch.empty(shape, dtype=piece.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is how one process reads
            load(wanted, storage_reader=self, no_dist=True)  # each rank knows what it needs
        return wanted

    def read_metadata(self, *args, **kwargs) -> Metadata:
        tensors: dict[str, Any] = {}
        for index, piece in self.pieces.items():
            entry = tensors.setdefault(
                index.fqn,
                TensorStorageMetadata(TensorProperties(dtype=piece.dtype), torch.Size(self.shapes[index.fqn]), []),
            )
            entry.chunks.append(ChunkStorageMetadata(index.offset or torch.Size(), piece.shape))
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata, is_coordinator, *args, **kwargs) -> None:
        pass

    def read_data(self, plan, planner) -> Future:
        for item in plan.items:
            piece = self.pieces[item.storage_index]
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths)):
                piece = piece.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece)
            planner.commit_tensor(item, target)
        return _done(None)


def read(files: Iterable[Any], like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """The tensors of which open safetensors `files` hold the parts; see `_Reader.read`."""
    return _Reader(files).read(like)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
class _Writer(_AsPlanned, StorageWriter):
    """Writes what the plan gives this rank to one file, which will have its final name in the end."""

    def __init__(self, path: Path, final: Path):
        self.path, self.final = path, final

    def set_up_storage_writer(self, is_coordinator, *args, **kwargs) -> None:
        pass

    def write_data(self, plan, planner) -> Future:
        tensors: dict[str, Tensor] = {}
        about = {}
        for item in plan.items:
            value, name = planner.resolve_data(item), item.index.fqn
            assert isinstance(value, Tensor) and item.tensor_data is not None and name not in tensors
            tensors[name] = value.detach().contiguous()
            about[name] = [list(item.tensor_data.chunk.offsets), list(item.tensor_data.size)]
        with explain_os_errors(self.final):
            checkpoint.write_tensors(self.path, tensors, {HEADER: json.dumps(about)})
        return _done([WriteResult(item.index, tensors[item.index.fqn].nbytes, None) for item in plan.items])

    def finish(self, metadata, results) -> None:
        pass


class ShardedStore(checkpoint.CheckpointStore):
    """The checkpoints of a run whose weights are in parts. Every rank makes one and calls `save`; the main rank looks for
    the newest, prunes and pins.

    Ranks talk over a group of their own, in the thread that writes: training does not wait for it.
    """

    def __init__(self, *arguments: Any, world: World, **options: Any):
        super().__init__(*arguments, **options)
        self.world = world
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._mesh = init_device_mesh("cpu", (world.size,))

    def _copy(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return super()._copy(tensor)
        return DTensor.from_local(
            super()._copy(tensor.to_local()),
            self._mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returned on each rank; if it failed on one, all of them raise."""
        mine: tuple[Any, str | None] = (None, None)
        error: Exception | None = None
        try:
            mine = (work(), None)
        except Exception as caught:
            error, mine = caught, (None, str(caught))
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, mine, group=self._group)
        if error is not None:
            raise error
        for rank, (_, message) in enumerate(everyone):
            if message is not None:
                raise UserError(f"Rank {rank}: {message}")
        return [result for result, _ in everyone]

    def _on_main(self, work: Callable[[], T]) -> T:
        return self._together(lambda: work() if self.world.is_main else None)[0]  # pyright: ignore[reportReturnType]

    def _write(self, step: int, copies: dict[str, dict[str, Tensor]], text: str, milestone: bool) -> None:
        parts = {s: g for s, g in copies.items() if any(isinstance(t, DTensor) for t in g.values())}
        whole = {stem: group for stem, group in copies.items() if stem not in parts}
        size = sum(math.prod(t.shape) * t.element_size() for group in copies.values() for t in group.values())
        temporary = self._on_main(lambda: self._begin(step, size + len(text)))
        try:
            files = {}
            for stem, group in parts.items():
                name = f"{stem}.part-{self.world.rank:05d}-of-{self.world.size:05d}.safetensors"
                writer = _Writer(temporary / name, self.folder / checkpoint.step_name(step) / name)
                files |= self._write_parts(writer, group)
            self._on_main(lambda: self._finish(temporary, step, whole, text, milestone, files))
        except BaseException:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _write_parts(self, writer: _Writer, tensors: dict[str, Tensor]) -> dict[str, dict]:
        """One file of every rank; entries of the manifest for all of them."""
        try:
            save(tensors, storage_writer=writer, process_group=self._group)
        except CheckpointException as error:  # the same on all ranks
            rank, (reason, _) = next(iter(error.failures.items()))
            raise UserError(f"Rank {rank}: {reason}") from reason
        entries = self._together(lambda: checkpoint.describe([writer.path], writer.path.parent))
        return {name: entry for files in entries for name, entry in files.items()}

    def _prune(self) -> None:
        if self.world.is_main:
            super()._prune()
