"""Checkpoints of weights in parts: written by some ranks, read by others; ranks that die or fail while they write."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from core.dist import World
from core.errors import UserError
from core.train import checkpoint
from core.train.checkpoint import Checkpoint, CheckpointStore, find_damage
from core.train.sharded import ShardedStore
from tests.ranks import in_processes

SHAPES = {"even": (4, 3), "odd": (5, 2), "one row": (1, 7), "vector": (3,)}


def weights(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def save(world: World, folder: Path, steps: list[int], **options) -> ShardedStore:
    """Everything in two files in parts, and one that is whole; the snapshot is taken at once."""
    mesh = init_device_mesh("cpu", (world.size,))
    store = ShardedStore(folder, world=world)
    for step in steps:
        live = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in weights(step).items()}
        buffer = torch.arange(step, step + 3)
        files = {"model": {**live, "buffer": buffer}, "model.ema_0.9": dict(live), "trainer": {"x": torch.tensor(step)}}
        store.save(step, files, {"step": step}, **options)
        for t in [*live.values(), buffer]:
            t.zero_()
    store.wait()
    return store


def same(tensors: dict[str, torch.Tensor], step: int) -> bool:
    """Whether these, of which some may be in parts, are what was saved."""
    for name, wanted in weights(step).items():
        held = tensors[name]
        if not torch.equal(held.full_tensor() if isinstance(held, DTensor) else held, wanted):
            return False
    return True


def read_in_parts(world: World, folder: Path, step: int) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    like = {name: distribute_tensor(t, mesh, [Shard(0)]).bfloat16() for name, t in weights(0).items()}
    like["odd"] = torch.zeros(5, 2)  # whole here
    tensors = CheckpointStore(folder).latest(clean=False).tensors("model", like=like.get)
    assert all(isinstance(tensors[n], DTensor) == (n != "odd") and tensors[n].dtype == torch.float32 for n in SHAPES)
    assert same(tensors, step) and tensors["buffer"].tolist() == [step, step + 1, step + 2]


def test_any_number_of_ranks_reads_what_others_wrote(tmp_path):
    assert in_processes(2, save, tmp_path, [1, 2]) == [0, 0]
    found = CheckpointStore(tmp_path).latest()
    assert found.step == 2 and not find_damage(found.path)
    held = Checkpoint(found.path).hold()
    for opened in (found, held):
        assert same(opened.tensors("model.ema_0.9"), 2) and opened.tensors("trainer")["x"] == 2
    assert in_processes(3, read_in_parts, tmp_path, 2) == [0, 0, 0]
    with pytest.raises(UserError, match='holds no "modle". Did you mean "model"'):
        found.tensors("modle")
    for file in found.path.iterdir():
        file.unlink()
    assert same(held.tensors("model"), 2)  # as where a running trainer deletes it


def test_a_damaged_part_is_found(tmp_path):
    assert in_processes(2, save, tmp_path, [1, 2]) == [0, 0]
    part = tmp_path / "step_00000002" / "model.part-00001-of-00002.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    store = CheckpointStore(tmp_path)
    assert store.latest().step == 1 and str(part) in store.skipped[0]
    (tmp_path / "step_00000001" / part.name).unlink()
    with pytest.raises(UserError, match="none is whole"):
        store.latest()


def dies_while_it_writes(world: World, folder: Path) -> None:
    save(world, folder, [1])
    if world.rank == 1:
        checkpoint.write_tensors = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save(world, folder, [2], wait=True)


def test_a_rank_is_killed_in_the_middle_of_a_save(tmp_path):
    codes = in_processes(2, dies_while_it_writes, tmp_path)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert CheckpointStore(tmp_path).latest().step == 1
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]
    assert in_processes(2, save, tmp_path, [2]) == [0, 0]  # the resumed run
    assert same(CheckpointStore(tmp_path).latest().tensors("model"), 2)


def has_no_room(world: World, folder: Path) -> None:
    store = save(world, folder, [1])
    write, full = checkpoint.write_tensors, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_):
        raise full

    if world.rank == 1:
        checkpoint.write_tensors = refuse
    save(world, folder, [2])  # training goes on
    with pytest.raises(UserError, match="step 3 was not saved.*part-00001-of-00002.*the disk is full.*untouched"):
        save(world, folder, [3], wait=True)
    checkpoint.write_tensors = write
    if world.is_main:  # which has tidied up
        assert sorted(os.listdir(folder)) == ["latest", "step_00000001"] and store.steps() == [1]
    save(world, folder, [4], wait=True)


def test_one_rank_cannot_write(tmp_path):
    assert in_processes(2, has_no_room, tmp_path) == [0, 0]
    assert CheckpointStore(tmp_path).steps() == [1, 4]
