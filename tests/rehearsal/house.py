"""A copy of the project as a user has it after the downloads, in which commands are run as users type them.

pretrained_models/   tiny files under the released names, in the released containers; the frozen helpers beside them
data/imagenet/       train and val in one folder per class; data/fid_stats/ with reference statistics
work_dirs/           what the commands leave behind
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy

from tests.rehearsal import frozen, released

ROOT = Path(__file__).resolve().parents[2]
CODE = ("core", "data", "evaluation", "generator", "tokenizer", "run", "scripts", "configs")
CLASSES, TRAIN, VAL = 4, 6, 3  # pictures per class
LIMIT = 1200  # seconds for one command, which is far more than any needs


@dataclasses.dataclass
class Done:
    """One command and how it ended."""

    command: str
    code: int
    output: str
    seconds: float

    def expect(self, *codes: int) -> Done:
        assert self.code in (codes or (0,)), f"{self.command}\nended with {self.code}:\n{self.output[-4000:]}"
        assert "Traceback" not in self.output, f"{self.command}\n{self.output[-4000:]}"
        return self


class House:
    """Make it in `folder`; `close` it to end the server that runs its programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        copy_project(folder)
        frozen.write_all(folder / "pretrained_models")
        released.write_all(folder / "pretrained_models")
        pictures(folder / "data" / "imagenet")
        references(folder / "data" / "fid_stats")
        self._server: subprocess.Popen | None = None
        self._socket = Path(tempfile.mkdtemp(prefix="tessera_rehearsal_")) / "server"  # paths of sockets are short

    def close(self, keep: bool = False) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        shutil.rmtree(self._socket.parent, ignore_errors=True)
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)  # hundreds of megabytes

    def environment(self, direct: bool = False) -> dict[str, str]:
        """Of its programs. `direct`: with the real interpreter, not through the server."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TESSERA", "COV_"))}
        kept |= {
            "OMP_NUM_THREADS": "1",
            "NPROC": "1",
            "TESSERA_OFFLINE": "1",
            "HF_HUB_OFFLINE": "1",
            "TESSERA_PYTHON": sys.executable,
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCH_HOME": str(self.folder / "torch_home"),
            "HF_HOME": str(self.folder / "hf_home"),
        }
        if direct:
            return kept
        if self._server is None:
            self._start(kept)
        return {
            **kept,
            "TESSERA_PYTHON": str(self.folder / "interpreter"),
            "TESSERA_REHEARSAL_SERVER": str(self._socket),
        }

    def _start(self, environment: dict[str, str]) -> None:
        here = Path(__file__).parent
        shim = self.folder / "interpreter"
        shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(here / "client.py"))} "$@"\n')
        shim.chmod(0o755)
        with open(self.folder / "server.log", "wb") as log:
            self._server = subprocess.Popen(
                [sys.executable, str(here / "server.py"), str(self.folder), str(self._socket)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._server.stdout.readline() == b"ready\n", (self.folder / "server.log").read_text()

    def run(self, command: str, direct: bool = False, **variables: str) -> Done:
        """One line of bash in the project's folder. `direct`: with the real interpreter, not through the server."""
        environment = {**self.environment(direct), **variables}
        if command.startswith(
            "python -m tests."
        ):  # which this copy lacks, and torch-fidelity installs a "tests" of its own
            environment["PYTHONPATH"] = str(ROOT)
        command_line = re.sub(r"^((?:[A-Z_]+=\S+ )*)python ", r'\1"$TESSERA_PYTHON" ', command)
        started = time.monotonic()
        with tempfile.TemporaryFile("w+") as output:
            code = subprocess.run(
                ["bash", "-c", command_line],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=LIMIT,
            ).returncode
            output.seek(0)
            text = output.read()
        return Done(command, code, text, time.monotonic() - started)


def copy_project(folder: Path) -> None:
    """The files of a plain clone that programs need; tests stay behind, so that nothing of them can be imported."""
    folder.mkdir(parents=True)
    for name in CODE:
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "imagenet", "fid_stats", "tokens")
        )
    for file in ROOT.glob("run_*.sh"):
        shutil.copy2(file, folder)
    shutil.copy2(ROOT / "requirements.txt", folder)
    shutil.copytree(ROOT / "pretrained_models" / "tiny", folder / "pretrained_models" / "tiny")


def pictures(folder: Path) -> None:
    """ImageNet's layout with a few of the embedded photographs: train/n0000001/..., val/n0000001/..."""
    for split, wanted in (("train", TRAIN), ("val", VAL)):
        counts: dict[str, int] = {}
        names: dict[str, str] = {}
        with tarfile.open(ROOT / "data" / "embedded" / f"photos256-{split}.tar") as archive:
            members = {m.name: m for m in archive.getmembers()}
            for name, member in members.items():
                stem, suffix = os.path.splitext(name)
                if suffix == ".cls" or f"{stem}.cls" not in members:
                    continue
                label = archive.extractfile(members[f"{stem}.cls"]).read().decode().strip()
                if label not in names and len(names) == CLASSES:
                    continue
                wnid = names.setdefault(label, f"n{int(label):08d}")
                counts[wnid] = counts.get(wnid, 0) + 1
                if counts[wnid] > wanted:
                    continue
                place = folder / split / wnid / f"{wnid}_{counts[wnid]}.JPEG"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(archive.extractfile(member).read())


def references(folder: Path) -> None:
    """The reference statistics that the five papers measure against, under their names and keys."""
    folder.mkdir(parents=True)
    draws = numpy.random.default_rng(0)
    mu, sigma = draws.random(2048), numpy.eye(2048)
    for name in ("adm_in256_stats.npz", "val_fid_statistics_file_256.npz", "val_fid_statistics_file_512.npz"):
        numpy.savez_compressed(folder / name, mu=mu, sigma=sigma)
    shots = draws.integers(0, 256, (8, 256, 256, 3), dtype=numpy.uint8)
    numpy.savez_compressed(
        folder / "VIRTUAL_imagenet256_labeled.npz",
        arr_0=shots,
        mu=mu,
        sigma=sigma,
        mu_s=draws.random(2023),
        sigma_s=numpy.eye(2023),
    )
