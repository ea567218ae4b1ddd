"""YAML + dotted overrides -> a typed, fully checked run configuration.

    config = load("configs/rectok/tokenizer.yaml", ["train.global_batch=256"], registries)

OmegaConf reads the YAML, applies the overrides and resolves ${...}; this file holds it against core/schema.py and reports
every mistake at once, each with the key, what was given, what was expected and the nearest valid name. Which settings do not
go together says core/config_rules.py. A YAML may start from another one with `base: other.yaml` (relative to itself).

Sections named after a registry (tokenizer, generator, discriminator ...) are components: `name` picks a class from
the registry and the remaining keys are its constructor arguments, checked against its signature.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from core.config_rules import run_problems, schedule_problems
from core.errors import UserError, nearest, plainly
from core.limits import Limits
from core.registry import Registry
from core.schema import Duration, RunConfig

RESERVED_TYPES = {
    "name": str,
    "weights": str | None,
    "use_ema": bool,
    "latent_stats": str | None,
    "view": Literal["vectors", "sequence"] | None,
}
RESERVED = set(RESERVED_TYPES)  # component keys that are not constructor arguments


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------
def describe(hint: Any) -> str:
    """A type as a user would say it."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *about = get_args(hint)
        comma = ", " if get_origin(inner) in (Union, types.UnionType) else " "
        return comma.join([describe(inner), *(str(limits) for limits in about if isinstance(limits, Limits))])
    if origin is Literal:
        return " or ".join(f'"{c}"' for c in get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in get_args(hint))
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        list: "a list",
        tuple: "a list",
        dict: "a table of keys",
        type(None): "null",
    }
    return names.get(origin or hint, getattr(hint, "__name__", str(hint)))


def table_of(hint: Any) -> type | None:
    """The schema of the table that a type allows: Annotated[dict, Schema], also as one of several; None without one."""
    return _schema_among(about for part in (hint, *get_args(hint)) for about in getattr(part, "__metadata__", ()))


def _schema_among(hints: Iterable[Any]) -> type | None:
    return next((hint for hint in hints if isinstance(hint, type) and dataclasses.is_dataclass(hint)), None)


def default_of(spec: dataclasses.Field) -> Any:
    """Of a field of a schema; dataclasses.MISSING where it has none."""
    return spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()


@functools.cache
def keys_of(schema: type | None, prefix: str = "") -> tuple[str, ...]:
    """Dotted names of all settings of a schema."""
    keys: tuple[str, ...] = ()
    for name, hint in typing.get_type_hints(schema).items() if schema else ():
        if inner := _schema_among((hint, *get_args(hint))):
            keys += keys_of(inner, f"{prefix}{name}.")
        elif get_origin(hint) is not ClassVar:
            keys += (f"{prefix}{name}",)
    return keys


class _Checker:
    """Walks a plain dictionary along a schema and collects problems instead of stopping at the first."""

    def __init__(self, registries: Mapping[str, Registry]):
        self.registries = registries
        self.problems: list[str] = []

    def wrong(self, path: str, message: str) -> None:
        self.problems.append(f"{path}: {message}")

    def value(self, path: str, raw: Any, hint: Any) -> Any:
        """`raw` as an instance of the type `hint`; a problem is noted when it is not one."""
        if hint is None or isinstance(hint, (str, typing.TypeVar)):
            return raw
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self.section(path, raw, hint)
        check = self.CHECKS.get(get_origin(hint) or hint)
        return raw if check is None else check(self, path, raw, hint)

    def annotated(self, path: str, raw: Any, hint: Any) -> Any:
        """A number with Limits, a table with a schema, or a component: Annotated[dict, kind], or Annotated[dict, kind, "table"]."""
        inner, kind, *form = get_args(hint)
        if isinstance(kind, type):  # the schema of a table, which its owner completes and checks
            return self.value(path, raw, inner)
        if not isinstance(kind, Limits):
            return self.component(path, raw, kind, table="table" in form)
        count, value = len(self.problems), self.value(path, raw, inner)
        if len(self.problems) == count and not kind.hold(value):
            self.wrong(path, f"must be {kind}, got {value!r}.")
        return value

    def literal(self, path: str, raw: Any, hint: Any) -> Any:
        choices = get_args(hint)
        if raw not in choices:
            advice = nearest(raw, map(str, choices)) if isinstance(raw, str) else ""
            self.wrong(path, f"expected {describe(hint)}, got {raw!r}.{advice}")
        return raw

    def duration(self, path: str, raw: Any, hint: Any) -> Any:
        try:
            return Duration.parse(raw)
        except ValueError as expected:
            self.wrong(path, f"expected {expected}, got {raw!r}.")
            return raw

    def sequence(self, path: str, raw: Any, hint: Any) -> Any:
        if not isinstance(raw, (list, tuple)):
            self.wrong(path, f"expected a list, got {raw!r}.")
            return raw
        inner = (*get_args(hint), Any)[0]
        items = [self.value(f"{path}[{i}]", item, inner) for i, item in enumerate(raw)]
        return tuple(items) if tuple in (hint, get_origin(hint)) else items

    def mapping(self, path: str, raw: Any, hint: Any) -> Any:
        if not isinstance(raw, dict):
            self.wrong(path, f"expected a table of keys, got {raw!r}.")
            return raw
        inner = (*get_args(hint), Any, Any)[1]
        return {key: self.value(f"{path}.{key}", item, inner) for key, item in raw.items()}

    def number(self, path: str, raw: Any, hint: Any) -> Any:
        if not isinstance(raw, (int, float)) or isinstance(raw, bool):
            return self.plain(path, raw, hint)
        if not abs(raw) <= sys.float_info.max:
            self.wrong(path, f"must be a finite number, got {raw!r}.")
            return raw
        return float(raw)

    def plain(self, path: str, value: Any, hint: Any) -> Any:
        if type(value) is not hint:
            advice = (
                f" Quotes make a text of it: {path}=\"'{value}'\"."
                if hint is str and type(value) in (int, float)
                else ""
            )
            self.wrong(path, f"expected {describe(hint)}, got {value!r}.{advice}")
        elif hint is int and abs(value) >= 2**63:
            self.wrong(path, "must be a number of less than 20 digits.")
        return value

    def union(self, path: str, raw: Any, hint: Any) -> Any:
        if raw is None and type(None) in get_args(hint):
            return None
        options = [option for option in get_args(hint) if option is not type(None)]
        if len(options) == 1:
            return self.value(path, raw, options[0])
        for option in options:  # the first type that takes the value without complaint
            trial = _Checker(self.registries)
            result = trial.value(path, raw, option)
            if not trial.problems:
                return result
        self.wrong(path, f"expected {describe(hint)}, got {raw!r}.")
        return raw

    CHECKS: ClassVar[dict[Any, Callable[..., Any]]] = {  # by the type of a setting, or its origin
        Annotated: annotated,
        Union: union,
        types.UnionType: union,
        Literal: literal,
        Duration: duration,
        list: sequence,
        tuple: sequence,
        dict: mapping,
        float: number,
        **dict.fromkeys((int, str, bool, type(None)), plain),
    }

    def section(self, path: str, table: Any, schema: type) -> Any:
        """A nested dataclass."""
        if table is None:
            table = {}
        if not isinstance(table, dict):
            self.wrong(path, f"expected a table of keys, got {table!r}.")
            return None
        hints = typing.get_type_hints(schema, include_extras=True)
        fields = {f.name: f for f in dataclasses.fields(schema)}
        prefix = f"{path}." if path else ""
        for key in table:
            if key not in fields:
                self.wrong(f"{prefix}{key}", f"unknown key.{nearest(key, fields, keys_of(RunConfig))}")
        values = {}
        for key, spec in fields.items():
            where = f"{prefix}{key}"
            if key in table:
                values[key] = self.value(where, table[key], hints[key])
                self.within(where, values[key], spec.metadata.get("limits") or Limits())
            elif spec.metadata.get("required"):
                if dataclasses.is_dataclass(hints[key]):  # name the mandatory keys inside rather than the section
                    self.section(where, {}, hints[key])
                else:
                    self.wrong(where, f"is missing: {spec.metadata['help']}.")
        return schema(**values)

    def within(self, path: str, value: Any, limits: Limits) -> None:
        """A number, or all numbers of a list."""
        if not all(map(limits.hold, value if isinstance(value, list) else [value])):
            self.wrong(path, f"must be {limits}, got {value!r}.")

    def component(self, path: str, raw: Any, kind: str, table: bool) -> Any:
        """{name: ..., arguments ...} against the signature of what the registry holds; a table has names as keys."""
        if raw is None and table:
            return {}
        if not isinstance(raw, dict):
            self.wrong(path, f"expected a table with a name, got {raw!r}.")
            return raw
        if table:
            return self.components(path, raw, kind)
        registry = self.registries.get(kind)
        if registry is None:
            return raw
        if "name" not in raw:
            if len(registry.entries) == 1:
                raw = {"name": registry.names()[0], **raw}
            elif raw.get("weights"):  # the weights know what they are
                for key in RESERVED & raw.keys():
                    self.value(f"{path}.{key}", raw[key], RESERVED_TYPES[key])
                return raw
            else:
                self.wrong(path, f"needs a name.{nearest('', registry.entries)}")
                return raw
        try:
            accepted = registry.signature(str(raw["name"]))
        except UserError as error:
            self.wrong(f"{path}.name", str(error))
            return raw
        result = dict(raw)
        for key, item in raw.items():
            if key in RESERVED and key not in accepted:
                self.value(f"{path}.{key}", item, RESERVED_TYPES[key])
            elif key not in accepted:
                inner = [
                    f"{path}.{name}.{field}"
                    for name, p in accepted.items()
                    for field in keys_of(table_of(p.annotation))
                ]
                advice = nearest(key, accepted, inner)
                self.wrong(f"{path}.{key}", f'{kind} "{raw["name"]}" has no such setting.{advice}')
            else:
                hint = accepted[key].annotation
                result[key] = self.value(f"{path}.{key}", item, Any if hint is inspect.Parameter.empty else hint)
        return result

    def components(self, path: str, parts: dict, kind: str) -> dict[str, Any]:
        """A table name -> arguments; false takes back what a base config names."""
        checked = {}
        for name, arguments in parts.items():
            if not isinstance(arguments or {}, dict):
                self.wrong(f"{path}.{name}", f"expected a table of keys, got {arguments!r}.")
            elif arguments is not False:
                checked[name] = self.component(f"{path}.{name}", {"name": name, **(arguments or {})}, kind, False)
        return checked


def parse_section(path: str, table: Any, schema: type) -> Any:
    """An instance of the dataclass `schema` from plain data; UserError with every mistake, named by `path`."""
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected a table of keys, got {table!r}.")
    known = {spec.name: default_of(spec) is dataclasses.MISSING for spec in dataclasses.fields(schema)}
    problems = [f"{path}.{key}: unknown key.{nearest(str(key), known)}" for key in table if key not in known]
    if missing := [name for name, required in known.items() if required and name not in table]:
        problems.append(f"{path} lacks {', '.join(missing)}.")
    if problems:
        raise UserError(" ".join(problems))
    checker = _Checker({})
    section = checker.section(path, table, schema)
    if checker.problems:
        raise UserError(" ".join(checker.problems))
    return section


# ---------------------------------------------------------------------------------------------------------------------
# Loading and dumping
# ---------------------------------------------------------------------------------------------------------------------
def _read_yaml(path: Path, registries: Mapping[str, Registry] | None = None, seen: tuple[Path, ...] = ()) -> Any:
    from omegaconf import OmegaConf

    if not os.path.isfile(path):  # Path.is_file raises for names that no file can have
        folder = path.parent if os.path.isdir(path.parent) else Path("configs")
        known = [str(p) for p in folder.rglob("*.yaml")]
        raise UserError(f"there is no config {path}.{nearest(str(path), known)}")
    if path.resolve() in seen:
        raise UserError(f"{path} is its own base.")
    try:
        config: Any = OmegaConf.load(path)
    except Exception as error:  # the YAML parser has many exception types, all of which mean: not YAML
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if config is None or not OmegaConf.is_dict(config):
        raise UserError(f"{path} should hold a table of keys.")
    if problems := list(_misread(path.read_text(encoding="utf-8"))):
        raise UserError(f"{path}: {'; '.join(problems)}.")
    base = config.pop("base", None)
    if base is None:
        return config
    if not isinstance(base, str):
        raise UserError(f"{path}: base should name another YAML file, not {base}.")
    inherited = _read_yaml(path.parent / base, registries, (*seen, path.resolve()))
    _forget_arguments(inherited, config, registries or {})
    return OmegaConf.merge(inherited, config)


_OCTAL = re.compile(r"[-+]?0[0-7_]+")


def _misread(text: str) -> Iterator[str]:
    """Numbers in a YAML text that mean another one than they show: leading zeros are octal there, colons base 60."""
    import yaml

    seen: set[int] = set()

    def walk(node: Any, path: str) -> Iterator[str]:
        if id(node) in seen:  # an anchor
            return
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield from walk(value, f"{path}.{key.value}" if path else str(key.value))
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                yield from walk(value, path)
        elif isinstance(node, yaml.ScalarNode) and not node.style and node.tag.endswith((":int", ":float")):
            written = node.value
            if ":" in written or _OCTAL.fullmatch(written):
                how = "a number to the base 60" if ":" in written else "an octal number"
                plain = "" if ":" in written else f"{written.replace('_', '').lstrip('0') or '0'} for the number, "
                yield f"{path or 'the value'}: YAML reads {written} as {how}; write {plain}'{written}' in quotes for a text"

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        yield from walk(yaml.compose(text, Loader=loader), "")
    except (yaml.YAMLError, UnicodeError):  # what OmegaConf alone reads
        return


def _misread_override(word: str) -> Iterator[str]:
    """The same of what follows the equals sign, and what YAML would take for a comment there."""
    key, _, value = word.partition("=")
    yield from (f"{key}{problem.removeprefix('the value')}" for problem in _misread(value))
    if re.search(r"\s#", value) and not re.match(r"""\s*["'\[{]""", value):
        yield f"{key}: YAML takes what follows the # in {value!r} for a comment; write it in quotes, {key}=\"'{value}'\""


def load(path: str | Path, overrides: list[str], registries: Mapping[str, Registry]) -> RunConfig:
    """Read, override, check. Raises UserError with every mistake found.

    Args:
        path: YAML file.
        overrides: "train.global_batch=256" and the like.
        registries: what component sections may name, by section kind.
    """
    config = override(lambda: _read_yaml(Path(path), registries), overrides, registries, source=str(path))
    _refuse([*schedule_problems(config.train, overrides)], str(path))
    return config


def peek(path: str, overrides: list[str]) -> dict[str, Any]:
    """What a YAML file and overrides say, unchecked."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged: Any = OmegaConf.to_container(OmegaConf.merge(_read_yaml(Path(path)), read_overrides(overrides)))
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{path}: {plainly(error)}") from None
    return merged


def read_overrides(overrides: list[str]) -> dict[str, Any]:
    """["a.b=1"] -> {"a": {"b": 1}}."""
    from omegaconf import OmegaConf

    if malformed := [o for o in overrides if "=" not in o or o.startswith("-")]:
        raise UserError(f"overrides look like train.global_batch=256, not {' '.join(malformed)}")
    if problems := [problem for word in overrides for problem in _misread_override(word)]:
        raise UserError("; ".join(problems) + ".")
    try:
        changes: Any = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
        return changes
    except Exception as error:  # values are YAML, whose parser has many exception types
        raise UserError(f"{' '.join(overrides)}: no YAML after the equals sign: {plainly(error)}") from None


def override(
    read: Callable[[], Any], overrides: list[str], registries: Mapping[str, Registry], source: str
) -> RunConfig:
    """A checked RunConfig from what `read` returns (plain data or an OmegaConf table) and overrides. `source`: its name."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    changes = read_overrides(overrides)
    try:
        base = OmegaConf.merge(read())  # a copy
        _forget_arguments(base, changes, registries)
        plain: Any = OmegaConf.to_container(OmegaConf.merge(base, changes), resolve=True)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a table where a list stands, or the reverse
        raise UserError(f"{source}: {plainly(error)}") from None
    return check(plain, registries, source=source)


def _forget_arguments(base: Any, changes: Any, registries: Mapping[str, Registry]) -> None:
    """Where overrides, or a YAML above its base, name another class for a section, arguments in `base` that are the former class's alone go."""
    for kind, registry in registries.items():
        former, new = (
            section[kind].get("name") if isinstance(section.get(kind), Mapping) else None for section in (base, changes)
        )
        if new not in registry.entries or former in (None, new):
            continue
        accepted = {*registry.signature(new), *RESERVED}
        for key in [key for key in base[kind] if key not in accepted]:
            del base[kind][key]


def check(plain: dict[str, Any], registries: Mapping[str, Registry], source: str) -> RunConfig:
    """A RunConfig from plain data. `source` names where it came from in the message."""
    checker = _Checker(registries)
    config = checker.section("", plain, RunConfig)
    # after what single keys can tell: how they fit together
    _refuse(checker.problems or [*run_problems(config)], source)
    return config


def _refuse(problems: list[str], source: str) -> None:
    if problems:
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        raise UserError(f"{source} has {count}:\n" + "\n".join(f"  - {p}" for p in problems))


def to_plain(config: Any) -> Any:
    """The resolved configuration, or a part of it, as plain data that YAML and JSON can hold."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(item) for item in config]
    return str(config) if isinstance(config, Duration) else config


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings -> dotted name -> value; an empty table is a value."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def smallest(name: str, tokenizer: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Plain data of a config for work on a tokenizer and pictures in which nothing is trained."""
    train = {"duration": "0ep", "global_batch": 1, "optimizer": {"lr": 0.0}}
    return {"name": name, "task": "tokenizer", "tokenizer": tokenizer, "data": data, "objective": {}, "train": train}


def with_defaults(plain: dict[str, Any], schema: type = RunConfig) -> dict[str, Any]:
    """Plain data of a configuration with the defaults of the settings that it lacks, because it was written before there
    were such: a default is how things were done until then."""
    hints, complete = typing.get_type_hints(schema), dict(plain)
    for spec in dataclasses.fields(schema):
        nested = _schema_among((hints[spec.name], *get_args(hints[spec.name])))
        if spec.name in plain:
            if nested and isinstance(plain[spec.name], dict):
                complete[spec.name] = with_defaults(plain[spec.name], nested)
        elif not spec.metadata.get("required"):
            complete[spec.name] = to_plain(default_of(spec))
    return complete


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML."""
    import yaml

    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)
