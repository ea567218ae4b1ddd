"""One program at a time writes into a folder, also where several machines share the disk.

The first to come leaves `.owner` there, with its host and process, and renews the file's time while it lives. A second one
is refused as long as that lasts: on the same host the system is asked; on another one the file is watched for a minute,
which needs no clocks that agree, and a job that a scheduler moves to another node after a kill goes on after that minute.
A copy of a folder in which somebody is at work is free: the same file still lies where that program found its folder.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import UserError
from core.files import explain_os_errors, is_copied, write_atomic

if TYPE_CHECKING:
    from core.dist import World

RENEW, WATCH = 15.0, 60.0  # seconds


class Lock:
    """The right to write into `folder`. `take` it before the first file, `release` it after the last."""

    def __init__(self, folder: Path):
        self.file = folder / ".owner"
        self._me = {"host": os.uname().nodename, "process": os.getpid(), "started": _started(os.getpid())}
        self._me["folder"] = str(folder.resolve())
        self._released = threading.Event()

    def take(self) -> None:
        """UserError that names the program which is at work there, if one is."""
        with explain_os_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(self.file, "x", encoding="utf-8") as file:
                    json.dump(self._me, file)
            except FileExistsError:
                if (owner := self._living()) is not None:
                    raise UserError(
                        f"{self.file.parent} is in use by process {owner['process']} on {owner['host']}. Wait for it or "
                        f"stop it; if it is gone for good, delete {self.file}."
                    ) from None
                write_atomic(self.file, json.dumps(self._me))
        atexit.register(self.release)
        threading.Thread(target=self._renew, name="lock", daemon=True).start()

    def release(self) -> None:
        """Let others in. Again: nothing."""
        if not self._released.is_set() and os.getpid() == self._me["process"]:  # not from a forked worker
            self._released.set()
            if self._read() == self._me:
                self.file.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._released.wait(RENEW):
            with contextlib.suppress(OSError):
                os.utime(self.file)

    def _read(self) -> dict | None:
        try:
            owner = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        # an earlier version did not tell the folder
        return owner if isinstance(owner, dict) and owner.keys() | {"folder"} == self._me.keys() else None

    def _living(self) -> dict | None:
        owner = self._read()
        if owner is None or owner | {"folder": None} == self._me | {"folder": None}:
            return None
        if owner["host"] == self._me["host"]:
            if is_copied(self.file, owner.get("folder", "")):
                return None
            return owner if _started(owner["process"]) == owner["started"] is not None else None
        return owner if self._is_renewed(owner) else None

    def _is_renewed(self, owner: dict) -> bool:
        before, until = self._renewed(), time.monotonic() + WATCH
        print(
            f"{self.file.parent} was in use by process {owner['process']} on {owner['host']}; "
            f"looking for {WATCH:.0f} s whether it still is ...",
            flush=True,
        )
        while before is not None and time.monotonic() < until:
            time.sleep(min(1.0, WATCH / 10))
            if self._renewed() != before:
                return self._read() == owner
        return False

    def _renewed(self) -> int | None:
        try:
            with open(self.file, "rb") as file:  # opened, so that NFS asks its server
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Inside, no other program writes into `folder`; the main rank has its lock, for all of them. Collective."""
    lock = Lock(folder)
    world.on_main(lock.take)
    try:
        yield
    finally:
        lock.release()


def _started(process: int) -> str | None:
    """When a process of this host began, None for none: numbers are given again."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:  # no /proc, as on a Mac
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        pass
    return "unknown"


def lives(process: int) -> bool:
    """Whether a process of this machine is there and has not ended; one that nobody has waited for yet has."""
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's, or no /proc
        return True
