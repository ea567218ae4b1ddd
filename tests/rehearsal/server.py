"""Start our programs without importing torch each time: `python server.py PROJECT SOCKET`.

It imports the heavy modules once and forks for every request; the child then runs the program like a fresh interpreter:
its own argv, environment, working directory, stdin, stdout and stderr, and an exit code of its own. `client.py` stands in
for the interpreter (TESSERA_PYTHON), so that commands are given as users give them: bash run_train_ar.sh ...
"""

import array
import json
import os
import runpy
import signal
import socket
import sys
import traceback


def run(request: dict, files: list[int]) -> None:
    """In the child: become `python ARGV`."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    # New streams: the server's own go into a file, in which they remember their place.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = open(number, "w" if number else "r", 1 if number == 2 else -1, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["argv"]
    code = 1
    try:
        if sys.argv[0] == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(project: str, place: str) -> None:
    os.chdir(project)
    sys.path.insert(0, project)
    import timm  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torchvision  # noqa: F401

    from run import (
        estimate,  # noqa: F401
        evaluate,  # noqa: F401
        train,
    )

    assert train.__file__.startswith(project), train.__file__
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the programs, which need their answers
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    listener.settimeout(10)
    parent = os.getppid()
    print("ready", flush=True)
    while os.getppid() == parent:  # else the house was killed and nobody will ask again
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        connection.setblocking(True)
        if os.fork() == 0:  # one process per request waits for its program, so that several can run
            listener.close()
            handle(connection)
            os._exit(0)
        connection.close()
        while True:  # bury those that are done
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def handle(connection: socket.socket) -> None:
    message, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    files = array.array("i")
    for _, _, data in ancillary:
        files.frombytes(data)
    child = os.fork()
    if child == 0:
        connection.close()
        run(json.loads(message), list(files))
    for file in files:
        os.close(file)
    connection.sendall(f"{child}\n".encode())  # for signals
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    connection.sendall(f"{code}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
