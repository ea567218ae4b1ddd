"""Weight files against our models on the meta device: what fits, what is unused, and which tensors differ.

A recorded layout is JSON: {"file": ..., "tensors": {name: [shape, dtype]}, "optional_tensors": {...}}; a name with
slashes, "trainer/var/blocks.0.weight", lies in nested containers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from core.errors import UserError, plainly
from core.weights.adapter import Adapter, Facts, State, describe_differences, merged


@dataclass
class Comparison:
    """Of one file with the model that its shapes describe."""

    settings: dict[str, Any] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)  # sentences; empty: the file fits
    ignored: dict[str, str] = field(default_factory=dict)  # tensor -> why it is no part of our model
    unused: list[str] = field(default_factory=list)  # tensors that our model has no place for by design (optional)
    model: nn.Module | None = None  # on the meta device
    questions: str = ""  # about facts that are in no tensor; stand-ins took their place
    asked: list[str] = field(default_factory=list)  # the settings in which those stand-ins are: "size.heads"


def read_layout(layout: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded layout as a file would load: meta tensors, nested where names have slashes."""
    loaded: dict[str, Any] = {}
    for section in ("tensors", "optional_tensors"):
        for name, (shape, dtype) in (layout.get(section) or {}).items():
            *folders, last = name.split("/")
            place = loaded
            for folder in folders:
                place = place.setdefault(folder, {})
            place[last] = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    return loaded


def to_meta(state: State) -> State:
    """The same tensors without their data; tables of whole numbers, which tell facts (VAR's scales), keep it."""
    return {
        name: torch.empty(t.shape, dtype=t.dtype, device="meta") if t.is_floating_point() else t
        for name, t in state.items()
    }


def build_on_meta(build: Callable[..., nn.Module], settings: dict[str, Any]) -> nn.Module:
    """The model without memory for its weights; tables made on the CPU whatever the context says go there too."""
    with torch.device("meta"):
        return build(**settings).to("meta")


class _Watched(dict):
    """A state dict that notes which tensors are looked at one by one: those that sizes are read from."""

    def __init__(self, state: State):
        super().__init__(state)
        self.read: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read.setdefault(name, super().__getitem__(name))

    def source(self) -> str:
        """A clause with the tensors read, of numbered ones the first."""
        first = {n: t for n, t in self.read.items() if not any(p.isdigit() and p != "0" for p in n.split("."))}
        return "; the sizes were read from " + ", ".join(f"{n} {list(t.shape)}" for n, t in list(first.items())[:16])


def compare(adapter: Adapter, loaded: Mapping[str, Any], exact: bool = False, **settings: Any) -> Comparison:
    """Build our model as the shapes say and see whether it takes every tensor.

    A wrong tensor that a size is read from makes others differ: where shapes differ, the difference also names the tensors
    that were read.

    Args:
        loaded: contents of a file or `read_layout`; data is not looked at.
        exact: also ask for what we could rebuild (tables that official files hold), in its shape.
        settings: constructor arguments that overrule what the shapes say.
    """
    state = _Watched(to_meta(adapter.open(loaded, use_ema=False)))
    facts, result = Facts(loaded, settings), Comparison()
    try:
        result.settings = merged(adapter.settings(state, facts), settings)
        result.model = build_on_meta(adapter.build, result.settings)
    except UserError as error:
        result.differences = [f"{error}{state.source() if state.read else ''}"]
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        result.differences = [f"no model can be built from these shapes ({plainly(error)}){state.source()}"]
    if result.model is not None:
        source = state.source()
        _against_model(adapter, dict(state), result, result.model, exact)
        result.differences = [d + source if d.startswith("other shapes") else d for d in result.differences]
    result.questions, result.asked = facts.questions(), [key.partition(".")[2] for key, _ in facts.open]
    return result


def _against_model(adapter: Adapter, state: State, result: Comparison, model: nn.Module, exact: bool) -> None:
    """Fill in what differs, is ignored and is unused, under official names: the file and what this model is saved as."""
    official, ours = adapter.restore(model), model.state_dict()
    result.ignored = adapter.names.ignored_in(state)
    try:
        prepared = adapter.prepare(model, state)
    except (UserError, RuntimeError) as error:
        result.differences = [str(error)]
        return
    result.unused = sorted(adapter.rename(adapter.names.weights(state)).keys() - prepared.keys())
    left_out = (result.ignored.keys() | set(result.unused)) - official.keys()
    theirs = {name: t for name, t in state.items() if name not in left_out}
    misfits = describe_differences(prepared, ours)
    if not exact:  # what can be rebuilt need not be there
        theirs, official = adapter.names.weights(theirs), adapter.names.weights(official)
        official = official if misfits else {name: t for name, t in official.items() if name in theirs}
    result.differences = describe_differences(theirs, official) or misfits
    result.differences += [
        f"{name} is {theirs[name].dtype}, ours is {t.dtype}"
        for name, t in official.items()
        if name in theirs and theirs[name].is_floating_point() != t.is_floating_point()
    ]


def check_layout(adapter: Adapter, layout: Mapping[str, Any]) -> list[str]:
    """Differences between a recorded layout and our model, as sentences; [] where they agree."""
    return compare(adapter, read_layout(layout), exact=True).differences
