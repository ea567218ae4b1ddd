#!/usr/bin/env python3
"""Fetch released files: python scripts/download.py SYSTEM|FILE|hf://owner/repo/file ... [--all] [--dry-run] [--list]

  download.py --list                     every known file, with its size and whether it is here
  download.py rectok                     what the README of that system needs
  download.py rectok --all               optional files too
  download.py ditdhxl_epoch_0599.pth     one file

Weights go to pretrained_models/, statistics to data/fid_stats/, tokens to data/tokens/. Files that are here are kept.
Without network, copy files there by hand: names and addresses are in --list and scripts/released.toml.
"""

import _root  # noqa: F401
import argparse
import os
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

from core import cli

TABLE = Path(__file__).with_name("released.toml")


@dataclass(frozen=True)
class Released:
    """One file that its authors offer."""

    system: str
    name: str
    about: str
    repo: str | None = None
    url: str | None = None
    path: str | None = None
    to: str = "pretrained_models"
    bytes: int | None = None
    at_least: int = 0
    default: bool = True

    @property
    def reference(self) -> str:
        """What core.hub.resolve fetches."""
        return self.url or f"hf://{self.repo}/{self.path or self.name}"

    @property
    def place(self) -> Path:
        return Path(self.to) / self.name

    def size_problem(self, size: int) -> str | None:
        """A sentence when a file of `size` bytes cannot be this one."""
        from core.files import human_bytes

        if self.bytes is not None and size != self.bytes:
            return f"has {size:,} bytes instead of {self.bytes:,}"
        if size < self.at_least:
            return f"has only {human_bytes(size)}; at least {human_bytes(self.at_least)} were expected"
        return None


def table() -> list[Released]:
    systems = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return [Released(system, name, **entry) for system, files in systems.items() for name, entry in files.items()]


def choose(words: list[str], everything: bool) -> list[Released]:
    """Table entries for systems, file names and hf:// references; UserError for a word that is none of them."""
    from core.errors import UserError, nearest

    known, chosen = table(), []
    for word in words:
        of_system = [f for f in known if f.system == word.lower()]
        if of_system:
            chosen += [f for f in of_system if f.default or everything]
        elif by_name := [f for f in known if word in (f.name, f.reference)]:
            chosen += by_name
        elif word.startswith("hf://"):
            chosen.append(Released("other", word.rsplit("/", 1)[-1], "", url=word))
        else:
            names = {f.system for f in known} | {f.name for f in known}
            raise UserError(f'"{word}" is neither a system nor a released file.{nearest(word, names)}')
    return list(dict.fromkeys(chosen))


def fetch(file: Released) -> str:
    """Download unless it is here; returns what happened. UserError when it cannot be had or is not whole."""
    from core import hub
    from core.errors import UserError
    from core.files import explain_os_errors, human_bytes

    if file.place.is_file():
        if problem := file.size_problem(file.place.stat().st_size):
            raise UserError(f"{file.place} {problem}: it is damaged, cut short or another version. Delete it and run again.")
        return f"here     {file.place}"
    source = hub.resolve(file.reference)
    if problem := file.size_problem(source.stat().st_size):
        raise UserError(f"{source} {problem}: it is damaged, cut short or another version. Delete it and run again.")
    with explain_os_errors(file.place):
        file.place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, file.place)  # one copy on disk, two names
        except OSError:  # other disks, or a file system without links
            temporary = file.place.with_name(f".{file.place.name}.{os.getpid()}.tmp")
            try:
                shutil.copyfile(source, temporary)
                os.replace(temporary, file.place)
            finally:
                temporary.unlink(missing_ok=True)
    return f"fetched  {file.place} ({human_bytes(source.stat().st_size)})"


def listing(files: list[Released]) -> str:
    from core.files import human_bytes

    lines = []
    for file in files:
        size = human_bytes(file.bytes) if file.bytes else f"> {human_bytes(file.at_least)}"
        state = "here" if file.place.is_file() else ("" if file.default else "optional")
        lines.append(f"{file.system:<12} {str(file.place):<60} {size:>12}  {state:<8}  {file.about}  [{file.reference}]")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="download.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="SYSTEM|FILE")
    parser.add_argument("--list", action="store_true", help="show files instead of fetching them")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched")
    parser.add_argument("--all", action="store_true", help="optional files of a system too")
    options = parser.parse_args(arguments)

    from core.errors import UserError

    if options.list:
        print(listing(choose(options.what, True) if options.what else table()))
        return 0
    if not options.what:
        systems = ", ".join(dict.fromkeys(f.system for f in table()))
        raise UserError(f"name a system ({systems}) or a file; --list shows them all.")
    files = choose(options.what, options.all)
    if options.dry_run:
        for file in files:
            print(f"{'here' if file.place.is_file() else 'would fetch':<12} {file.reference} -> {file.place}")
        return 0
    failures = []
    for file in files:
        try:
            print(fetch(file), flush=True)
        except UserError as error:
            failures.append(str(error))
            print(f"failed   {file.place}: {error}", flush=True)
    if failures:
        raise UserError(f"{len(failures)} of {len(files)} files could not be had; what arrived is kept. Run the same again, or "
                        "copy them by hand.")
    return 0


if __name__ == "__main__":
    cli.run(main)
