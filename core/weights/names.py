"""What tensors are called in official files and in ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError

State = dict[str, Tensor]

# What training and sampling leave in state dicts of any model, and why it is no part of ours: pattern -> reason.
NEVER_WEIGHTS = {
    "*kv_cache.*": "a cache of keys and values",
    "*.[kv]_cache": "a cache of keys and values",
    "*.cached_[kv]": "a cache of keys and values",
    "*freqs_cis": "a rotary table, which is rebuilt",
    "*.freqs_cos": "a rotary table, which is rebuilt",
    "*.freqs_sin": "a rotary table, which is rebuilt",
    "*.inv_freq": "a rotary table, which is rebuilt",
    "*causal_mask": "a mask, which is rebuilt",
    "*.attn_mask": "a mask, which is rebuilt",
    "*foundation_model*": "the frozen teacher, not part of the model",
    "teacher*.*": "the frozen teacher",
    "semantic_model.*": "the frozen teacher",
    "detail_model.*": "a teacher that the official code cannot build",
    "n_averaged": "a counter of averaged weights",
    "*total_ops": "a profiler's count",
    "*total_params": "a profiler's count",
}
_WRAPPERS = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
)  # of torch.compile and FSDP, anywhere
_PREFIXES = ("module.", "model.", "_forward_module.")  # of DDP, of a class around the network, of DeepSpeed


def plain_names(state: Mapping[str, Any]) -> State:
    """The tensors of a state dict without what torch.compile and FSDP put into names."""
    plain_state = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and isinstance(name, str):
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            plain_state[name] = value
    return plain_state


def matching(name: str, patterns: Any) -> str | None:
    """The first of the shell-style patterns that a tensor's name matches."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def renamed(state: State, rename: Callable[[str], str]) -> State:
    """The same tensors, in the same order, under other names."""
    return {rename(name): tensor for name, tensor in state.items()}


class Renames:
    """A table of names that is read both ways.

        Renames(("^quantize.", "^quantizer."), (".up.{}.", ".levels.{}."), fused={".qkv.": (".q.", ".k.", ".v.")})

    Args:
        pairs: (official, ours) parts of names, replaced in turn; to official names from the last to the first. "^" stands
            for the beginning of a name, "{}" for a number.
        fused: our part of a name -> the official ones whose tensors lie in it one above the other. Parts are fused before
            names are replaced, and split after.
    """

    def __init__(self, *pairs: tuple[str, str], fused: Mapping[str, tuple[str, ...]] | None = None):
        self.fused = fused or {}
        self._forth = [_rule(official, ours) for official, ours in pairs]
        self._back = [_rule(ours, official) for official, ours in reversed(pairs)]

    def ours(self, state: State) -> State:
        """Official state -> ours; UserError where one of the tensors to fuse is missing."""
        fused: State = {}
        for name, tensor in state.items():
            whole, official = self._whole(name)
            missing = [part for part in official if part not in state]
            if missing:
                raise UserError(f"these weights are incomplete: {', '.join(missing)} is missing")
            if whole not in fused:
                fused[whole] = torch.cat([state[part] for part in official]) if official else tensor
        return renamed(fused, lambda name: _replaced(name, self._forth))

    def official(self, state: State) -> State:
        """The reverse of `ours`, bit for bit."""
        split: State = {}
        for name, tensor in renamed(state, lambda name: _replaced(name, self._back)).items():
            whole = next((whole for whole in self.fused if whole in name), None)
            if whole is None:
                split[name] = tensor
                continue
            parts = self.fused[whole]
            split |= {name.replace(whole, part): rows for part, rows in zip(parts, tensor.chunk(len(parts)))}
        return split

    def _whole(self, name: str) -> tuple[str, list[str]]:
        """(our name of what a tensor is fused into, the official names of all that is); (name, []) for others."""
        for whole, parts in self.fused.items():
            for part in parts:
                if part in name:
                    return name.replace(part, whole), [name.replace(part, other) for other in parts]
        return name, []


def _rule(old: str, new: str) -> tuple[re.Pattern, str]:
    pattern = ("^" if old.startswith("^") else "") + re.escape(old.removeprefix("^")).replace(r"\{\}", r"(\d+)")
    return re.compile(pattern), new.removeprefix("^").replace("{}", r"\g<1>")


def _replaced(name: str, rules: Iterable[tuple[re.Pattern, str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


@dataclass(frozen=True)
class Names:
    """What tensors of one family of files are called. All patterns are shell-style: "blocks.*.attn.*".

    "Official names" are those of a state dict after the container is opened, the prefixes "module." and "_orig_mod." are
    gone and `aliases` are applied.

    Attributes:
        markers: patterns that together occur in no other family. The adapter with the largest share of its markers
            present is asked, so one missing tensor still leads to the right adapter and is then named by it.
        aliases: historical parts of names -> the official ones, replaced as text: {"aux_": "sem_"}.
        ignored: pattern of official names -> why they are not part of the model, beside NEVER_WEIGHTS, which holds for
            every family. They are dropped before `Adapter.rename`; `convert.py` lists them. What `Adapter.restore`
            gives of them is asked of recorded layouts, not of files.
        optional: patterns of our names that a file has all or none of (heads that only training needs). Where the file
            lacks them the model keeps its own values; where the model lacks them they are dropped.
    """

    markers: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    def share(self, state: State) -> float:
        """Share of the markers that are present, 0..1."""
        return sum(any(fnmatchcase(name, marker) for name in state) for marker in self.markers) / len(self.markers)

    def official(self, state: Mapping[str, Any]) -> State:
        """The tensors of a state dict under official names."""
        state = self._unwrapped(plain_names(state))
        for old, new in self.aliases.items():
            state = {name.replace(old, new): value for name, value in state.items()}
        return state

    def _unwrapped(self, state: State) -> State:
        """What lies below "module.", "model." or both, where this family's markers are there and not beside it."""
        for prefix in _PREFIXES:
            inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            if inside and (len(inside) == len(state) or self.share(inside) > self.share(state)):
                return self._unwrapped(inside)
        return state

    def ignored_in(self, state: State) -> dict[str, str]:
        """Official name -> reason of every tensor that is not part of our model."""
        reasons = {**NEVER_WEIGHTS, **self.ignored}
        patterns = {name: matching(name, reasons) for name in state}
        return {name: reasons[pattern] for name, pattern in patterns.items() if pattern}

    def weights(self, state: State) -> State:
        """The tensors that are part of our model."""
        ignored = self.ignored_in(state)
        return {name: t for name, t in state.items() if name not in ignored}
