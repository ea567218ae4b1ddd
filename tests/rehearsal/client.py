"""The interpreter that the shell scripts start in a rehearsal: hands its arguments to server.py and ends as that ends."""

import array
import json
import os
import signal
import socket
import sys


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or (
        arguments[0].startswith("-") and not (arguments[0] == "-m" and arguments[1].startswith("scripts."))
    ):
        os.execv(sys.executable, [sys.executable, *arguments])
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ["TESSERA_REHEARSAL_SERVER"])
    request = {"argv": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    files = array.array("i", [0, 1, 2])
    server.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    answers = server.makefile()
    child = int(answers.readline())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda got, _: os.kill(child, got))
    code = int(answers.readline() or 75)  # nothing from a server that was stopped with us
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
