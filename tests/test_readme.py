"""What the README says exists, exists; its commands run (with toy settings where the real ones need a cluster)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
TOY = ["train.duration=2step", "train.global_batch=4", "data.workers=0", "train.precision=fp32", "train.preview_every=never",
       "train.schedule.warmup=0ep"]


def shell(command: str, folder: Path, **extra: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TESSERA_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NPROC": "1", **extra}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("command", COMMANDS)
def test_command_names_files_that_exist(command):
    for word in shlex.split(command):
        if re.search(r"\.(sh|py|yaml)$", word) and "=" not in word:
            assert (ROOT / word).is_file(), f"README runs {command!r}, but {word} is missing"


def test_paths_in_the_map_exist():
    rows = re.findall(r"^\| (`[^|]*) \|", README.split("## Map of the code")[1], flags=re.M)
    paths = [p for row in rows for p in re.findall(r"`([^`]+)`", row)]
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_the_pipeline_of_the_readme(tmp_path):
    """Stage 1, stage 2, generator and evaluation through the shell scripts, each taking the weights of the one before."""
    runs = tmp_path / "runs"
    data = "data.url=embedded://emoji64 data.split=val"
    quick = "configs/quickstart/rectok"
    common = f"work_dir={runs} data.cache_dir={tmp_path}/cache {' '.join(TOY)} {data}"
    steps = [
        f"bash run_train_tokenizer.sh {quick}/tokenizer.yaml name=stage1 {common}",
        f"bash run_finetune_decoder.sh {quick}/decoder.yaml name=stage2 train.init_from={runs}/stage1 {common}",
        f"bash run_train_diffusion.sh {quick}/generator.yaml name=dit tokenizer.weights={runs}/stage2 {common}",
        f"bash run_eval_tokenizer.sh {runs}/stage2 embedded://emoji64 --num 16 --out {tmp_path}/eval",
    ]
    for command in steps:
        done = shell(command, ROOT)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "eval" / "metrics.json").is_file() and (tmp_path / "eval" / "reconstructions.png").is_file()
    assert (runs / "dit" / "checkpoints" / "latest" / "generator.safetensors").is_file()
