"""Names in YAML -> classes, without importing anything until a name is used.

    TOKENIZERS = Registry("tokenizer", {"rectok": "tokenizer.continuous.rectok:RecTok"})
    TOKENIZERS.build({"name": "rectok", "width": 192}, image_size=64)

A YAML file can only reach what is listed in a registry; it never names a Python path.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from core.errors import UserError, nearest, plainly


def parameters(constructor: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a constructor, with their defaults, and with types as annotations.

    A class may name by `Settings` the dataclass whose fields they are; `**others` stands for what its base class takes.
    """
    schema = getattr(constructor, "Settings", constructor)
    accepted = dict(inspect.signature(schema, eval_str=True).parameters)
    others = next((p.name for p in accepted.values() if p.kind is p.VAR_KEYWORD), None)
    if others is not None:
        del accepted[others]
        accepted = {**parameters(constructor.__base__), **accepted}
    return {name: p for name, p in accepted.items() if p.kind is not p.POSITIONAL_ONLY}


class Registry:
    """A table of lazily imported constructors of one kind.

    Args:
        kind: what the entries are, for messages ("tokenizer").
        entries: name -> "module:attribute".
        complete: "module:function", called with everything that is built; UserError for what it lacks.
    """

    def __init__(self, kind: str, entries: dict[str, str], complete: str | None = None):
        self.kind, self.entries, self.complete = kind, dict(entries), complete

    def names(self) -> list[str]:
        return sorted(self.entries)

    def get(self, name: str) -> Callable[..., Any]:
        """The constructor called `name`; UserError with the nearest known name if there is none."""
        if name not in self.entries:
            raise UserError(f'unknown {self.kind} "{name}".{nearest(name, self.entries)}')
        found = self._imported(name)
        if inspect.isabstract(found):
            missing = ", ".join(sorted(found.__abstractmethods__))
            raise UserError(
                f'{self.kind} "{name}" ({found.__name__}) lacks {missing}: core/specs.py says what is wanted.'
            )
        return found

    def _imported(self, name: str) -> Any:
        module, colon, attribute = self.entries[name].partition(":")
        entry = f'{self.kind} "{name}": its entry "{self.entries[name]}"'
        if not colon:
            raise UserError(f'{entry} is not written "package.module:Class".')
        if not _exists(module):
            raise UserError(f"{entry} names a module that is not there.")
        content = vars(importlib.import_module(module))
        if attribute not in content:
            raise UserError(f"{entry} names a class that is not in that module.{nearest(attribute, content)}")
        return content[attribute]

    def signature(self, name: str) -> dict[str, inspect.Parameter]:
        """Keyword arguments that the constructor accepts, see `parameters`."""
        return parameters(self.get(name))

    def build(self, config: dict[str, Any], **defaults: Any) -> Any:
        """Construct config["name"] from the other keys of `config`; `defaults` fill in what it accepts and lacks."""
        config = dict(config)
        name = config.pop("name")
        accepted = self.signature(name)
        unknown = [key for key in config if key not in accepted]
        if unknown:
            raise UserError(
                "; ".join(f'{self.kind} "{name}" has no setting "{k}".{nearest(k, accepted)}' for k in unknown)
            )
        fill = {k: v for k, v in defaults.items() if k in accepted and config.get(k) is None}
        try:
            built = self.get(name)(**{**config, **fill})
        except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
            raise UserError(
                f'{self.kind} "{name}" cannot be built with these settings ({plainly(error)}): one of them is '
                "of the wrong kind, or they do not go together. TESSERA_TRACEBACK=1 shows where."
            ) from error
        if self.complete is not None:
            module, _, check = self.complete.partition(":")
            getattr(importlib.import_module(module), check)(built)
        return built


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package
        return False
