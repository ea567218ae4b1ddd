"""Checkpoints that are either complete or absent, written while training goes on.

    <run>/checkpoints/step_00000500/{model,ema,...}.safetensors state.json manifest.json      latest -> step_00000500

Weights that are in parts (FSDP) are written in parts: core/train/sharded.py.

A checkpoint is written to `.tmp-step_00000500-<pid>`, every file synced, the manifest (sizes and digests) last; then the
folder is renamed. Loading takes the newest folder whose manifest verifies and says what it passed over. Nothing is
pickled: tensors are safetensors, everything else is JSON. Only rank 0 writes and verifies; any rank may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError, nearest
from core.files import (
    DIGEST_PIECE,
    digests,
    explain_os_errors,
    fsync_file,
    fsync_folder,
    read_ahead,
    read_json,
    require_space,
    sha256_file,
    to_json,
    write_atomic,
    write_json,
)
from core.lock import lives

FORMAT = 2  # 1 had a sha256 per file, which one processor took longer to compute than to read the file
MANIFEST, STATE = "manifest.json", "state.json"
_STEP = re.compile(r"step_(\d{8,})")
_LEFTOVER = re.compile(r"\.(tmp|old)-(step_\d{8,}|latest)-(\d+)")
PART = re.compile(r"(.+)\.part-\d{5,}-of-\d{5,}\.safetensors")
_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped from disk; UserError that names the file when it is damaged."""
    from safetensors.torch import load_file

    return _explained(load_file, path)


def _open_tensors(path: Path) -> Any:
    """An open safetensors file; UserError that names it when it is damaged."""
    from safetensors import safe_open

    return _explained(lambda name: safe_open(name, "pt"), path)


def _read_open(_: Path, file: Any) -> dict[str, Tensor]:
    """All tensors of a file of `_open_tensors`, which need not be at its path any more."""
    return {name: file.get_tensor(name) for name in file.keys()}


def _explained(read: Callable[[str], Any], path: str | os.PathLike) -> Any:
    from safetensors import SafetensorError

    with explain_os_errors(path):
        open(path, "rb").close()  # safetensors' own message for an unreadable file names no reason
        try:
            return read(os.fspath(path))
        # The last three are what a header with impossible types, sizes or names raises.
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{os.fspath(path)}: not a whole safetensors file ({error}). Delete it and copy or download it again."
            ) from error


def _manifest_digest(manifest: dict) -> str:
    """Protects the manifest itself: every field but the digest."""
    return hashlib.sha256(to_json({k: v for k, v in manifest.items() if k != "sha256"}).encode()).hexdigest()


def _read_manifest(path: Path) -> dict:
    manifest = read_json(path / MANIFEST)
    whole = isinstance(manifest, dict) and (path / MANIFEST).read_bytes() == to_json(manifest).encode()
    if not whole or manifest.get("sha256") != _manifest_digest(manifest):
        raise UserError(f"{path / MANIFEST}: contents changed since it was written.")
    if manifest["format"] not in (1, FORMAT):
        raise UserError(f"{path / MANIFEST}: format {manifest['format']}, this version reads {FORMAT}. Update Tessera.")
    return manifest


def _digest_kind(manifest: dict) -> str:
    return "xxh3" if manifest["format"] > 1 else "sha256"


def _digests(paths: list[Path], manifest: dict) -> Iterable[str]:
    """Of each file, as the manifest's format has them."""
    return digests(paths, manifest["piece"]) if manifest["format"] > 1 else map(sha256_file, paths)


_verified: dict[str, tuple] = {}  # folder -> stamp of a checkpoint whose contents this process has found right


def _stamp(path: Path, manifest: dict) -> tuple:
    """Changes when a file of a checkpoint is written or replaced, if not what it holds."""
    stats = [(path / name).stat() for name in manifest["files"]]
    return manifest["sha256"], *((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def find_damage(path: str | os.PathLike, contents: bool = True) -> list[str]:
    """Sentences that name each missing or changed file; empty for a good checkpoint.

    Names and sizes first, contents only where these are right: nothing long is read in vain. Contents that this process
    has found right are not read again while no file changes its time.

    contents False skips the digests.
    """
    path = Path(path)
    problems = []
    try:
        manifest = _read_manifest(path)
        if path.name != step_name(manifest["step"]) and _STEP.fullmatch(path.name):
            problems.append(f"{path / MANIFEST}: belongs to {step_name(manifest['step'])}.")
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file():
                problems.append(f"{file}: missing.")
            elif file.stat().st_size != expected["bytes"]:
                problems.append(f"{file}: {file.stat().st_size} bytes instead of {expected['bytes']}.")
        stamp = _stamp(path, manifest) if contents and not problems else None
        if stamp is not None and _verified.get(str(path.resolve())) != stamp:
            kind = _digest_kind(manifest)
            digests = _digests([path / name for name in manifest["files"]], manifest)
            problems += [
                f"{path / name}: contents changed since it was written ({kind} differs)."
                for (name, expected), digest in zip(manifest["files"].items(), digests)
                if digest != expected[kind]
            ]
            if not problems:
                _verified[str(path.resolve())] = stamp
    except UserError as error:
        problems.append(str(error))
    except OSError as error:  # a failing disk is damage too
        problems.append(f"{error.filename or path}: {error.strerror}.")
    return problems


class Checkpoint:
    """One checkpoint folder. Opening it reads the two JSON files and trusts the rest; see `find_damage`."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        self.step: int = manifest["step"]
        self.milestone: bool = manifest["milestone"]
        self.files: list[str] = sorted(manifest["files"])
        self.state: dict[str, Any] = read_json(self.path / STATE)
        self._held: dict[str, Any] = {}

    def hold(self) -> Checkpoint:
        """Open all files, so that they can be read although a running trainer deletes the folder meanwhile."""
        for name in self.files:
            if name.endswith(".safetensors"):
                self._held[name] = _open_tensors(self.path / name)
        return self

    def tensors(self, stem: str, like: Callable[[str], Tensor | None] = lambda name: None) -> dict[str, Tensor]:
        """The tensors saved under this name, on the CPU, mapped from disk.

        Args:
            like: name -> where this rank needs a part of the tensor only, one that is in such parts. Followed where the
                checkpoint is in parts, any number of them; otherwise tensors are whole.
        """
        name = f"{stem}.safetensors"
        if parts := self._parts(stem):
            from core.train import sharded

            return sharded.read([self._held.get(part) or _open_tensors(self.path / part) for part in parts], like)
        if name not in self.files:
            parts = {f: match[1] for f in self.files if (match := PART.fullmatch(f))}
            stems = {parts.get(f, f.removesuffix(".safetensors")) for f in self.files if f.endswith(".safetensors")}
            raise UserError(f'{self.path} holds no "{stem}".{nearest(stem, stems)}')
        if name in self._held:
            return _read_open(self.path / name, self._held[name])
        return read_tensors(self.path / name)

    def _parts(self, stem: str) -> list[str]:
        """Names of the files in which several ranks wrote parts of this."""
        return [file for file in self.files if (match := PART.fullmatch(file)) and match[1] == stem]


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
class _Staging:
    """Pinned host memory that a GPU copies into. It is kept from save to save: pinning takes longer than copying, and what
    is given back to torch is lost whenever its caches are emptied.

    Args:
        slab: bytes that are pinned at a time; a power of two, to which torch rounds.
    """

    def __init__(self, slab: int = 1 << 28, pinned: bool = True):
        self.slab, self.pinned = slab, pinned
        self.slabs: list[Tensor] = []
        self._devices: set[torch.device] = set()
        self._current = self._used = 0

    def restart(self) -> None:
        """Hand out the same memory again."""
        self._devices.clear()
        self._current = self._used = 0

    def like(self, tensor: Tensor) -> Tensor:
        """Contiguous memory for a copy of `tensor`, whatever it holds now."""
        while True:
            if self._current == len(self.slabs):
                size = max(self.slab, tensor.nbytes)
                self.slabs.append(torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned))
            if self._used + tensor.nbytes <= self.slabs[self._current].numel():
                break
            self._current, self._used = self._current + 1, 0
        start = self._used
        self._used += -(-tensor.nbytes // 64) * 64  # aligned for every type
        return self.slabs[self._current][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A private copy on the CPU. From a GPU it is queued on the current stream; see `events`."""
        tensor = tensor.detach()
        if tensor.device.type == "cpu":
            return tensor.clone(memory_format=torch.contiguous_format)
        if tensor.device.type == "cuda":
            self._devices.add(tensor.device)
            return self.like(tensor).copy_(tensor, non_blocking=True)
        return tensor.cpu().contiguous()

    def events(self) -> list:
        """After them the copies since `restart` are complete."""
        return [torch.cuda.current_stream(device).record_event() for device in self._devices]


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
    """A safetensors file that is on disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, header)
    except SafetensorError as error:
        # The library wraps the operating system's error in text; unwrap it, so that it can be explained.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    # safetensors goes through a private temporary file; give the result the folder's permissions.
    path.chmod(path.parent.stat().st_mode & 0o666)
    fsync_file(path)


def describe(files: list[Path], folder: Path) -> dict[str, dict]:
    """The manifest's entry of each file in `folder`."""
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "xxh3": digest}
        for file, digest in zip(files, digests(files))
    }


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: `<run>/checkpoints`; made at the first save.
        keep: how many of the newest to keep, beside the milestones.
        log: receives one sentence at a time, from the writer thread too. When writing fails (a full disk, say) it is
            all that happens: training goes on, the last good checkpoint stays as it is, the next `save` tries again.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3, log: Callable[[str], None] = lambda message: None):
        if keep < 1:
            raise UserError(f"keep = {keep} checkpoints, at least 1 is needed to resume a run.")
        self.folder, self.keep, self._log = Path(folder), keep, log
        self.skipped: list[str] = []  # what the last call of `latest` passed over, and why
        self._damaged: set[str] = set()
        self._staging = _Staging()
        self._thread: threading.Thread | None = None
        self._failure: str | None = None  # of the last save

    def log(self, message: str) -> None:
        """Say something, in the thread that writes too, where an error would be nobody's."""
        with contextlib.suppress(UserError):  # a disk that has no room for the checkpoint has none for log.txt
            self._log(message)

    # -- finding ------------------------------------------------------------------------------------------------------
    def steps(self) -> list[int]:
        """Steps that have a folder, ascending; nothing is verified."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def read_ahead(self) -> None:
        """For ranks that wait for the verdict of the main one: have what is probably loaded next in memory by then."""
        for step in self.steps()[-1:]:
            read_ahead((self.folder / step_name(step)).rglob("*.safetensors"))

    def latest(self, clean: bool = True) -> Checkpoint | None:
        """The newest checkpoint that verifies; None when there is none at all.

        Damaged ones are passed over, logged and listed in `skipped`. When all are damaged this raises: a run must not
        start afresh on top of them.

        Args:
            clean: also remove what killed writers left and repair `latest`. The process that writes passes True;
                other ranks, and programs that look at a run which may be alive, pass False.
        """
        self.wait()
        self.skipped = []
        if clean:
            self._clean()
        for step in reversed(self.steps()):
            path = self.folder / step_name(step)
            problems, checkpoint = find_damage(path), None
            if not problems:
                try:
                    checkpoint = Checkpoint(path)
                except UserError as error:
                    problems = [str(error)]
            if checkpoint is not None:
                if clean:
                    self._point("latest", path.name)
                return checkpoint
            if not clean and not path.exists():  # deleted by its trainer, which has newer ones by now
                return self.latest(clean=False)
            self._damaged.add(path.name)
            self.skipped.extend(problems)
            for problem in problems:
                self.log(f"Passed over a damaged checkpoint: {problem}")
        if self.skipped:
            raise UserError(
                f"{self.folder}: there are checkpoints but none is whole. {' '.join(self.skipped)} "
                "Restore the files from a backup, or choose another run folder to start afresh."
            )
        return None

    # -- the best one -------------------------------------------------------------------------------------------------
    def best(self) -> dict[str, Any]:
        """{step, metric, value} of the checkpoint that `pin` named last; {} when there is none."""
        try:
            return json.loads((self.folder / "best.json").read_text())
        except (OSError, json.JSONDecodeError):
            return {}

    def pin(self, step: int, metric: str, value: float) -> None:
        """Keep the checkpoint of `step`, which is written, until another one is pinned; `best` points to it."""
        write_json(self.folder / "best.json", {"step": step, "metric": metric, "value": value})
        self._point("best", step_name(step))

    # -- saving -------------------------------------------------------------------------------------------------------
    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        *,
        wait: bool = False,
        milestone: bool = False,
    ) -> None:
        """Copy everything now and write it in the background; waits for the save before.

        Args:
            tensors: file name without suffix -> name -> tensor.
            state: anything JSON can hold.
            wait: return only when it is on disk; UserError when it could not be written.
            milestone: keep this one for good.
        """
        for stem in tensors:
            if not _STEM.fullmatch(stem):
                raise ValueError(f'"{stem}" cannot be part of a file name')
        text = to_json(state)
        self.wait()
        self._staging.restart()  # the copies are ahead of the next optimiser step; this thread does not wait for them
        copies = {s: {name: self._copy(t) for name, t in group.items()} for s, group in tensors.items()}
        events = self._staging.events()
        # Not a daemon: a program that ends during a save ends after it.
        self._thread = threading.Thread(
            target=self._run, args=(step, copies, events, text, milestone), name="checkpoint writer"
        )
        self._thread.start()
        if wait:
            self.wait()
            if self._failure is not None:
                raise UserError(self._failure)

    def _copy(self, tensor: Tensor) -> Tensor:
        return self._staging.copy(tensor)

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, step: int, copies: dict, events: list, text: str, milestone: bool) -> None:
        self._failure = None
        try:
            for event in events:
                event.synchronize()
            self._write(step, copies, text, milestone)
        except BaseException as error:
            self._failure = f"The checkpoint of step {step} was not saved. {error} Older checkpoints are untouched."
            self.log(self._failure)
        else:
            self._prune()

    def _write(self, step: int, copies: dict[str, dict[str, Tensor]], text: str, milestone: bool) -> None:
        size = sum(t.nbytes for group in copies.values() for t in group.values())
        temporary = self._begin(step, size + len(text))
        try:
            self._finish(temporary, step, copies, text, milestone, {})
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _begin(self, step: int, size: int) -> Path:
        """An empty folder on a disk that has room for so many bytes."""
        temporary = self._leftover("tmp", step_name(step))
        with explain_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            require_space(self.folder, size)
            temporary.mkdir()
        return temporary

    def _finish(
        self,
        temporary: Path,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        text: str,
        milestone: bool,
        described: dict[str, dict],
    ) -> None:
        """Write what is missing, the manifest last, and publish it all.

        Args:
            described: entries of the manifest for files that are there already.
        """
        final = self.folder / step_name(step)
        for stem, group in tensors.items():
            with explain_os_errors(final / f"{stem}.safetensors"):
                write_tensors(temporary / f"{stem}.safetensors", group)
        with explain_os_errors(final):
            write_atomic(temporary / STATE, text)
            new = [file for file in sorted(temporary.iterdir()) if file.name not in described]
            files = describe(new, temporary) | described
            manifest = {"format": FORMAT, "step": step, "milestone": milestone, "piece": DIGEST_PIECE, "files": files}
            write_atomic(temporary / MANIFEST, to_json(manifest | {"sha256": _manifest_digest(manifest)}))
            self._publish(temporary, final)
        self._damaged.discard(final.name)

    def _publish(self, temporary: Path, final: Path) -> None:
        """Rename into place. A resumed run writes the same step again, bit for bit: then the old one makes room."""
        aside = self._leftover("old", final.name)
        shutil.rmtree(aside, ignore_errors=True)
        replaces = final.exists()
        if replaces:
            os.rename(final, aside)  # killed here, `_clean` puts it back
        try:
            os.rename(temporary, final)
        except BaseException:
            if replaces:
                os.rename(aside, final)
            raise
        fsync_folder(self.folder)
        self._point("latest", final.name)
        if replaces:
            shutil.rmtree(aside, ignore_errors=True)

    def _leftover(self, kind: str, name: str) -> Path:
        """What `_clean` recognises when this process is gone. kind "tmp": incomplete; "old": a whole checkpoint."""
        return self.folder / f".{kind}-{name}-{os.getpid()}"

    def _point(self, title: str, name: str) -> None:
        """`title` -> `name`, relative, so that a run folder can be moved. A convenience: nothing here reads it."""
        link = self.folder / title
        try:
            if link.is_symlink() and os.readlink(link) == name:
                return
            temporary = self._leftover("tmp", title)
            temporary.unlink(missing_ok=True)
            os.symlink(name, temporary)
            os.replace(temporary, link)
            fsync_folder(self.folder)
        except OSError as error:  # some file systems have no links
            self.log(f"{link} could not be set to {name} ({error.strerror}). Checkpoints are found without it.")

    # -- tidying ------------------------------------------------------------------------------------------------------
    def _clean(self) -> None:
        """Remove what dead writers left; put back a checkpoint that one had moved aside and not yet replaced."""
        if not self.folder.is_dir():
            return
        for entry in sorted(self.folder.iterdir()):
            match = _LEFTOVER.fullmatch(entry.name)
            # In a container the process before us may well have had our own number.
            if not match or (int(match[3]) != os.getpid() and lives(int(match[3]))):
                continue
            if match[1] == "old" and not (self.folder / match[2]).exists():
                with contextlib.suppress(OSError):  # another rank was faster
                    os.rename(entry, self.folder / match[2])
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Delete all but the newest `keep` sound checkpoints, the milestones and the best one."""
        kept, best = 0, self.best().get("step")
        for step in reversed(self.steps()):
            path = self.folder / step_name(step)
            sound = path.name not in self._damaged and not find_damage(path, contents=False)
            if kept < self.keep:
                kept += sound  # a damaged one this new stays for a person to look at
            elif step != best and not (sound and _read_manifest(path)["milestone"]):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint, or the link to one that was put elsewhere. It loses its name first, so that a reader never sees
        half of it."""
        doomed = self._leftover("tmp", path.name)
        try:
            os.rename(path, doomed)
            doomed.unlink() if doomed.is_symlink() else shutil.rmtree(doomed)
        except OSError as error:
            left = doomed if doomed.exists() else path
            self.log(f"{left} could not be deleted ({error.strerror}). Delete it by hand to free its space.")
