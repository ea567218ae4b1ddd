"""Words of the original programs -> our settings and options, one sentence each; the words are in translate.toml.

Options of theirs are answered with what to write; whose they are follows from what else was typed (a config, a run, a
released file), else from the words themselves. Dotted keys of reAR are answered too. YAML files of ImageFolder, D-AR and
reAR, and key names of ImageFolder, are translated: every key arrives in the run or is refused by name.
"""

from __future__ import annotations

import ast
import difflib
import functools
import itertools
import operator
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import launch
from core.config import flatten
from core.errors import UserError
from core.weights import released

Answer = str | dict[str, str]
DATA: dict[str, Any] = tomllib.loads(Path(__file__).with_name("translate.toml").read_text(encoding="utf-8"))
PROGRAMS: dict[str, dict[str, Any]] = DATA["programs"]
SYSTEMS = [name for name, table in DATA.items() if "models" in table]
FILES: dict[str, str] = DATA["files"]
REAR_KEYS: dict[str, Answer] = DATA["rear"]["yaml"]
REAR_GROUPS = {key.split(".")[0] for key in REAR_KEYS if "." in key}  # none of ours is called like these
_PLACE = re.compile(r"\$\(((?:[^()]|\([^()]*\))*)\)|\$dir|\$base|\$")
_FUNCTIONS = {
    "list": lambda x: x if isinstance(x, list) else [x],
    "last": lambda x: x[-1] if isinstance(x, list) else x,
    "abs": abs,
    "negative": lambda x: x < 0,
}
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------
def shown_value(value: Any) -> str:
    """As it is typed behind an equals sign."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(shown_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> Any:
    """Text as a number, where it is one."""
    if isinstance(value, (list, tuple)):
        return [_number(item) for item in value]
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
    return value


def compute(expression: str, names: dict[str, Any]) -> Any:
    """Value of an arithmetic expression over `names`, with _FUNCTIONS; item by item for lists."""

    def visit(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return _number(names[node.id])
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            (value,) = map(visit, node.args)
            return _FUNCTIONS[node.func.id](value)
        assert isinstance(node, ast.BinOp)
        left, right = visit(node.left), visit(node.right)
        apply = _OPERATORS[type(node.op)]
        if not isinstance(left, list) and not isinstance(right, list):
            return apply(left, right)
        sides = [side if isinstance(side, list) else itertools.repeat(side) for side in (left, right)]
        return list(map(apply, *sides))

    return visit(ast.parse(expression, mode="eval").body)


def fill(template: str, value: Any, names: dict[str, Any]) -> list[str]:
    """The words of a template with the value in them; UserError for a value that is not the number it should be."""
    path = Path(shown_value(value))

    def place(match: re.Match) -> str:
        if match[0] == "$dir":
            return str(path.parent if path.name not in ("", "..") else path)
        if match[0] == "$base":
            return "" if path.name == ".." else path.name
        if not match[1]:
            return shown_value(value)
        try:
            return shown_value(compute(match[1], names))
        except (TypeError, ZeroDivisionError):
            raise UserError(f"{shown_value(value)} is not a number, and {match[1]} is computed from it") from None

    if "://" in shown_value(value):  # an address says itself what it is
        template = re.sub(r"\w+://(?=\$)", "", template)
    words = [_PLACE.sub(place, word) for word in template.split(" ")]
    return [word for word in words if word != "name="]  # "." is a place, but no name for a run


def choose(entry: Answer, value: Any) -> str:
    """The answer of an entry for a value."""
    if not isinstance(entry, dict):
        return entry
    text = shown_value(value)
    known = ": known are " + ", ".join(key for key in entry if key != "*")
    return entry.get(text, entry.get(text.lower(), entry.get("*", known)))


def is_sentence(answer: str) -> bool:
    return answer.startswith((":", "~"))


def pieces(answer: str) -> list[str]:
    """What can be typed, of an answer or of the sentence in it."""
    return re.findall(r"`([^`]*)`", answer) if is_sentence(answer) else [answer]


def phrase(entry: Answer, value: Any, names: dict[str, Any]) -> str:
    """The rest of a sentence that begins with the word as it was typed."""
    answer = choose(entry, value)
    if is_sentence(answer):
        return f": {' '.join(fill(answer[2:], value, names)).replace('`', '')}"
    return " is written " + " ".join(f'"{word}"' if " " in word else word for word in fill(answer, value, names))


# ---------------------------------------------------------------------------------------------------------------------
# Whose words, and about what
# ---------------------------------------------------------------------------------------------------------------------
@functools.cache
def _released() -> dict[str, str]:
    """Name of a released file -> its system."""
    return {file.name: file.system for file in released.table() if file.system in SYSTEMS}


def _content(path: Path) -> dict[str, Any]:
    """The keys of a YAML file on top of those of its bases; {} for anything else."""
    import yaml

    if not os.path.isfile(path):  # a pipe would never end
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    base = content.get("base")
    inherited = _content(path.parent / base) if isinstance(base, str) and path.parent / base != path else {}
    merged = {**inherited, **content}
    for key in ("tokenizer", "generator"):  # a name may come from the base
        merged[key] = {**_table(inherited, key), **_table(content, key)}
    return merged


def _table(content: dict, key: str) -> dict:
    return content[key] if isinstance(content.get(key), dict) else {}


def _config_of(word: str) -> dict[str, Any]:
    """What a word that names a config or a run says; {} where it names neither."""
    path = Path(FILES.get(word, word))
    if path.is_dir():
        return _content(path / "config.yaml")
    return _content(path) if path.suffix in (".yaml", ".yml") else {}


def systems_of(words: Iterable[str]) -> list[str]:
    """Systems that the words name: by configs and runs, names of released files, names of models in other words."""
    systems: dict[str, None] = {}
    for word in words:
        word = word.rpartition("=")[2]
        config, path = _config_of(word), Path(FILES.get(word, word))
        names = [_table(config, key).get("name") for key in ("tokenizer", "generator")] + [_released().get(path.name)]
        if not any(names):
            system = foreign_yaml(config)
            names = [system] if system else [path.parent.name, *path.stem.split("__")]
        for system in SYSTEMS:
            models = "|".join([system, *DATA[system]["models"]])
            if any(re.match(rf"(toy_)?({models})(_|$)", name) for name in names if name):
                systems[system] = None
    return list(systems)


def tasks_of(words: Iterable[str], stage: str | None = None) -> list[str]:
    """Which of "tokenizer" and "generator" a training command is about; both where that cannot be told."""
    by_stage = {"tokenizer": "tokenizer", "decoder": "tokenizer", "diffusion": "generator", "var": "generator"}
    tasks: list[Any] = [_config_of(word).get("task") for word in words] + [by_stage.get(stage or "")]
    return [task for task in tasks if task in by_stage.values()][:1] or ["tokenizer", "generator"]


def lookup(system: str, program: str, name: str) -> Answer | None:
    """The entry of a word of a system's, for a program of ours."""
    for part in (*PROGRAMS[program]["parts"], "common"):
        if (entry := DATA[system].get(part, {}).get(name)) is not None:
            return entry
    return None


def homes_of(system: str, name: str) -> list[str]:
    """The programs of ours that a word of a system's command lines may stand behind."""
    return [program for program in PROGRAMS if lookup(system, program, name) is not None]


def words_of(system: str) -> set[str]:
    """All words of its command lines."""
    parts = {part for program in PROGRAMS.values() for part in program["parts"]} | {"common"}
    return {word for part in parts for word in DATA[system].get(part, {}) if "." not in word}


@dataclass(frozen=True)
class Flag:
    """One --option of a command."""

    typed: str  # as it stands there, with its value
    name: str  # "global_batch_size"
    value: Any  # text, a list where there are several numbers, "true" where there is none


def name_of(option: str) -> str:
    """ "--global-batch-size=512" -> "global_batch_size"."""
    return option[2:].partition("=")[0].replace("-", "_")


def split_flags(arguments: Sequence[str], switches: set[str]) -> list[Flag]:
    """The --flags of a command with the values behind them; `switches` take none."""
    flags = []
    for place, argument in enumerate(arguments):
        if not argument.startswith("--") or argument == "--":
            continue
        option, equals, value = argument.partition("=")
        values = [value] if equals else []
        following = arguments[place + 1 :] if not equals and name_of(option) not in switches else []
        for word in following:
            if word.startswith("--") or "=" in word or (values and not is_number(values[-1], word)):
                break
            values.append(word)
        typed = " ".join([option, *values])
        flags.append(Flag(typed, name_of(option), values[0] if len(values) == 1 else values or "true"))
    return flags


def is_number(*words: str) -> bool:
    return all(isinstance(_number(word), (int, float)) for word in words)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------
def explain(
    arguments: Sequence[str],
    programs: Sequence[str] = ("tokenizer", "generator"),
    only: Iterable[str] | None = None,
    options: Iterable[str] = (),
) -> str:
    """What to write instead of each --flag (of those in `only`, as typed up to an equals sign), in a sentence each.

    Args:
        programs: keys of PROGRAMS, what the command may be about.
        options: the options that the program does have, for "did you mean".
    """
    options_typed = [a for a in arguments if a.startswith("--")]
    systems = systems_of(a for a in arguments if a not in options_typed)
    systems = systems or _likeliest({name_of(option) for option in options_typed}, programs)
    switches = {word for system in [*(systems or SYSTEMS), "launch"] for word in DATA[system].get("switches", ())}
    flags = split_flags(arguments, switches)
    values = {flag.name: flag.value for flag in flags}
    wanted = set(values) if only is None else set(map(name_of, only))
    answers = [_explain_one(flag, values, systems, programs, options) for flag in flags if flag.name in wanted]
    return join(dict.fromkeys([*key_answers(arguments, programs), *answers]))


def join(answers: Iterable[str]) -> str:
    """Answers as one sentence."""
    text = "; ".join(answers)
    return text if text.endswith((".", "?")) else f"{text}."


def _likeliest(flags: set[str], programs: Sequence[str]) -> list[str]:
    """The systems that know most of these words."""

    def known(system: str) -> tuple[int, int]:
        here = sum(any(lookup(system, program, flag) is not None for program in programs) for flag in flags)
        return here, len(flags & words_of(system))

    best = max(map(known, SYSTEMS))
    return [system for system in SYSTEMS if known(system) == best] if any(best) else []


def _explain_one(
    flag: Flag, values: dict[str, Any], systems: list[str], programs: Sequence[str], options: Iterable[str]
) -> str:
    """What to write instead of one option; `values` are those of all, `systems` whose words they may be."""
    name, typed = flag.name, flag.typed

    def rest(system: str, program: str) -> str:
        entry = lookup(system, program, name)
        assert entry is not None
        return phrase(entry, flag.value, {**DATA[system].get("defaults", {}), **values})

    owners: dict[str, list[tuple[str, str]]] = {}  # answer -> of which systems, for which programs
    for system in systems:
        for program in programs:
            if lookup(system, program, name) is not None:
                owners.setdefault(rest(system, program), []).append((system, program))
    if len(owners) == 1:
        return typed + next(iter(owners))
    if owners:
        return "; ".join(f"{typed} ({_whose(owners, answer)}){answer}" for answer in owners)
    if (entry := lookup("launch", programs[0], name)) is not None:
        return typed + phrase(entry, flag.value, {})
    for system in systems:
        if homes := homes_of(system, name):
            answer, where = rest(system, homes[0]), ", ".join(PROGRAMS[home]["title"] for home in homes)
            return f"{typed} belongs to {where}" + (answer if answer.startswith(":") else f", where it{answer}")
    if others := [DATA[system]["title"] for system in SYSTEMS if homes_of(system, name)]:
        return f"{typed} is a word of {' and '.join(others)}, not of {', '.join(DATA[s]['title'] for s in systems)}"
    known = {word for system in systems or SYSTEMS for word in words_of(system)}
    ours = difflib.get_close_matches("--" + name.replace("_", "-"), options, n=1, cutoff=0.6)
    close = ours or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    return f"there is no option {typed}; settings are key=value.{hint}"


def _whose(owners: dict[str, list[tuple[str, str]]], answer: str) -> str:
    """What tells an answer from the others: its systems, and what it is for where one system has several answers."""
    answers_of = Counter(system for pairs in owners.values() for system in {system for system, _ in pairs})
    names = []
    for system, program in owners[answer]:
        title = DATA[system]["title"] if len(answers_of) > 1 else ""
        purpose = PROGRAMS[program]["title"] if answers_of[system] > 1 else ""
        names.append(f"{title} {purpose}".strip())
    return ", ".join(dict.fromkeys(names))


# ---------------------------------------------------------------------------------------------------------------------
# Keys of reAR and RAR
# ---------------------------------------------------------------------------------------------------------------------
def key_answers(words: Iterable[str], programs: Sequence[str]) -> list[str]:
    """What to write for reAR's key=value words, an answer each."""
    pairs = [word.partition("=")[::2] for word in words if "=" in word and not word.startswith("--")]
    names = {**DATA["rear"]["defaults"], **{key.split(".")[-1]: value for key, value in pairs}}
    answers = []
    for key, value in pairs:
        entry = next(filter(None, (lookup("rear", program, key) for program in programs)), REAR_KEYS.get(key))
        if entry is not None:
            answers.append(key + phrase(entry, value, names))
        elif key.split(".")[0] in REAR_GROUPS:
            answers.append(f"{key} is of the original and has no counterpart here")
    return answers


def refuse(words: Sequence[str], programs: Sequence[str] = ("generator",)) -> None:
    """UserError with our words for theirs, all in one sentence, if there are reAR's keys among `words`."""
    if answers := key_answers(words, programs):
        raise UserError(join(answers))


# ---------------------------------------------------------------------------------------------------------------------
# YAML files of the originals
# ---------------------------------------------------------------------------------------------------------------------
def foreign_yaml(content: dict[str, Any]) -> str | None:
    """The system whose YAML file this is; None for one of ours."""
    if not content or "task" in content or "base" in content:
        return None
    keys = flatten(content)
    known = {system: sum(key in DATA[system]["yaml"] for key in keys) for system in DATA["yaml"]}
    best = max(known, key=known.__getitem__)
    return best if known[best] else None


def check_files(words: Iterable[str]) -> None:
    """UserError for a file that is not here but that a README of the originals names, with our name for it."""
    for word in (word.rpartition("=")[2] for word in words):
        ours = next((ours for theirs, ours in FILES.items() if f"/{word}".endswith(f"/{theirs}")), None)
        if ours and "://" not in word and not any((Path(place) / word).exists() for place in ("", "pretrained_models")):
            place = f"what bash run_download.sh {ours} fetches" if ours in _released() else ours
            raise UserError(f"there is no {word} here; what the original keeps in a file of that name is {place}.")


def translate(path: str, overrides: list[str]) -> tuple[str, list[str]]:
    """(config, overrides) with an original's YAML file and ImageFolder's key names replaced; ours pass unchanged."""
    from core.schema import RunConfig

    check_files([path, *overrides])
    content = _content(Path(path))
    system = foreign_yaml(content)
    keys = DATA["imagefolder"]["yaml"].keys() - RunConfig.__dataclass_fields__.keys() - {"base"}
    pairs = [(word, *word.partition("=")[::2]) for word in overrides]
    theirs = {key: value for _, key, value in pairs if key in keys}
    ours = [word for word, key, _ in pairs if key not in keys]
    if system is None and not theirs:
        return path, overrides
    values = flatten({key: value for key, value in content.items() if value != {}}) if system else {}
    settings = translate_keys(system or "imagefolder", {**values, **theirs}, ours, Path(path) if system else None)
    return (DATA["yaml"][system]["base"] if system else path), settings + ours


def translate_keys(system: str, values: dict[str, Any], ours: Sequence[str], path: Path | None) -> list[str]:
    """Our settings for keys of an original's YAML file; UserError naming each that has none.

    Args:
        values: their keys and values; null stands for a key that is not there.
        ours: the user's settings in our words, which excuse a key that is refused for want of them.
        path: of a whole file, which means something by the keys that it lacks; None for single keys.
    """
    facts, table = DATA["yaml"][system], DATA[system]["yaml"]
    values = {
        key: "none" if value is None and isinstance(table.get(key), dict) and "none" in table[key] else value
        for key, value in values.items()
    }
    values = {key: value for key, value in values.items() if value is not None}
    if path:
        values = {**facts.get("missing", {}), **values}
    names = {**DATA[system]["defaults"], **{key.split(".")[-1]: value for key, value in values.items()}}
    for part, key in facts.get("variants", {}).items():
        if key in names and len(compute(f"list({key})", names)) == 1:
            table = {**table, **DATA[system][part]}
    settings: list[str] = []
    problems = [f"{key}: unknown here and in the original" for key in values if key not in table]
    notes: list[str] = []
    chosen_by_user = {word.partition("=")[0] for word in ours}
    for key in (key for key in table if key in values):
        answer, value = choose(table[key], values[key]), values[key]
        expected = facts.get("equal", {}).get(key)
        if expected and (wanted := _known(expected, names)) not in (None, _number(value)):
            problems.append(f"{key}: {value} does not fit the other keys, by which it is {wanted}")
        elif answer.startswith("~"):
            notes.append(key)
        elif answer.startswith(":"):
            named = {word.partition("=")[0] for piece in pieces(answer) for word in piece.split() if "=" in word}
            if not named & chosen_by_user:
                problems.append(f"{key}: {shown_value(value)}{phrase(table[key], value, names)}")
        else:
            settings += fill(answer, value, names)
    title = DATA[system]["title"]
    if problems:
        raise UserError(
            f"settings of the original {title} that must be said in another way, here or by changing "
            f"{facts['base']}:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )
    if path and not any(word.startswith("name=") for word in settings):
        settings.append(f"name={path.stem}")
    if path:
        absent = [key for key in table if key not in values and not all(map(is_sentence, _answers(table[key])))]
        launch.say(
            f"{path} is a file of {title}: {facts['base']} with {' '.join(settings)}\n"
            f"  nothing to set for: {', '.join(notes) or '-'}\n  not in it, so as in the recipe: {', '.join(absent) or '-'}"
        )
    return settings


def _answers(entry: Answer) -> list[str]:
    return list(entry.values()) if isinstance(entry, dict) else [entry]


def _known(expression: str, names: dict[str, Any]) -> Any:
    """Its value; None where a name in it is not given."""
    try:
        return compute(expression, names)
    except KeyError:
        return None
