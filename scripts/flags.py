"""Words of the original programs -> our settings, one sentence each; the words themselves are in originals.py.

Flags are answered with what to write; which system's comes first follows from the config that was named (its folder,
or the start of its name). Dotted keys of reAR are answered too. A YAML file of ImageFolder and its key names are translated.
"""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path
from typing import Any, Iterable

from core.errors import UserError
from originals import IMAGEFOLDER_KEYS, REAR_KEYS, TABLES, VALUES

REAR_GROUPS = {key.split(".")[0] for key in REAR_KEYS if "." in key}  # none of ours is called like these
IMAGEFOLDER_BASE = "configs/imagefolder/ms_pq2_4096.yaml"
NOTHING = "it follows from other settings or never had an effect"


def settings_for(entry: str | dict[str, str], value: str) -> str | None:
    """What to write for a word whose entry in a table is this; None where it is a sentence, or does not know the value."""
    if isinstance(entry, dict):
        return entry.get(value)
    if " " in entry and "{" not in entry:
        return None
    template = entry if not entry or "=" in entry or " " in entry else f"{entry}={{0}}"
    if "://" in value:  # an address says itself what it is
        template = template.replace("folder://", "")
    return template.format(Path(value).name if entry.startswith("name=") else value)


def answer(shown: str, entry: str | dict[str, str], value: str) -> str:
    """One sentence, without its full stop, about a word as it was typed."""
    settings = settings_for(entry, value)
    if settings:
        return f"{shown} is written {settings}"
    if isinstance(entry, dict):
        return f"{shown}: {NOTHING if value in entry else 'known are ' + ', '.join(entry)}"
    return f"{shown}: {entry or NOTHING}".rstrip(".")


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------
def table_for(arguments: Iterable[str]) -> dict[str, str]:
    """Flags of the system that the arguments are about, then those of the others."""
    words = [part for a in arguments if "=" not in a for part in (Path(a).parent.name, Path(a).stem)]
    named = [system for system in TABLES if any(re.match(rf"(toy_)?{system}(_|$)", word) for word in words)]
    merged: dict[str, str | dict[str, str]] = {}
    for system in [*named, *TABLES]:
        merged = {**TABLES[system], **merged}
    return merged


def explain(arguments: list[str], only: Iterable[str] | None = None) -> str:
    """What to write instead of each --flag (value) in `arguments` (of those in `only`), in one sentence per flag."""
    table, answers = table_for(arguments), []
    for place, argument in enumerate(arguments):
        if not argument.startswith("--") or (only is not None and argument not in only):
            continue
        flag, given, value = argument[2:].partition("=")
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        if not given and following and not following.startswith("--") and "=" not in following:
            value = following
        name, shown = flag.replace("-", "_"), f"--{flag} {value}".rstrip()
        if name in table:
            entry = table[name]
            mapped = value if isinstance(entry, dict) else VALUES.get(value, value or "true")
            answers.append(answer(shown, entry, mapped))
            continue
        close = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        answers.append(f"there is no option {shown}; settings are key=value.{hint}")
    return "; ".join(text.rstrip(".") for text in answers) + ("" if answers[-1].endswith("?") else ".")


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """parser.parse_intermixed_args, where flags of the original programs are answered with ours."""
    refuse(arguments)
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(explain(arguments, unknown))
    return options


# ---------------------------------------------------------------------------------------------------------------------
# Keys of reAR and RAR
# ---------------------------------------------------------------------------------------------------------------------
def refuse(words: Iterable[str]) -> None:
    """UserError with our words for theirs, all in one sentence, if there are any among `words`."""
    answers = []
    for key, equals, value in (word.partition("=") for word in words):
        if not equals or key.startswith("--") or not (key in REAR_KEYS or key.split(".")[0] in REAR_GROUPS):
            continue
        answers.append(answer(key, REAR_KEYS[key], value) if key in REAR_KEYS else
                       f"{key} is of the original and has no counterpart here")
    if answers:
        raise UserError("; ".join(answers) + ".")


# ---------------------------------------------------------------------------------------------------------------------
# Files and keys of ImageFolder
# ---------------------------------------------------------------------------------------------------------------------
def translate_setting(key: str, value: Any) -> list[str]:
    """Our settings for one of ImageFolder's; UserError where there is none."""
    if key == "cloud_save_path":
        folder = Path(str(value))
        return [f"work_dir={folder.parent}", f"name={folder.name}"]
    if key == "v_patch_nums" and not isinstance(value, str):
        return [f"tokenizer.scales={list(value)}", f"tokenizer.latent_grid={list(value)[-1]}"]
    entry = IMAGEFOLDER_KEYS[key]
    settings = settings_for(entry, str(value).lower() if isinstance(value, bool) else str(value))
    if isinstance(entry, dict):
        if settings is None:
            raise UserError(f"{key}: {value} is not supported; known: {', '.join(entry)}")
        return settings.split()
    if settings is None:
        raise UserError(f"{key}: {value}: {entry}")
    return [settings] if settings else []


def _known(key: str) -> bool:
    return key in IMAGEFOLDER_KEYS or key == "cloud_save_path"


def translate(path: str, overrides: list[str]) -> tuple[str, list[str]]:
    """(config, overrides) with the original's YAML file and key names replaced; ours pass unchanged."""
    import yaml

    from core.config import RunConfig

    own = set(RunConfig.__dataclass_fields__) | {"base"}
    given: list[tuple[str, Any]] = []
    problems: list[str] = []
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        content = None  # the loader of configs says what is wrong with it
    if isinstance(content, dict) and "task" not in content and "base" not in content and any(map(_known, content)):
        factor = float(content.get("global_batch_size", 1024)) / 128
        rates = {"lr": "train.optimizer.lr", "disc_lr": "train.discriminator.optimizer.lr"}
        problems += [f"{key}: unknown here and in the original" for key in content if not _known(key)]
        given = [(key, value) for key, value in content.items() if _known(key) and key not in rates and value is not None]
        scaled = [f"{ours}={float(content[key]) * factor:g}" for key, ours in rates.items() if content.get(key) is not None]
        path = IMAGEFOLDER_BASE
    else:
        scaled = []
    translated = list(scaled)
    mine = []
    for override in overrides:
        key, _, value = override.partition("=")
        if "." not in key and key not in own and _known(key):
            given.append((key, value))
        else:
            mine.append(override)
    for key, value in given:
        try:
            translated += translate_setting(key, value)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("settings of the original ImageFolder that must be said in another way:\n"
                        + "\n".join(f"  - {problem}" for problem in problems))
    return path, translated + mine
