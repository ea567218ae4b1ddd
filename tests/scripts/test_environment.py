"""scripts/environment.sh: it finds an interpreter or makes an environment, once, with the torch that the driver runs."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.scripts.shell import program, run


def test_interpreter_that_is_not_there(tmp_path):
    done = run("run_train_tokenizer.sh", "x", TESSERA_PYTHON=str(tmp_path / "nope"))
    assert done.returncode == 2 and done.stderr == f"error: TESSERA_PYTHON={tmp_path / 'nope'} is not a program\n"


def test_interpreter_that_is_too_old(tmp_path):
    old = program(tmp_path / "python", '[ "$1" = --version ] && echo "Python 3.8.10"\nexit 1')
    done = run("run_train_tokenizer.sh", "x", TESSERA_PYTHON=str(old))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {old} is Python 3.8.10; Tessera needs Python 3.11 or newer.")


@pytest.fixture
def repository(tmp_path) -> Path:
    """A copy of what an installation needs, without a .venv."""
    copy = tmp_path / "a repository"
    (copy / "scripts").mkdir(parents=True)
    for name in ("environment.sh", "signals.sh", "launch.sh"):
        shutil.copy(ROOT / "scripts" / name, copy / "scripts" / name)
    (copy / "requirements.txt").write_text("nothing\n")
    return copy


def install(repository: Path, programs: Path) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "TESSERA_PYTHON": "",
        "NPROC": "1",
        "PYTHON_FOR_VENV": sys.executable,
    }
    return subprocess.run(
        ["bash", str(repository / "scripts" / "launch.sh"), "program.py"],
        env=environment,
        text=True,
        capture_output=True,
        timeout=600,
    )


FAKE_UV = """
echo "uv $*" >>"$(dirname "$0")/uv.log"
if [ "$1" = venv ]; then
    venv="${!#}"; mkdir -p "$venv/bin"
    printf '#!/usr/bin/env bash\\necho "ran $*"\\n' >"$venv/bin/python"; chmod +x "$venv/bin/python"
fi
"""


def test_environment_is_made_once(repository, tmp_path):
    program(tmp_path / "bin" / "uv", FAKE_UV)
    program(tmp_path / "bin" / "df", 'echo header; echo "disk 1 1 99999 1% /"')
    first, second = install(repository, tmp_path / "bin"), install(repository, tmp_path / "bin")
    assert first.returncode == second.returncode == 0, first.stderr
    assert "Installing requirements.txt" in first.stdout and second.stdout == "ran -m program\n"
    assert [line.split()[1] for line in (tmp_path / "bin" / "uv.log").read_text().splitlines()] == ["venv", "pip"]
    (repository / "requirements.txt").write_text("something else\n")
    assert "Installing requirements.txt" in install(repository, tmp_path / "bin").stdout


def test_failed_installation_is_not_remembered(repository, tmp_path):
    program(tmp_path / "bin" / "uv", '[ "$1" = venv ] || exit 1')
    program(tmp_path / "bin" / "df", 'echo header; echo "disk 1 1 99999 1% /"')
    for _ in range(2):
        done = install(repository, tmp_path / "bin")
        assert done.returncode == 2 and "error: uv could not install the requirements" in done.stderr


def test_full_disk(repository, tmp_path):
    program(tmp_path / "bin" / "df", 'echo header; echo "disk 1 1 12 99% /"')
    done = install(repository, tmp_path / "bin")
    assert done.returncode == 2 and done.stderr.startswith("error: only 12 MB free in ")
    assert not (repository / ".venv").exists()


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("run_*.sh")))
def test_help_needs_no_installation(script, tmp_path):
    """Nor a list of files, nor any GPU: the standard library answers."""
    copy = tmp_path / "repository"
    for part in ("scripts", "run", "core", "data", "evaluation", "configs"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (script, "run_decoder_finetune_tokenizer.sh", "requirements.txt"):
        shutil.copy(ROOT / name, copy / name)
    bare = program(tmp_path / "python", f'exec {sys.executable} -S -E "$@"')  # without site-packages
    questions = [("--help",)] + [("--list",), ("rectok", "--list")] * (script == "run_download.sh")
    for words in questions:
        environment = {**os.environ, "TESSERA_PYTHON": "", "PYTHON_FOR_VENV": str(bare), "NPROC": "2"}
        done = subprocess.run(
            ["bash", str(copy / script), *words], env=environment, text=True, capture_output=True, timeout=600
        )
        assert done.returncode == 0 and len(done.stdout) > 60 and not done.stderr, (words, done.stderr)
        assert not (copy / ".venv").exists()


def test_help_imports_little():
    """It answers within a tenth of a second of processor time; libraries and these parts of Python's own cost more."""
    programs = [path.stem for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text()]
    dear = {"torch", "numpy", "yaml", "PIL", "logging", "email", "hashlib", "http", "asyncio", "multiprocessing"}
    dear |= {"concurrent.futures", "importlib.metadata", "subprocess", "unittest"}
    code = f"import sys, {', '.join(f'scripts.{name}' for name in programs)}; print(sorted({dear} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert len(programs) > 15 and done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("driver", "torch_line"),
    [
        ("", r"torch==2\.15\.0 "),
        ("590.44.01", r"torch==2\.15\.0 "),
        ("580.65.06", r"torch==2\.15\.0 "),
        ("570.124.06", r"torch==2\.10\.0 .*\ntorchvision==0\.25\.0 "),
        ("525.60.13", r"torch==2\.10\.0 .*\ntorchvision==0\.25\.0 "),
    ],
)
def test_torch_is_chosen_for_the_driver(repository, tmp_path, driver, torch_line):
    shutil.copy(ROOT / "requirements.txt", repository)
    keep = 'while [ $# -gt 0 ]; do [ "$1" = -r ] && cat "$2" >>"$(dirname "$0")/lists"; shift; done'
    program(tmp_path / "bin" / "uv", FAKE_UV + keep)
    program(tmp_path / "bin" / "df", 'echo header; echo "disk 1 1 99999 1% /"')
    program(tmp_path / "bin" / "nvidia-smi", f"echo {driver}" if driver else "echo no devices were found; exit 6")
    done = install(repository, tmp_path / "bin")
    assert done.returncode == 0, done.stderr
    assert re.search("^" + torch_line, (tmp_path / "bin" / "lists").read_text(), re.MULTILINE)


def test_a_login_node_takes_the_torch_of_the_node_that_computes(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_DRIVER", "550")
    test_torch_is_chosen_for_the_driver(repository, tmp_path, "", r"torch==2\.10\.0 ")


def test_two_nodes_make_one_environment(repository, tmp_path):
    """At the same time, on a shared disk: the second one waits, and finds it made."""
    slow = '[ "$1" != pip ] || sleep 1'
    program(tmp_path / "bin" / "uv", FAKE_UV + slow)
    program(tmp_path / "bin" / "df", 'echo header; echo "disk 1 1 99999 1% /"')
    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(lambda _: install(repository, tmp_path / "bin"), range(3)))
    assert [done.returncode for done in ends] == [0, 0, 0], ends
    assert (tmp_path / "bin" / "uv.log").read_text().count("uv venv") == 1
    assert not (repository / ".venv.lock").exists()
    assert any("Waiting for .venv, which process" in done.stdout for done in ends)


def test_an_installation_that_was_killed_is_not_waited_for(repository, tmp_path):
    program(tmp_path / "bin" / "uv", FAKE_UV)
    program(tmp_path / "bin" / "df", 'echo header; echo "disk 1 1 99999 1% /"')
    lock = repository / ".venv.lock"
    lock.mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    (lock / "owner").write_text(f"{os.uname().nodename} {dead.pid}\n")
    assert install(repository, tmp_path / "bin").returncode == 0 and not lock.exists()


def test_a_temporary_folder_of_another_node(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    done = run("run_train_tokenizer.sh", "x", TESSERA_PYTHON=str(tmp_path / "nope"))
    assert done.stderr.startswith(f"TMPDIR={tmp_path / 'nowhere'} is no folder that can be written to; /tmp is used\n")


def test_a_driver_that_is_too_old(repository, tmp_path):
    program(tmp_path / "bin" / "nvidia-smi", "echo 470.82.01")
    program(tmp_path / "bin" / "df", 'echo header; echo "disk 1 1 99999 1% /"')
    done = install(repository, tmp_path / "bin")
    assert done.returncode == 2 and "driver 470.82.01 of this machine's GPU is older than 525" in done.stderr


def test_programs_by_path(tmp_path):
    """The environment knows its clone; a program of another one says so instead of running half of each."""
    other = tmp_path / "clone" / "scripts" / "train.py"
    other.parent.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "train.py", other)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # stands for .venv's tessera.pth
    for path, code, said in ((ROOT / "scripts" / "train.py", 0, "usage:"), (other, 2, "python -m scripts.train")):
        done = subprocess.run(
            [sys.executable, path, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == code and said in done.stdout + done.stderr


@pytest.mark.parametrize(
    "words", ["train.py x.yaml", "sample.py x --labels 1 --out y", "convert.py --describe x", "report.py x"]
)
def test_a_python_without_the_packages_is_a_sentence(tmp_path, words):
    """Started by its path in another folder: what it lacks, and which Python has it."""
    program, *rest = words.split()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TESSERA_PYTHON"))}
    command = [sys.executable, "-S", str(ROOT / "scripts" / program), *rest]
    run = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert re.search(
        r"error: .* has no package (torch|numpy)\. Use .*/\.venv/bin/python, which run_\*\.sh make", run.stderr
    )
    for named, advice in (
        (sys.executable, "TESSERA_PYTHON names this one: unset it, and run_*.sh make one that has all"),
        (str(tmp_path / "python"), f"Use {tmp_path / 'python'}, which TESSERA_PYTHON names"),
    ):
        run = subprocess.run(
            command, cwd=tmp_path, env={**clean, "TESSERA_PYTHON": named}, capture_output=True, text=True
        )
        assert run.returncode == 2 and advice in run.stderr and "which run_" not in run.stderr, run.stderr


def test_an_old_python_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "core" / "__init__.py"))
    assert ended.value.code == 2 and "this is Python 3.10, and 3.11 or newer is needed" in capsys.readouterr().err
