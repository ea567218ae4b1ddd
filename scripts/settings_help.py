"""The settings that `--help` of a program lists. Without a config only the standard library."""

from __future__ import annotations

import re
from collections.abc import Sequence


def settings_help(words: Sequence[str]) -> str:
    """Every setting of a config, with those of the parts that the YAML file among the words names."""
    from core.help import help_text, parts_text

    text = "\nSettings (type) [default]:\n" + help_text()
    configs = [word for word in words if word.endswith((".yaml", ".yml"))]
    if not configs:
        return f"{text}\n\nWith a config before --help: also those of the tokenizer, generator ... that it names."
    try:
        from run.load import REGISTRIES
    except ModuleNotFoundError:  # --help is answered by any Python, before the environment is made
        return f"{text}\n\nThose of the parts that {configs[0]} names are listed when the first run has made the environment."
    return f"{text}\n{parts_text(configs[0], [word for word in words if re.match(r'[a-z_.]+=', word)], REGISTRIES)}"
