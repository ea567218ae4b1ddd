"""tests/rehearsal/server.py: what it starts finds itself as in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import sys
sys.stderr.reconfigure(errors="backslashreplace")  # which asks where in the stream it is
print(sys.argv[1:], file=sys.stderr)
print(input(), flush=True)
raise SystemExit(3)
"""
SERVER = """
import os, sys
sys.path.insert(0, {root!r})
from tests.rehearsal import server
print("a line of the log", file=sys.stderr, flush=True)
pipes = [os.pipe() for _ in range(3)]
os.write(pipes[0][1], b"asked\\n")
if os.fork() == 0:
    server.run({{"environment": {{}}, "folder": "/", "argv": [{program!r}, "word"]}}, [pipes[0][0], pipes[1][1], pipes[2][1]])
code = os.waitstatus_to_exitcode(os.wait()[1])
print(code, *(os.read(pipe[0], 999).decode().strip() for pipe in pipes[1:]))
"""


def test_streams_of_another_kind_than_the_servers(tmp_path):
    """Its own go to a file, those of what it starts into pipes."""
    (tmp_path / "program.py").write_text(PROGRAM)
    text = SERVER.format(root=str(ROOT), program=str(tmp_path / "program.py"))
    with open(tmp_path / "log", "wb") as log:
        done = subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=log, text=True, timeout=20)
    assert done.stdout == "3 asked ['word']\n", (done.stdout, (tmp_path / "log").read_text())
