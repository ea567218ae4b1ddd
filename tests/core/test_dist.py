"""Ranks that were not started for the same thing are refused before they mix what they make."""

from __future__ import annotations

import os

from core import dist
from core.chunks import require_same_job
from core.dist import World
from core.errors import UserError
from tests.ranks import in_processes, in_threads


def test_a_rank_with_other_facts_is_named():
    def meet(world: World) -> None:
        world.require_same({"a": 1, "b": 2 if world.rank == 1 else 1, "c": None}, "Do this.")

    host, answers = os.uname().nodename, in_threads(3, meet)
    assert all(isinstance(answer, UserError) for answer in answers)
    assert {*map(str, answers)} == {f"rank 1 on {host} differs from rank 0 on {host}: b is 2 and there 1. Do this."}
    assert in_threads(2, lambda world: world.require_same({"a": 1}, "Do this.")) == [None, None]


def test_the_same_files_at_other_places_are_the_same_job():
    def meet(world: World, fingerprint: str) -> None:
        job = {"weights": f"/disk{world.rank}/a.pt", "weights_fingerprint": fingerprint, "count": 4}
        require_same_job(world, job)

    assert in_threads(2, lambda world: meet(world, "f")) == [None, None]
    _, other = in_threads(2, lambda world: meet(world, f"f{world.rank}"))
    assert isinstance(other, UserError) and "weights_fingerprint is 'f1' and there 'f0'" in str(other)


def _met(world: World) -> None:
    assert world.size == 2


def test_machines_with_other_code_are_refused(monkeypatch):
    assert {"the code", "torch", "pillow"} <= dist.program().keys()
    assert in_processes(2, _met) == [0, 0]
    monkeypatch.setattr(dist, "program", lambda: {"the code": os.environ["RANK"]})
    assert in_processes(2, _met) == [1, 1]


def test_a_package_that_tells_no_version_stops_nobody(monkeypatch):
    """Some containers' torch was built in place and has no metadata."""
    monkeypatch.setattr(dist, "PACKAGES", ("torch", "no-such-package"))
    assert dist.program()["no-such-package"] == "None" and dist.program()["torch"] != "None"
