"""Programs started in forks of a process that has imported everything: hundreds of starts cost what a few do."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import sys
import time
from pathlib import Path

MEMORY = 12 << 30


def warm_up() -> None:
    """Import what the programs import, once for all forks, and keep them off GPU and network."""
    import torch

    from tests.tools import preloaded  # noqa: F401

    torch.set_num_threads(1)
    os.environ.update(CUDA_VISIBLE_DEVICES="", TESSERA_OFFLINE="1", OMP_NUM_THREADS="1")


def start(program: str, arguments: list[str], folder: Path, seconds: int) -> tuple[int | str, str]:
    """(exit code, or "hangs", or a signal; what it printed) of `python -m PROGRAM ARGUMENTS` in `folder`.

    Args:
        seconds: of processor time; what sleeps for ten times as long hangs as well.
    """
    output = folder.parent / f"{folder.name}.output.txt"
    child = os.fork()
    if child == 0:
        _become(program, arguments, folder, output, seconds)
    try:
        status = _wait(child, 10 * seconds)
    except BaseException:  # we are stopped
        _end(child)
        raise
    if status is None:
        _end(child)
    said = output.read_text(errors="replace") if output.exists() else ""
    if status is not None and not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status), said
    number = signal.SIGKILL if status is None else signal.Signals(os.WTERMSIG(status))
    return "hangs" if number in (signal.SIGXCPU, signal.SIGKILL) else number.name, said


def _wait(child: int, seconds: float) -> int | None:
    """How it ended, as os.waitpid has it; None where it did not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.02)
    return None


def _end(child: int) -> None:
    """The group that it leads; before it leads one, itself."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # it has ended, and we were stopped before we took note
        os.waitpid(child, 0)


def _become(program: str, arguments: list[str], folder: Path, output: Path, seconds: int) -> None:
    """What the fork does. It does not return."""
    code = 1
    try:
        sink = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(sink, 1), os.dup2(sink, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(folder)
        import torch

        from core import cli

        torch.set_num_threads(1)  # makes the fork's pool anew while there is one thread: two at once get none and abort
        sys.argv = [program, *arguments]
        cli.run(importlib.import_module(program).main)
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
