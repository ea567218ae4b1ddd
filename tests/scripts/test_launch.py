"""The shell side: launchers, exit codes, SLURM, and the messages of scripts/environment.sh, with a fake interpreter that notes
how it was called. Real ranks are in test_launched_ranks.py.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from core import dist, launch
from core.errors import UserError
from tests.conftest import ROOT
from tests.scripts.shell import program, run, start

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


NVIDIA_SMI = 'for i in 0 1 2 3 4 5 6 7; do [ "$1" != -L ] || echo "GPU $i: H100"; done; [ "$1" = -L ] || echo 535.54'


@pytest.fixture
def launched(tmp_path):
    """launched(**environment) -> the words with which the interpreter was last called, and the result."""
    calls = tmp_path / "calls"
    fake = program(tmp_path / "python", f'[ "$1" = -c ] && exit 0\necho "$@" >>"{calls}"\nexit "${{FAKE_CODE:-0}}"')

    def call(**environment: str) -> tuple[list[str], subprocess.CompletedProcess]:
        done = run(
            "scripts/launch.sh", "scripts/train.py", "some config.yaml", "a=1", TESSERA_PYTHON=str(fake), **environment
        )
        return (calls.read_text().splitlines()[-1].split() if calls.is_file() else []), done

    return call


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_one_process_needs_no_launcher(launched):
    words, done = launched(NPROC="1")
    assert done.returncode == 0 and words == ["-m", "scripts.train", "some", "config.yaml", "a=1"]
    assert launched(NPROC="1", FAKE_CODE="75")[1].returncode == 75


def test_one_process_per_visible_gpu(launched):
    assert after(launched(CUDA_VISIBLE_DEVICES="0,3,5")[0], "--nproc-per-node") == "3"
    assert launched(CUDA_VISIBLE_DEVICES="2")[0][0] == "-m"


def test_slurm_is_read(launched, tmp_path):
    program(tmp_path / "bin" / "scontrol", "echo first-node; echo second-node")
    slurm = {
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "nodes[1-2]",
        "SLURM_JOB_ID": "123456",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "NPROC": "4",
    }
    words, _ = launched(**slurm)
    assert [
        after(words, o) for o in ("--nnodes", "--node-rank", "--master-addr", "--master-port", "--nproc-per-node")
    ] == ["2", "1", "first-node", "23456", "4"]
    words, _ = launched(**slurm, LAUNCHER="accelerate")
    assert [after(words, o) for o in ("--num_processes", "--num_machines", "--machine_rank", "--main_process_ip")] == [
        "8",
        "2",
        "1",
        "first-node",
    ]
    words, _ = launched(
        **{**slurm, "SLURM_NNODES": "1", "SLURM_NODEID": "0"}, NNODES="1", MASTER_ADDR="here", MASTER_PORT="9"
    )
    assert [after(words, o) for o in ("--nnodes", "--master-addr", "--master-port")] == ["1", "here", "9"]


def test_which_gpus_are_visible(launched, tmp_path):
    program(tmp_path / "bin" / "nvidia-smi", NVIDIA_SMI)
    gpus = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    assert after(launched(**gpus)[0], "--nproc-per-node") == "8"
    for hidden in ("", "-1", "-1,0"):  # CUDA stops at the first that is none
        assert launched(**gpus, CUDA_VISIBLE_DEVICES=hidden)[0][0] == "-m"
    assert after(launched(**gpus, CUDA_VISIBLE_DEVICES="4,6,-1,7")[0], "--nproc-per-node") == "2"
    assert launched(**gpus, NPROC="1")[0][0] == "-m"


def test_a_question_needs_one_process(launched, tmp_path):
    calls = tmp_path / "calls"
    fake = program(tmp_path / "python", f'[ "$1" = -c ] && exit 0\necho "$@" >>"{calls}"')
    for question in ("--check", "--dry-run"):
        run(
            "scripts/launch.sh", "scripts/train.py", "x.yaml", question, TESSERA_PYTHON=str(fake), NPROC="8", NNODES="2"
        )
        assert calls.read_text() == f"-m scripts.train x.yaml {question}\n"
        calls.unlink()


WRONG = [
    ({"NPROC": "0"}, "NPROC=0 should be a whole number from 1"),
    ({"NPROC": "two"}, "NPROC=two should be a whole number"),
    ({"NNODES": "2", "NODE_RANK": "2", "NPROC": "1"}, "NODE_RANK=2 should be a whole number from 0 to 1"),
    ({"NPROC": "2", "MASTER_PORT": "70000"}, "MASTER_PORT=70000 should be"),
    ({"NPROC": "2", "SLURM_JOB_ID": "12a"}, "SLURM_JOB_ID=12a is not the number of a job: set MASTER_PORT"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, as another launcher does"),
    ({"RANK": "1"}, "RANK=1 is set"),
    (
        {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        "WORLD_SIZE=8 is set",
    ),
    ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_PROCID": "0", "SLURM_NNODES": "2"}, "started 8(x2) tasks per node"),
    ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "use --ntasks-per-node=1"),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started 8 processes per node"),
    ({"MPI_LOCALNRANKS": "4", "PMI_RANK": "0"}, "mpirun started 4 processes per node"),
    ({"NNODES": "2", "NPROC": "1"}, "NNODES=2 needs MASTER_ADDR, the address of the node with NODE_RANK=0"),
]


@pytest.mark.parametrize(("environment", "sentence"), WRONG)
def test_an_environment_that_cannot_be_meant(launched, environment, sentence):
    words, done = launched(**environment)
    assert done.returncode == 2 and not words and done.stderr.count("\n") == 1 and sentence in done.stderr, done.stderr


def test_nodes_without_a_scheduler(launched):
    """mpirun with a process per node, or by hand: the port is the same everywhere."""
    mpirun = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    for several in (mpirun, {"NNODES": "2", "NODE_RANK": "1"}):
        words, _ = launched(**several, NPROC="1", MASTER_ADDR="first")
        assert [after(words, o) for o in ("--nnodes", "--node-rank", "--master-port")] == ["2", "1", "29500"]
    assert launched(**{**mpirun, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})[1].stderr == ""  # rank 0 says it


def test_environments_that_only_look_odd(launched):
    words, done = launched(NPROC="2", SLURM_JOB_ID="12_4")  # a task of an array
    assert done.returncode == 0 and after(words, "--master-port") == "20124"
    assert launched(NPROC="2", SLURM_JOB_ID="700089")[0][-1] == "a=1"  # 00089 is no octal number
    for leftovers in ({"WORLD_SIZE": "", "RANK": ""}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}):
        assert launched(NPROC="1", **leftovers)[0][0] == "-m"
    batch = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}  # sbatch's shell, without srun
    assert after(launched(NPROC="4", **batch)[0], "--nproc-per-node") == "4"
    done = launched(NPROC="2", SLURM_STEP_TASKS_PER_NODE="8", SLURM_PROCID="5")[1]
    assert done.returncode == 2 and not done.stderr  # the first task has said it


def taken() -> socket.socket:
    """A server on one of the ports that are derived from job numbers."""
    for port in range(20000, 39000):
        try:
            return socket.create_server(("", port))
        except OSError:
            pass
    raise AssertionError("no free port")


def test_a_busy_port(tmp_path):
    fake = program(tmp_path / "python", f'[ "$1" = -c ] && exec {sys.executable} "$@"\necho "$@"')

    def call(**environment: str) -> subprocess.CompletedProcess:
        return run("scripts/launch.sh", "scripts/train.py", TESSERA_PYTHON=str(fake), NPROC="2", **environment)

    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        done = call(MASTER_PORT=str(port))
        assert done.returncode == 2 and f"error: port {port} cannot be used on this node" in done.stderr
    with taken() as server:  # a port of ours that is taken: the next free one will do
        port = server.getsockname()[1]
        done = call(SLURM_JOB_ID=str(port))
        assert done.returncode == 0 and int(after(done.stdout.split(), "--master-port")) > port, done.stdout
        done = call(SLURM_JOB_ID=str(port), NNODES="2", MASTER_ADDR="127.0.0.1")  # all nodes have to agree
        assert done.returncode == 2 and f"port {port} cannot be used" in done.stderr


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT not set"),
        ({"RANK": "1"}, "WORLD_SIZE and"),
        ({"WORLD_SIZE": "two"}, "not set"),
        ({"LOCAL_RANK": "3"}, "RANK and WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "not a rank among that many"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "not a rank among that many"),
    ],
)
def test_half_a_launcher(environment, sentence, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, environment.get(name, ""))
    with pytest.raises(UserError, match=sentence):
        dist.start("cpu")
    assert launch.speaks() or ("RANK" in environment and "WORLD_SIZE" in environment)


def test_empty_variables_are_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert dist.start("cpu").size == 1 and launch.speaks() and not launch.is_one_of_several()


def test_ranks_that_cannot_meet(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        ranks = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(server.getsockname()[1]),
        }
        for name, value in ranks.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="2 ranks could not meet at 127.0.0.1:.*free MASTER_PORT"):
            dist.start("cpu")


def test_gpus_that_torch_cannot_use(tmp_path, monkeypatch):
    program(tmp_path / "nvidia-smi", NVIDIA_SMI)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wanted, sentence in (
        ("auto", rf"lists 8 GPU\(s\) \(driver 535.54\), but torch {re.escape(torch.__version__)}, built "),
        ("cuda", "torch sees no CUDA device"),
    ):
        with pytest.raises(UserError, match=sentence):
            dist.pick_device(wanted)
    assert dist.pick_device("cpu").type == "cpu"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert dist.pick_device("auto").type == "cpu"
    program(tmp_path / "nvidia-smi", "echo no driver; exit 9")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert dist.pick_device("auto").type == "cpu"


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (
        ("RANK", "2"),
        ("WORLD_SIZE", "3"),
        ("MASTER_ADDR", "x"),
        ("MASTER_PORT", "1"),
        ("LOCAL_RANK", "2"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="process 2 of this machine finds no GPU: torch sees 2.*NPROC=2"):
        dist.pick_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dist.pick_device("auto") == torch.device("cuda", 1)


def test_failures_of_the_check_are_passed_on(launched):
    words, done = launched(NPROC="2", FAKE_CODE="2")
    assert done.returncode == 2 and words[-1] == "--check"


def stop_when_there(folder: Path, number: signal.Signals, **environment: str) -> tuple[int, list[str]]:
    """Exit code and last lines of scripts/launch.sh, signalled once the fake interpreter has written `folder`/there."""
    process = start("scripts/launch.sh", "scripts/train.py", "c.yaml", NPROC="2", **environment)
    while not (folder / "there").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["--check", "torch.distributed.run"])
def test_stopped_before_the_ranks_are_there(tmp_path, number, moment):
    """While the command is checked, or while the launcher starts and has no ranks yet: nothing is lost but a moment."""
    body = f'''[ "$1" = -c ] && exit 0
case "$*" in *{moment}*) touch "{tmp_path}/there"; exec sleep 60 ;; esac'''
    fake = program(tmp_path / "python", body)
    code, lines = stop_when_there(tmp_path, number, TESSERA_PYTHON=str(fake))
    assert code == 75
    assert lines[-1] == f"stopped (received {number.name}); run the same command again to continue"


def test_a_signal_to_the_whole_group_spares_the_launcher(tmp_path):
    """SIGUSR1 as SLURM may send it: to the shell, the launcher and the ranks."""
    body = f'''[ "$1" = -c ] && exit 0
case "$*" in *--check*) exit 0 ;; esac
kill -USR1 $$
trap "exit 75" TERM
(trap 'echo told >"{tmp_path}/rank"; exit 0' TERM; touch "{tmp_path}/there"; while :; do sleep 0.1; done) &
wait; wait
exit 75'''
    fake = program(tmp_path / "python", body)
    code, _ = stop_when_there(tmp_path, signal.SIGUSR1, TESSERA_PYTHON=str(fake))
    assert code == 75 and (tmp_path / "rank").read_text() == "told\n"


def test_unknown_launcher(launched):
    _, done = launched(NPROC="2", LAUNCHER="horovod")
    assert done.returncode == 2 and done.stderr == "error: LAUNCHER is torchrun or accelerate, not horovod\n"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """sbatch, srun and scontrol of a job on two nodes: they note what they are asked, and srun ends with $SRUN_CODE."""
    note = f'echo "$(basename "$0") $*" >>{tmp_path}/asked'
    program(
        tmp_path / "bin" / "srun",
        f'{note}; echo "$SRUN_CPUS_PER_TASK $MASTER_ADDR" >{tmp_path}/told; exit "${{SRUN_CODE:-0}}"',
    )
    program(tmp_path / "bin" / "scontrol", f'{note}; [ "$1" != show ] || printf "node07\\nnode08\\n"')

    def send(*words: str, cwd: Path = ROOT, **more: str) -> tuple[subprocess.CompletedProcess, str]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node[07-08]",
            "SLURM_JOB_ID": "12",
            "SLURM_CPUS_PER_TASK": "96",
            **more,
        }
        copy = tmp_path / "slurm_script"  # sbatch runs a copy
        copy.write_text((ROOT / "scripts" / "slurm_example.sbatch").read_text())
        done = subprocess.run(
            ["bash", copy, *words], cwd=cwd, env=environment, text=True, capture_output=True, timeout=60
        )
        return done, (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""

    return send


def test_the_example_for_slurm(slurm, tmp_path):
    """All cores of the node, the first one's address, the program that is asked for, and another turn after 75 alone."""
    done, asked = slurm("configs/x.yaml", "name=a b")
    assert done.returncode == 0 and "srun bash scripts/launch.sh scripts.train configs/x.yaml name=a b" in asked
    assert (tmp_path / "told").read_text() == "96 node07\n" and "requeue" not in asked
    done, asked = slurm(
        "x", SRUN_CODE="75", TESSERA_PROGRAM="scripts.evaluate_generator", TESSERA_IN="apptainer exec i.sif"
    )
    assert done.returncode == 75 and asked.endswith("scontrol requeue 12\n")
    assert "srun apptainer exec i.sif bash scripts/launch.sh scripts.evaluate_generator x" in asked
    done, _ = slurm("x", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: send this off from Tessera's folder")


def test_threads_are_shared_out_from_the_cores_of_the_job(tmp_path):
    """A job may use some of a node's cores, of which nproc knows; a number of the user's own stays."""
    noted = tmp_path / "threads"
    fake = program(tmp_path / "python", f'echo "$OMP_NUM_THREADS" >{noted}')
    program(tmp_path / "bin" / "nproc", 'echo "${OMP_NUM_THREADS:-12}"')
    for given, threads in (("", "6\n"), ("3", "3\n")):
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NPROC": "2", "OMP_NUM_THREADS": given}
        run("scripts/launch.sh", "scripts/train.py", "x", TESSERA_PYTHON=str(fake), **environment)
        assert noted.read_text() == threads
