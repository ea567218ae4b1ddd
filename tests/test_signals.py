"""Polite stopping: signals and the time limit set a flag and nothing else."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from core.train.signals import REQUEUE_EXIT_CODE

ROOT = Path(__file__).resolve().parent.parent

LOOP = """
    import signal, sys, time
    from core.train.signals import REQUEUE_EXIT_CODE, StopRequest
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(float(sys.argv[1]) if len(sys.argv) > 1 else None) as request:
        print("ready", flush=True)
        while not (reason := request.requested()) or "wait" in sys.argv[2:]:
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) == before
    print(reason)
    sys.exit(REQUEUE_EXIT_CODE)
"""


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(LOOP), *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_set_a_flag(name):
    process = start()
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == (f"received {name}\n", REQUEUE_EXIT_CODE) and REQUEUE_EXIT_CODE == 75


def test_time_limit():
    process = start("0.003")
    out, _ = process.communicate(timeout=20)
    assert process.returncode == REQUEUE_EXIT_CODE and "time limit of 0.003 minutes" in out


def test_second_interrupt_means_now():
    process = start("99", "wait")
    assert process.stdout.readline() == "ready\n"
    for pause in (0.1, 0.7, 0.0):  # the second comes within the same keypress, as under torchrun
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors and process.returncode != REQUEUE_EXIT_CODE
