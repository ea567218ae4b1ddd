"""What `--help` says about settings: key, line of help, type with its range, default. Imports nothing but the standard library
until a config names parts.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from core.config import RESERVED_TYPES, default_of, describe, peek, table_of
from core.registry import Registry
from core.schema import RunConfig

RESERVED_DEFAULTS: dict[str, dict[str, Any]] = {
    "tokenizer": {"weights": None, "use_ema": True, "latent_stats": None, "view": None},
    "generator": {"weights": None, "use_ema": True},
}
_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): ?(.*)$")


def line(key: str, about: str, hint: Any, default: Any) -> str:
    """One setting."""
    shown = "required" if default is inspect.Parameter.empty else default
    about = about.rstrip(".") + " " if about else ""
    return f"  {key:<34} {about}({describe(hint)}) [{shown}]"


def help_text(schema: type = RunConfig, prefix: str = "") -> str:
    """Every setting of a schema."""
    lines = []
    hints = typing.get_type_hints(schema, include_extras=True)
    for spec in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[spec.name]):
            lines.append(help_text(hints[spec.name], f"{prefix}{spec.name}."))
            continue
        default = inspect.Parameter.empty if spec.metadata.get("required") else default_of(spec)
        limits = spec.metadata.get("limits")
        hint = typing.Annotated[hints[spec.name], limits] if limits else hints[spec.name]
        lines.append(line(prefix + spec.name, spec.metadata.get("help", ""), hint, default))
    return "\n".join(lines)


def parts_text(path: str, overrides: list[str], registries: Mapping[str, Registry]) -> str:
    """The settings of the parts that a YAML file and overrides name: tokenizer, generator, objective, discriminator, teachers."""
    sections = peek(path, overrides)
    lines = []
    for kind in ("tokenizer", "generator", "objective", "discriminator"):
        if isinstance(settings := sections.get(kind), dict):
            lines += _part(kind, settings, registries[kind])
    teachers = sections.get("teachers")
    for name, settings in (teachers if isinstance(teachers, dict) else {}).items():
        if settings is not False:
            lines += _part(f"teachers.{name}", {"name": name, **(settings or {})}, registries["teacher"])
    return "\n".join(lines)


def _part(path: str, settings: dict[str, Any], registry: Registry) -> Iterator[str]:
    name = settings.get("name") or (registry.names()[0] if len(registry.entries) == 1 else None)
    yield ""
    if name is None:
        yield f"{path}: what it is and how it was made is known by {path}.weights={settings.get('weights')}"
    else:
        constructor = registry.get(str(name))
        yield f"{path}: {name}"
        about = explained(constructor)
        for key, parameter in registry.signature(str(name)).items():
            yield line(f"{path}.{key}", about.get(key, ""), parameter.annotation, parameter.default)
            yield from _table(f"{path}.{key}.", parameter.annotation)
    for key, default in RESERVED_DEFAULTS.get(path, {}).items():
        yield line(f"{path}.{key}", "", RESERVED_TYPES[key], default)


def _table(prefix: str, hint: Any) -> Iterator[str]:
    """The keys of a table whose schema the annotation names."""
    if (schema := table_of(hint)) is None:
        return
    hints, about = typing.get_type_hints(schema, include_extras=True), explained(schema)
    for field in dataclasses.fields(schema):
        default = default_of(field)
        shown = inspect.Parameter.empty if default is dataclasses.MISSING else default
        yield line(prefix + field.name, about.get(field.name, ""), hints[field.name], shown)


def explained(constructor: Any) -> dict[str, str]:
    """Argument -> what the docstring says about it, those of base classes included."""
    texts: dict[str, str] = {}
    for cls in (getattr(constructor, "Settings", constructor), *getattr(constructor, "__mro__", ())):
        names: list[str] = []
        of_class: dict[str, str] = {}
        for text in inspect.cleandoc(cls.__doc__ or "").splitlines():
            entry = _ENTRY.match(text)
            if entry:
                names = entry[1].split(", ")
                of_class |= dict.fromkeys(names, entry[2])
            elif text.startswith(" " * 8) and names:
                of_class |= {name: f"{of_class[name]} {text.strip()}" for name in names}
            else:
                names = []
        texts = {**of_class, **texts}
    return texts
