"""Files that are either whole or absent: atomic writes, checksums, free space, and errors a person can act on.

Nothing here knows what is inside a file. Checkpoints are in core/train/checkpoint.py, weights in core/weights/hub.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # of this project

# What the operating system reports -> what is wrong and what to do about it.
ADVICE = {
    errno.ENOSPC: "the disk is full. Free some space or choose another folder, then try again",
    errno.EDQUOT: "your disk quota is used up. Delete what you no longer need or choose another folder, then try again",
    errno.EFBIG: "the file is larger than the system allows. Raise the limit (ulimit -f) or choose another folder",
    errno.EACCES: "permission denied. Choose a folder you may use, or ask its owner for access",
    errno.EPERM: "the operation is not permitted. Choose a folder you may use, or ask its owner for access",
    errno.EROFS: "the file system is read-only. Choose a folder on a writable disk",
    errno.ENOENT: "no such file or folder. Check the spelling of the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder. Check the path",
    errno.EISDIR: "this is a folder, a file was expected. Check the path",
    errno.ENAMETOOLONG: "the name is too long for this file system. Choose a shorter one",
    errno.EMFILE: "too many files are open. Raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine. Close some programs, or ask its owner",
    errno.EIO: "the disk reported an input/output error. Check its health and choose another folder",
}

DIGEST_PIECE = 1 << 24  # bytes, see `digests`

# Never a program's; of a name, the user's.
MACHINES_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EIO, errno.ENAMETOOLONG}


def expanded(path: str | os.PathLike) -> Path:
    """With ~ as the home folder. It stays where nobody is known by that name, or where this account has no home: what is not
    there is said by who looks there."""
    return Path(os.path.expanduser(path))


@contextlib.contextmanager
def explain_os_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError with a known cause into a UserError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        if problem := misplaced(error):
            raise UserError(problem) from error
        if error.errno not in ADVICE:
            raise
        raise UserError(f"{os.fspath(path) or 'an empty name'}: {ADVICE[error.errno]}.") from error


def misplaced(error: OSError) -> str | None:
    """A sentence where an error comes from a link to nowhere, or from a file in the place of a folder."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if not isinstance(name, int | None)]
    if problem := next(filter(None, map(dangling, names)), None):
        return problem
    if isinstance(error, FileExistsError) and names and os.path.isfile(names[0]):
        return f"{names[0]}: a file is in its place. Move it away, or choose another name."
    return None


def text_instead(start: bytes) -> str | None:
    """What a download left instead of a file, and what to do about it, without the full stop: by its first bytes."""
    start = start[:200].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return (
            "a Git-LFS pointer, not the file it stands for. Run git lfs pull in its repository, or download the file "
            "itself"
        )
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return (
            "a web page, not the file itself: the server answered the download with a page, of an error or a login. "
            "Delete it and download it again"
        )
    return None


def refuse_device(path: str | os.PathLike) -> None:
    """UserError for a pipe or a device: reading it might never end."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"{os.fspath(path)} is neither a file nor a folder. Copy what it gives into a file first.")


def refuse_text(path: str | os.PathLike) -> None:
    """UserError that says what is there where another file was expected and a download left something else."""
    refuse_device(path)
    with explain_os_errors(path), open(path, "rb") as file:
        instead = text_instead(file.read(200))
    if instead:
        raise UserError(f"{os.fspath(path)}: {instead}.")


def is_machines_fault(error: BaseException | None) -> bool:
    """Whether the operating system is behind `error` (a full disk, a lost mount): the same command may work later."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return True
        error = error.__cause__
    return False


def human_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    if abs(count) < 1024:
        return f"{count} bytes"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if abs(value) < 1024 or unit == "PiB":
            break
    return f"{value:.1f} {unit}"


def fsync_file(path: str | os.PathLike) -> None:
    """Make the contents of a closed file survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(path: str | os.PathLike) -> None:
    """Make renames inside a folder survive a power cut."""
    try:
        fsync_file(path)
    except OSError as error:
        # Some network file systems cannot sync a folder. The rename is atomic all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


@contextlib.contextmanager
def replacing(path: str | os.PathLike, sync: bool = True) -> Iterator[Path]:
    """A name beside `path`, whose folder is made, for the block to write a file under, whatever its format.

    After the block the file takes the place of `path`; after a crash at any moment `path` holds the old contents or the
    new, nothing between. An error in the block leaves the old file and nothing else.

    Args:
        sync: the file survives a power cut. False for many small ones that can be made again: it takes milliseconds.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    with explain_os_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if sync:
                fsync_file(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if sync:
            fsync_folder(path.parent)


def write_atomic(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a whole file: after a crash at any moment, `path` holds the old contents or the new, nothing between."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)


def is_copied(file: Path, folder: str) -> bool:
    """Whether the same file still lies in `folder`, too: `file` was copied from there together with its own folder."""
    other = Path(folder) / file.name
    with contextlib.suppress(OSError):
        return bool(folder) and not other.samefile(file) and other.read_bytes() == file.read_bytes()
    return False


def clear_folder(folder: str | os.PathLike, is_ours: Callable[[Path], bool]) -> None:
    """Delete what an earlier call of the same program left in `folder`; UserError where other things are in it.

    Args:
        is_ours: whether a folder that holds something was made by that program.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not is_ours(folder))):
        raise UserError(f"{folder} holds other things, which would be deleted. Name a folder that is new or empty.")
    with explain_os_errors(folder), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def sorted_facts(tensors: bytes) -> bytes:
    """A safetensors file with its facts in alphabetical order; the library writes them in another order each time."""
    size = int.from_bytes(tensors[:8], "little")
    header = json.loads(tensors[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # which aligns the tensors
    return len(text).to_bytes(8, "little") + text + tensors[8 + size :]


def to_json(value: Any) -> str:
    """The one way we write JSON: sorted, indented, readable in any language, floats exact."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def write_json(path: str | os.PathLike, value: Any) -> None:
    write_atomic(path, to_json(value))


_REQUIRED = object()


def read_json(path: str | os.PathLike, otherwise: Any = _REQUIRED) -> Any:
    """The contents of a JSON file; UserError when it is not JSON, or missing and there is no value to take `otherwise`."""
    if otherwise is not _REQUIRED and not os.path.isfile(path):
        return otherwise
    refuse_device(path)
    with explain_os_errors(path):
        data = Path(path).read_bytes()
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        refuse_text(path)
        raise UserError(f"{os.fspath(path)}: not valid JSON ({error}). It is damaged or was edited by hand.") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one in each line; lines that a crash cut or filled with zeros are left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def sha256_file(path: str | os.PathLike) -> str:
    """Hex digest, read in pieces."""
    import hashlib  # loads OpenSSL, which --help does without

    digest = hashlib.sha256()
    piece = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def digests(paths: Iterable[str | os.PathLike], piece: int = DIGEST_PIECE) -> Iterator[str]:
    """A digest of each file, by all processors: hex XXH3 (128 bits) of the digests of its pieces. Against damage only.

    Args:
        piece: bytes of each piece but the last.
    """
    from concurrent.futures import ThreadPoolExecutor

    from xxhash import xxh3_128

    def digest(path: str, start: int, stop: int) -> bytes:
        state, block = xxh3_128(), memoryview(bytearray(min(1 << 20, stop - start)))
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                while start < stop and (count := file.readinto(block[: stop - start])):
                    state.update(block[:count])
                    start += count
        except OSError as error:  # a read that fails names no file
            raise OSError(error.errno, error.strerror, path) from error
        return state.digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        files = []
        for path in paths:
            name, size = os.fspath(path), os.stat(path).st_size
            files.append(
                [pool.submit(digest, name, start, min(start + piece, size)) for start in range(0, size, piece)]
            )
        for pieces in files:
            yield xxh3_128(b"".join(part.result() for part in pieces)).hexdigest()


def read_ahead(paths: Iterable[str | os.PathLike]) -> None:
    """Ask the system to have these files in memory soon; nothing waits for it, and nothing is wrong where it cannot."""
    for path in paths:
        with contextlib.suppress(OSError, AttributeError), open(path, "rb") as file:  # AttributeError: macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def existing_part(folder: str | os.PathLike) -> Path:
    """The folder, or the nearest one above it, of which something is there, be it a link to nowhere."""
    whole = Path(os.path.abspath(folder))
    return next(place for place in (whole, *whole.parents) if os.path.lexists(place))


def dangling(path: str | os.PathLike) -> str | None:
    """A sentence where a part of the path is a link to nowhere."""
    place = existing_part(path)
    if not place.is_symlink() or place.exists():
        return None
    return f"{place}: a link to {os.readlink(place)}, which is not there. Mount the disk that it leads to, or choose another place."


def require_place(folder: str | os.PathLike) -> None:
    """UserError unless `folder` may be written into, or made."""
    if problem := dangling(folder):
        raise UserError(problem)
    place = existing_part(folder)
    if not place.is_dir():
        raise UserError(f"{place}: a file, and a folder is needed here. Choose another one.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{place}: may not be written into, or lies on a read-only disk. Choose another folder.")


def require_space(folder: str | os.PathLike, needed: int) -> None:
    """UserError when `needed` bytes do not fit on the disk of `folder`."""
    with explain_os_errors(folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{os.fspath(folder)}: {human_bytes(needed)} are needed and {human_bytes(free)} are free. "
            "Free some space or choose another folder, then try again."
        )
