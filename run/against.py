"""The original's side of the benchmark: its checkout in a process of its own, timed in turn with ours."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core import sizes
from core.errors import UserError
from core.schema import RunConfig, SampleConfig
from run import originals
from run.load import REGISTRIES, tokenizer_layout
from run.weights import constructor_arguments

COMPARED = ("train", "encode", "decode", "generate", "sample")


def complete(kind: str, settings_here: dict[str, Any], **more: Any) -> dict[str, Any]:
    """All constructor arguments of a network, those that were left out from `more` or its defaults; sizes by number."""
    registry = REGISTRIES[kind]
    defaults = {
        name: parameter.default
        for name, parameter in registry.signature(settings_here["name"]).items()
        if parameter.default is not inspect.Parameter.empty
    }
    settings = {**defaults, **{n: v for n, v in more.items() if settings_here.get(n) is None}, **settings_here}
    module = sys.modules[registry.get(settings_here["name"]).__module__]
    if kind == "generator" and "size" in settings:
        settings["size"] = dataclasses.asdict(sizes.pick(settings["size"], module.Size, module.SIZES))
    return settings


def settings_of(sample: SampleConfig) -> dict[str, Any]:
    """Guidance and filters with what the samplers take where a config says nothing."""
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "steps": 150}
    set_here = {name: getattr(sample, name) for name in ("scale", "schedule", "start", "power", *plain)}
    return {name: plain.get(name) if value is None else value for name, value in set_here.items()}


def asked(config: RunConfig, spec_sizes: dict[str, Any], what: str, batch: int, device: torch.device) -> dict[str, Any]:
    """What run/originals.py is told.

    Args:
        spec_sizes: of the latents, `Tokenizer.spec.sizes()`.
    """
    request = {
        "what": what,
        "batch": batch,
        "device": str(device),
        "precision": config.train.precision,
        "compile": what == "train" and config.train.compile,
        "stored": config.data.cache_latents,
        "tokenizer": complete("tokenizer", tokenizer_layout(config.tokenizer)[0]),
        "sample": settings_of(config.sample),
    }
    if config.generator is not None:
        arguments = constructor_arguments(config.generator)
        request["generator"] = complete("generator", arguments, **spec_sizes, num_classes=1000)
    return request


class Originals:
    """A checkout that speeds are compared with.

    Args:
        checkout: folder of the original's repository.
    """

    def __init__(self, checkout: str | Path):
        self.checkout = Path(checkout).resolve()
        if not self.checkout.is_dir():
            raise UserError(
                f"--against {checkout}: there is no such folder. Give the checkout of the original's repository."
            )
        self._process: subprocess.Popen[str] | None = None

    def open(self, request: dict[str, Any]) -> Callable[[], float] | None:
        """A function that runs the original's call once and returns its seconds; None for what cannot be compared."""
        kind = "tokenizer" if request["what"] in ("encode", "decode") or "generator" not in request else "generator"
        if request["what"] not in COMPARED or request[kind]["name"] not in originals.ORIGINALS:
            return None
        if (
            kind == "tokenizer" and request["what"] == "train"
        ):  # its losses need weights that nobody has without a download
            return None
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", originals.__file__, str(self.checkout)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        reply = self._ask(request)
        if "error" in reply:
            raise UserError(
                f"--against {self.checkout}: {request[kind]['name']}'s {request['what']} does not run there ({reply['error']}). "
                "run/originals.py holds the modules, arguments and calls that are expected of it."
            )
        return None if reply.get("skipped") else lambda: self._ask("call")["seconds"]

    def _ask(self, message: Any) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(
                f"--against {self.checkout}: its process ended with code {process.wait()}; its last words are above."
            )
        return json.loads(line)

    def close(self) -> None:
        """End the process; it holds a network."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
