"""Locks on folders: the second program is refused while the first lives, and only then."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from core import lock as lock_module
from core.errors import UserError
from core.lock import Lock
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from core.lock import Lock
Lock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_program_is_refused_until_the_first_is_gone(tmp_path, holder):
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on {os.uname().nodename}"):
        Lock(tmp_path).take()
    holder.send_signal(signal.SIGKILL)  # leaves its file behind
    holder.wait()
    lock = Lock(tmp_path)
    lock.take()
    lock.release()
    assert not (tmp_path / ".owner").exists()


def test_a_number_that_was_given_again(tmp_path, holder):
    """The process lives, but it is another one than the owner of that number."""
    owner = json.loads((tmp_path / ".owner").read_text())
    (tmp_path / ".owner").write_text(json.dumps({**owner, "started": "1"}))
    Lock(tmp_path).take()


def test_a_copy_is_free_and_a_moved_folder_is_not(tmp_path, holder):
    """Of a folder in which somebody is at work."""
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}_copy"))
    lock = Lock(tmp_path.with_name(f"{tmp_path.name}_copy"))
    lock.take()
    lock.release()
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}_moved"))
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
        Lock(moved).take()


def test_an_owner_that_does_not_tell_its_folder(tmp_path, holder):
    """As earlier versions write it."""
    owner = json.loads((tmp_path / ".owner").read_text())
    del owner["folder"]
    (tmp_path / ".owner").write_text(json.dumps(owner))
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
        Lock(tmp_path).take()


@pytest.mark.parametrize("lives", [True, False])
def test_an_owner_on_another_host_is_watched(tmp_path, lives, monkeypatch):
    """Whatever its clock says."""
    monkeypatch.setattr(lock_module, "WATCH", 2.0)
    file = tmp_path / ".owner"
    file.write_text(json.dumps({"host": "elsewhere", "process": 1, "started": "1"}))
    os.utime(file, (time.time() + 5000,) * 2)
    if lives:
        threading.Timer(0.5, os.utime, (file, (1, 1))).start()
        with pytest.raises(UserError, match="in use by process 1 on elsewhere"):
            Lock(tmp_path).take()
    else:
        Lock(tmp_path).take()


def test_the_time_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "RENEW", 0.05)
    lock = Lock(tmp_path)
    lock.take()
    os.utime(tmp_path / ".owner", (1, 1))
    until = time.monotonic() + 30
    while (tmp_path / ".owner").stat().st_mtime < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert (tmp_path / ".owner").stat().st_mtime > 2
    lock.release()


@pytest.mark.parametrize("text", ["", "x", "[]", '{"host": "a"}'])
def test_a_damaged_file_stops_nobody(tmp_path, text):
    (tmp_path / ".owner").write_text(text)
    Lock(tmp_path).take()


def test_what_somebody_else_holds_is_not_released(tmp_path):
    lock = Lock(tmp_path)
    lock.take()
    (tmp_path / ".owner").write_text("of somebody else")
    lock.release()
    assert (tmp_path / ".owner").exists()


def test_two_trainings_in_one_folder(tmp_path, holder):
    config = ["configs/toy/rectok_tokenizer.yaml", f"work_dir={tmp_path.parent}", f"name={tmp_path.name}"]
    program = [sys.executable, "-m", "scripts.train", *config, "train.device=cpu", "train.duration=1step"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and f"is in use by process {holder.pid}" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == [".owner"]
    holder.kill()
    holder.wait()
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not (tmp_path / ".owner").exists(), done.stderr
