"""Polite stopping: signals and the time limit only set a flag, which the trainer reads between two steps.

Nothing is written inside a signal handler. After a requested stop the trainer saves and exits with REQUEUE_EXIT_CODE,
which tells a scheduler to start the same command again.
"""

from __future__ import annotations

import signal
import time
from typing import Any

REQUEUE_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
# torchrun repeats a Ctrl-C to its workers, which the terminal has already told: so soon it is the same one.
_SAME_KEYPRESS_SECONDS = 0.5
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Collects the wish to stop while it is open as a context manager; old handlers come back when it closes.

    Args:
        time_limit_minutes: stop this long after construction. None: no limit.
    """

    def __init__(self, time_limit_minutes: float | None = None):
        self.time_limit_minutes = time_limit_minutes
        self._start = time.monotonic()
        self._signal: str | None = None
        self._interrupted: float | None = None  # when the first Ctrl-C came
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back by it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, _frame) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
            elif now - self._interrupted > _SAME_KEYPRESS_SECONDS:
                raise KeyboardInterrupt  # the second Ctrl-C means: now
        self._signal = self._signal or signal.Signals(number).name

    def requested(self) -> str | None:
        """Why to stop, as words for the log, or None to go on."""
        if self._signal is not None:
            return f"received {self._signal}"
        if self.time_limit_minutes is not None and time.monotonic() - self._start >= self.time_limit_minutes * 60:
            return f"reached the time limit of {self.time_limit_minutes:g} minutes"
        return None
