"""What `bash run_gpu_check.sh` does: stages in processes of their own, each with its share of the time, and the tables.

Everything is kept in one JSON file from stage to stage, so that whatever ends the program leaves what was found.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import ROOT, explain_os_errors, read_json, write_atomic, write_json
from run import gpu_stages

SECTION = "## Measured by run_gpu_check.sh"
WARNING = re.compile(r"^[WI]\d{4} [\d:.]+ |^\S+: \w*Warning: |^  warnings?[._]")  # of torch's log, of Python
LEAST = 10  # seconds below which a stage is not begun


@dataclass(frozen=True)
class Stage:
    """One of those in `--help`.

    Attributes:
        share: seconds of 480 that it may take; up to twice as many from half of what earlier stages left of theirs.
        command: (check) -> words after the interpreter.
        summary: (log, exit code or None where time ran out) -> one line.
        needs: packages without which it is not begun.
    """

    name: str
    share: float
    command: Callable[[Check], list[str]]
    summary: Callable[[str, int | None], str]
    needs: tuple[str, ...] = ()


@dataclass
class Check:
    """One run of the program.

    Args:
        device: "cuda" or "cpu".
        rehearse: toy sizes.
        out: the JSON file; logs lie beside it.
        markdown: file whose section is written.
        seconds: for everything.
    """

    device: str
    rehearse: bool
    out: Path
    markdown: Path
    seconds: float

    def run(self, wanted: list[str], again: bool) -> int:
        """All wanted stages that are not finished yet. Returns 0, or 1 where one failed or ran out of time."""
        began = time.monotonic()
        machine = describe(self.device)
        if again:
            for path in self.out.parent.glob("*.jsonl"):
                path.unlink()
        with explain_os_errors(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            record = {} if again else read_json(self.out, {})
        if record.get("machine", machine) != machine or record.get("rehearsal", self.rehearse) != self.rehearse:
            raise UserError(
                f"{self.out} holds what another machine, torch or code gave. Add --again, or choose another --out."
            )
        record = {"machine": machine, "rehearsal": self.rehearse, "stages": {}, **record}
        print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
        for package, loss in lacking(wanted).items():
            print(f"not installed: {package} ({loss})", flush=True)
        counting = self._count_aside() if "benchmark" in wanted else []
        spare = 0.0
        try:
            for stage in STAGES:
                before, share = record["stages"].get(stage.name, {}), stage.share * self.seconds / 480
                if stage.name not in wanted:
                    continue
                if before.get("status") == "passed":
                    print(f"{stage.name:12} passed before: {before['summary']}", flush=True)
                    spare += share
                    continue
                left = self.seconds - (time.monotonic() - began)
                if package := next((name for name in stage.needs if not gpu_stages.is_installed(name)), None):
                    done = {"status": "not begun", "summary": f"no package {package}", "seconds": 0.0}
                else:
                    done = self._stage(stage, left, share + min(share, max(0.0, spare / 2)))
                spare += share - done["seconds"]
                record["stages"][stage.name] = done
                self._write(record)
            for process in counting:  # floors need them
                left = self.seconds - (time.monotonic() - began)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, left - 5))
        finally:
            for process in counting:
                end(process)
            self._write(record)
        statuses = [record["stages"].get(name, {}).get("status") for name in wanted]
        print(f"{statuses.count('passed')} of {len(wanted)} stages passed; {self.out}, {self.markdown}")
        return 0 if statuses.count("passed") == len(wanted) else 1

    def work(self, *words: str) -> list[str]:
        """The command of a stage of run/gpu_stages.py."""
        rehearse = ["--rehearse"] if self.rehearse else []
        return ["-m", "scripts.gpu_check", "--device", self.device, "--out", str(self.out), *rehearse, "--work", *words]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "TESSERA_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TESSERA_PYTHON": sys.executable}

    def _start(self, words: list[str], log: Path) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _count_aside(self) -> list[subprocess.Popen]:
        """Processes that count operations on the meta device while the stages use the GPU."""
        systems = list(gpu_stages.SYSTEMS)
        groups = [[system] for system in systems] if (os.cpu_count() or 1) > 2 * len(systems) else [systems]
        return [self._start(self.work("count", *g), self.out.parent / f"log_count_{g[0]}.txt") for g in groups]

    def _stage(self, stage: Stage, left: float, most: float) -> dict[str, Any]:
        """Run one stage for `most` seconds, the last one for all that are left; what is kept of it."""
        limit = left - 5 if stage is STAGES[-1] else min(left - 5, most)
        if limit < LEAST:
            summary = f"no time left ({left:.0f} s)"
            print(f"{stage.name:12} not begun: {summary}", flush=True)
            return {"status": "not begun", "summary": summary, "seconds": 0.0}
        log, began = self.out.parent / f"log_{stage.name}.txt", time.monotonic()
        process = self._start(stage.command(self), log)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
        seconds = time.monotonic() - began
        status = "ran out of time" if code is None else "passed" if code == 0 else "failed"
        summary = stage.summary(log.read_text(errors="replace"), code)
        print(f"{stage.name:12} {status} after {seconds:.0f} s: {summary}", flush=True)
        return {"status": status, "summary": summary, "seconds": round(seconds, 1), "log": log.name}

    def _write(self, record: dict[str, Any]) -> None:
        rows = gpu_stages.rows_with_floors(self.out.parent)
        record["rows"] = [row.record() for row in rows]
        write_json(self.out, record)
        lines = [SECTION, "", *_sentences(record), "", "| stage | result | seconds | |", "|---|---|---|---|"]
        for name, stage in record["stages"].items():
            lines.append(
                f"| {name} | {stage['status']} | {stage['seconds']:.0f} | {stage['summary'].replace('|', '/')} |"
            )
        lines += ["", *gpu_stages.table(rows)] if rows else []
        replace_section(self.markdown, lines)


def end(process: subprocess.Popen) -> None:
    """End a process that leads its own group, with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def describe(device: str) -> dict[str, str]:
    """The machine and the code, as the tables name them. UserError where there is no GPU."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} sees no GPU here: run this on one, or add --device cpu --rehearse to see every stage "
            "at toy size."
        )
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    commit = ""
    with contextlib.suppress(FileNotFoundError):  # no git
        words = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}


def lacking(wanted: list[str]) -> dict[str, str]:
    """Packages that are not installed -> what is lost without them. All other optional ones are asked for by no stage."""
    without: dict[str, list[str]] = {}
    for stage in STAGES:
        for package in stage.needs:
            if stage.name in wanted and not gpu_stages.is_installed(package):
                without.setdefault(package, []).append(stage.name)
    missing = {package: f"not begun: {', '.join(stages)}" for package, stages in without.items()}
    if "train" in wanted and not any("train" in stages for stages in without.values()):
        missing |= {p: gpu_stages.WITHOUT_LPIPS for p in gpu_stages.LPIPS_PACKAGES if not gpu_stages.is_installed(p)}
    return missing


def _sentences(record: dict[str, Any]) -> Iterator[str]:
    machine = record["machine"]
    command = "bash run_gpu_check.sh" + (" --device cpu --rehearse" if record["rehearsal"] else "")
    yield f"`{command}` on {machine['device']}, torch {machine['torch']}, code at {machine['commit'] or 'no commit'}."
    if record["rehearsal"]:
        yield "A rehearsal: toy sizes, whose speeds say nothing."


def replace_section(path: Path, lines: list[str]) -> None:
    """Put `lines`, whose first is a heading, in place of the section of that heading; at the end where there is none."""
    with explain_os_errors(path):
        before = path.read_text().rstrip("\n").split("\n") if path.is_file() else ["# Benchmarks"]
    start = before.index(lines[0]) if lines[0] in before else len(before)
    stop = next((i for i in range(start + 1, len(before)) if before[i].startswith("## ")), len(before))
    head, tail = before[:start], before[stop:]
    if start == len(before):
        head = [*head, ""]
    write_atomic(path, "\n".join([*head, *lines, *([""] if tail else []), *tail]) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------------------------------
def _tests(check: Check) -> list[str]:
    files = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu\n" in path.read_text()
    )
    return ["-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rfE", *files]


def _last_line(log: str, code: int | None) -> str:
    lines = [line.strip("= ") for line in log.splitlines() if line.strip("= ") and not WARNING.search(line)]
    if code is None:
        lines = [line for line in lines if not line.startswith("stopped (")]  # what it says when it is ended
    return lines[-1][:200] if lines else "nothing was finished" if code is None else "nothing was printed"


def _of_tests(log: str, code: int | None) -> str:
    counts = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|skipped|error).*? in [\d.]+s)", log, re.M)
    if not counts:
        return _last_line(log, code)
    return "; ".join([counts[-1], *re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.M)])[:400]


def _parity(precision: str) -> Callable[[Check], list[str]]:
    def command(check: Check) -> list[str]:
        small = "tests/parity/fixtures"
        everything = Path(os.environ.get("TESSERA_PARITY") or ROOT.parent / "shared" / "parity")
        paths = [str(everything) if everything.is_dir() else small]
        if check.rehearse:
            paths = [f"{small}/{name}.safetensors" for name in ("dar/gpt_train", "rear/rar_generate_kv_cache")]
        return ["-m", "tests.parity", "--device", check.device, "--precision", precision, *paths]

    return command


def _of_parity(log: str, code: int | None) -> str:
    passed, failed = len(re.findall("^PASS ", log, re.M)), re.findall(r"^FAIL (\S+)", log, re.M)
    if not passed and not failed:
        return _last_line(log, code)
    cut = "" if code is not None else ", the rest not reached"
    return f"{passed} of {passed + len(failed)} passed{cut}" + (
        f"; failed: {', '.join(failed)}"[:300] if failed else ""
    )


def _worker(name: str) -> Callable[[Check], list[str]]:
    return lambda check: check.work(name)


def _of_worker(log: str, code: int | None) -> str:
    """The lines that a stage of run/gpu_stages.py marks."""
    sentences = [
        json.loads(line[len(gpu_stages.MARK) :]) for line in log.splitlines() if line.startswith(gpu_stages.MARK)
    ]
    return "; ".join(sentences) if sentences else _last_line(log, code)


CONFIGS = ("omegaconf",)
STAGES = (
    Stage("tests", 75, _tests, _of_tests, ("pytest",)),
    Stage("parity_fp32", 80, _parity("fp32"), _of_parity),
    Stage("parity_bf16", 50, _parity("bf16"), _of_parity),
    Stage("graphs", 40, _worker("graphs"), _of_worker),
    Stage("compile", 75, _worker("compile"), _of_worker, CONFIGS),
    Stage("train", 75, _worker("train"), _of_worker, CONFIGS),
    Stage("benchmark", 480, _worker("benchmark"), _of_worker, CONFIGS),
)
NAMES = tuple(stage.name for stage in STAGES)
