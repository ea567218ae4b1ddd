"""Work in chunks: each item once on any number of ranks, facts compared, kept through kills, failures and stops."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.chunks import ALONE, Chunks, Stopped, differences, enter, shared_array, write_rows
from core.dist import OtherRankFailed, World
from core.errors import UserError
from core.files import write_atomic
from tests.ranks import in_processes, in_threads


class Folder(Chunks):
    """The simplest user: a chunk is a text file with its items."""

    def __init__(self, folder: Path, world: World = ALONE, count: int = 11, size: int = 2):
        self.folder = folder
        size = world.on_main(
            lambda: enter(folder / "job.json", {"count": count, "size": size}, "x", "Delete it.", ("size",))["size"]
        )
        super().__init__(count, size, world, lambda c: self.path(c).is_file())

    def path(self, chunk: int) -> Path:
        return self.folder / f"{chunk}.txt"

    def write(self, before: Callable[[int], None] = lambda chunk: None, **options) -> list[int]:
        """Do this rank's share; the chunks that it did."""
        chunks = self.mine()

        def share(mine: list[int]) -> None:
            assert mine == chunks
            for chunk in mine:
                before(chunk)
                write_atomic(self.path(chunk), " ".join(map(str, self.indices(chunk))))
                self.advance(len(self.indices(chunk)))

        self.run(share, **options)
        return chunks

    def read(self) -> list[int]:
        return [int(i) for c in range(self.num_chunks) for i in self.path(c).read_text().split()]


class Killed(BaseException):
    """Not an error that anything may catch."""


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_every_item_once_on_any_number_of_ranks(tmp_path, size):
    shares = in_threads(size, lambda world: Folder(tmp_path, world).write())
    assert sorted(c for share in shares for c in share) == list(range(6))
    assert Folder(tmp_path).read() == list(range(11))
    assert in_threads(size, lambda world: Folder(tmp_path, world).write()) == [[]] * size  # nothing is left


def test_a_killed_job_goes_on_with_other_ranks(tmp_path):
    def die(chunk: int) -> None:
        if chunk == 2:
            raise Killed

    with pytest.raises(Killed):
        Folder(tmp_path).write(die)
    assert {p.name for p in tmp_path.iterdir()} == {"job.json", "0.txt", "1.txt"}
    assert in_threads(3, lambda world: Folder(tmp_path, world, size=5).write()) == [[2, 5], [3], [4]]  # in twos still
    assert Folder(tmp_path).read() == list(range(11))


def test_a_rank_that_fails_leaves_no_other_waiting(tmp_path):
    def fail(chunk: int) -> None:
        if chunk == 1:
            raise UserError("the disk is full")

    results = in_threads(3, lambda world: Folder(tmp_path, world).write(fail))
    assert str(results[1]) == "the disk is full"
    assert all(isinstance(results[r], OtherRankFailed) and "rank 1 failed" in str(results[r]) for r in (0, 2))
    assert {p.name for p in tmp_path.glob("*.txt")} == {"0.txt", "3.txt", "2.txt", "5.txt"}  # theirs stay


def test_a_stop_is_agreed_upon(tmp_path):
    """Asked of one rank, obeyed by all, after what was begun has been kept."""

    def stopped(world: World) -> None:
        Folder(tmp_path, world).write(stop=lambda: "received SIGTERM" if world.rank == 1 else None)

    results = in_threads(2, stopped)
    assert [type(r) for r in results] == [Stopped, Stopped]
    assert [str(r) for r in results] == ["another rank was asked to stop", "received SIGTERM"]
    assert {p.name for p in tmp_path.glob("*.txt")} == {"0.txt", "2.txt", "4.txt", "1.txt"}


def test_progress_counts_all_ranks_and_what_was_done_before(tmp_path):
    write_atomic(tmp_path / "0.txt", "0 1")
    told: list[int] = []
    in_threads(2, lambda world: Folder(tmp_path, world).write(progress=told.append if world.is_main else None))
    assert told == [6, 10, 11]  # two items a chunk, on two ranks, beside the two of the first chunk


def test_facts(tmp_path):
    record = tmp_path / "new" / "job.json"
    facts = {"seed": 1, "weights": "a.pth", "weights_fingerprint": "w", "chunk": 4}
    args = ("pictures of other settings", "Choose another --out.", ("chunk",))
    assert enter(record, facts, *args) == json.loads(record.read_text()) == facts
    assert enter(record, {**facts, "weights": "moved/a.pth", "chunk": 9}, *args) == facts
    with pytest.raises(UserError) as refused:
        enter(record, {**facts, "seed": 2, "layout": "x"}, *args)
    assert str(refused.value) == (
        f"{tmp_path / 'new'} holds pictures of other settings (layout was None, now 'x'; seed was 1, now 2). "
        "Choose another --out."
    )
    assert differences({"weights": "a"}, {"weights": "b", "weights_fingerprint": "w"}).startswith("weights was 'a'")
    for content, message in (("[1]", "does not say what"), ("{", "not valid JSON")):
        record.write_text(content)
        with pytest.raises(UserError, match=message):
            enter(record, facts, *args)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"):
        Folder(tmp_path / "file" / "x")


def test_shared_arrays(tmp_path):
    """The bytes that numpy writes; made by all at once or by any later, without harm to rows that are there."""
    path = tmp_path / "a.npy"
    rows = np.arange(12, dtype=np.uint16).reshape(4, 3)
    assert any(in_threads(4, lambda world: shared_array(path, (4, 3), "uint16")))
    write_rows(path, 2, rows[2:])
    path.open("r+b").truncate(path.stat().st_size)
    assert not shared_array(path, (4, 3), "uint16")
    write_rows(path, 0, rows[:2])
    np.save(tmp_path / "b.npy", rows)
    assert path.read_bytes() == (tmp_path / "b.npy").read_bytes()
    path.write_bytes(path.read_bytes()[:50])  # killed while it was made
    shared_array(path, (4, 3), "uint16")
    assert not np.load(path).any()
    with pytest.raises(ValueError, match="rows uint16"):
        write_rows(path, 0, rows[:, :2])
    with pytest.raises(UserError, match="was begun for arrays other than uint16"):
        shared_array(path, (5, 3), "uint16")


# ---------------------------------------------------------------------------------------------------------------------
# Ranks that are processes
# ---------------------------------------------------------------------------------------------------------------------
def _two_processes(world: World, folder: str) -> None:
    assert Folder(Path(folder) / "whole", world).write() == [[0, 2, 4], [1, 3, 5]][world.rank]

    def fail(chunk: int) -> None:
        if chunk == 3:
            raise UserError("no luck")

    with pytest.raises(UserError, match="no luck" if world.rank == 1 else "rank 1 failed"):
        Folder(Path(folder) / "failed", world).write(fail)
    with pytest.raises(Stopped, match="SIGTERM" if world.rank == 0 else "another rank"):
        Folder(Path(folder) / "failed", world).write(stop=lambda: None if world.rank else "received SIGTERM")


def test_two_processes(tmp_path):
    assert in_processes(2, _two_processes, str(tmp_path)) == [0, 0]
    assert Folder(tmp_path / "whole").read() == list(range(11))
    failed = Folder(tmp_path / "failed")
    assert failed.mine() == []  # the fourth chunk came with the second attempt, all the others with the first
    assert failed.read() == list(range(11))


def _one_dies(world: World, folder: str) -> None:
    def die(chunk: int) -> None:
        if chunk == 3:
            os._exit(9)  # without a word, as where memory runs out

    with pytest.raises(OtherRankFailed, match="rank 1 .process .* is gone"):
        Folder(Path(folder), world).write(die)


def test_a_process_that_dies_leaves_no_other_waiting(tmp_path):
    assert in_processes(2, _one_dies, str(tmp_path)) == [0, 9]
    assert Folder(tmp_path).mine() == [3, 5]  # theirs and the first of the dead one are kept
