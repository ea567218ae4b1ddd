"""Launchers with two real ranks on the CPU: torchrun and accelerate, through run_*.sh and by themselves."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image

from core import cli, launch
from core.errors import UserError
from core.peers import OtherRankFailed
from core.rng import permutation
from core.train.checkpoint import Checkpoint, CheckpointStore
from core.train.run import read_metrics
from scripts import convert, sample
from tests.conftest import ROOT, TOY_GENERATOR, TOY_TOKENIZER
from tests.scripts.shell import run, start, toy

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


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


def test_two_nodes_with_other_settings(tmp_path):
    """Each is started by hand; the second is told another learning rate."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def node(rank: int, *more: str) -> subprocess.Popen:
        words = [*toy(tmp_path, "train.duration=1step", "train.preview_every=never"), *more]
        environment = {**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": "0"}
        command = [sys.executable, "-m", "scripts.train", *words]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    both = node(0), node(1, "train.optimizer.lr=0.5")
    said = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], said
    assert "error: rank 1 on" in said[0] and "train.optimizer.lr is 0.5 and there 0.001. Start all" in said[0]
    assert not (tmp_path / "toy_rectok_tokenizer").exists()


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
