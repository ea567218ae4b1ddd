"""The shell side: launchers, exit codes, SLURM, and the messages of scripts/environment.sh.

Most tests hand the scripts a fake interpreter, which notes how it was called; a few start two real ranks on the CPU.
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
from PIL import Image

from core import cli, dist, launch
from core.errors import UserError
from core.peers import OtherRankFailed
from core.rng import permutation
from core.train.checkpoint import Checkpoint, CheckpointStore
from core.train.run import read_metrics
from scripts import convert, sample
from tests.conftest import ROOT, TOY_GENERATOR, TOY_TOKENIZER

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def start(script: str, *arguments: object, stderr=subprocess.PIPE, **environment: str) -> subprocess.Popen:
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM_", "MASTER_")) and k not in ("NPROC", "NNODES", "NODE_RANK", "LAUNCHER")
    }
    settings = {**clean, "TESSERA_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        ["bash", str(ROOT / script), *map(str, arguments)],
        cwd=ROOT.parent,
        env=settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    process = start(script, *arguments, **environment)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def toy(folder: Path, *more: str) -> list[str]:
    return [TOY_TOKENIZER, f"work_dir={folder}", "train.device=cpu", *more]


# ---------------------------------------------------------------------------------------------------------------------
# Two real ranks
# ---------------------------------------------------------------------------------------------------------------------
# accelerate starts ranks in test_asked_to_stop and, to their end, in test_accelerate_itself, too
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_ranks(tmp_path, launcher):
    done = run("run_train_tokenizer.sh", *toy(tmp_path, "train.duration=3step"), NPROC="2", LAUNCHER=launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "toy_rectok_tokenizer"
    assert done.stdout.count("3 steps of 8 on 2 x cpu") == 1 and "finished: 3 steps" in (folder / "log.txt").read_text()
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_asked_to_stop(tmp_path, launcher):
    """SIGTERM to the shell, as a scheduler sends it: both ranks save and leave, and the shell says 75."""
    process = start(
        "run_train_tokenizer.sh",
        *toy(tmp_path, "train.duration=100000step"),
        stderr=subprocess.STDOUT,
        NPROC="2",
        LAUNCHER=launcher,
    )
    folder = tmp_path / "toy_rectok_tokenizer"
    deadline = time.monotonic() + 600
    while not (folder / "metrics.jsonl").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 75, out[-3000:]
    (step,) = CheckpointStore(folder / "checkpoints").steps()[-1:]
    assert f"stopped at step {step} " in (folder / "log.txt").read_text()


def launched_by(module: str, *words: object, code: int = 0) -> subprocess.CompletedProcess:
    """scripts/train.py under a launcher itself, without run_*.sh."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def test_torchrun_itself(tmp_path):
    done = launched_by(
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--standalone",
        "-m",
        "scripts.train",
        *toy(tmp_path, "train.duration=1step"),
    )
    assert done.stdout.count("1 steps of 8 on 2 x cpu") == 1


def test_torchrun_itself_ends_with_the_sentence(tmp_path):
    """Of a mistake that the second rank alone meets, which prints nothing itself."""
    done = launched_by(
        "torch.distributed.run", "--nproc-per-node", 2, "--standalone", "-m", "tests.core.failing_rank", code=1
    )
    *_, sentence, border = done.stderr.splitlines()
    assert sentence.strip() == "traceback : error: the disk is full" and set(border) == {"="}


def test_accelerate_itself(tmp_path, tokenizer_run):
    """Processes, precision and sharding are those of its config; what stands behind CONFIG wins."""
    (tmp_path / "accelerate.yaml").write_text("""
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_sharding_strategy: FULL_SHARD, fsdp_offload_params: false, fsdp_auto_wrap_policy: NO_WRAP}
machine_rank: 0
main_process_port: 0
mixed_precision: bf16
num_machines: 1
num_processes: 2
""")
    done = launched_by(
        "accelerate.commands.launch",
        "--config_file",
        tmp_path / "accelerate.yaml",
        "-m",
        "scripts.train",
        TOY_GENERATOR,
        f"work_dir={tmp_path}",
        f"data.cache_dir={tmp_path}/cache",
        f"tokenizer.weights={tokenizer_run}",
        "train.device=cpu",
        "train.duration=1step",
        "train.preview_every=never",
    )
    assert done.stdout.count("accelerate's config sets train.precision=bf16 train.parallel=fsdp") == 1
    assert "1 steps of 8 on 2 x cpu" in done.stdout
    config = (tmp_path / "toy_rectok_generator" / "config.yaml").read_text()
    assert "precision: bf16" in config and "parallel: fsdp" in config


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
FSDP = {
    **ACCELERATE,
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({}, []),
        (ACCELERATE, ["train.precision=fp32"]),
        ({**ACCELERATE, "TESSERA_EXIT_FILE": "x"}, []),  # LAUNCHER=accelerate of run_*.sh
        (
            {**ACCELERATE, "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "True"},
            ["train.precision=bf16", "train.device=cpu"],
        ),
        ({**ACCELERATE, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["train.precision=fp32", "train.compile=true"]),
        (FSDP, ["train.precision=fp32", "train.parallel=fsdp"]),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "1"}, ["train.precision=fp32", "train.parallel=fsdp"]),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, ["train.precision=fp32", "train.parallel=ddp"]),
        (
            {**FSDP, "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "None", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            ["train.precision=fp32", "train.parallel=fsdp", "train.activation_checkpointing=true"],
        ),
    ],
)
def test_what_accelerate_asks_for(environment, settings, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.asked_by_accelerate() == settings


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision fp16, which is not taken: use bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8, which is not taken"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed: use FSDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_DYNAMO_BACKEND": "ONNXRT"}, "dynamo_backend: inductor is the one"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "fsdp_sharding_strategy HYBRID_SHARD, which is not taken"),
        (
            {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "starts only one this way",
        ),
    ],
)
def test_what_is_not_taken_from_accelerate(environment, sentence, monkeypatch, train_main):
    for name, value in {**ACCELERATE, **environment}.items():
        monkeypatch.setenv(name, value)
    code, _, err = train_main(TOY_TOKENIZER, "--check")
    assert code == 2 and sentence in err and err.count("\n") == 1


def test_the_command_line_overrules_accelerate(monkeypatch, train_main, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    code, out, _ = train_main(*toy(tmp_path, "train.precision=fp32", "train.duration=1step"))
    assert code == 0 and "accelerate" not in out
    assert "precision: fp32" in (tmp_path / "toy_rectok_tokenizer" / "config.yaml").read_text()


def test_weights_in_parts(tmp_path):
    """FSDP2 on two ranks, with accumulation and previews, goes on on one rank as if nothing had been in parts; and a run
    of one rank goes on in parts. What the ranks wrote serves the other programs."""
    common = [f"work_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache", "train.device=cpu"]
    assert run("run_train_tokenizer.sh", *toy(tmp_path, "train.duration=1step"), NPROC="1").returncode == 0
    common += [f"tokenizer.weights={tmp_path}/toy_rectok_tokenizer", "train.checkpoint_every=3step"]

    def generator(name: str, ranks: str, *more: str) -> list[dict]:
        done = run("run_train_diffusion.sh", TOY_GENERATOR, *common, f"name={name}", *more, NPROC=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        return read_metrics(tmp_path / name / "metrics.jsonl")

    in_parts = ["train.parallel=fsdp", "train.micro_batch=2"]
    generator("whole", "1", "train.duration=5step", "train.preview_every=never")
    whole = generator("whole", "2", "train.duration=6step", "train.preview_every=never", *in_parts)
    generator("parts", "2", "train.duration=3step", "train.preview_every=3step", *in_parts)
    assert (tmp_path / "parts" / "samples" / "step_00000003.png").is_file()
    files = Checkpoint(tmp_path / "parts" / "checkpoints" / "step_00000003").files
    assert "generator.safetensors" not in files and "generator.optim.part-00001-of-00002.safetensors" in files
    assert sample.main([str(tmp_path / "parts"), "--labels", "0", "--num", "1", "--out", str(tmp_path / "s")]) == 0
    exported = str(tmp_path / "exported.safetensors")
    assert convert.main([str(tmp_path / "parts"), exported]) == 0 and convert.main(["--describe", exported]) == 0
    resumed = generator("parts", "1", "train.duration=6step", "train.preview_every=never")
    assert [r["step"] for r in resumed] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(resumed, whole):
        assert ours["flow"] == pytest.approx(theirs["flow"], rel=1e-5)
        assert ours["grad_norm/generator"] == pytest.approx(theirs["grad_norm/generator"], rel=1e-5)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_mistake_that_only_the_ranks_find(tmp_path, launcher):
    done = run("run_train_tokenizer.sh", *toy(tmp_path, "train.global_batch=9"), NPROC="2", LAUNCHER=launcher)
    assert done.returncode == 2, done.stderr[-2000:]
    sentence = "error: global batch 9 must be a positive multiple of 2 ranks."
    assert done.stderr.count(sentence) == 1
    assert done.stderr.splitlines()[-1].startswith(sentence)  # after the launcher's own traceback


def test_a_mistake_that_only_one_rank_finds(tmp_path):
    """The second rank meets a broken picture; its message must not drown."""
    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / f"{number}.png")
    broken = sorted(folder.iterdir())[permutation(8, 0, 0)[6]]  # position 6 of the first batch of 8: the second rank
    broken.write_bytes(b"not a picture")
    # Previews show other pictures: they would meet it on both ranks.
    done = run(
        "run_train_tokenizer.sh",
        *toy(tmp_path, f"data.url=folder://{folder.parent}", "data.on_corrupt=raise"),
        NPROC="2",
    )
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.splitlines()[-1]
    assert done.stderr.count("cannot be read") == 1 and "cannot be read" in last and broken.name in last


def test_config_mistakes_are_reported_once(tmp_path):
    done = run("run_train_tokenizer.sh", *toy(tmp_path, "train.globl_batch=8"), NPROC="2")
    assert done.returncode == 2
    assert done.stderr.count("unknown key") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_first_rank_that_fails_speaks(tmp_path, monkeypatch, capsys):
    """A rank that is done does not speak for one that fails later, and the ones after that add nothing."""
    monkeypatch.setenv("TESSERA_EXIT_FILE", str(tmp_path / "code"))

    def fail(_):
        raise UserError("the disk is full")

    def echo(_):
        raise OtherRankFailed("rank 0 failed; its message says why.")

    def end(main) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.run(main)
        return stopped.value.code, capsys.readouterr().err

    monkeypatch.setenv("RANK", "1")
    assert end(lambda _: 0) == (0, "") and not (tmp_path / "code").exists()
    assert end(echo) == (2, "") and not (tmp_path / "code").exists()  # it may be faster than the one that knows why
    assert end(fail) == end(fail) == (2, "") and end(lambda _: 75) == (75, "")
    assert (tmp_path / "code").read_text() == "2\nerror: the disk is full\n"  # scripts/launch.sh ends with it


ENDING = """
import atexit, os, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from core import cli, dist, launch

class Fragile:
    def __del__(self, abort=os.abort):  # what a thread of gloo may do while the interpreter is taken apart
        abort()

keep = Fragile()

def main(_):
    atexit.register(lambda: Path(sys.argv[1]).write_text(str(written)))
    threading.Thread(target=lambda: (time.sleep(0.3), written.append(1))).start()
    print("buffered", end="")
    return 75

written = []
cli.run(main)
"""


@pytest.mark.parametrize(("ranks", "code"), [("1", -signal.SIGABRT), ("2", 75)])
def test_a_rank_of_several_leaves_without_a_shutdown(tmp_path, ranks, code):
    """Threads are waited for, exit functions called and output written; then nothing can abort any more."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING, tmp_path / "exit", ROOT],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "WORLD_SIZE": ranks},
    )
    assert (done.returncode, done.stdout) == (code, "buffered")
    assert (tmp_path / "exit").read_text() == "[1]"


# ---------------------------------------------------------------------------------------------------------------------
# A fake interpreter
# ---------------------------------------------------------------------------------------------------------------------
def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


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
