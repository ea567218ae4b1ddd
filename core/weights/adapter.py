"""Official checkpoints to our state dicts and back: what every system's adapter has in common.

An adapter knows the names of one family of released files; the instances are in tokenizer/adapters/ and
generator/adapters/. Loading is strict: whatever does not match is named, nothing is skipped in silence.
core/weights/layouts.py compares whole files with our models and says which tensor is at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from core.errors import UserError, plainly
from core.weights.names import Names, State, matching
from core.weights.pickles import plain


def entry(loaded: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, as in {"trainer": {"var": ...}} and "trainer.var"; None where there is none."""
    for key in path.split("."):
        if not isinstance(loaded, Mapping) or key not in loaded:
            return None
        loaded = loaded[key]
    return loaded


class Facts:
    """What is known of a weight file beside its tensors.

    Attributes:
        answers: constructor arguments that the user states; they overrule the file.
        stored: what the trainer wrote into the file (args, config), by its own words, whatever section they are in.
        open: questions that neither answers, (key, what it is).
    """

    PLACES = ("args", "config", "cfg", "hyper_parameters", "trainer.config")

    def __init__(self, loaded: Mapping[str, Any] | None = None, answers: Mapping[str, Any] | None = None):
        self.loaded, self.answers = loaded or {}, answers or {}
        self.stored: dict[str, Any] = {}
        self.open: list[tuple[str, str]] = []
        for place in self.PLACES:
            self._gather(plain(entry(self.loaded, place)))

    def _gather(self, words: Any, section: str = "") -> None:
        """Outer sections win over inner ones; "section.word" is always that section's."""
        if not isinstance(words, dict):
            return
        for word, value in words.items():
            if not isinstance(value, dict):
                self.stored.setdefault(word, value)
                self.stored.setdefault(f"{section}.{word}", value)
        for word, value in words.items():
            self._gather(value, word)

    def said(self, word: str) -> Any:
        """What the trainer stored under a word of its own, "word" or "section.word"; None where it stored nothing."""
        return self.stored.get(word)

    def ask(self, key: str, what: str, stand_in: Any, *known: Any) -> Any:
        """A fact that is in no tensor.

        Args:
            key: of our constructor with the kind in front, "generator.size.heads".
            what: for the question: "the number of attention heads".
            stand_in: a value with which the shapes of all tensors are right. `Adapter.describe` refuses to go on with it.
            known: what the file or a published size says, None where it does not; the first that says something counts.
        """
        for value in (entry(self.answers, key.partition(".")[2]), *known):
            if value is not None:
                return value
        self.open.append((key, what))
        return stand_in

    def questions(self) -> str:
        """One sentence that asks for everything that is open, "" where nothing is."""
        if not self.open:
            return ""
        what = " and ".join(dict.fromkeys(what for _, what in self.open))
        keys = " ".join(f"{key}=..." for key, _ in self.open)
        words = " ".join(f"{key.partition('.')[2]}=..." for key, _ in self.open)
        return (
            f"these weights do not tell {what}; give {keys} (or once for all: python -m scripts.convert FILE "
            f"NEW.safetensors --set {words})"
        )


def transformer_size(
    sizes: Mapping[str, Any], width: int, layers: int, facts: Facts, key: str, part: str, heads: int | None = None
) -> str | dict[str, int]:
    """A transformer as a setting: the name of the published size of this width and depth, else {width, layers, heads}.

    Args:
        sizes: name -> what has these three.
        key: of the setting, with the kind in front: "tokenizer.encoder".
        part: for the question: "the encoder".
        heads: what is known of their number; None: it is asked for.
    """
    for name, size in sizes.items():
        if (size.width, size.layers) == (width, layers):
            return name
    answer: int = facts.ask(f"{key}.heads", f"the number of attention heads of {part}", 1, heads)
    return {"width": width, "layers": layers, "heads": answer}


def merged(known: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`known` overruled by `overrides`, part by part where both hold tables."""
    return {
        **known,
        **{
            key: merged(known[key], value) if isinstance(value, dict) and isinstance(known.get(key), dict) else value
            for key, value in overrides.items()
        },
    }


def nested(path: str, value: Any) -> dict[str, Any]:
    """("trainer.var", x) -> {"trainer": {"var": x}}"""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def unusable(state: State, like: State | None = None) -> str:
    """A sentence about the first tensor that cannot be a weight: not finite, complex, or whole numbers where `like` has
    fractions; "" where there is none. Tensors without data are taken as they are."""
    for name, value in state.items():
        if value.is_complex() or (
            like is not None and like[name].is_floating_point() and not value.is_floating_point()
        ):
            return (
                f"{name} holds {str(value.dtype).removeprefix('torch.')} numbers, a floating-point tensor was expected"
            )
        if value.is_floating_point() and not value.is_meta:
            broken = int((~torch.isfinite(value.float() if value.itemsize == 1 else value)).sum())
            if broken:
                return (
                    f"{name} holds {broken:,} NaN or infinite values of {value.numel():,}: the file is damaged, or of a "
                    "run that diverged"
                )
    return ""


def describe_differences(state: State, expected: State) -> list[str]:
    """Sentences naming every tensor that is missing, unexpected or of another shape; empty when all is well."""

    def listing(names: list[str]) -> str:
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"missing {len(missing)}: {listing(missing)}")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"unexpected {len(unexpected)}: {listing(unexpected)}")
    shapes = [
        f"{name} is {list(state[name].shape)}, the model has {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"other shapes {len(shapes)}: {listing(shapes)}")
    return problems


def layer_count(state: State, prefix: str) -> int:
    """How many different numbers follow `prefix` in the names ("blocks." -> number of blocks)."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


@dataclass(frozen=True)
class Container:
    """Where official files keep weights; all places are dotted paths ("trainer.var").

    Attributes:
        averaged, raw: of EMA weights and of weights, the first that exists wins. Neither there: the file is bare.
        written: of (raw, EMA) weights in exported files, (path, None) where there is room for one set; None where the
            released file is a bare state dict.
        raw_only: official names that the EMA dictionary of an exported file leaves out, where raw weights hold them too.
        beside: where a generator's file holds its tokenizer too; None where it has no place for one.
    """

    averaged: tuple[str, ...] = ("model_ema", "ema")
    raw: tuple[str, ...] = ("model", "module", "state_dict")
    written: tuple[str, str | None] | None = ("model", "model_ema")
    raw_only: tuple[str, ...] = ()
    beside: str | None = None

    @property
    def holds_both(self) -> bool:
        """Whether exported files have room for raw and for averaged weights."""
        return self.written is not None and self.written[1] is not None

    def sets(self, loaded: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """(raw, averaged) state dicts as they lie in a file; {} for what it does not hold."""
        raw, averaged = (
            next((place for path in paths if isinstance(place := entry(loaded, path), Mapping)), {})
            for paths in (self.raw, self.averaged)
        )
        return (raw, averaged) if raw or averaged else (loaded, {})

    def pack(self, raw: State, averaged: State | None = None) -> dict[str, Any]:
        """What the official file holds, from official state dicts. A file with room for one set gets the averaged one
        where it is given. A set that comes alone lies where raw weights are expected too: some official programs look
        nowhere else."""
        if self.written is None:
            return averaged or raw
        first, second = self.written
        packed = nested(first, (raw if second else averaged) or raw or averaged)
        if averaged and second:
            packed |= nested(second, {n: t for n, t in averaged.items() if not matching(n, self.raw_only)})
        return packed


BARE = Container(written=None)


@dataclass(frozen=True)
class Adapter:
    """One family of released files: all sizes and variants of one model class, as the official code saves them.

    Writing one: give the first four, then whatever the files of the family need of the rest. The functions see official
    names only (see `Names`). Check a new adapter against every layout of its family:
    python -m scripts.convert --check-layout FILE.json ...

    Attributes:
        title: for messages, with its article: "the RecTok tokenizer".
        build: constructor of our model.
        inspect: (official state, Facts) -> constructor arguments that follow from names and shapes. Ignored tensors and
            buffers are still there (tables of RoPE tell the number of heads). Index freely: a KeyError becomes "... is
            missing". What no tensor tells and no published size settles is asked of Facts, never guessed. What a
            setting's default says anyway may be left out.
        names: see there.
        container: see there.
        rename: official names -> ours, split or fused tensors included.
        restore: model -> official state dict with every tensor of the released file, rebuilt buffers included, so that
            official file -> model -> official file is the same bit for bit.
        fit: (renamed state, model) -> state, resizing or dropping what this very model allows: learned positions of
            another grid, decoders it is built without. Also applied to our own checkpoints.
    """

    title: str
    build: Callable[..., nn.Module]
    inspect: Callable[[State, Facts], dict[str, Any]]
    names: Names
    container: Container = Container()
    rename: Callable[[State], State] = dict
    restore: Callable[[nn.Module], State] = nn.Module.state_dict
    fit: Callable[[State, nn.Module], State] = lambda state, model: state

    def parts(self, loaded: Mapping[str, Any]) -> tuple[State, State]:
        """(raw, averaged) weights of a file under official names; {} for what it does not hold."""
        raw, averaged = self.container.sets(loaded)
        return self.names.official(raw), self.names.official(averaged)

    def open(self, loaded: Mapping[str, Any], use_ema: bool = True) -> State:
        """The averaged weights, or the raw ones where asked for or alone; UserError where there are none."""
        raw, averaged = self.parts(loaded)
        if not raw and not averaged:
            raise UserError(f"no weights found in this checkpoint; it holds: {', '.join(map(str, list(loaded)[:10]))}")
        return averaged if averaged and (use_ema or not raw) else raw

    def settings(self, state: State, facts: Facts) -> dict[str, Any]:
        """What `inspect` tells of an official state; UserError that names a tensor it misses."""
        try:
            return self.inspect(state, facts)
        except KeyError as error:
            raise UserError(f"these are not the weights of {self.title}: {error.args[0]} is missing") from error
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise UserError(
                f"these are not the weights of {self.title}: their shapes fit none ({plainly(error)})"
            ) from error

    def describe(self, loaded: Mapping[str, Any], answers: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Constructor arguments for a weight file; UserError that asks for what neither it nor `answers` tells."""
        # The raw weights where there are any: EMA dictionaries may lack buffers, which tell the number of heads.
        facts = Facts(loaded, answers)
        settings = self.settings(self.open(loaded, use_ema=False), facts)
        if facts.open:
            raise UserError(facts.questions())
        return settings

    def prepare(self, model: nn.Module, loaded: Mapping[str, Any], use_ema: bool = True) -> State:
        """The checkpoint under our names, as far as it goes; differences are not looked at."""

        def ours(official: State) -> State:
            return self.fit(self.rename(self.names.weights(official)), model)

        state, empty = ours(self.open(loaded, use_ema)), model.state_dict()
        raw, averaged = self.parts(loaded)
        buffers = {name for name, _ in model.named_buffers() if name in empty}
        if raw and averaged and buffers - state.keys():
            state |= {name: t for name, t in ours(raw).items() if name in buffers and name not in state}
        return self.completed(state, model)

    def completed(self, state: State, model: nn.Module) -> State:
        """Weights under our names without the optional ones that `model` lacks, with its own for those that are missing."""
        empty = model.state_dict()
        for pattern in self.names.optional:
            in_file, in_model = ([n for n in names if fnmatchcase(n, pattern)] for names in (state, empty))
            if not in_model:
                state = {name: t for name, t in state.items() if name not in in_file}
            elif not in_file:
                state = state | {name: empty[name] for name in in_model}
        return state

    def convert(self, model: nn.Module, loaded: Mapping[str, Any], use_ema: bool = True) -> State:
        """The checkpoint as a state dict that `model` loads strictly; UserError naming what does not match."""
        if problem := unusable(self.names.weights(self.open(loaded, use_ema))):
            raise UserError(problem)
        state, expected = self.prepare(model, loaded, use_ema), model.state_dict()
        if problems := describe_differences(state, expected):
            raise UserError(f"these weights do not fit {self.title}: " + "; ".join(problems))
        if problem := unusable({name: t.to("meta") for name, t in state.items()}, expected):
            raise UserError(problem)
        return state

    def load(self, model: nn.Module, loaded: Mapping[str, Any], use_ema: bool = True) -> None:
        """Load a checkpoint into `model`. A model on the meta device takes over the checkpoint's tensors."""
        on_meta = any(p.is_meta for p in model.parameters())
        model.load_state_dict(self.convert(model, loaded, use_ema), assign=on_meta)


def recognise(adapters: Mapping[str, Adapter], loaded: Mapping[str, Any]) -> str | None:
    """Name of the adapter whose family a file belongs to; None when it looks like none of them."""

    def likeness(name: str) -> tuple[float, int]:
        raw, averaged = adapters[name].parts(loaded)
        return adapters[name].names.share(raw or averaged), len(adapters[name].names.markers)

    scores = {name: likeness(name) for name in adapters}
    best = max(scores, key=scores.__getitem__, default=None)
    return best if best is not None and scores[best][0] >= 0.5 else None
