"""Comparison of our code with recorded outputs of the official code ("fixtures").

A fixture is a safetensors file with `weights/`, `inputs/` and `outputs/`, and metadata naming its `system` and `kind`.
For each kind there is one function that recomputes the outputs:

    @kind("rectok", "ddt_forward", reads("args.img_size ..."))
    def ddt_forward(case: Case) -> dict[str, Tensor]:
        return {"velocity": ...}

Every recorded output must be returned and agree; what is returned beyond that is ignored. Every setting that a fixture
names must be known to its kind and, unless the kind says that it plays no part, be read (`fields.py`). The functions live
in the other modules of this package, which `discover` imports. `python -m tests.parity` is the command line
(`__main__.py`).
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from tests.parity.fields import FieldError, Fields, Known
from tests.parity.recipe import recipe_inputs, recipe_weights

if TYPE_CHECKING:
    from tests.parity.setting import Setting

REPOSITORY = Path(__file__).resolve().parents[2]
EMBEDDED = Path(__file__).resolve().parent / "fixtures"  # the small set that travels with the code, see record.py


@dataclass
class Tolerance:
    """max|a-b| <= relative * max|ref| + absolute; `off_by_one` is the share of uint8 values allowed to differ by 1."""

    relative: float = 1e-4
    absolute: float = 1e-9
    off_by_one: float = 1e-3

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """The tolerance a fixture states in words; what it does not state is the default."""
        number = r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)"
        tolerance = cls()
        if match := re.fullmatch(number, text.strip()):
            tolerance.relative = float(match[1])
        if match := re.search(r"\br(?:tol|el) " + number, text):
            tolerance.relative = float(match[1])
        if match := re.search(r"\b(?:atol|abs) " + number, text):
            tolerance.absolute = float(match[1])
        if match := re.search(number + r"\s*\*\s*max\|ref\|(?:\s*\+\s*" + number + ")?", text):
            tolerance.relative = float(match[1])
            tolerance.absolute = float(match[2]) if match[2] else tolerance.absolute
        if "within 1 level" in text:
            tolerance.off_by_one = 1e-2
        if match := re.search(number + r" percent", text):
            tolerance.off_by_one = float(match[1]) / 100
        return tolerance


@dataclass
class Case:
    """One fixture. `options` are the arguments of the recorded call, where they are kept apart from the config."""

    path: Path
    meta: dict[str, str]
    config: Fields
    options: Fields
    weights: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Case:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            given = {
                "config": json.loads(meta.get("config") or "{}"),
                "options": json.loads(meta.get("options") or "{}"),
            }
            case = cls(Path(path), meta, Fields(given["config"]), Fields(given["options"], path="options."))
            for key in file.keys():
                section, name = key.split("/", 1)
                getattr(case, section)[name] = file.get_tensor(key)
        if shapes := meta.get("weight_shapes"):  # weights by formula, see recipe.py and record.py
            case.weights |= recipe_weights(json.loads(shapes), int(meta.get("weight_salt", 0)))
        case.inputs |= recipe_inputs(json.loads(meta.get("input_shapes") or "{}"))
        return case

    def given(self) -> dict[str, Any]:
        """Every setting by its path."""
        options = {"options": self.options.values_} if self.options else {}
        return {**self.config.values_, **options}

    def to(self, device: torch.device) -> None:
        """Move all tensors."""
        for part in (self.weights, self.inputs, self.outputs):
            part.update({name: value.to(device) for name, value in part.items()})

    @property
    def system(self) -> str:
        return self.meta.get("system", "?")

    @property
    def kind(self) -> str:
        return self.meta.get("kind", "?")

    @property
    def tolerance(self) -> Tolerance:
        return Tolerance.parse(self.meta.get("tolerance", ""))


def read_meta(path: Path) -> dict[str, str]:
    """What a fixture says about itself; empty when the file cannot be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except Exception:
        return {}


KINDS: dict[tuple[str, str], Callable[[Case], dict[str, Tensor]]] = {}
FIELDS: dict[tuple[str, str], Known] = {}
JUDGES: dict[tuple[str, str], Callable[[Case, str], Tolerance]] = {}


def kind(system: str, name: str, fields: Known = Known(), judge: Callable[[Case, str], Tolerance] | None = None):
    """Decorator: this function recomputes the outputs of fixtures of this system and kind.

    fields: what it knows of the settings in a fixture's metadata.
    judge: the tolerance of an output by name, for fixtures whose words `Tolerance.parse` cannot read.
    """

    def register(function: Callable[[Case], dict[str, Tensor]]):
        if (system, name) in KINDS:
            raise ValueError(f"kind {system}/{name} is registered twice")
        KINDS[system, name], FIELDS[system, name] = function, fields
        if judge:
            JUDGES[system, name] = judge
        return function

    return register


def discover() -> None:
    """Import every module of this package, so that their kinds are registered."""
    for module in pkgutil.iter_modules(__path__):
        if module.name not in ("__main__", "record"):
            importlib.import_module(f"{__name__}.{module.name}")


@dataclass
class Comparison:
    """`error` is max|a-b| / max|ref| for floats, the share of differing values for integers."""

    name: str
    error: float
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.name} {self.note or f'{self.error:.1e}'}"
        return text if self.passed else f"!! {text}"


def compare(name: str, ours: Any, reference: Tensor, tolerance: Tolerance) -> Comparison:
    """One recorded output against ours."""
    if ours is None:
        return Comparison(name, float("inf"), False, "not computed")
    ours = torch.as_tensor(ours).detach().cpu()
    if ours.shape != reference.shape:
        return Comparison(name, float("inf"), False, f"shape {list(ours.shape)} for {list(reference.shape)}")
    if ours.is_floating_point() != reference.is_floating_point():
        return Comparison(name, float("inf"), False, f"dtype {ours.dtype} for {reference.dtype}")
    if reference.numel() == 0:
        return Comparison(name, 0.0, True)
    if not reference.is_floating_point():
        differ = (ours.long() - reference.long()).abs()
        share = (differ > 0).double().mean().item()
        if reference.dtype == torch.uint8:
            return Comparison(name, share, differ.max().item() <= 1 and share <= tolerance.off_by_one)
        return Comparison(name, share, share == 0)
    ours, reference = ours.double(), reference.double()
    error, scale = (ours - reference).abs().max().item(), reference.abs().max().item()
    passed = error <= tolerance.relative * scale + tolerance.absolute  # False for NaN
    return Comparison(name, error / scale if scale else error, passed)


def compare_all(case: Case, computed: dict[str, Any], tolerances: dict[str, Tolerance]) -> list[Comparison]:
    """Every recorded output of a case."""
    return [compare(name, computed.get(name), ref, tolerances[name]) for name, ref in case.outputs.items()]


@dataclass
class Outcome:
    """What running one file gave."""

    path: Path
    title: str
    comparisons: list[Comparison] = field(default_factory=list)
    failure: str = ""  # why nothing could be compared

    @property
    def passed(self) -> bool:
        return not self.failure and bool(self.comparisons) and all(c.passed for c in self.comparisons)

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "FAIL"
        ordered = sorted(self.comparisons, key=lambda c: (c.passed, -c.error))
        text = self.failure or " | ".join(map(str, ordered)) or "no recorded outputs"
        return f"{verdict} {self.path.name} [{self.title}]: {text}"


def run(path: Path, setting: Setting | None = None) -> Outcome:
    """Recompute and compare one file. Never raises: whatever goes wrong is in the outcome.

    Args:
        setting: device and precision; None: as recorded, fp32 on the CPU.
    """
    path = Path(path)
    title = "?"
    try:
        case = Case.load(path)
        title = f"{case.system}/{case.kind}"
        function = KINDS.get((case.system, case.kind))
        if function is None:
            return Outcome(path, title, failure=f'unknown kind "{case.kind}" of system "{case.system}"')
        fields = FIELDS.get((case.system, case.kind), Known())
        fields.check(case.given())
        if setting:
            with setting.around(case):
                computed = function(case)
        else:
            computed = function(case)
        if unread := fields.unread(case.given(), case.config.seen | case.options.seen):
            raise FieldError(f"given but not looked at: {', '.join(unread)}")
        judge = JUDGES.get((case.system, case.kind), lambda case, name: case.tolerance)
        tolerances = {name: judge(case, name) for name in case.outputs}
        comparisons = (setting.compare if setting else compare_all)(case, computed, tolerances)
        stated = "per output" if (case.system, case.kind) in JUDGES else f"{case.tolerance.relative:g}"
        return Outcome(path, f"{title}, tolerance {stated}", comparisons)
    except Exception as error:
        return Outcome(path, title, failure=f"{type(error).__name__}: {error}")


def fixture_folder() -> Path:
    """Where fixtures lie: $TESSERA_PARITY, or `shared/parity` next to the repository."""
    return Path(os.environ.get("TESSERA_PARITY") or REPOSITORY.parent / "shared" / "parity")


def default_folders() -> list[Path]:
    """The set that travels with the code, and all recordings where they are at hand."""
    return [EMBEDDED, *([fixture_folder()] if fixture_folder().is_dir() else [])]


def find(paths: list[Path]) -> list[Path]:
    """Every fixture among files and (recursively) folders."""
    found = []
    for path in map(Path, paths):
        found += sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return found
