"""How programs end when the machine, the terminal or a decoding process is at fault."""

from __future__ import annotations

import errno
import re
import subprocess
import sys

import pytest

from core import cli
from core.train.run import RunFolder
from run.load import load_config
from tests.conftest import ROOT, TOY_TOKENIZER


def program(body: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess:
    """cli.run of a main with this body, started behind some shell redirections."""
    code = f"from core import cli\ndef main(_):\n    {body}\ncli.run(main)"
    return subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, code],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=120,
    )


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_odd_names_on_any_terminal(encoding):
    """Not of the terminal's letters, or of none at all, as file systems allow."""
    ended = program(r"print('Bäume', '\udcff.png')", PYTHONIOENCODING=encoding)
    shown = {"ascii": rb"B\xe4ume \udcff.png", "utf-8": "Bäume ".encode() + rb"\udcff.png"}[encoding]
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, shown, b"")
    refused = program(r"raise __import__('core.errors').errors.UserError('kein Bäume')", PYTHONIOENCODING=encoding)
    assert refused.returncode == 2 and refused.stderr.startswith(b"error: kein B") and refused.stderr.count(b"\n") == 1


def test_names_do_not_steer_the_terminal():
    refused = program(r"raise __import__('core.errors').errors.UserError('\x1b[31m\rä.png')", PYTHONIOENCODING="utf-8")
    assert refused.stderr == "error: \\x1b[31m\\rä.png\n".encode()


def test_closed_outputs():
    body = "import sys; print('x', flush=True); sys.stdout.isatty(); sys.stdout.flush(); print('e', file=sys.stderr)"
    assert program(body, ">&-").returncode == 0
    assert program(body, ">&- 2>&-").returncode == 0


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/a/b"), "error: /a/b: too many files are open. Raise the limit"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: the disk is full. Free some space"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 5000), "error: a{300} ...: the name is too long"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "ended by the system .Killed.. The mem",
        ),
    ],
)
def test_faults_of_the_machine_are_one_sentence(monkeypatch, capsys, error, sentence):
    def main(_):
        raise error

    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.delenv("TESSERA_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(sentence, said) and said.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "No such file"), RuntimeError("x"), KeyError("y")])
def test_other_errors_stay_what_they_are(monkeypatch, error):
    def main(_):
        raise error

    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(type(error)):
        cli.run(main)


def test_odd_names_in_the_log(tmp_path):
    run = RunFolder(load_config(TOY_TOKENIZER, [f"work_dir={tmp_path}"]))
    run.path.mkdir()
    run._append("log.txt", "warning: \udcff.png cannot be read")
    assert (run.path / "log.txt").read_text() == "warning: \\udcff.png cannot be read\n"


def test_a_signal_while_others_are_imported():
    """torch lets no exception through in places of its import: it is raised again, and half a module asked."""
    body = (
        "import signal, sys, types, time; from core import signals; signals.LOOK_SECONDS = 0.1; signals.GRACE_SECONDS = 60\n"
        "    sys.modules['core.dist'] = types.ModuleType('core.dist')\n"
        "    try: signal.raise_signal(signal.SIGTERM)\n"
        "    except BaseException: [time.sleep(0.01) for _ in range(10000)]"
    )
    ended = program(body)
    assert ended.returncode == 75 and ended.stderr.decode().startswith(
        "stopped (received SIGTERM); run the same command"
    )
