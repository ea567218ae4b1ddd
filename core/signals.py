"""Polite stopping: how a signal or the time limit ends any program, with nothing lost.

Nothing is written inside a signal handler. Every program runs inside one StopRequest (core/cli.py), which turns a signal
into the exception `Stopped` wherever the program is, so that start-up and short work end within a second. Where something
would be lost by that, another StopRequest is open inside it: the training loop and work in chunks (core/chunks.py) read
its flag between two pieces and keep what is done; on one rank a piece that takes longer than GRACE_SECONDS is given up.
Either way the exit code is REQUEUE_EXIT_CODE, which tells a scheduler to start the same command again.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import Any

from core.errors import UserError

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
GO_ON = "run the same command again to continue"
# A main thread that is inside one long call (a matrix root, a wait for another rank) cannot run Python's handler.
LOOK_SECONDS, GRACE_SECONDS = 2.0, 15.0
LOADING_SECONDS = 0.05  # between two looks at whether a compiled module is loaded
# torchrun repeats a Ctrl-C to its workers, which the terminal has already told: so soon it is the same one.
_SAME_KEYPRESS_SECONDS = 0.5
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class Stopped(BaseException):
    """A stop was asked for. What is done is kept; the same command goes on with the rest.

    Like KeyboardInterrupt it is no Exception: whoever replaces a picture that cannot be decoded must not take this for
    one.
    """


class StopRequest:
    """Collects the wish to stop while it is open as a context manager; old handlers come back when it closes.

    One that is opened inside another takes its place, knows what that one has heard, and hands on what it heard, except to
    one that is `at_once`: whoever opened it raises Stopped then, or fails otherwise, which hands it on. Outside the main thread, which alone receives signals, it does nothing.

    Args:
        time_limit_minutes: stop this long after construction. None: no limit.
        at_once: the first signal also raises Stopped, wherever the main thread is.
        at_last: GRACE_SECONDS after the first signal Stopped is raised there, too, under `insist`.
    """

    innermost: StopRequest | None = None

    def __init__(self, time_limit_minutes: float | None = None, at_once: bool = False, at_last: bool = False):
        self.time_limit_minutes, self.at_once, self.at_last = time_limit_minutes, at_once, at_last
        self._start = time.monotonic()
        self._signal: str | None = None
        self._interrupted: float | None = None  # when the first Ctrl-C came
        self._again = False
        self.late = False  # `finishing`
        self._previous: dict[int, Any] = {}
        self._outer: StopRequest | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._outer, StopRequest.innermost = StopRequest.innermost, self
            # What was heard before counts: at the end of a step, before an evaluation; or Stopped was raised in the
            # middle of an import of others, who let no exception through.
            self._signal = self._signal or (self._outer._signal if self._outer is not None else None)
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back by it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._previous:
            StopRequest.innermost = self._outer
            # A terminal's Ctrl-C also ends the compilers that work for us: what they then fail with is the stop.
            failed = kind is not None and issubclass(kind, Exception) and not issubclass(kind, UserError)
            if self._outer is not None and (failed or not self._outer.at_once):
                self._outer._signal = self._outer._signal or self._signal
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
            elif now - self._interrupted > _SAME_KEYPRESS_SECONDS:
                raise KeyboardInterrupt  # the second Ctrl-C means: now
        if self.late:
            return
        is_first = self._signal is None
        self._signal = self._signal or signal.Signals(number).name
        if (is_first or self._again) and self.at_once:
            self._again = _is_loading_extension(frame)
            if not self._again:
                raise Stopped(self.requested())
            later = threading.Timer(LOADING_SECONDS, _thread.interrupt_main, (signal.SIGTERM,))
            later.daemon = True
            later.start()

    def insist(self) -> None:
        """From another thread: raise Stopped once more. Somebody caught the first one, as some modules do while they load."""
        self._again = True
        _thread.interrupt_main(signal.SIGTERM)

    def requested(self) -> str | None:
        """Why to stop, as words for the log, or None to go on."""
        if self._signal is not None:
            return f"received {self._signal}"
        if self.time_limit_minutes is not None and time.monotonic() - self._start >= self.time_limit_minutes * 60:
            return f"reached the time limit of {self.time_limit_minutes:g} minutes"
        return None


def ignore_signals() -> None:
    """For a process that is about to end with a code of its own."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """A piece of work in the middle of which Stopped is not raised; what is heard meanwhile is raised, or handed on, behind it.

    A mask of the main thread is not enough: the system then gives the signal to another thread, and Python's handler runs
    in the main one all the same.
    """
    with StopRequest() as request:
        yield
    outer = StopRequest.innermost
    if outer is not None and outer.at_once and (reason := request.requested()):
        raise Stopped(reason)


def finishing() -> None:
    """To be called before the file appears with which the same command would be refused, or answered as done: a stop comes too
    late from here on, and the program ends as done. A second Ctrl-C still means now."""
    if StopRequest.innermost is not None:
        StopRequest.innermost.late = True


def _is_loading_extension(frame: FrameType | None) -> bool:
    """Whether a compiled module is just being made. Some C++ then lets no exception through (nanobind's, Triton's): it aborts
    the process."""
    while frame is not None:
        loads = frame.f_code.co_name in ("create_module", "exec_module")
        if loads and isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


_wakeup: list[socket.socket] = []  # where signals arrive in the process that watches them


def insist(look: Callable[[str], None], leave: Callable[[str], None]) -> None:
    """Watch from a thread that signals are obeyed, from now to the end of this process.

    Args:
        look: called with the signal's name, LOOK_SECONDS after it. May end the process.
        leave: called with the signal's name, GRACE_SECONDS after it, where the program should have stopped at once and
            has not. Ends the process.
    """
    if _wakeup or threading.current_thread() is not threading.main_thread():
        return
    _wakeup.extend(socket.socketpair())
    heard, teller = _wakeup
    teller.setblocking(False)
    signal.set_wakeup_fd(teller.fileno(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)

    def watch() -> None:
        while number := heard.recv(1):
            if number[0] not in _SIGNALS:
                continue
            name, request = signal.Signals(number[0]).name, StopRequest.innermost
            time.sleep(LOOK_SECONDS)
            look(name)
            if request is not None and request.at_last and request is StopRequest.innermost:
                time.sleep(GRACE_SECONDS - LOOK_SECONDS)
                request.at_once = request is StopRequest.innermost
            # A program that has ended may live on, in a notebook or a test; a loop inside it stops by itself.
            if request is not None and request.at_once and not request.late and request is StopRequest.innermost:
                request.insist()
                time.sleep(GRACE_SECONDS - LOOK_SECONDS)
                if request is StopRequest.innermost:
                    leave(name)

    threading.Thread(target=watch, name="signals", daemon=True).start()


def _forget() -> None:
    """In a forked child: a worker's signals are not ours."""
    if _wakeup:
        signal.set_wakeup_fd(-1)
        _wakeup.clear()


def words(reason: str) -> str:
    """The one sentence of a program that was stopped."""
    return f"stopped ({reason}); {GO_ON}"
