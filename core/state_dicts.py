"""Official checkpoints to our state dicts and back: what every system's adapter has in common.

An adapter knows the names of one family of released files; the instances are in tokenizer/adapters.py and
generator/adapters.py. Loading is strict: whatever does not match is named, nothing is skipped in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor, nn

from core.errors import UserError

State = dict[str, Tensor]


def unwrap(loaded: dict[str, Any], use_ema: bool = True) -> State:
    """The state dict inside a training checkpoint {"model": ..., "model_ema": ...}, or `loaded` if it is bare."""
    for key in ("model_ema", "model") if use_ema else ("model",):
        if isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    state = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"no weights found in this checkpoint; it holds: {', '.join(map(str, list(loaded)[:10]))}")
    return state


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
    """One family of released files.

    Attributes:
        title: for messages.
        build: constructor of our model.
        inspect: renamed state -> constructor arguments that follow from tensor shapes.
        rename: official names -> ours, dropping what is not part of the model.
        fit: (renamed state, model) -> state, resizing what may be resized.
        restore: model -> official state dict.
    """

    title: str
    build: Callable[..., nn.Module]
    inspect: Callable[[State], dict[str, Any]]
    rename: Callable[[State], State]
    fit: Callable[[State, nn.Module], State]
    restore: Callable[[nn.Module], State]

    def describe(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """Constructor arguments for a bare weight file."""
        # The raw weights where there are any: EMA dictionaries lack buffers, which tell the number of heads.
        return self.inspect(unwrap(loaded, use_ema=not isinstance(loaded.get("model"), dict)))

    def convert(self, model: nn.Module, loaded: dict[str, Any], use_ema: bool = True) -> State:
        """The checkpoint as a state dict that `model` loads strictly; UserError naming what does not match."""
        state = self.fit(self.rename(unwrap(loaded, use_ema)), model)
        if problems := describe_differences(state, model.state_dict()):
            raise UserError(f"these weights do not fit {self.title}: " + "; ".join(problems))
        return state

    def load(self, model: nn.Module, loaded: dict[str, Any], use_ema: bool = True) -> None:
        """Load a checkpoint into `model`. A model on the meta device takes over the checkpoint's tensors."""
        on_meta = any(p.is_meta for p in model.parameters())
        trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        model.load_state_dict(self.convert(model, loaded, use_ema), strict=True, assign=on_meta)
        for name, p in model.named_parameters():
            p.requires_grad_(trainable[name])

    def to_official(self, model: nn.Module) -> State:
        """The model's weights under the names that the official code loads."""
        return self.restore(model)

    def check_layout(self, layout: dict[str, Any], **settings: Any) -> list[str]:
        """Compare our model, built on the meta device from the shapes alone, with a recorded file layout
        {"tensors": {name: [shape, dtype]}}. Returns the differences; `settings` override what the shapes say."""
        with torch.device("meta"):
            recorded = {name: torch.empty(shape, dtype=getattr(torch, dtype))
                        for section in ("tensors", "optional_tensors")
                        for name, (shape, dtype) in (layout.get(section) or {}).items()}
            model = self.build(**{**self.describe(recorded), **settings})
        state = self.fit(self.rename(recorded), model)
        ours = model.state_dict()
        return describe_differences(state, ours) + [
            f"{name} is {state[name].dtype}, ours is {ours[name].dtype}"
            for name in ours if name in state and state[name].dtype != ours[name].dtype
        ]
