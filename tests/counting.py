"""Effort without a clock: how many calls a piece of code makes, which is the same on a busy machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Calls:
    """How many functions were called so far, Python's and C's."""

    count = 0


@contextmanager
def calls(most: int | None = None) -> Iterator[Calls]:
    """Count the calls of this thread. Beyond `most` the block fails there and then, so that nothing runs away."""
    counted = Calls()

    def note(_frame, event: str, _argument) -> None:
        if event in ("call", "c_call"):
            counted.count += 1
            if most is not None and counted.count > most:
                sys.setprofile(None)
                raise AssertionError(f"more than {most:,} calls")

    sys.setprofile(note)
    try:
        yield counted
    finally:
        sys.setprofile(None)
    assert most is None or counted.count <= most, f"more than {most:,} calls"
