"""From a reference that a user types to a file on this machine, and from a file to tensors.

    hf://owner/repo/folder/file.pt     a file of a Hugging Face repository; hf://owner/repo@revision/... of one revision;
                                       hf://owner/repo its only file of weights, or tokenizer.safetensors where one is asked for
    https://host/file.safetensors      any file on the web
    name.safetensors                   a file in pretrained_models/
    path/to/file, work_dirs/my_run     a file, or the newest good checkpoint of a run
    path/to/checkpoint-5000            a folder of accelerate, save_pretrained or FSDP: the weight file in it, see FOLDERS

Downloads are kept under pretrained_models/ in readable places, so that a machine without network can be fed by hand;
what other programs have left in the hub's own cache is used from there.
Loading never runs code from a file. Which keys a file holds is the business of the adapters.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import launch
from core.errors import UserError, brief, nearest
from core.files import expanded, explain_os_errors, read_json, refuse_device, refuse_text, replacing, require_space
from core.train.checkpoint import MANIFEST, CheckpointStore, find_damage, read_tensors
from core.weights import exports, released
from core.weights.pickles import load_pickle
from core.weights.released import hub_cache_folder, in_hub_cache, put

CACHE = Path("pretrained_models")  # where downloads go and bare names are looked up
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")  # how files of weights end
_PIECE = 1 << 20
_PATIENCE = 15  # seconds without any answer

# Which file stands for a folder of another program's: the first of these that is there. Averaged weights come before raw
# ones, as everywhere; a finished model before the checkpoints on the way to it; safetensors before pickles of the same.
FOLDERS = {  # name -> why, for the line that says so
    "ema_model": "averaged weights before raw ones",
    "unwrapped_model": "the bare model before the wrapped one",  # accelerate
    **dict.fromkeys(
        (
            "model.safetensors",
            "diffusion_pytorch_model.safetensors",
            "pytorch_model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "diffusion_pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "consolidated.pth",
        ),
        "the name that stands for the whole model",
    ),
}
_STATE_OF_TRAINING = re.compile(  # how files begin that hold anything but weights
    r"(optim|sched|sampler|scaler|random_states|rng_state|training_args|dl_state|grad)", re.IGNORECASE
)


def is_offline() -> bool:
    """Whether the environment forbids downloads (TESSERA_OFFLINE=1 or HF_HUB_OFFLINE=1)."""
    values = (os.environ.get(variable, "") for variable in ("TESSERA_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.lower() in ("1", "true", "yes", "on") for value in values)


def resolve(reference: str, to: Path | None = None, kind: str | None = None) -> Path:
    """The file (or checkpoint folder) that `reference` stands for, downloaded first if need be.

    Args:
        reference: one of the forms in this file's docstring.
        to: where a download goes instead of pretrained_models/.
        kind: "tokenizer" or "generator", where it decides between the files of a folder or a repository.
    """
    scheme, separator, rest = reference.partition("://")
    if not separator:
        path = _local(reference)
        return _newest_checkpoint(path, kind) if path.is_dir() else path
    if scheme == "hf":
        return _from_hugging_face(reference, rest, to, kind)
    if scheme == "https":
        return _from_web(reference, to)
    if scheme == "http":
        raise UserError(f"{reference}: http:// can be altered on the way. Use https://.")
    raise UserError(f'"{reference}": unknown kind of address "{scheme}://". Known: hf://, https:// and file paths.')


# ---------------------------------------------------------------------------------------------------------------------
# Files that are here
# ---------------------------------------------------------------------------------------------------------------------
def _local(reference: str) -> Path:
    path = expanded(reference)
    if path.exists():
        refuse_device(path)
        return path
    for cache in () if path.is_absolute() else (CACHE, released.ROOT / CACHE):
        if (cache / path).exists():
            return cache / path
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if path.name == reference:
        raise UserError(f'"{reference}" is neither here nor in {CACHE}/.{_near(reference, CACHE, folder)}')
    beside = [cache / path.parent for cache in (CACHE, released.ROOT / CACHE) if (cache / path.parent).is_dir()]
    if folder == path.parent or beside:  # tiny/rectk is looked for in pretrained_models/, too
        hint = _near(path.name, path.parent, *beside)
    else:
        hint = f" The last folder that exists is {folder.resolve()}."
    raise UserError(f"{path}: no such file or folder.{hint}")


def _near(name: str, *folders: Path) -> str:
    """What `name` may mean: files of weights, and folders where it is not itself called like a file."""
    entries = [e for folder in folders if folder.is_dir() for e in folder.iterdir() if not e.name.startswith(".")]
    is_file = Path(name).suffix in WEIGHTS
    return nearest(name, {e.name for e in entries if e.suffix in WEIGHTS or (e.is_dir() and not is_file)})


def _newest_checkpoint(path: Path, kind: str | None) -> Path:
    if (path / MANIFEST).exists():
        problems = find_damage(path)
        if problems:
            raise UserError(f"{path} is a damaged checkpoint. {' '.join(problems)} Use another checkpoint of the run.")
        return path.resolve() if path.is_symlink() else path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint = CheckpointStore(folder).latest(clean=False)  # the run may be alive: only look
    if checkpoint is not None:
        return checkpoint.path
    if kind and (path / f"{kind}.safetensors").is_file():
        return path / f"{kind}.safetensors"
    if weights := _first_weights(path):
        return _taken(path, *weights)
    raise UserError(f"{path} is a folder without checkpoints{_instead(path)}")


def _first_weights(folder: Path) -> tuple[Path, str] | None:
    """(weight file that stands for a folder which another program wrote, why this one); None where no rule names one."""
    for name, why in FOLDERS.items():
        place = folder / name
        if place.is_dir() and (inside := _first_weights(place)):
            return inside[0], why
        if place.is_file():
            return place, why
    files = [
        f
        for f in sorted(folder.iterdir())
        if f.suffix in WEIGHTS and f.is_file() and not _STATE_OF_TRAINING.match(f.name)
    ]
    if len(files) == 1:
        return files[0], "the only file of weights in it"
    numbered = [(int(match[1]), f) for f in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", f.name))]
    for _, place in sorted(numbered, reverse=True) if not files else ():
        if place.is_dir() and (inside := _first_weights(place)):
            return inside[0], f"of the last checkpoint; {inside[1]}"
    return None


@functools.cache  # one line, however often a program asks
def _taken(folder: Path, file: Path, why: str) -> Path:
    if launch.speaks():
        print(f"{folder}: taking {file.relative_to(folder)} ({why})", file=sys.stderr, flush=True)
    return file


def _instead(folder: Path) -> str:
    """What could be named in place of a folder: files in it, else files or runs below it."""
    entries = sorted(e for e in folder.iterdir() if not e.name.startswith("."))
    if not entries:
        return ": it is empty. Name a run, a checkpoint or a file of weights."
    files = [e for e in entries if e.is_file()]
    inside = files or [d for d in entries if d.is_dir() and ((d / "checkpoints").is_dir() or (d / MANIFEST).exists())]
    inside = inside or sorted(f for f in folder.rglob("*") if f.suffix in WEIGHTS and f.is_file())
    if not inside:
        held = ", ".join(e.name for e in entries[:10])
        return f" or files of weights; it holds {held}. Name a run or a file of weights."
    names = ", ".join(e.relative_to(folder).as_posix() for e in inside[:10]) + (", ..." if len(inside) > 10 else "")
    return f"; name one {'file' if inside[0].is_file() else 'run'} in it: {names}."


# ---------------------------------------------------------------------------------------------------------------------
# Files that are elsewhere
# ---------------------------------------------------------------------------------------------------------------------
def _require_online(reference: str, url: str, target: Path) -> None:
    if is_offline():
        raise UserError(
            f"{reference} is not on this machine and downloads are switched off (TESSERA_OFFLINE or HF_HUB_OFFLINE). "
            f"On a machine with network, download {url} and copy it to {target}."
        )


def _from_hugging_face(reference: str, rest: str, to: Path | None, kind: str | None) -> Path:
    parts = rest.split("/")
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        raise UserError(f'"{reference}" should read hf://owner/repository/path/of/file.')
    owner, (name, _, revision), filename = parts[0], parts[1].partition("@"), "/".join(parts[2:])
    repository, revision = f"{owner}/{name}", revision or "main"
    folder = CACHE / owner / parts[1]
    filename = filename or _weights_in(reference, repository, revision, folder, kind)
    target = to or folder / filename
    if target.exists():
        return target
    cached = in_hub_cache(repository, filename, revision)
    if cached and to is None:
        return cached
    if cached:
        put(cached, target)
    else:
        _ask_hugging_face(reference, repository, revision, filename, folder, target)
    return target


def _weights_in(reference: str, repository: str, revision: str, folder: Path, kind: str | None) -> str:
    """The one file of a repository that an address without a file means; UserError that lists them where it is open."""
    if is_offline():
        cached = hub_cache_folder(repository, revision)
        places = [place for place in (folder, cached) if place and place.is_dir()]
        names = [f.relative_to(p).as_posix() for p in places for f in p.rglob("*") if f.is_file()]
    else:
        from huggingface_hub import HfApi

        try:
            names = HfApi(endpoint=_endpoint()).list_repo_files(repository, revision=revision)
        except Exception as error:  # any of the library's, of its HTTP client's or of the network
            reason = _reason(error, repository, revision)
            raise UserError(f"{reference}: its files could not be listed: {reason}.") from error
    weights = sorted({name for name in names if name.endswith(WEIGHTS) and not name.startswith(".cache/")})
    if kind and f"{kind}.safetensors" in weights:
        return f"{kind}.safetensors"
    if len(weights) == 1:
        return weights[0]
    if not weights:
        where = "on this machine, and downloads are switched off" if is_offline() else "in it"
        raise UserError(f"{reference}: there is no file of weights {where}.")
    listed = "\n".join(f"  hf://{repository}{'' if revision == 'main' else '@' + revision}/{name}" for name in weights)
    raise UserError(f"{reference} holds {len(weights)} files of weights; name one:\n{listed}")


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def commit_of(path: Path) -> str | None:
    """The commit of the repository that a downloaded file is from; None for other files."""
    parts = path.absolute().parts
    if "snapshots" in parts[:-1]:
        return parts[parts.index("snapshots") + 1]
    for folder in path.absolute().parents:
        note = folder / ".cache" / "huggingface" / "download" / f"{path.absolute().relative_to(folder)}.metadata"
        if note.is_file():
            return note.read_text().split("\n")[0].strip() or None
    return None


def _ask_hugging_face(
    reference: str, repository: str, revision: str, filename: str, folder: Path, target: Path
) -> None:
    """Download into `target` through `folder`; UserError in one sentence, at once, where that cannot be."""
    endpoint = _endpoint()
    url = f"{endpoint}/{repository}/resolve/{revision}/{filename}"
    _require_online(reference, url, target)
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{reference} needs a library: pip install huggingface_hub") from error
    try:
        # Asked first, because the download itself tries again and again where there is no network.
        huggingface_hub.get_hf_file_metadata(url, timeout=_PATIENCE)
        with explain_os_errors(target):
            huggingface_hub.hf_hub_download(
                repository, filename, revision=revision, local_dir=folder, endpoint=endpoint
            )
    except UserError:
        raise
    except Exception as error:  # any of the library's, of its HTTP client's or of the network
        hint = _near_remote(repository, revision, filename, endpoint) if _status(error)[1] == "EntryNotFound" else ""
        reason = _reason(error, repository, revision, filename)
        raise UserError(
            f"{reference} could not be downloaded: {reason}{hint or ','} or download {url} by hand and copy it "
            f"to {target}."
        ) from error
    if launch.speaks() and (commit := commit_of(folder / filename)):
        print(f"{reference}: of commit {commit}", file=sys.stderr, flush=True)
    if target != folder / filename:
        put(folder / filename, target)


def _status(error: BaseException) -> tuple[int | None, str]:
    """(HTTP status, the hub's own word for it) behind an error; (None, "") where there was no answer."""
    response = getattr(error, "response", None)
    code = getattr(error, "code", None) if response is None else response.status_code
    headers = getattr(response, "headers", None) or {}
    return (code if isinstance(code, int) else None), headers.get("X-Error-Code", "")


def _reason(error: BaseException, repository: str = "", revision: str = "", filename: str = "") -> str:
    """Why a download failed and what helps, as a sentence without its full stop."""
    code, word = _status(error)
    page = f"https://huggingface.co/{repository}"
    if word == "GatedRepo":
        return (
            f"its licence must be accepted first ({code}): log in at {page} and accept it, then run `hf auth login` "
            "(or set HF_TOKEN) and the same command again"
        )
    if word == "EntryNotFound":
        return f"{repository} has no file {filename}"
    if word == "RevisionNotFound":
        return f"{repository} has no revision {revision}"
    if code in (401, 403) and repository:
        return (
            f"there is no public repository {repository}, or it does not let you in ({code}): check the name, log in "
            f"with `hf auth login` and, where {page} shows a licence, accept it"
        )
    if code == 404:
        return f"there is no such {'repository' if repository else 'file'} (404): check the address"
    if code == 429:
        return "too many requests came from here (429): log in with `hf auth login`, or wait a while"
    if code is not None:
        return f"the server answered {code}: try again later"
    return f"no answer, is there a network? ({brief(error)}) Check it"


def _near_remote(repository: str, revision: str, filename: str, endpoint: str) -> str:
    """A hint from the repository's list of files; empty when that cannot be had, for the hint is not the point."""
    from huggingface_hub import HfApi

    try:
        files = HfApi(endpoint=endpoint).list_repo_files(repository, revision=revision)
        return f".{nearest(filename, files)} Take that,"
    except Exception:
        return ""


def _from_web(url: str, to: Path | None = None) -> Path:
    parsed = urllib.parse.urlparse(url)
    parts = [parsed.netloc, *urllib.parse.unquote(parsed.path).strip("/").split("/")]
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        raise UserError(f'"{url}" does not name a file.')
    target = to or CACHE.joinpath(*parts)
    if not target.exists():
        _require_online(url, url, target)
        _download(url, target)
    return target


def _download(url: str, target: Path) -> None:
    """Stream `url` into `target`, which appears only when it is whole."""
    received = 0
    with replacing(target) as part:
        try:
            # An URLError is an OSError too: only what happens to our file is explained as such.
            with urllib.request.urlopen(url, timeout=_PATIENCE) as response, open(part, "wb") as file:
                expected = response.headers.get("Content-Length")
                require_space(target.parent, int(expected or 0))
                while piece := response.read(_PIECE):
                    with explain_os_errors(target):
                        file.write(piece)
                    received += len(piece)
        except OSError as error:
            raise UserError(
                f"{url} could not be downloaded: {_reason(error)}, or download it by hand and copy it to {target}."
            ) from error
        if expected is not None and received != int(expected):
            raise UserError(f"{url}: the connection broke after {received} of {expected} bytes. Try again.")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors of a file
# ---------------------------------------------------------------------------------------------------------------------
def load_tensors(path: str | os.PathLike) -> dict[str, Any]:
    """The contents of a weight file, mapped from disk: name -> tensor, or nested as a .pt file has it.

    .safetensors by its suffix, everything else as torch.save writes it. No code of a file is ever run: objects beside
    the tensors are `core.weights.pickles.Inert`. The config.json of save_pretrained beside a file comes along as "config".
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one weight file in it.")
    if path.name.endswith(".index.json"):
        loaded = _shards(path)
    elif path.suffix == ".safetensors":
        refuse_text(path)
        loaded = {**read_tensors(path), **exports.in_header(path)}
    else:
        loaded = load_pickle(path)
    settings = path.with_name("config.json")
    if path.name in FOLDERS and settings.is_file() and "config" not in loaded:
        config = read_json(settings)
        loaded = {**loaded, "config": config} if isinstance(config, dict) else loaded
    return loaded


def _shards(index: Path) -> dict[str, Any]:
    """All tensors of the files that an index of the transformers library names."""
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise UserError(f"{index}: not an index of weight files; it should hold a table weight_map.")
    missing = sorted({n for n in names.values() if not index.with_name(n).is_file()})
    if missing:
        raise UserError(f"{index}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing beside it.")
    loaded: dict[str, Any] = {}
    for name in sorted(set(names.values())):
        loaded |= load_tensors(index.with_name(name))
    if lost := [name for name in names if name not in loaded]:
        raise UserError(f"{index}: {len(lost)} tensors are in none of its files: {', '.join(lost[:5])}.")
    return loaded


def fingerprint(state: dict[str, Tensor]) -> str:
    """Sixteen hex digits of names, dtypes, shapes and bytes; the order of the names does not matter."""
    digest = hashlib.sha256()
    for name in sorted(state):
        t = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\x1f{t.dtype}\x1f{list(t.shape)}\x1e".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
