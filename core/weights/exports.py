"""The settings of a network in an official file that we write, some of which no tensor tells (numbers of heads, groups).

They lie where the official programs do not look: beside the sets of weights, in the header of a safetensors file, in the
attribute `_metadata` of a state dict that is the whole file. Read back, they are an entry KEY of what the file holds.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from core.errors import UserError, plainly

KEY = "tessera_settings"


def written(settings: Mapping[str, dict[str, Any]]) -> str:
    """Kind of network -> its name and constructor arguments, as text for `KEY`."""
    return json.dumps(settings, sort_keys=True)


def with_text(packed: dict[str, Any], text: str, bare: bool) -> dict[str, Any]:
    """What torch.save shall write. A `bare` state dict gets no entry: the official programs load it strictly."""
    if not bare:
        return {**packed, KEY: text}
    state = OrderedDict(packed)
    vars(state)["_metadata"] = {KEY: text}
    return state


def in_header(path: str | os.PathLike) -> dict[str, Any]:
    """{KEY: its text} of a safetensors file that can be read; {} where its header has none."""
    from safetensors import safe_open

    with safe_open(os.fspath(path), "pt") as file:
        header = file.metadata() or {}
    return {KEY: header[KEY]} if KEY in header else {}


def settings_in(loaded: Mapping[str, Any], kind: str, name: str) -> dict[str, Any]:
    """Constructor arguments of the network of this kind and name, as `written`; {} where the file does not say."""
    text = loaded.get(KEY)
    if not isinstance(text, str):
        return {}
    try:
        settings = json.loads(text).get(kind, {})
        if settings.get("name", name) != name:
            return {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"its entry {KEY} is not what Tessera writes ({plainly(error)}). Export it again.") from error
    return {key: value for key, value in settings.items() if key != "name"}
