"""Released files: chosen by system or name, fetched to where the programs look, unpacked where they are archives."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from pathlib import Path

from core.errors import UserError, nearest
from core.files import explain_os_errors, human_bytes, require_space
from core.weights import released
from core.weights.released import Released, table


def choose(words: list[str], everything: bool) -> list[Released]:
    """Table entries for systems, file names and hf:// references; UserError for a word that is none of them."""
    known, chosen = table(), []
    for word in words:
        word = word.lower() if word.lower() in {f.system for f in known} else word
        of_system = [
            f for f in known if f.system == word or (f.system == "auxiliary" and word == "evaluation" in f.systems)
        ]
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
    if file.unpack and Path(file.unpack).is_dir():
        return f"here     {file.unpack}/"
    if here := file.found():
        if problem := file.problem(here):
            raise UserError(f"{here} {problem}: it is damaged, cut short or another version. Delete it and run again.")
        if here != file.place and not file.systems:  # helpers are found wherever they are, other files by place
            released.put(here, file.place)
        said = f"here     {here}"
    else:
        said = f"fetched  {file.fetch()} ({human_bytes(file.place.stat().st_size)})"
    if file.unpack:
        said += f"\nunpacked {file.unpack}/ ({unpack(file.place, Path(file.unpack))} files)"
        file.place.unlink()
    return said


def unpack(archive: Path, folder: Path) -> int:
    """Put the files of a zip below `folder`, which appears whole, and count them. Names that lead elsewhere are refused.

    An archive whose files all lie in a folder of that name, and one without it, give the same.
    """
    try:
        with zipfile.ZipFile(archive) as source, explain_os_errors(folder):
            files = [entry for entry in source.infolist() if not entry.is_dir() and not _is_litter(entry.filename)]
            for entry in files:
                is_link = stat.S_ISLNK(entry.external_attr >> 16)
                parts = entry.filename.replace("\\", "/").split("/")
                if is_link or ".." in parts or parts[0] in ("", "~") or ":" in parts[0]:
                    raise UserError(
                        f"{archive}: {entry.filename} would be written outside of {folder}; nothing was unpacked."
                    )
            require_space(folder.parent, sum(entry.file_size for entry in files))
            prefix = f"{folder.name}/" if all(e.filename.startswith(f"{folder.name}/") for e in files) else ""
            temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
            try:
                source.extractall(temporary, files)  # checks the CRC of every file
                os.rename(temporary / prefix, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive}: not a whole zip archive ({error}). Delete it and run again.") from error
    return len(files)


def _is_litter(name: str) -> bool:
    return name.startswith("__MACOSX/") or name.endswith(".DS_Store")


def listing(files: list[Released]) -> str:
    lines = []
    for file in files:
        size = human_bytes(file.bytes) if file.bytes else f"> {human_bytes(file.at_least)}"
        state = "here" if file.found() else ("" if file.default else "optional")
        about = file.about + (f"; {file.licence}" if file.licence else "")
        lines.append(f"{file.system:<12} {file.place!s:<60} {size:>12}  {state:<8}  {about}  [{file.reference}]")
    return "\n".join(lines)
