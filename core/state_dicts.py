"""Official checkpoints to our state dicts and back: what every system's adapter has in common.

An adapter knows the names of one family of released files; the instances are in tokenizer/adapters/ and
generator/adapters/. Loading is strict: whatever does not match is named, nothing is skipped in silence.
core/layouts.py compares whole files with our models and says which tensor is at fault.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Callable, Mapping

import torch
from torch import Tensor, nn

from core.errors import UserError

State = dict[str, Tensor]


def _entry(loaded: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, as in {"trainer": {"var": ...}} and "trainer.var"; None where there is none."""
    for key in path.split("."):
        if not isinstance(loaded, Mapping) or key not in loaded:
            return None
        loaded = loaded[key]
    return loaded


def plain_names(state: Mapping[str, Any]) -> State:
    """The tensors of a state dict without what DDP ("module.") and torch.compile ("_orig_mod.") put into names."""
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items() if isinstance(value, Tensor)}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def matching(name: str, patterns: Any) -> str | None:
    """The first of the shell-style patterns that a tensor's name matches."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def describe_differences(state: State, expected: State) -> list[str]:
    """Sentences naming every tensor that is missing, unexpected or of another shape; empty when all is well."""

    def listing(names: list[str]) -> str:
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"missing {len(missing)}: {listing(missing)}")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"unexpected {len(unexpected)}: {listing(unexpected)}")
    shapes = [f"{name} is {list(state[name].shape)}, the model has {list(expected[name].shape)}"
              for name in expected if name in state and state[name].shape != expected[name].shape]
    if shapes:
        problems.append(f"other shapes {len(shapes)}: {listing(shapes)}")
    return problems


def layer_count(state: State, prefix: str) -> int:
    """How many different numbers follow `prefix` in the names ("blocks." -> number of blocks)."""
    return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})


@dataclass(frozen=True)
class Adapter:
    """One family of released files: all sizes and variants of one model class, as the official code saves them.

    Writing one: give the first six, then whatever the files of the family need of the rest. "Official names" below are
    those of a state dict after the container is opened (`averaged`, `raw`), the prefixes "module." and "_orig_mod."
    are gone and `aliases` are applied; the functions see only such names. Patterns are shell-style ("blocks.*.attn.*").
    Check a new adapter against every layout of its family: python scripts/convert.py --check-layout FILE.json ...

    Attributes:
        title: for messages, with its article: "the RecTok tokenizer".
        build: constructor of our model.
        inspect: official state -> constructor arguments that follow from names and shapes. Ignored tensors and buffers
            are still there (tables of RoPE tell the number of heads). Index freely: a KeyError becomes "... is
            missing"; raise UserError for what cannot be told. What a setting's default says anyway may be left out.
        rename: official names -> ours, split or fused tensors included.
        fit: (renamed state, model) -> state, resizing or dropping what this very model allows: learned positions of
            another grid, decoders it is built without. Also applied to our own checkpoints; usually the identity.
        restore: model -> official state dict with every tensor of the released file, rebuilt buffers included, so that
            official file -> model -> official file is the same bit for bit.
        markers: patterns that together occur in no other family. The adapter with the largest share of its markers
            present is asked, so one missing tensor still leads to the right adapter and is then named by it.
        unlike: patterns that rule this family out, where another one has all its markers and more.
        aliases: historical parts of names -> the official ones, replaced as text: {"aux_": "sem_"}.
        ignored: pattern of official names -> why they are not part of the model (frozen teachers inside the file,
            tables that are rebuilt). They are dropped before `rename`; `convert.py` lists them. What `restore` gives of
            them is asked of recorded layouts, not of files.
        optional: patterns of our names that a file has all or none of (heads that only training needs). Where the file
            lacks them the model keeps its own values; where the model lacks them they are dropped.
        averaged, raw: where files keep EMA weights and weights, dotted paths, the first that exists wins. Neither
            there: the file is bare. Buffers that an EMA dictionary lacks are taken from the raw weights.
        container: keys of (raw, EMA) weights in exported files; None where the released file is a bare state dict.
        raw_only: official names that the EMA dictionary of an exported file leaves out, where raw weights hold them too.
    """

    title: str
    build: Callable[..., nn.Module]
    inspect: Callable[[State], dict[str, Any]]
    rename: Callable[[State], State]
    fit: Callable[[State, nn.Module], State]
    restore: Callable[[nn.Module], State]
    markers: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ("model_ema", "ema")
    raw: tuple[str, ...] = ("model", "module", "state_dict")
    container: tuple[str, str] | None = ("model", "model_ema")
    raw_only: tuple[str, ...] = ()

    # -- opening a file -----------------------------------------------------------------------------------------------
    def parts(self, loaded: Mapping[str, Any]) -> tuple[State, State]:
        """(raw, averaged) weights under official names; {} for what the file does not hold."""
        found = []
        for paths in (self.raw, self.averaged):
            entries = (_entry(loaded, path) for path in paths)
            found.append(next((entry for entry in entries if isinstance(entry, Mapping)), {}))
        if not any(found):
            found[0] = loaded
        return self._official(found[0]), self._official(found[1])

    def _official(self, state: Mapping[str, Any]) -> State:
        state = plain_names(state)
        for old, new in self.aliases.items():
            state = {name.replace(old, new): value for name, value in state.items()}
        return state

    def open(self, loaded: Mapping[str, Any], use_ema: bool = True) -> State:
        """The averaged weights, or the raw ones where asked for or alone; UserError where there are none."""
        raw, averaged = self.parts(loaded)
        if not raw and not averaged:
            raise UserError(f"no weights found in this checkpoint; it holds: {', '.join(map(str, list(loaded)[:10]))}")
        return averaged if averaged and (use_ema or not raw) else raw

    def likeness(self, loaded: Mapping[str, Any]) -> float:
        """Share of this family's markers in a file, 0..1. One without markers takes what it can inspect."""
        raw, averaged = self.parts(loaded)
        state = raw or averaged
        if any(matching(name, self.unlike) for name in state):
            return 0.0
        if self.markers:
            return sum(any(fnmatchcase(name, marker) for name in state) for marker in self.markers) / len(self.markers)
        try:
            self.describe(loaded)
        except UserError:
            return 0.0
        return 1.0

    # -- what is in it ------------------------------------------------------------------------------------------------
    def describe(self, loaded: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments for a weight file."""
        # The raw weights where there are any: EMA dictionaries may lack buffers, which tell the number of heads.
        raw, averaged = self.parts(loaded)
        try:
            return self.inspect(raw or averaged)
        except KeyError as error:
            raise UserError(f"these are not the weights of {self.title}: {error.args[0]} is missing") from error

    def ignored_in(self, state: State) -> dict[str, str]:
        """Name -> reason of every tensor that is not part of our model."""
        patterns = {name: matching(name, self.ignored) for name in state}
        return {name: self.ignored[pattern] for name, pattern in patterns.items() if pattern}

    # -- to our model -------------------------------------------------------------------------------------------------
    def prepare(self, model: nn.Module, loaded: Mapping[str, Any], use_ema: bool = True) -> State:
        """The checkpoint under our names, as far as it goes; differences are not looked at."""
        def ours(state: State) -> State:
            ignored = self.ignored_in(state)
            return self.fit(self.rename({name: t for name, t in state.items() if name not in ignored}), model)

        state, own = ours(self.open(loaded, use_ema)), model.state_dict()
        raw, averaged = self.parts(loaded)
        buffers = {name for name, _ in model.named_buffers()}
        if raw and averaged and any(name in own and name not in state for name in buffers):
            state |= {name: t for name, t in ours(raw).items() if name in buffers and name not in state}
        for pattern in self.optional:
            theirs, mine = ([name for name in names if fnmatchcase(name, pattern)] for names in (state, own))
            if not mine:
                state = {name: t for name, t in state.items() if name not in theirs}
            elif not theirs:
                state |= {name: own[name] for name in mine}
        return state

    def convert(self, model: nn.Module, loaded: Mapping[str, Any], use_ema: bool = True) -> State:
        """The checkpoint as a state dict that `model` loads strictly; UserError naming what does not match."""
        state = self.prepare(model, loaded, use_ema)
        if problems := describe_differences(state, model.state_dict()):
            raise UserError(f"these weights do not fit {self.title}: " + "; ".join(problems))
        return state

    def load(self, model: nn.Module, loaded: Mapping[str, Any], use_ema: bool = True) -> None:
        """Load a checkpoint into `model`. A model on the meta device takes over the checkpoint's tensors."""
        on_meta = any(p.is_meta for p in model.parameters())
        trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        model.load_state_dict(self.convert(model, loaded, use_ema), strict=True, assign=on_meta)
        for name, p in model.named_parameters():
            p.requires_grad_(trainable[name])

    # -- to official files --------------------------------------------------------------------------------------------
    def to_official(self, model: nn.Module) -> State:
        """The model's weights under the names that the official code loads."""
        return self.restore(model)

    def pack(self, raw: State, averaged: State | None = None) -> dict[str, Any]:
        """What the official file holds, from official state dicts. A bare file has room for one set of weights:
        the averaged one where it is given."""
        if self.container is None:
            return averaged or raw
        packed = {self.container[0]: raw} if raw else {}
        if averaged:
            packed[self.container[1]] = {n: t for n, t in averaged.items() if not (raw and matching(n, self.raw_only))}
        return packed

    def check_layout(self, layout: dict[str, Any], **settings: Any) -> list[str]:
        """Differences between a recorded layout (core/layouts.py) and our model; `settings` override what it says."""
        from core.layouts import compare, read_layout

        return compare(self, read_layout(layout), True, layout.get("parameters"), **settings).differences


def recognise(adapters: Mapping[str, Adapter], loaded: Mapping[str, Any]) -> str | None:
    """Name of the adapter whose family a file belongs to; None when it looks like none of them."""
    scores = {name: (adapter.likeness(loaded), len(adapter.markers)) for name, adapter in adapters.items()}
    best = max(scores, key=scores.__getitem__, default=None)
    return best if best is not None and scores[best][0] >= 0.5 else None
