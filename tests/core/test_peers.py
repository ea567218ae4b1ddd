"""Who is named where another rank is gone or hangs: by what ranks tell a store, and where the store went with its host."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest
import torch.distributed as dist

from core import peers
from core.peers import Peers

HOST = os.uname().nodename


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(peers, "_BEAT_SECONDS", 1.0)
    monkeypatch.setattr(peers.time, "sleep", lambda seconds, sleep=peers.time.sleep: sleep(min(seconds, 0.1)))
    return dist.HashStore()


def rank_one(store, other: int, process: int) -> Peers:
    """The Peers of one of two ranks, whose other one, of this process number, has only said where it is."""
    store.set(f"tessera/place/{other}", f"{HOST} {process}")
    store.set(f"tessera/beat/{other}", "7 3")
    here = Peers(store, 1 - other, 2, 0.1)
    while not here._places:
        pass
    return here


def waited() -> RuntimeError:
    return RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation")


@pytest.mark.parametrize("reached", [3, 4])
def test_a_rank_that_hangs_is_named(store, reached):
    """Also one that had come as far as this one before it was stopped in the middle of a step."""
    here = rank_one(store, 1, os.getppid())
    here.reached = reached
    message = str(here.explain(waited()))
    assert f"rank 1 ({HOST}, process {os.getppid()}) did not come" in message and "run the same command" in message
    assert ("gives no sign of life" in message) == (reached == 3)


class Gone:
    """A store whose host is no more."""

    def check(self, *_):
        raise dist.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed.")

    set = get = add = check


def test_the_host_of_the_store_is_named_when_it_is_killed(store):
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = rank_one(store, 0, ended.pid)
    here.store = Gone()
    with pytest.raises(dist.DistNetworkError) as met:
        here.meet()
    for error in (met.value, RuntimeError("[gloo/transport/tcp/pair.cc] Connection reset by peer")):
        assert f"rank 0 (process {ended.pid} on {HOST}) is gone" in str(here.explain(error))
    assert "rank 0" in str(here.gone())
    here.goodbye()


def test_the_host_of_the_store_is_named_when_it_is_stopped(store):
    here = rank_one(store, 0, os.getppid())
    never = threading.Event()
    here.store = type("Silent", (), {name: lambda *_: never.wait() for name in ("check", "get", "set")})()
    assert "rank 0 hangs" in str(here.explain(RuntimeError("Application timeout caused pair closure")))
    here.goodbye()
    never.set()


def test_other_errors_are_nobodys_fault(store):
    here = rank_one(store, 0, os.getppid())
    assert here.explain(RuntimeError("shape mismatch")) is None and here.explain(ValueError("timed out")) is None
