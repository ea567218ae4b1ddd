"""The shell scripts as the tests of launching start them: from another folder, without what a scheduler has left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, TOY_TOKENIZER


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


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path
