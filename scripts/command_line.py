"""Command lines of the programs: options of ours, words of the original programs answered with ours."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.weights import released
from run import translate
from scripts.settings_help import settings_help

MOST, MOST_SEED = 10**9, 2**63 - 1  # of whole numbers on command lines
WORKERS = min(4, os.cpu_count() or 1)  # processes that decode pictures, unless told


def parser_of(program: str, about: str | None, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser whose --help begins with `about`, the docstring of the program."""
    return argparse.ArgumentParser(program, usage, about, formatter_class=argparse.RawTextHelpFormatter)


def add_options(parser: argparse.ArgumentParser, kind: type, **defaults: Any) -> None:
    """Options of one type that the program's docstring explains."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=argparse.SUPPRESS)


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options without a value that the program's docstring explains."""
    for name in names:
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)


def is_setting(word: str) -> bool:
    """Whether a word reads key=value; a data URL may hold an equals sign, too."""
    return "=" in word and "://" not in word.split("=")[0]


def split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(names, key=value words)."""
    return [word for word in words if not is_setting(word)], [word for word in words if is_setting(word)]


def tokenizer_settings(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The other words, and what `tokenizer.key=value` words say: facts that the weights of a tokenizer do not tell."""
    settings = [word for word in arguments if re.match(r"tokenizer\.[\w.]+=", word)]
    if not settings:  # --help does without libraries
        return list(arguments), {}
    from core.config import read_overrides

    return [word for word in arguments if word not in settings], read_overrides(settings).get("tokenizer", {})


def overrides_of(options: dict[str, Any]) -> list[str]:
    """`key=value` words of the config keys whose options were given; None: not given."""
    return [f"{key}={value}" for key, value in options.items() if value is not None]


def sampling_overrides(options: argparse.Namespace) -> list[str]:
    """What the short options of sampling (--scale, --guide, --steps, --tokenizer, --seed) say as `key=value`."""
    return overrides_of(
        {
            "sample.scale": options.scale,
            "sample.guide": options.guide,
            "sample.guidance": "auto" if options.guide else None,
            "sample.steps": options.steps,
            "tokenizer.weights": options.tokenizer,
            "seed": options.seed,
        }
    )


def few_of_tiny(targets: Sequence[str], settings: list[str], num: int | None, few: int) -> str:
    """Where nobody says how many, `settings` get `few` pictures of tiny models that come with the code: 50,000 of a toy are
    an hour on a CPU. What to tell the user, or ""."""
    if num is not None or any(word.startswith("eval.num_images=") for word in settings):
        return ""
    if not all(map(released.is_shipped, targets)):
        return ""
    settings.append(f"eval.num_images={few}")
    return f"{few:,} pictures, as {', '.join(targets)} came with the code; --num says another number"


def parse(parser: argparse.ArgumentParser, program: str, arguments: Sequence[str]) -> argparse.Namespace:
    """parser.parse_intermixed_args, where words of the original programs are answered with ours.

    Args:
        program: a key of translate.PROGRAMS.
    """
    if {"--help", "-h"} & {*arguments} and any(word.endswith((".yaml", ".yml")) for word in arguments):
        parser.print_help()
        print(settings_help(arguments))
        raise SystemExit(0)
    options = {word: action for action in parser._actions for word in action.option_strings}
    foreign = [
        a
        for a, following in zip(arguments, [*arguments[1:], ""])
        if a.startswith("--") and a != "--" and _foreign(a, following, options)
    ]
    if foreign:
        raise UserError(translate.explain(arguments, [program], foreign, options))
    translate.refuse(arguments, [program])
    translate.check_files(arguments)
    arrays = [word for word in arguments if word.endswith(".npz") and "=" not in word]
    if "pair" in translate.PROGRAMS[program] and arrays == list(arguments) and len(arrays) == 2:
        raise UserError(translate.PROGRAMS[program]["pair"].replace("$1", arrays[0]).replace("$2", arrays[1]) + ".")
    refused = parser.error

    def error(message: str) -> None:
        """An option of ours with a value of theirs."""
        named = [
            word
            for word in re.findall(r"argument .*?(--[\w-]+)", message)
            if any(translate.lookup(s, program, word[2:].replace("-", "_")) is not None for s in translate.SYSTEMS)
        ]
        if named:
            raise UserError(translate.explain(arguments, [program], named, options))
        refused(message)

    parser.error = error
    return within(parser.parse_intermixed_args(arguments))


def within(options: argparse.Namespace) -> argparse.Namespace:
    """The options; UserError for a whole number that nobody means, which arrays, lists and counters cannot take."""
    for name, value in vars(options).items():
        most = MOST_SEED if name == "seed" else MOST
        if isinstance(value, int) and abs(value) > most:
            shown = value if abs(value) < 10**20 else "of so many digits"
            raise UserError(f"--{name.replace('_', '-')} {shown}: a number of at most {most:,} is expected.")
    return options


def _foreign(word: str, following: str, options: dict[str, argparse.Action]) -> bool:
    """Whether this is no option of ours, or one with a number behind it that takes none."""
    name, equals, value = word.partition("=")
    if name not in options:
        return True
    value = value if equals else following
    return bool(options[name].choices) and translate.is_number(value) and value not in options[name].choices


def target_of(
    target: str | None, weights: str | None, settings: Iterable[str], default: str | None = None
) -> tuple[str, list[str]]:
    """(what is sampled from, settings) of a command `[TARGET] [--weights FILE] [key=value ...]`.

    With a target --weights are other weights for it, else they are the target. `default` where there is neither, or a
    UserError.
    """
    settings = list(settings)
    if target is not None and is_setting(target) and not Path(target).exists():
        target, settings = None, [target, *settings]
    if target is not None and weights is not None:
        return target, [*settings, f"generator.weights={weights}"]
    if (target or weights or default) is None:
        raise UserError("name a generator: a config, a run folder, a checkpoint or a released file; see --help.")
    return target or weights or default, settings
