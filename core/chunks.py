"""Long work in chunks: shared by ranks, kept in a folder, continued after a kill.

Items 0 ... N - 1 are cut into chunks of one size. A chunk is what a rank takes on, what is kept as a whole or not at
all, and what a killed job does again at most. Caches and token stores (data/cache.py), evaluations (evaluation/chunks.py)
and folders of samples are made so. Each of them says where its chunks lie and which of them are whole. The rest is the
same for all and stands here:

    facts     what decides the result is noted in the folder; a folder with other facts is refused, before anything
              in it is touched
    shares    the chunks that are left go round and round the ranks, of which there may be another number each time
    waiting   ranks meet when they look for what is done and after their shares, through `World.together`: a rank that
              fails says why, and the others raise OtherRankFailed instead of waiting for it
    stopping  between two pieces of work, on a signal; if one rank is asked to, all raise Stopped once they have kept
              what is done

A chunk must depend on its items alone: then neither the number of ranks nor a restart changes a bit of the result.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

from core.dist import World
from core.errors import UserError
from core.files import explain_os_errors, read_json, write_json
from core.signals import Stopped, StopRequest

Share = Callable[[list[int]], None]
ALONE = World(0, 1, 0, torch.device("cpu"))


class Chunks:
    """The chunks of one job, as one of its ranks sees them.

    Args:
        count: N, at least 1.
        size: items per chunk.
        world: this rank.
        is_whole: chunk -> whether an earlier part of the job has finished it; asked on the main rank. None: none is.
    """

    def __init__(self, count: int, size: int, world: World, is_whole: Callable[[int], bool] | None = None):
        self.count, self.size, self.world = count, size, world
        self.done: set[int] = set()
        if is_whole is not None:
            self.look(is_whole)

    def look(self, is_whole: Callable[[int], bool]) -> None:
        """Find out which chunks are done. Collective."""
        self.done = set(self.world.on_main(lambda: [c for c in range(self.num_chunks) if is_whole(c)]))

    @property
    def num_chunks(self) -> int:
        return -(-self.count // self.size)

    def indices(self, chunk: int) -> range:
        """Its items."""
        return range(chunk * self.size, min(self.count, (chunk + 1) * self.size))

    def mine(self) -> list[int]:
        """The chunks that this rank still has to do."""
        left = [c for c in range(self.num_chunks) if c not in self.done]
        return left[self.world.rank :: self.world.size]

    def items(self, chunks: Collection[int]) -> int:
        """How many items these chunks have."""
        return sum(len(self.indices(c)) for c in chunks)

    def run(
        self, share: Share, progress: Callable[[int], None] | None = None, stop: Callable[[], str | None] | None = None
    ) -> None:
        """Do what is missing. Collective: if one rank fails, all of them raise.

        Args:
            share: does the chunks it is given and keeps each as soon as it is whole. Calls `advance` after each piece.
            progress: called with an estimate of the items done over all ranks.
            stop: says why to stop, or None to go on; raises Stopped on all ranks. None: signals say so.
        """

        def work() -> str | None:
            try:
                share(self.mine())
            except Stopped as asked:
                return str(asked)
            return self._stop()  # what came after the last piece is heard too

        # Of several ranks one that gives up would leave the others in the middle of what they do together.
        with StopRequest(at_last=self.world.size == 1) as request:
            self._items, self._progress, self._stop = self.items(self.done), progress, stop or request.requested
            reason = self.world.together(work)
        if self.world.any(reason is not None):
            raise Stopped(reason or "another rank was asked to stop")
        self.done = set(range(self.num_chunks))

    def advance(self, items: int) -> None:
        """Called by a share when so many more items are done, at places where it may be stopped."""
        self._items = min(self.count, self._items + items * self.world.size)  # ranks are about equally quick
        if self._progress:
            self._progress(self._items)
        if reason := self._stop():
            raise Stopped(reason)


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------
CONTENT = ("_sizes", "_sha256")  # ends of facts about files, which records of before do not have


def changed_facts(before: dict[str, Any], now: dict[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """Names of those in which two jobs differ.

    Things count by what they are, not by where they lie: where both have a fact "X_fingerprint" or "X_sha256", X may differ;
    of pictures, whose fingerprint is of their names, only where both or none have "X_sizes". A fact of CONTENT that one of
    them lacks says nothing.
    """
    either, both = before.keys() | now.keys(), before.keys() & now.keys()

    def same(key: str) -> bool:
        if key.endswith(CONTENT) and key not in both:
            return True
        sized = {f"{key}_sizes"}
        known = {f"{key}_fingerprint", f"{key}_sha256"} & both and sized & either == sized & both
        return before.get(key) == now.get(key) or bool(known)

    return [key for key in sorted(either - set(ignored)) if not same(key)]


def differences(before: dict[str, Any], now: dict[str, Any], ignored: Collection[str] = ()) -> str:
    """ "seed was 1, now 2; ..."; "" when there are none. See `changed_facts`."""
    changed = changed_facts(before, now, ignored)
    return "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed)


def require_same_job(world: World, facts: dict[str, Any], ignored: Collection[str] = ()) -> None:
    """UserError where a rank was given another job than the main one: its pieces would be mixed with theirs. Collective."""
    advice = "Start all machines with the same command, on the same files."
    world.require_same(facts, advice, lambda before, now: changed_facts(before, now, ignored))


def enter(
    record: Path, facts: dict[str, Any], contents: str, advice: str, ignored: Collection[str] = ()
) -> dict[str, Any]:
    """Note the facts in the file `record`, or compare them with those that are noted there. For the main rank.

    Args:
        facts: JSON that decides what the folder will hold.
        contents: what the folder holds when the facts are others ("pictures of other settings").
        advice: what to do then.
        ignored: facts in which an unfinished job may differ: it keeps its own.

    Returns: the facts that hold, which are those of the record where there is one.
    """
    with explain_os_errors(record.parent):
        record.parent.mkdir(parents=True, exist_ok=True)
        is_there = record.is_file()
    if is_there:
        before = read_json(record)
        if not isinstance(before, dict):
            raise UserError(f"{record} does not say what its folder holds. {advice}")
        if changed := differences(before, facts, ignored):
            raise UserError(f"{record.parent} holds {contents} ({changed}). {advice}")
        return before
    write_json(record, facts)
    return facts


def shared_array(path: Path, shape: Sequence[int], dtype: np.dtype | str) -> bool:
    """Make a .npy file of zeros that several processes then fill through ordinary writes.

    All of them may call it at once, at any time, also after a kill: each writes the same header and never shortens the
    file, so rows that are in it stay. UserError when a file of another type or shape is there.

    Returns: whether there was none.
    """
    dtype = np.dtype(dtype)
    header = io.BytesIO()
    npy.write_array_header_1_0(
        header, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    )
    fresh = not path.exists()
    with explain_os_errors(path):
        path.open("ab").close()
        with open(path, "r+b") as file:
            begun = file.read(len(header.getvalue()))
            if not header.getvalue().startswith(begun):
                raise UserError(f"{path} was begun for arrays other than {dtype} {list(shape)}. Delete it.")
            file.seek(0)
            file.write(header.getvalue())
            file.truncate(len(header.getvalue()) + int(np.prod(shape)) * dtype.itemsize)
    return fresh


def write_rows(path: Path, start: int, rows: np.ndarray) -> None:
    """Put rows into a file of `shared_array`, from row `start` on; ValueError where they are of another kind.

    Not through a memory map: a full disk is then an error and not a bus error, and processes on several machines do
    not write each other's pages back.
    """
    with explain_os_errors(path):
        target = np.load(path, mmap_mode="r")
        if rows.dtype != target.dtype or rows.shape[1:] != target.shape[1:]:
            raise ValueError(f"{path}: rows {rows.dtype} {rows.shape[1:]}, file {target.dtype} {target.shape[1:]}")
        with open(path, "r+b") as file:
            file.seek(target.offset + start * (target[0].nbytes))
            file.write(np.ascontiguousarray(rows).data)
