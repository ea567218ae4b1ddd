"""What a kind of fixture knows of the settings in its metadata, so that none is passed over.

Fields are named by their path in the JSON of `config`, "ModelArgs.dim", or of `options`, "options.cfg_scale". A `*` stands
for one name, `**` for any path below. A kind says for each field whether it

- reads it (`reads`): what is given must have been looked at when the function returns;
- works with certain values only (`only`), any other being refused;
- does without it (`notes`), and why.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any


class FieldError(ValueError):
    """A field that a kind does not understand, cannot serve, or did not look at."""


class Fields(Mapping):
    """A JSON object that remembers which of its values were read.

    Objects inside are Fields too; lists count as one value. Asking whether a name is there does not read it.
    """

    def __init__(self, values: Mapping[str, Any], seen: set[str] | None = None, path: str = ""):
        self.values_, self.path, self.seen = values, path, set() if seen is None else seen

    def __getitem__(self, name: str) -> Any:
        value, path = self.values_[name], self.path + name
        if isinstance(value, dict) and value:
            return Fields(value, self.seen, path + ".")
        self.seen.add(path)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.values_

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def replaced(self, **changes: Any) -> Fields:
        """The same fields, noted in the same place, with other values for some."""
        return Fields({**self.values_, **changes}, self.seen, self.path)

    def plain(self) -> dict[str, Any]:
        """All of it as a dict, all of it read."""
        self.seen |= {self.path + path for path, _ in leaves(self.values_)}
        return dict(self.values_)


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything that is no object with something inside."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


class Known(dict):
    """Path -> what is known of it: None (read), a tuple (the only values), or a text (why it plays no part)."""

    def __or__(self, other: Mapping) -> Known:
        return Known({**self, **other})

    def below(self, *prefixes: str) -> Known:
        """The same under each of these names."""
        return Known({f"{prefix}.{path}": rule for prefix in prefixes for path, rule in self.items()})

    def rule(self, path: str) -> Any:
        """KeyError where nothing is known. A path that is spelt out goes before one with stars."""
        if path in self:
            return self[path]
        for pattern, rule in self.items():
            if "*" in pattern:
                expression = re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", r"[^.]+")
                if re.fullmatch(expression, path):
                    return rule
        raise KeyError(path)

    def check(self, given: Mapping[str, Any]) -> None:
        """FieldError for the first field that is unknown, or has a value that cannot be served."""
        for path, value in leaves(given):
            try:
                rule = self.rule(path)
            except KeyError:
                raise FieldError(
                    f'unknown field "{path}" (it is {value!r}); known: {", ".join(self) or "none"}'
                ) from None
            if isinstance(rule, tuple) and value not in rule:
                raise FieldError(f'field "{path}" is {value!r}; this kind serves {" or ".join(map(repr, rule))} only')

    def unread(self, given: Mapping[str, Any], seen: set[str]) -> list[str]:
        """Fields that are to be read and were not."""
        return [path for path, _ in leaves(given) if self.rule(path) is None and path not in seen]

    def describe(self) -> Iterator[str]:
        for path, rule in self.items():
            if rule is None:
                yield path
            elif isinstance(rule, tuple):
                yield f"{path} = {' or '.join(map(repr, rule))} only"
            else:
                yield f"{path} ({rule})"


def reads(names: str) -> Known:
    return Known(dict.fromkeys(names.split()))


def only(**values: Any) -> Known:
    """A list gives several values."""
    return Known({name: tuple(v) if isinstance(v, list) else (v,) for name, v in values.items()})


def notes(why: str, names: str) -> Known:
    return Known(dict.fromkeys(names.split(), why))


NOTE = notes("remarks", "note")
