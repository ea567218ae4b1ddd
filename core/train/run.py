"""The folder of a run: what was asked for, in what environment, what happened.

work_dirs/<name>/ config.yaml command.txt environment.json about.json log.txt metrics.jsonl samples/ checkpoints/
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from core.config import flatten, to_plain, to_yaml, with_defaults
from core.errors import UserError
from core.files import explain_os_errors, read_json_lines, write_atomic, write_json
from core.lock import Lock
from core.schema import RunConfig

ABOUT = "about.json"

# Keys that may differ between the parts of one run: they change where and how fast it runs, not what it computes. A folder
# with another name in it was renamed, or is a copy that goes its own way.
FREE = (
    "name",
    "work_dir",
    "log",
    "eval",
    "sample",
    "data.workers",
    "data.cache_dir",
    "data.val_url",
    "train.duration",
    "train.micro_batch",
    "train.device",
    "train.parallel",
    "train.compile",
    "train.activation_checkpointing",
    "train.log_every",
    "train.preview_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.milestone_every",
    "train.time_limit_minutes",
    "train.rank_timeout",
    "train.max_nonfinite_steps",
    "train.init_from",
    "train.new_classes",
)


# Keys that name something by its place, which may move: what lies there is compared where a run is resumed, with what
# its checkpoints say of it.
PLACES = ("data.url", "data.pictures", "tokenizer.weights")


# Keys that may differ between the ranks of one run, beside those whose values are places on their machines.
OF_MACHINES = ("work_dir", "log", "data.workers", "data.cache_dir")


def shared_settings(config: RunConfig) -> dict[str, Any]:
    """What all ranks of a run have to agree in, by key."""

    def is_place(value: Any) -> bool:
        return isinstance(value, str) and "/" in value

    settings = flatten(to_plain(config))
    return {key: value for key, value in settings.items() if not _is_of(OF_MACHINES, key) and not is_place(value)}


def _is_of(keys: tuple[str, ...], key: str) -> bool:
    return any(key == k or key.startswith(f"{k}.") for k in keys)


def _moved(key: str, before: Any, now: Any) -> bool:
    """Whether the two values may be the same thing at two places: a source of another kind or with other options is not."""
    if key not in PLACES or not isinstance(before, str) or not isinstance(now, str):
        return False
    if key == "tokenizer.weights" or before.rstrip("/") == now.rstrip("/"):
        return True
    (scheme, options), other = (re.findall(r"^(?:([a-z]+)://)?[^?]*(.*)$", url)[0] for url in (before, now))
    # token stores have the fingerprint of the pictures they were made of, and others that of their name
    return (scheme, options) == other and scheme in ("", "folder", "list", "wds")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Sentences about the keys in which two configurations differ; keys that are free, or name a place, left out."""
    a, b = flatten(old), flatten(new)
    return [
        f"{key}: was {a.get(key)!r}, now {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not _is_of(FREE, key) and not _moved(key, a.get(key), b.get(key))
    ]


class RunFolder:
    """work_dirs/<name>. Only the main rank writes, and nothing before `open`.

    Raises UserError when the folder holds a run with another configuration: nothing is overwritten silently. A run
    without a checkpoint is not worth that, it most likely ended at a mistake in its configuration.
    """

    def __init__(self, config: RunConfig, is_main: bool = True):
        self.config, self.path, self.is_main = config, config.run_dir, is_main
        self.metrics_path = self.path / "metrics.jsonl"
        self.saved = self.path / "config.yaml"
        self._lock, self._is_open = Lock(self.path), False
        if self.saved.is_file() and any(self.path.glob("checkpoints/step_*")):
            import yaml

            try:
                before = yaml.safe_load(self.saved.read_text())
            except (yaml.YAMLError, UnicodeDecodeError):
                raise UserError(
                    f"{self.saved} is damaged. Restore it, or delete it to continue with the configuration "
                    "that was given."
                ) from None
            changed = differences(with_defaults(before), to_plain(config))
            if changed:
                raise UserError(
                    f"{self.path} holds a run with another configuration:\n"
                    + "\n".join(f"  - {c}" for c in changed)
                    + "\nGive this run another name (name=...), or move the old folder away."
                )

    def open(self, environment: dict[str, Any]) -> None:
        """Make the folder, or reopen it, and note what was asked for and in what environment.

        UserError on the main rank where another program is at work in it.
        """
        if self.is_main:
            self._lock.take()
            with explain_os_errors(self.path):
                write_atomic(self.saved, to_yaml(self.config))
                self._is_open = True
                self._append("command.txt", shlex.join(sys.argv))
                write_json(self.path / "environment.json", environment)

    def describe(self, facts: dict[str, Any]) -> None:
        """Note what pages and exports want to know of the run beyond its configuration, in about.json."""
        if self.is_main:
            with explain_os_errors(self.path):
                write_json(self.path / ABOUT, facts)

    def close(self) -> None:
        """Let other programs in."""
        self._lock.release()

    def log(self, message: str) -> None:
        """A dated line in log.txt and on the terminal."""
        if not self.is_main:
            return
        line = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {message}"
        print(line, flush=True)
        self._append("log.txt", line)

    def write_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.is_main:
            self._append(self.metrics_path.name, json.dumps(record))

    def require_there(self) -> None:
        """UserError where the folder is gone: to be asked before something is written that would make it anew."""
        if self._is_open and not self.saved.exists():
            raise UserError(
                f"{self.path} was moved or deleted while this run was at work in it. Put it back, or go on where it lies now "
                "with work_dir= and name=."
            )

    def _append(self, name: str, line: str) -> None:
        path = self.path / name
        self.require_there()
        with explain_os_errors(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def rewind_metrics(self, step: int) -> None:
        """Drop lines after `step` (they will be written again) and a last line cut by a crash."""
        if not self.is_main or not self.metrics_path.is_file():
            return
        kept = [line for line in read_metrics(self.metrics_path) if line["step"] <= step]
        write_atomic(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl."""
    return [record for record in read_json_lines(path) if "step" in record]
