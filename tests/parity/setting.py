"""Recordings elsewhere than they were made: on a GPU, and in the precision of training.

In fp32 the recorded tolerances hold, widened to what another order of sums needs (TF32 is off). Nothing was recorded in
bf16: there the root mean square of the error is compared with that of the recording, `BF16` at most. Codes near a margin
change, and with them all that follows: numbers of such a file must be finite, no more, and its line says how many changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from evaluation.networks import full_precision
from tests.parity import Case, Comparison, Tolerance, compare_all, read_meta

BF16 = {"grad": 0.25, "": 0.1}  # by the beginning of an output's name
WIDER = 10.0  # times the recorded tolerance, on another device
# Crops by Pillow, schedules, statistics by numpy: no run computes them on a device.
HOST = {
    "dar/image_ops",
    "fqgan/preprocess",
    "fqgan/image_metrics",
    "imagefolder/var_lr",
    "rear/pre",
    "rear/sched",
    "rectok/utils",
}
# Kinds that hold two ways to compute the same against each other, or whose codes are not recorded; and losses, which are
# never computed in bf16.
FP32_ONLY = {
    "dar/c2i_end_to_end",
    "dar/tok_decode",
    "fqgan/tok_train",
    "imagefolder/dino_disc",
    "imagefolder/tok_lora_eval",
    "imagefolder/vqloss",
    "rear/e2e",
    "rectok/loss",
}


class Together(TorchFunctionMode):
    """Inside, tensors of the CPU follow those of `device` that they meet: numbers of a recording that a kind keeps aside."""

    MOVES = {"copy_", "to", "__get__", "__set__"}  # these know what to do

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ not in self.MOVES:
            kinds = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()}
            if {"cpu", self.device.type} <= kinds:
                args, kwargs = tree_map_only(Tensor, lambda t: t.to(self.device), (args, kwargs))
        return function(*args, **kwargs)


@contextlib.contextmanager
def placed(device: torch.device) -> Iterator[None]:
    """Inside, new tensors and networks are on `device`; tables that are made on the CPU follow when weights are loaded."""
    load = nn.Module.load_state_dict

    def load_and_move(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        self.to(device)
        return result

    with Together(device), torch.device(device), mock.patch.object(nn.Module, "load_state_dict", load_and_move):
        yield


@dataclass(frozen=True)
class Setting:
    """Where and how recordings are computed again.

    Attributes:
        precision: "fp32", or "bf16": products under autocast, as in training.
    """

    device: torch.device
    precision: str = "fp32"

    def skips(self, path: Path) -> bool:
        """Whether there is nothing to learn from this file."""
        meta = read_meta(path)
        title = f"{meta.get('system')}/{meta.get('kind')}"
        return meta.get("system") == "evaluation" or title in HOST or (self.precision == "bf16" and title in FP32_ONLY)

    @contextlib.contextmanager
    def around(self, case: Case) -> Iterator[None]:
        """Moves the case and computes inside as this setting says."""
        case.to(self.device)
        if self.precision == "bf16":  # autocast on a CPU takes no other
            case.weights.update({n: t.float() if t.is_floating_point() else t for n, t in case.weights.items()})
        with contextlib.ExitStack() as stack:
            stack.enter_context(full_precision())
            if self.device.type != "cpu":
                stack.enter_context(placed(self.device))
            half = self.precision == "bf16"
            stack.enter_context(torch.autocast(self.device.type, torch.bfloat16, enabled=half))
            yield

    def compare(self, case: Case, computed: dict[str, Any], tolerances: dict[str, Tolerance]) -> list[Comparison]:
        """As tests.parity.compare_all, with the tolerances of this setting."""
        case.to(torch.device("cpu"))
        if self.device.type != "cpu":
            tolerances = {n: dataclasses.replace(t, relative=WIDER * t.relative) for n, t in tolerances.items()}
        found = compare_all(case, computed, tolerances)
        if self.precision == "fp32":
            return found
        return [
            self._loosened(c, computed.get(c.name), case.outputs[c.name], _codes_changed(case, found)) for c in found
        ]

    @staticmethod
    def _loosened(strict: Comparison, ours: Any, reference: Tensor, codes_changed: bool) -> Comparison:
        if strict.note or reference.numel() == 0:  # not computed, of another shape or kind
            return strict
        ours = torch.as_tensor(ours).detach().cpu()
        if not reference.is_floating_point():
            return dataclasses.replace(strict, passed=True)
        difference, scale = ((t.double()).square().mean().sqrt().item() for t in (ours - reference, reference))
        error = difference / scale if scale > 1e-6 else difference
        limit = next(value for beginning, value in BF16.items() if strict.name.startswith(beginning))
        passed = bool(ours.isfinite().all()) if codes_changed else error <= limit
        return Comparison(strict.name, error, passed)


def _codes_changed(case: Case, found: list[Comparison]) -> bool:
    """Whether a whole number that is no level of a pixel came out otherwise."""
    whole = {n for n, t in case.outputs.items() if not t.is_floating_point() and t.dtype != torch.uint8}
    return any(c.error > 0 for c in found if c.name in whole)
