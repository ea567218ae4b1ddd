"""Named or custom shapes of a network: `size: b` or `size: {width: 768, layers: 12, heads: 12}` in a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from core.config import parse_section
from core.errors import UserError, nearest

T = TypeVar("T")


def pick(value: str | dict[str, Any], schema: type[T], sizes: Mapping[str, T], what: str = "generator.size") -> T:
    """The entry of `sizes` called `value`, or the dataclass `schema` from a dictionary; UserError naming what is wrong."""
    if not isinstance(value, str):
        return parse_section(what, value, schema)
    if value not in sizes:
        raise UserError(f'{what}: "{value}" is not known.{nearest(value, sizes)}')
    return sizes[value]
