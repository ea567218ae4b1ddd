"""Weights of one network, wherever they are: a run of ours, a file of ours, a released file or an address.

Source           a reference, resolved and opened once
read_weights     what it holds: settings of the network, tensors, latent statistics, what is noted of them
Weights.read     a state dict under our names that fits a network exactly
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from core.config import RESERVED
from core.dist import World, group_size
from core.errors import UserError
from core.train.checkpoint import Checkpoint
from core.weights import exports, hub, released
from core.weights import files as weight_files
from core.weights.adapter import describe_differences, merged, recognise, unusable
from generator.adapters import ADAPTERS as GENERATOR_ADAPTERS
from tokenizer.adapters import ADAPTERS as TOKENIZER_ADAPTERS

ADAPTERS = {"tokenizer": TOKENIZER_ADAPTERS, "generator": GENERATOR_ADAPTERS}


def constructor_arguments(section: dict[str, Any]) -> dict[str, Any]:
    """Of a component's config section: its name and what its constructor takes."""
    return {key: value for key, value in section.items() if key not in RESERVED - {"name"}}


# ---------------------------------------------------------------------------------------------------------------------
# Where they are
# ---------------------------------------------------------------------------------------------------------------------
class Source:
    """Where weights are. It is resolved, checked and opened once, however many questions are asked of it.

    Args:
        reference: run folder, checkpoint folder, file, file name in pretrained_models/, or hf://owner/repo/file.
        kind: "tokenizer" or "generator", where it decides between the files of a folder or a repository.
    """

    def __init__(self, reference: str, kind: str | None = None):
        self.reference, self.kind, self.path = reference, kind, released.resolve(reference, kind)

    @functools.cached_property
    def content(self) -> Checkpoint | weight_files.WeightFile | dict[str, Any]:
        """A checkpoint of ours, a file of ours, or what another program wrote; tensors are mapped from disk."""
        while self.path.is_dir() or not self.path.exists():
            try:
                return Checkpoint(self.path).hold()
            except UserError:
                if self.path.is_dir():
                    raise
                # The trainer of a living run has deleted it meanwhile: it has newer ones.
                self.path = released.resolve(self.reference, self.kind)
        return weight_files.read(self.path) or hub.load_tensors(self.path)

    def follow(self, world: World) -> None:
        """Take what the main rank takes: beside a running trainer another rank may have found a newer checkpoint. Collective."""
        if world.size == 1:
            return
        while True:
            path = world.on_main(self._opened)
            if path != str(self.path):
                self.close()
                self.path = Path(path)
            other = world.together(self._opened) != path  # it was deleted before this rank had opened it
            if not world.any(other):
                return
            if world.is_main:
                self.close()
                self.path = released.resolve(self.reference, self.kind)

    def _opened(self) -> str:
        """The place of what is held from now on. Files are not deleted by a trainer, and opened when they are read."""
        if not self.path.is_file():
            _ = self.content
        return str(self.path)

    def close(self) -> None:
        """Let go of the file."""
        self.__dict__.pop("content", None)


def open_weights(reference: str, kind: str, world: World | None) -> Source:
    """The same weights on all ranks. Collective where there are several; `world` is None where this is the only one."""
    if world is None:
        assert group_size() == 1, f"{reference}: each rank might take another checkpoint of a living run"
        return Source(reference, kind)
    source = world.together(lambda: Source(reference, kind))
    source.follow(world)
    return source


def commits_of(sources: dict[str, Source]) -> dict[str, str]:
    """Of the repositories that weights were downloaded from, by setting."""
    return {setting: commit for setting, source in sources.items() if (commit := hub.commit_of(source.path))}


def kinds_of(reference: str) -> set[str]:
    """What the weights of a reference are of: {"tokenizer"} or {"generator"}, or both for a folder with a file of each.
    UserError where there are none."""
    source = Source(reference, "generator")
    beside = source.path.with_name("tokenizer.safetensors")
    if source.path.name == "generator.safetensors" != Path(reference).name and beside.is_file():
        return {"tokenizer", "generator"}
    try:
        if isinstance(source.content, Checkpoint):
            return {source.content.state["primary"]}
        if isinstance(source.content, weight_files.WeightFile):
            return {source.content.kind}
        return {"generator" if recognise(ADAPTERS["generator"], source.content) else "tokenizer"}
    finally:
        source.close()


# ---------------------------------------------------------------------------------------------------------------------
# What they are
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Weights:
    """Weights of one network, from a run of ours or a released file.

    Attributes:
        kind: "tokenizer" or "generator".
        settings: name and constructor arguments of the network.
        tensors: averaged? -> state dict under our names; None for a released file, which its adapter translates.
        official: contents of a released file.
        constants: latent statistics and the like.
        about: what a file of ours says beside its weights, see run/sharing.py.
        trained: the config of a run of ours.
    """

    kind: str
    path: Path
    settings: dict[str, Any]
    tensors: Callable[[bool], dict[str, Tensor]] | None = None
    official: dict[str, Any] | None = None
    constants: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    trained: dict[str, Any] | None = None

    def read(
        self,
        network: nn.Module,
        averaged: bool = True,
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state,
    ) -> dict[str, Tensor]:
        """A state dict that fits `network` exactly, after `change` of one under our names; UserError where there is none."""
        adapter = ADAPTERS[self.kind].get(self.settings["name"])  # one that nobody published weights of has none
        if adapter is not None:
            fit = adapter.fit
            adapter = replace(adapter, fit=lambda state, model: change(fit(state, model)))
        if self.tensors is None:
            assert adapter is not None and self.official is not None
            with _naming(self.path):
                return adapter.convert(network, self.official, averaged)
        state = self.tensors(averaged)
        state = adapter.completed(adapter.fit(state, network), network) if adapter else change(state)
        if problems := describe_differences(state, network.state_dict()):
            raise UserError(f"{self.path} does not fit {type(network).__name__}: {'; '.join(problems)}")
        if problem := unusable(state, network.state_dict()):
            raise UserError(f"{self.path}: {problem}")
        return state

    def load(self, network: nn.Module, averaged: bool = True) -> None:
        network.load_state_dict(self.read(network, averaged))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Mistakes are told with the name of the file that they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_weights(kind: str, source: str | Source, known: dict[str, Any] | None = None) -> Weights:
    """Find the weights of a tokenizer or generator.

    Args:
        kind: "tokenizer" or "generator".
        source: an opened one, or what `Source` takes.
        known: settings that the user states; they answer what a released file does not tell (numbers of heads).
    """
    source = Source(source, kind) if isinstance(source, str) else source
    content = source.content
    if isinstance(content, dict):
        return _released(kind, source.path, content, known)
    held = content.state["primary"] if isinstance(content, Checkpoint) else content.kind
    if held != kind:
        raise UserError(f"{source.path} holds a {held}, a {kind} was asked for.")
    if isinstance(content, Checkpoint):
        return _checkpoint(kind, content)

    def tensors(averaged: bool) -> dict[str, Tensor]:
        return content.weights if averaged or not content.raw else content.raw

    about = content.provenance, content.about
    return Weights(kind, source.path, content.settings, tensors, None, content.constants, *about)


def _checkpoint(kind: str, checkpoint: Checkpoint) -> Weights:
    state = checkpoint.state

    def tensors(averaged: bool) -> dict[str, Tensor]:
        return checkpoint.tensors(f"{kind}.ema_{state['ema'][0]}" if averaged and state["ema"] else kind)

    settings = constructor_arguments(state["config"][kind])
    constants = checkpoint.tensors("constants") if "constants.safetensors" in checkpoint.files else {}
    return Weights(
        kind, checkpoint.path, settings, tensors, None, constants, state["provenance"], trained=state["config"]
    )


def _released(kind: str, path: Path, content: dict[str, Any], known: dict[str, Any] | None) -> Weights:
    """A released file, read by the adapter that recognises it."""
    name = recognise(ADAPTERS[kind], content)
    if name is None:
        other = next((a[n].title for a in ADAPTERS.values() if (n := recognise(a, content))), None)
        raise UserError(
            f"{path} holds {other}, a {kind} was asked for."
            if other
            else f"{path}: these are not the weights of any {kind} that is known "
            f"({', '.join(a.title.removeprefix('the ') for a in ADAPTERS[kind].values())})."
        )
    with _naming(path):
        stored = exports.settings_in(content, kind, name)
        settings = merged(ADAPTERS[kind][name].describe(content, merged(stored, known or {})), stored)
    return Weights(kind, path, {"name": name, **settings}, official=content)
