"""Weight files against our models on the meta device: what fits, what is unused, and which tensor is at fault.

A recorded layout is JSON: {"file": ..., "tensors": {name: [shape, dtype]}, "optional_tensors": {...}}; a name with
slashes, "trainer/var/blocks.0.weight", lies in nested containers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from core.errors import UserError
from core.weights.adapter import Adapter, Facts, State, describe_differences, merged

MAX_HYPOTHESES = 24  # models built to find the tensor at fault; each takes a fraction of a second


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
    wrong: dict[str, tuple] = field(
        default_factory=dict
    )  # tensor -> (its shape, the shape it should have), None: absent


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
    """A state dict that notes which tensors are looked at one by one."""

    def __init__(self, state: State):
        super().__init__(state)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = super().__getitem__(name)
        if name not in self.read:
            self.read.append(name)
        return tensor


def compare(
    adapter: Adapter, loaded: Mapping[str, Any], exact: bool = False, parameters: int | None = None, **settings: Any
) -> Comparison:
    """Build our model as the shapes say and see whether it takes every tensor.

    Args:
        loaded: contents of a file or `read_layout`; data is not looked at.
        exact: also ask for what we could rebuild (tables that official files hold), in its shape.
        parameters: how many the file is known to hold. It tells a wrong size that only one tensor has (of a table of
            classes, say), which no other tensor contradicts.
        settings: constructor arguments that overrule what the shapes say.
    """
    state = to_meta(adapter.open(loaded, use_ema=False))
    facts = Facts(loaded, settings)
    result = _fit(adapter, state, facts, exact)
    questions, asked = facts.questions(), [key.partition(".")[2] for key, _ in facts.open]
    if result.differences:
        result = _find_fault(adapter, state, facts, result, exact) or result
    elif parameters is not None and (surplus := _parameters(result.model) - parameters):
        result.differences = _find_free_size(adapter, state, facts, parameters, surplus)
    result.questions, result.asked = questions, asked
    return result


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _find_free_size(adapter: Adapter, state: State, facts: Facts, parameters: int, surplus: int) -> list[str]:
    """The tensor that, given another shape, makes the model the recorded size; nothing where there is none: the count
    was then taken otherwise, and proves nothing."""
    watched = _Watched(state)
    adapter.inspect(watched, facts)
    for name in watched.read:
        shape = list(state[name].shape)
        for place, size in enumerate(shape):
            each = state[name].numel() // size if size else 0
            if not each or surplus % each or not size - surplus // each > 0:
                continue
            other = [*shape[:place], size - surplus // each, *shape[place + 1 :]]
            changed = {**state, name: torch.empty(other, dtype=state[name].dtype, device="meta")}
            fitted = _fit(adapter, changed, facts, True)
            if not fitted.differences and _parameters(fitted.model) == parameters:
                return [f"{name} is {shape}, {parameters:,} parameters ask for {other}"]
    return []


def _fit(adapter: Adapter, state: State, facts: Facts, exact: bool) -> Comparison:
    watched = _Watched(state)
    try:
        described = merged(adapter.inspect(watched, facts), facts.given)
    except KeyError as error:
        return Comparison(differences=[f"{error.args[0]} is missing"])
    except UserError as error:
        last = f" (read from {watched.read[-1]}: {list(state[watched.read[-1]].shape)})" if watched.read else ""
        return Comparison(differences=[f"{error}{last}"])
    try:
        model = build_on_meta(adapter.build, described)
    except (UserError, ValueError, RuntimeError, ZeroDivisionError) as error:
        single = [n for n in watched.read if not any(part.isdigit() for part in n.split("."))] or watched.read
        where = ", ".join(f"{n} {list(state[n].shape)}" for n in single[:16])
        return Comparison(
            described,
            [
                f"no model can be built from these shapes ({error})"
                + (f"; the sizes were read from {where}" if where else "")
            ],
        )
    return _against(adapter, state, model, Comparison(described, model=model), exact)


def _against(adapter: Adapter, state: State, model: nn.Module, result: Comparison, exact: bool) -> Comparison:
    """Compare under official names: the file with what this model would be saved as."""
    official = adapter.to_official(model)
    result.ignored = adapter.ignored_in(state)
    for name in state.keys() - official.keys() - result.ignored.keys():
        if _left_out(adapter, name, state[name]):
            result.ignored[name] = "left out by the adapter"
    try:
        prepared, ours = adapter.prepare(model, state), model.state_dict()
        result.unused = sorted(
            adapter.rename({n: t for n, t in state.items() if n not in result.ignored}).keys() - prepared.keys()
        )
        loads = not describe_differences(prepared, ours)
    except (UserError, KeyError, RuntimeError) as error:
        prepared, ours, loads = {}, {}, False
        result.differences = [f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)]
    theirs = {n: t for n, t in state.items() if n in official or n not in result.ignored.keys() | set(result.unused)}
    wanted = dict(official)
    if not exact:  # what can be rebuilt need not be there
        rebuilt = adapter.ignored_in(official)
        wanted = {n: t for n, t in official.items() if n not in rebuilt and (n in theirs or not loads)}
        theirs = {n: t for n, t in theirs.items() if n not in rebuilt}
    result.wrong = {
        n: (theirs[n].shape if n in theirs else None, wanted[n].shape if n in wanted else None)
        for n in theirs.keys() | wanted.keys()
        if n not in theirs or n not in wanted or theirs[n].shape != wanted[n].shape
    }
    found = describe_differences(theirs, wanted) or ([] if loads else describe_differences(prepared, ours))
    found += [
        f"{name} is {theirs[name].dtype}, ours is {wanted[name].dtype}"
        for name in wanted
        if name in theirs and theirs[name].is_floating_point() != wanted[name].is_floating_point()
    ]
    result.differences = found or result.differences
    return result


def _left_out(adapter: Adapter, name: str, tensor: torch.Tensor) -> bool:
    """Whether `rename` drops this tensor."""
    try:
        return not adapter.rename({name: tensor})
    except (UserError, KeyError, RuntimeError):  # it needs others beside it, so it is used
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Which tensor is at fault, when the sizes were read from it
# ---------------------------------------------------------------------------------------------------------------------
def _find_fault(adapter: Adapter, state: State, facts: Facts, result: Comparison, exact: bool) -> Comparison | None:
    """One tensor of a wrong shape spoils many others when a size is read from it. Look for a tensor that, given another
    shape, leaves fewer differences than there are; None where there is no such tensor."""
    if result.model is not None and not any(
        theirs and mine and len(theirs) == len(mine) for theirs, mine in result.wrong.values()
    ):
        return None  # names alone differ
    best, fewest = None, len(result.wrong) or len(state)
    limit = MAX_HYPOTHESES if len(result.wrong) != 1 else 3
    for name, shape in islice(_hypotheses(adapter, state, facts, result.wrong), limit):
        changed = {**state, name: torch.empty(shape, dtype=state[name].dtype, device="meta")}
        other = _fit(adapter, changed, facts, exact)
        if other.model is None or other.settings == result.settings:
            continue
        left = len(other.wrong)
        sentence = f"{name} is {list(state[name].shape)}, the other tensors ask for {shape}"
        if left + 1 < fewest:
            best, fewest = other, left + 1
            best.differences = [sentence, *other.differences]
        elif left == 0 and len(result.wrong) == 1:  # two tensors contradict each other, either may be wrong
            result.differences.append(f"or else {sentence}")
        if left == 0:
            break
    return best


def _hypotheses(
    adapter: Adapter, state: State, facts: Facts, wrong: Mapping[str, Any]
) -> Iterator[tuple[str, list[int]]]:
    """(tensor, other shape) that change what the adapter reads, the likeliest first.

    The numbers to try come from the tensors that differ: where the model has 258 and the file 256, a size of 129 may
    want to be 128. Without a model, the sizes that are most common in the file are tried.
    """
    watched = _Watched(state)
    try:
        before = adapter.inspect(watched, facts)
    except UserError:
        before = None
    except KeyError:
        return  # a missing tensor, named already
    swaps = Counter(
        (mine, theirs)
        for a, b in wrong.values()
        if a and b and len(a) == len(b)
        for theirs, mine in zip(a, b)
        if theirs != mine
    )
    common = Counter(size for t in state.values() for size in t.shape if size > 3)
    seen = set()
    for name in reversed(watched.read) if before is None else watched.read:
        shape = list(state[name].shape)
        for place, size in enumerate(shape):
            values = (
                [size * theirs // mine for (mine, theirs), _ in swaps.most_common(12) if size * theirs % mine == 0]
                if swaps
                else [value for value, _ in common.most_common(6)]
            )
            for value in values:
                other = [*shape[:place], value, *shape[place + 1 :]]
                if value in (0, size) or (name, *other) in seen:
                    continue
                seen.add((name, *other))
                try:
                    after = adapter.inspect({**state, name: torch.empty(other, device="meta")}, facts)
                except (UserError, KeyError):
                    continue
                if after != before:
                    yield name, other
