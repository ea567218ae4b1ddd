"""tests/rehearsal/server.py: what it starts finds itself as in a fresh interpreter."""

from __future__ import annotations

import os
import socket
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


def test_a_server_that_is_gone_is_a_stop(tmp_path):
    """Of the whole rehearsal: no traceback."""
    place = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen()
        command = [sys.executable, str(ROOT / "tests" / "rehearsal" / "client.py"), "-m", "scripts.sample"]
        environment = {**os.environ, "TESSERA_REHEARSAL_SERVER": place}
        client = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        connection, _ = server.accept()
        connection.recv(1 << 16)
        connection.sendall(b"12345\n")
        connection.close()
        _, said = client.communicate(timeout=20)
    assert (client.returncode, said) == (75, "")


def test_a_ctrl_c_reaches_the_program_and_not_the_server(tmp_path):
    """The handler of the server's own is not the program's."""
    told = "import os, signal\nfor f in (1, 2): os.write(f, signal.getsignal(signal.SIGINT).__name__.encode())\n"
    (tmp_path / "program.py").write_text(told)
    text = SERVER.format(root=str(ROOT), program=str(tmp_path / "program.py"))
    text = text.replace("pipes =", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); pipes =", 1)
    done = subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, timeout=20)
    assert done.stdout.startswith("0 default_int_handler")
