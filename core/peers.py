"""What ranks know of each other beside their collectives: who is gone, who hangs, and a place to meet without haste.

A collective that waits for longer than `train.rank_timeout` fails, which is right in a training step. Ranks that wait for
work of uneven length (the share of a cache, a checkpoint, the numbers of an evaluation) meet through the store instead,
for as long as everybody lives.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from core.errors import UserError, first_line
from core.lock import lives

_BEAT_SECONDS = 5.0  # between two notes of how far a rank is
_POLL_SECONDS = (0.0005, 0.1)  # while waiting: first and longest pause
_LOOK_SECONDS = 1.0  # between two looks at whether all live
_KEPT = "Checkpoints and finished pieces are kept; run the same command again to continue."
# How collectives say that a connection broke or that nobody came.
_BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error", "Socket Timeout")
_BROKEN += ("Connection was likely closed",)
_WAITED = (
    "Timed out waiting",
    "timed out",
    "Watchdog caught collective operation timeout",
    "Application timeout caused",
)


class OtherRankFailed(UserError):
    """This rank is well; another one has said what is wrong."""


class RankGone(OtherRankFailed):
    """Another rank has ended without a word, or hangs."""

    exit_code = 1


class Peers:
    """The ranks of one program, through the store that they met at.

    Args:
        store: of torch.distributed; keys of ours begin with "tessera/".
        timeout_minutes: for which a collective waits.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout_minutes: float):
        self.store, self.rank, self.size, self.timeout_minutes = store, rank, size, timeout_minutes
        self.reached = 0  # collectives that this rank has come to
        self._meetings = 0
        self._places: list[tuple[str, int]] = []  # host and process of every rank; [] until all have said
        self._set("place", f"{os.uname().nodename} {os.getpid()}")
        threading.Thread(target=self._beat, args=(store.clone(),), name="peers", daemon=True).start()

    def _set(self, name: str, value: str) -> None:
        self.store.set(f"tessera/{name}/{self.rank}", value)

    def _get(self, name: str, rank: int) -> str:
        """What a rank has set; "" where it has not."""
        key = f"tessera/{name}/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _beat(self, store: Any) -> None:
        """Note again and again that this rank lives and how far it is. Learn first who the others are: the store may be
        the first to go."""
        try:
            places = store.multi_get([f"tessera/place/{rank}" for rank in range(self.size)])
            self._places = [(host, int(process)) for host, process in (place.decode().split() for place in places)]
            for beat in itertools.count():
                store.set(f"tessera/beat/{self.rank}", f"{beat} {self.reached}")
                time.sleep(_BEAT_SECONDS)
        except Exception:  # the store has ended with its host
            return

    def goodbye(self) -> None:
        """This rank ends of its own will, and has said why."""
        _answer(lambda: self._set("left", "yes"), _LOOK_SECONDS)

    def count_once(self, topic: str, key: str = "") -> int:
        """How many different keys all ranks have named under a topic, with this one if it is not "". Asks the store alone:
        no rank waits for another."""
        import hashlib  # loads OpenSSL, which --help does without

        name = hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=12).hexdigest()
        is_new = bool(key) and self.store.add(f"tessera/{topic}/{name}", 1) == 1
        return self.store.add(f"tessera/{topic}", int(is_new))

    def lost(self) -> str | None:
        """Names a rank of this machine whose process ended without a word; None where all live."""
        for rank, (host, process) in enumerate(self._places):
            if rank != self.rank and host == os.uname().nodename and not lives(process) and not self._has_left(rank):
                return f"rank {rank} (process {process} on {host}) is gone: killed, or out of memory"
        return None

    def _has_left(self, rank: int) -> bool:
        with contextlib.suppress(Exception):  # the store has ended with its host
            return bool(self._get("left", rank))
        return False

    def gone(self) -> RankGone | None:
        """What to raise where a rank has ended without a word."""
        reason = _answer(self.lost, _LOOK_SECONDS)
        return RankGone(f"{reason}. {_KEPT}") if isinstance(reason, str) else None

    def left(self) -> str | None:
        """Names a rank that ended of its own will; None where none did."""
        for rank in range(self.size):
            if rank != self.rank and self._get("left", rank):
                return f"rank {rank} failed; its message says why"
        return None

    def behind(self) -> str | None:
        """Names the ranks that have not come to the collective at which this one waits, or that give no sign of life."""
        before = [self._get("beat", rank) for rank in range(self.size)]
        time.sleep(2 * _BEAT_SECONDS + 1)  # until all have noted how far they are, also on a busy machine
        beats = [self._get("beat", rank) or "0 0" for rank in range(self.size)]
        late = [rank for rank in range(self.size) if int(beats[rank].split()[1]) < self.reached]
        silent = [rank for rank in range(self.size) if rank != self.rank and beats[rank] == before[rank]]
        what = f"did not come to a step of all ranks within train.rank_timeout={self.timeout_minutes:g} minutes"
        if not late and not silent:
            return None
        where = [(rank, *self._get("place", rank).split()) for rank in late or silent]
        places = ", ".join(f"{rank} ({host}, process {process})" for rank, host, process in where)
        return f"rank {places} {what if late else f'{what} and gives no sign of life'}"

    def meet(self) -> None:
        """Wait for all ranks, however long they are at work; UserError once one of them is gone."""
        self._meetings += 1
        key = f"tessera/meeting/{self._meetings}"
        self.store.add(key, 1)
        pause, looked = _POLL_SECONDS[0], time.monotonic()
        while self.store.add(key, 0) < self.size:
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS[1])
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                reason = self.lost() or self.left()
                if reason and self.store.add(key, 0) < self.size:
                    raise RankGone(f"{reason}. {_KEPT}")

    def explain(self, error: BaseException) -> RankGone | None:
        """What to raise for an exception of a collective that other ranks are to blame for; None for other exceptions."""
        if not isinstance(error, RuntimeError):  # as all errors of collectives are
            return None
        text = f"{type(error).__name__}: {error}"
        is_broken, waited = (any(sign in text for sign in signs) for signs in (_BROKEN, _WAITED))
        if not is_broken and not waited:
            return None
        reason = _answer(lambda: self._reason(waited), 4 * _BEAT_SECONDS)
        if reason is _SILENCE:
            reason = "rank 0 hangs: the store where ranks meet, which it or its launcher keeps, does not answer"
        reason = reason or f"another rank is gone or hangs ({first_line(error)[:200]})"
        return RankGone(f"{reason}. {_KEPT}")

    def _reason(self, waited: bool) -> str | None:
        time.sleep(0.2)  # a killed process is not gone at once
        return self.lost() or self.left() or (self.behind() if waited else None)


_SILENCE = object()


def _answer(question: Callable[[], Any], seconds: float) -> Any:
    """What question() returns; None where it fails, _SILENCE where it takes longer: the host of a store may be stopped."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception:
            answers.append(None)

    thread = threading.Thread(target=ask, name="question to the store", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else _SILENCE
