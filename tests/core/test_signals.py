"""Polite stopping: signals and the time limit set a flag and nothing else."""

import contextlib
import signal
import subprocess
import sys
import textwrap
import time
import types
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import pytest

from core import signals
from core.signals import REQUEUE_EXIT_CODE, Stopped, StopRequest

ROOT = Path(__file__).resolve().parents[2]

LOOP = """
    import signal, sys, time
    from core.signals import REQUEUE_EXIT_CODE, StopRequest
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        print("ready", flush=True)
        while not (reason := request.requested()):
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) == before
    print(reason)
    sys.exit(REQUEUE_EXIT_CODE)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_set_a_flag(name):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOOP)], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=600)
    assert (out, process.returncode) == (f"received {name}\n", REQUEUE_EXIT_CODE) and REQUEUE_EXIT_CODE == 75


def test_time_limit(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    request = StopRequest(2.5)
    now += 149.0
    assert request.requested() is None
    now += 1.0
    assert request.requested() == "reached the time limit of 2.5 minutes"


class Compiled(ExtensionFileLoader):
    """Stands for one that aborts the process at an exception."""

    def exec_module(self, module) -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(3 * signals.LOADING_SECONDS)
        module.whole = True


def test_a_compiled_module_is_loaded_before_the_stop():
    module = types.SimpleNamespace()
    with StopRequest(at_once=True):
        with pytest.raises(Stopped, match="received SIGTERM"):
            Compiled("name", "path").exec_module(module)
            for _ in range(1000):
                time.sleep(0.01)
        assert module.whole
        with pytest.raises(Stopped):  # which a later one still does at once
            signals.StopRequest.innermost._signal = None
            signal.raise_signal(signal.SIGTERM)


def test_what_was_heard_is_not_forgotten():
    """Before an evaluation begins; and where Stopped was raised inside an import that lets no exception through."""
    for at_once in (False, True):
        with StopRequest(at_once=at_once) as outer:
            with contextlib.suppress(Stopped):
                signal.raise_signal(signal.SIGTERM)
            with StopRequest() as inner:
                assert inner.requested() == outer.requested() == "received SIGTERM"
    with StopRequest() as later:
        assert later.requested() is None


def test_second_interrupt_means_now(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    with StopRequest() as request:
        signal.raise_signal(signal.SIGINT)
        now += 0.1
        signal.raise_signal(signal.SIGINT)  # within the same keypress, as under torchrun
        assert request.requested() == "received SIGINT"
        now += 0.7
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


LIVES_ON = """
import os, signal, sys, time
from core import cli, signals
signals.LOOK_SECONDS, signals.GRACE_SECONDS = 0.1, 0.3

def main(_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)

try:
    cli.run(main)
except SystemExit as stopped:
    print("ended with", stopped.code, flush=True)
time.sleep(1)
print("lives", flush=True)
"""


def test_a_process_outlives_a_program_that_was_stopped_in_it():
    """As a notebook does."""
    done = subprocess.run([sys.executable, "-c", LIVES_ON], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout == "ended with 75\nlives\n", done.stdout + done.stderr


LONG_PIECE = """
import os, signal, time
from core import cli, signals
from core.chunks import ALONE, Chunks
signals.LOOK_SECONDS, signals.GRACE_SECONDS = 0.1, GRACE

def main(_):
    job = Chunks(2, 1, ALONE)

    def share(mine):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(PAUSES):  # the handler runs between two of them, and only notes the signal
            time.sleep(0.01)
        print("piece kept", flush=True)
        job.advance(1)

    job.run(share)

cli.run(main)
"""


@pytest.mark.parametrize(("pauses", "grace", "kept"), [("10", "600", "piece kept\n"), ("60000", "0.3", "")])
def test_a_piece_is_finished_unless_it_takes_too_long(pauses, grace, kept):
    code = LONG_PIECE.replace("PAUSES", pauses).replace("GRACE\n", f"{grace}\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (75, kept), done.stdout + done.stderr
    assert done.stderr == "stopped (received SIGTERM); run the same command again to continue\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_behind_the_end_changes_no_exit_code(name):
    """While libraries are being taken apart: the work is done, and a scheduler must not start it again."""
    code = f"""
        import atexit, signal
        from core import cli

        def main(_):
            atexit.register(signal.raise_signal, signal.{name})
            print("done")

        cli.run(main)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_when_the_work_is_done_comes_too_late(name):
    """The file is there with which the same command would be refused: 75 would promise that it goes on."""
    code = f"""
        import os, signal, time
        from core import cli, signals
        signals.LOOK_SECONDS, signals.GRACE_SECONDS = 0.1, 0.3

        def main(_):
            signals.finishing()
            os.kill(os.getpid(), signal.{name})
            for _ in range(100):
                time.sleep(0.01)
            print("done")

        cli.run(main)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_an_undivided_piece_is_finished_before_stopped_is_raised():
    done = []
    with StopRequest(at_once=True), pytest.raises(Stopped, match="SIGTERM"), signals.undivided():
        signal.raise_signal(signal.SIGTERM)
        done.append("finished")
    with StopRequest() as loop, signals.undivided():
        signal.raise_signal(signal.SIGUSR1)
    assert done == ["finished"] and loop.requested() == "received SIGUSR1"


FAILING = """
import os, signal
from core import cli
from core.errors import UserError
from core.signals import StopRequest

def main(_):
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ERROR

cli.run(main)
"""


@pytest.mark.parametrize("error, code", [("RuntimeError('g++ has failed')", 75), ("UserError('no such key')", 2)])
def test_what_fails_because_of_a_stop_is_the_stop(error, code):
    """A signal of the whole group ends the compiler that a step waits for; mistakes of users are still told."""
    program = [sys.executable, "-c", FAILING.replace("ERROR", error)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert ("no such key" if code == 2 else "received SIGTERM") in done.stderr
