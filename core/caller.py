"""Paths of the command line, which are relative to the caller's folder. Only the standard library.

run_*.sh go to the repository, where the paths in YAML files start from, and keep the folder they were called from in
TESSERA_CALLER. Here the words behind them get the paths that they had there: what exists in the caller's folder is meant
before what is called the same in the repository; what is to be written lies in the caller's folder, unless an earlier
part of the job lies in the repository already.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "TESSERA_CALLER"
SETTING = re.compile(r"([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
URL = re.compile(r"(folder|list|wds|tokens)://(.*?)(\?.*)?", re.DOTALL)
QUERY = re.compile(r"([?&](?:root|classes)=)([^&]*)")
# Options and last parts of keys whose values are paths: of what is read, of what is written.
READ = {
    "weights",
    "tokenizer",
    "guide",
    "layout",
    "mask",
    "original",
    "reconstructed",
    "import",
    "url",
    "data",
    "from",
    "markdown",
    "texts",
}
READ |= {"tokenizer-config", "guide-config", "val_url", "pictures", "moments", "init_from", "reference", "latent_stats"}
WRITTEN = {"out", "npz", "work_dir", "cache_dir"}
NAMES = {"network", "labels"}  # names of ours too: paths where there is a slash or a dot in them
# Options without a value: what follows them stands for itself.
FLAGS = {
    "--check",
    "--dry-run",
    "--raw",
    "--again",
    "--infinity",
    "--keep",
    "--stages",
    "--list",
    "--list-labels",
    "--rehearse",
    "--verify",
    "--preview",
    "--full",
    "--all",
}


def folder() -> Path | None:
    """Where the caller is; None where that is the folder of this process, or nobody said."""
    said = os.environ.get(VARIABLE)
    here = Path.cwd()
    return Path(said) if said and Path(said).is_dir() and not os.path.samefile(said, here) else None


def from_caller(words: Iterable[str]) -> list[str]:
    """The words of a command line with the caller's paths as they are to be named here."""
    place, option, answer = folder(), "", []
    if place is None:
        return list(words)
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            value = _meant(place, name[2:], value) if equals else ""
            answer.append(name + equals + value)
            option = "" if equals or name in FLAGS else name[2:]
            continue
        setting = SETTING.fullmatch(word)
        if option == "to" and word in ("official", "jsonl"):  # a path comes next
            answer.append(word)
            option = "out"
            continue
        if option:
            answer.append(_meant(place, option, word))
        elif setting and not (place / word).exists():
            key, value = setting.groups()
            answer.append(f"{key}={_meant(place, key.rpartition('.')[2], value)}")
        elif "/" not in word and "." not in word and Path("work_dirs", word).exists():  # the name of a run
            answer.append(word)
        else:
            answer.append(_meant(place, "url", word))
        option = ""
    return answer


def written(path: str) -> str:
    """A path that is written to and stands in no option."""
    place = folder()
    return path if place is None else _meant(place, "out", path)


def _meant(place: Path, name: str, value: str) -> str:
    """The value of the option, or of the key, that is called or ends so."""
    url = URL.fullmatch(value)
    if url:
        query = QUERY.sub(lambda part: part[1] + _meant(place, "url", part[2]), url[3] or "")
        return f"{url[1]}://{_meant(place, 'url', url[2])}{query}"
    path = name in READ | WRITTEN or (name in NAMES and ("/" in value or "." in value))
    if not path or not value or value.startswith(("/", "~")) or "://" in value:
        return value
    known = value
    if name not in WRITTEN and not (place / value).exists():
        table = value.rpartition("#")[0] or value  # "FILE#KEY"
        known = re.split(r"[{*?\[]", table)[0]
        if known != table:  # shards, "DIR/{00..63}.tar"
            known = os.path.dirname(known)
    if not known:
        return value
    if not (place / known).exists() and (name not in WRITTEN or Path(known).exists()):
        return value
    path = os.path.normpath(place / value)
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
