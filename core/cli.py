"""How every script ends: 0 done, 2 the user can fix it (one sentence), 75 stopped on request: run the same again.

TESSERA_TRACEBACK=1 shows where a sentence came from.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from core import caller, launch
from core.errors import UserError, lost_worker
from core.files import ADVICE, MACHINES_FAULTS, ROOT, misplaced
from core.peers import OtherRankFailed
from core.signals import REQUEUE_EXIT_CODE, Stopped, StopRequest, ignore_signals, insist, words

SHOWN_NAME = 300  # characters of a file's name in a message
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what steers a terminal; names of files may have it


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call main(arguments) and exit. A UserError becomes its message on stderr and exit code 2, a signal 75."""
    _open_outputs()
    message, ending, echo = "", {"code": 1}, False  # 1 of an exception that nobody catches
    if launch.is_one_of_several():
        # What is registered first is called last: when other threads have ended and everything else was tidied up.
        atexit.register(lambda: leave(ending["code"]))
    insist(_leave_bereft, _leave_stopped)
    try:
        _refuse_another_clone(Path(sys.argv[0]))
        code = _until_stopped(main)
    except Stopped as stopped:
        code, message = REQUEUE_EXIT_CODE, words(str(stopped))
    except UserError as error:
        if os.environ.get("TESSERA_TRACEBACK"):
            raise
        code, message = error.exit_code, f"error: {error}"
        echo = type(error) is OtherRankFailed
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        sys.stderr.close()
        code = 1
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except SystemExit as error:  # argparse's
        ending["code"] = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    _report(code, message, echo)
    ending["code"] = code
    atexit.register(ignore_signals)  # what is called first: the work is done, and taking libraries apart takes its time
    sys.exit(code)


def _until_stopped(main: Callable[[list[str]], int | None]) -> int:
    """What main(arguments) returns; Stopped as soon as a signal asks for it, RankGone where another rank has died."""
    with StopRequest(at_once=True) as request:
        try:
            return main(caller.from_caller(sys.argv[1:])) or 0
        except (Exception, Stopped) as error:
            request.at_once = False  # the reason is being looked for
            if (gone := _of_other_ranks(error)) is not None:
                raise gone from None
            # Stopped in the middle of an import, say, others turn into errors of their own.
            if isinstance(error, Stopped):
                raise
            if (reason := request.requested()) is None:
                explained = lost_worker(error) or _machines_fault(error) or _lacking(error)
                raise (explained or error) from error.__cause__
            raise Stopped(reason) from None


def _peers() -> Any | None:
    """What this process knows of the other ranks (core/peers.py); None where there are none."""
    look = getattr(sys.modules.get("core.dist"), "peers", None)  # the module may be half imported when a signal comes
    return look() if look is not None else None


def _of_other_ranks(error: BaseException) -> UserError | None:
    """What to say where another rank is to blame; None where none is.

    When a rank has died, a launcher asks the others to stop.
    """
    if (peers := _peers()) is None:
        return None
    causes = [cause for cause in (error, error.__context__) if cause is not None]
    reasons = (peers.gone() if isinstance(cause, Stopped) else peers.explain(cause) for cause in causes)
    return next((reason for reason in reasons if reason is not None), None)


def _machines_fault(error: Exception) -> UserError | None:
    """A sentence about a full disk and the like, wherever it was met; None for errors that programs make."""
    if not isinstance(error, OSError):
        return None
    if problem := misplaced(error):
        return UserError(problem)
    if error.errno not in MACHINES_FAULTS:
        return None
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    place = f"{name if len(name) <= SHOWN_NAME else name[:SHOWN_NAME] + ' ...'}: " if name else ""
    return UserError(f"{place}{ADVICE[error.errno]}.")


def _lacking(error: Exception) -> UserError | None:
    """A sentence about a Python without the packages that requirements.txt lists; None for other errors."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package, ours = error.name.partition(".")[0], {folder.parent.name for folder in ROOT.glob("*/__init__.py")}
    if package in ours:
        return None
    chosen = os.environ.get("TESSERA_PYTHON", "")
    if not chosen:
        other = f"Use {ROOT / '.venv/bin/python'}, which run_*.sh make, or install"
    elif os.path.abspath(shutil.which(chosen) or chosen) == os.path.abspath(sys.executable):
        other = "TESSERA_PYTHON names this one: unset it, and run_*.sh make one that has all, or install"
    else:
        other = f"Use {chosen}, which TESSERA_PYTHON names, or install"
    return UserError(
        f"{sys.executable} has no package {package}. {other} what {ROOT / 'requirements.txt'} lists (pip install -r)."
    )


def _open_outputs() -> None:
    """Let output be written wherever it goes: to nowhere if it was closed (>&-), and names that the terminal's encoding does
    not have, with escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the program
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _report(code: int, message: str, echo: bool = False) -> None:
    """Say why this program ends, as the last thing that the user sees.

    Launchers print tracebacks of their own when a process fails, and turn every failure into exit code 1. Under run_*.sh
    the first rank to fail, which need not be the main one, leaves code and sentence to scripts/launch.sh, which ends with
    them. Under torchrun itself the sentence goes into the last lines of its report.

    Args:
        echo: the sentence only says that another rank has one.
    """
    if (peers := _peers()) is not None:
        peers.goodbye()
    if not code:
        return
    message = _UNSEEN.sub(lambda found: repr(found[0])[1:-1], message)
    if (exit_file := os.environ.get("TESSERA_EXIT_FILE")) is None:
        if message and launch.speaks():
            print(message, file=sys.stderr, flush=True)
        if message and not echo:
            launch.tell_torchrun(message)
    elif not echo and _is_first(exit_file):
        Path(exit_file).write_text(f"{code}\n{message}\n", encoding="utf-8", errors="backslashreplace")


def _leave_bereft(_: str) -> None:
    """End a program that a launcher tells to because another rank has died, also where it waits for that one."""
    if (peers := _peers()) is not None and (gone := peers.gone()) is not None:
        _report(gone.exit_code, f"error: {gone}")
        leave(gone.exit_code)


def _leave_stopped(name: str) -> NoReturn:
    """End a program that was asked to stop and is still inside one long call."""
    _report(REQUEUE_EXIT_CODE, words(f"received {name}"))
    leave(REQUEUE_EXIT_CODE)


def _refuse_another_clone(program: Path) -> None:
    """`python scripts/NAME.py` finds the packages through the environment, which may be that of another clone."""
    if program.parent.name == "scripts" and program.resolve().parents[1] != ROOT:
        raise UserError(
            f"{program} would run with the packages of {ROOT}, whose environment this is. Start it from its own folder as "
            f"python -m scripts.{program.stem}"
        )


def leave(code: int) -> NoReturn:
    """End this process before the interpreter is taken apart.

    A rank of several has threads of gloo or NCCL, which destroy_process_group does not end while anything (FSDP's
    caches, default arguments in torch.distributed.nn) refers to the group. One that drops a tensor during the
    interpreter's shutdown aborts the process, and work that is done would be reported as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the reader went away, or `run` closed it
            stream.flush()
    os._exit(code)


def _is_first(exit_file: str) -> bool:
    """Whether this is the first rank of its node to end with a code.

    An unreadable picture, say, ends one rank; the others then die of its silence and know nothing of the reason.
    """
    try:
        Path(f"{exit_file}.claimed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
