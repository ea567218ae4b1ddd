"""A token store for a config: encoded from its pictures or taken from files of other code bases, looked at, exported.

Making the store is core/chunks.py's work (data/cache.py): a killed job goes on, on any number of ranks. Whoever imports
tokens with the pictures at hand has them compared: the tokenizer must make the same codes of the same pictures.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from core import dist, launch
from core.config import override, read_overrides, smallest
from core.dist import World
from core.errors import UserError
from core.files import expanded, refuse_device, require_place
from core.images import grid, save_png, to_model_range, to_uint8, to_unit_range
from core.rng import hash64, permutation
from core.schema import RunConfig
from core.specs import Continuous, DataSource, Tokenizer
from core.train.checkpoint import Checkpoint
from core.train.log import progress_line
from core.weights.encoding import encoding_fingerprint
from core.weights.files import WeightFile
from data import pairing, tokens
from data.base import spread
from data.cache import Builder
from data.checks import require_labels, say_left_out
from data.loader import read_or_replace
from data.sources import exists
from data.token_files import TokenFiles, copy_to, export_jsonl, export_numbered, open_import
from data.tokens import TokenStore
from data.transforms import Transform
from evaluation.images import psnr
from run.data import compute_once, make_transform, open_pictures
from run.load import REGISTRIES, lay_out_tokenizer, load_config, read_tokenizer
from run.unseen import IMAGENET
from run.weights import Source, read_weights

SHOWN = 16  # pictures that are decoded for the preview
AGREEMENT = 0.95  # share of imported codes that the tokenizer must make again
FORMS = ("official", "jsonl")


@dataclass(frozen=True)
class Request:
    """What to make beside what the config says.

    Args:
        out: folder of the store; None: see `folder`.
        foreign: file or folder of another code base to take tokens from; None: encode the pictures.
        classes: of imported tokens when there are no pictures.
        to: (one of FORMS, path) to export the store to.
        batch: crops per forward pass of the tokenizer.
        precision: of the tokenizer, "fp32" or "bf16".
        verify: also read the whole store and compare its digests.
    """

    out: str | None = None
    foreign: str | None = None
    classes: int = 1000
    to: Sequence[str] | None = None
    batch: int = 256
    precision: str = "fp32"
    verify: bool = False

    def folder(self, config: RunConfig) -> Path:
        """Where the store goes."""
        if self.out:
            return expanded(self.out)
        if config.data.url.startswith("tokens://"):
            return expanded(config.data.url.removeprefix("tokens://"))
        return Path(config.work_dir) / "tokens" / config.name


def config_of(named: str, overrides: list[str]) -> RunConfig:
    """The config of a file, or the one that weights stand for: that of a run, or a tokenizer with the pictures of its training.

    Args:
        named: a config, or what `run.load.Source` takes.
    """
    if named.endswith((".yaml", ".yml")) or Path(f"{named}.yaml").is_file():
        return load_config(named, overrides)
    source = Source(named, "tokenizer")
    if isinstance(source.content, Checkpoint):
        trained: dict[str, Any] = copy.deepcopy(source.content.state["config"])
        config = override(lambda: trained, overrides, REGISTRIES, source=named)
        if source.content.state["primary"] == "tokenizer":
            config.tokenizer = {**config.tokenizer, "weights": named}
        return config
    settings = read_weights("tokenizer", source, read_overrides(overrides).get("tokenizer")).settings
    path = Path(named.rstrip("/"))
    pictures = (source.content.about if isinstance(source.content, WeightFile) else {}).get("config", {}).get("data")
    name = path.parent.name if path.stem == "tokenizer" else path.stem
    untrained = smallest(name, settings, pictures or {"url": f"{IMAGENET}/train"})
    config = override(lambda: untrained, overrides, REGISTRIES, source=named)
    config.tokenizer = {**config.tokenizer, "weights": named}
    if not any(word.startswith("data.url=") for word in overrides):
        whose = f", which {named} was trained on" if pictures else ""
        launch.say(f"no pictures were named: taking {config.data.url}{whose}")
    return config


def check(config: RunConfig, request: Request) -> DataSource | None:
    """Find mistakes without loading a network. Returns the pictures; None where tokens come without them."""
    if request.batch < 1 or request.classes < 1:
        raise UserError(f"--batch {request.batch} and --classes {request.classes}: give at least 1.")
    if request.to and request.to[0] not in FORMS:
        raise UserError(f'--to {request.to[0]}: write "--to official DIR" or "--to jsonl FILE".')
    if not config.tokenizer.get("weights") and config.task == "tokenizer" and (config.run_dir / "checkpoints").is_dir():
        config.tokenizer = {**config.tokenizer, "weights": str(config.run_dir)}  # what this config has trained
    if not config.tokenizer.get("weights"):
        trained = f" {config.run_dir}, which this config trains, is not there." if config.task == "tokenizer" else ""
        raise UserError(f"tokenizer.weights is not set, and tokens of an untrained tokenizer are useless.{trained}")
    lay_out_tokenizer(config.tokenizer)
    require_place(request.folder(config))
    dist.pick_device(config.train.device)
    if request.foreign:
        refuse_device(place := expanded(request.foreign))
        if not place.exists():
            raise UserError(f"--import {request.foreign}: no such file or folder. Check the spelling of the path.")
    pictures = None
    if request.foreign and not config.data.pictures and not exists(config.data.url):
        print(f"data.url={config.data.url} is not here: the tokens are taken without their pictures")
    else:
        pictures = open_pictures(config)
    if pictures is not None:
        require_labels(pictures)
    if not request.foreign and pictures is None and not request.folder(config).exists():
        raise UserError(f"data.url={config.data.url} is where the tokens go; set data.pictures to the pictures.")
    return pictures


def pretokenize(config: RunConfig, request: Request, pictures: DataSource | None) -> int:
    """Make, check, show and export one store. Returns the exit code."""
    with dist.start(config.train.device, config.train.rank_timeout) as world:
        tokenizer = read_tokenizer(config.tokenizer, world=world)
        module = cast(Tokenizer, tokenizer.module.to(world.device))
        job = Pretokenizing(
            config, request, pictures, world, module, tokenizer.fingerprint, encoding_fingerprint(module)
        )
        job.make()
        store = job.open()
        if world.is_main:
            job.show(store)
        if request.to:
            job.export(store, *request.to)
        world.barrier()
    return 0


@dataclass
class Pretokenizing:
    """One job on one rank; `tokenizer` is on the rank's device, `fingerprint` is that of its weights, `encoding` that of
    those which encode."""

    config: RunConfig
    request: Request
    pictures: DataSource | None
    world: World
    tokenizer: Tokenizer
    fingerprint: str
    encoding: str

    def __post_init__(self) -> None:
        self.folder = self.request.folder(self.config)

    def make(self) -> None:
        """The store, unless it is there. Collective; raises Stopped when a signal asks for it."""
        if self.world.on_main(self.folder.exists):
            self.world.on_main(self._refuse_other_pictures)
            return
        transform = make_transform(self.config, self.tokenizer.image_size)
        if self.request.foreign:
            self._convert(expanded(self.request.foreign), transform)
        elif self.pictures is not None:
            self._encode(self.pictures, transform)

    def _refuse_other_pictures(self) -> None:
        """UserError where a store is there and its tokens are not those that are asked for."""
        if self.pictures is None or self.request.foreign or self.request.to:
            return
        store, asked = TokenStore(self.folder), make_transform(self.config, self.tokenizer.image_size)
        if not store.is_of(self.pictures):
            url = self.config.data.pictures or self.config.data.url
            other = f"pictures than {url}"
        elif store.transform.describe() != asked.describe():
            other = f"crops ({store.transform.describe()}) than these ({asked.describe()})"
        else:
            return
        raise UserError(f"{self.folder} holds tokens of other {other}. Choose another --out, or delete that folder.")

    def _encode(self, pictures: DataSource, transform: Transform) -> None:
        """Tokens of the pictures."""
        transform.view_of((0, 0))  # refuses crops without views
        size = f"{len(pictures):,} pictures x {transform.views} views"
        self.world.say(f"tokens of {size} ({transform.crop}) -> {self.folder}")
        say_left_out(self.world.say, pictures, self.config.data.pictures or self.config.data.url)

        def encode(images: Tensor) -> Tensor:
            return self.tokenizer.precompute(to_model_range(images.to(self.world.device)))

        spec, batch = self.tokenizer.spec, max(1, self.request.batch // (transform.views or 1))
        build = functools.partial(
            tokens.build, self.folder, pictures, transform, spec, encode, self.fingerprint, encoding=self.encoding
        )
        network, precision = self.tokenizer, self.request.precision
        compute_once(self.config, "tokens", network, self.world, build, precision, batch)

    def _convert(self, path: Path, transform: Transform) -> None:
        """Tokens from files of another code base; with the pictures at hand each entry is given to its own."""
        spec, pictures = self.tokenizer.spec, self.pictures
        if isinstance(spec, Continuous):
            raise UserError(f"--import reads codes; this tokenizer makes {spec}.")
        size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.glob("*.jsonl")))
        with progress_line(self.world, size, "counting lines", "B") as counted:
            files = open_import(path, spec, transform.views or 1, counted)
        places = labels = None
        if pictures is None:
            count, names = files.samples, [str(i) for i in range(self.request.classes)]
            source = f"{hash64('imported', path.name, count, files.views, size):016x}"
            shown = f"{count:,} pictures x {files.views} views"
            self.world.say(f"no pictures are given: {path} is taken as {shown}, without a comparison")
        else:
            pairing.check_count(path, files.samples, files.views, len(pictures))
            order = self.world.on_main(lambda: self._find_order(files, path, pictures, transform))
            places = order.places(pictures, files.samples)
            count, names, source = len(pictures), pictures.class_names, pictures.fingerprint()
            labels = pictures.labels if pictures.num_classes > 1 else None
        plan = tokens.plan(count, files.views, source, transform, spec, self.fingerprint, names, encoding=self.encoding)
        with progress_line(self.world, count, "import") as shown:
            report = shown and (lambda done, total: shown(done))
            copy_to(files, Builder(self.folder, plan, self.world), places, labels, report)

    def _find_order(self, files: TokenFiles, path: Path, pictures: DataSource, transform: Transform) -> pairing.Order:
        """In which a token file lists the pictures: the known order that the tokenizer agrees with best.

        UserError below AGREEMENT, for then none of the known orders is the right one.
        """
        # drawn, not evenly spaced: multiples of a number of ranks would lie alike in many orders
        chosen = permutation(len(pictures), "pairing")[:SHOWN].tolist()
        views = [i % files.views for i in range(len(chosen))]
        again = self._codes_of(crops(pictures, transform, list(zip(chosen, views))))

        @functools.cache
        def share(row: int, place: int) -> float:
            return agreement([files.row(place)[0][views[row]]], again[row : row + 1])

        best, order, tried = pairing.best_order(pictures, files.samples, chosen, share)
        if order is None or best < AGREEMENT:
            raise UserError(
                f"{path}: the tokenizer reproduces only {best:.1%} of the codes in the best of {tried} "
                f"known orders of lines ({order or 'none came above 50 %'}). They are of another tokenizer, of "
                "other pictures, or of another crop (data.crop)."
            )
        agreed = f"the tokenizer makes {best:.1%} of the codes of {len(chosen)} of them"
        self.world.say(f"{path} lists the pictures in {order}: {agreed}")
        return order

    def open(self) -> TokenStore:
        """The finished store, checked against the tokenizer."""
        store = TokenStore(self.folder)
        store.check_tokenizer(self.tokenizer.spec, self.fingerprint, self.tokenizer.image_size, self.encoding)
        if self.request.verify and self.world.is_main:
            store.verify()
        pictures = self.pictures
        if pictures is not None and not self.world.on_main(lambda: store.is_of(pictures)):
            self.world.say(
                f"warning: {self.folder} was there and is of other pictures than {self.config.data.pictures or self.config.data.url} "
                "holds now; delete it, or choose another --out, to make their tokens"
            )
        self.world.say(
            f"{self.folder}: {len(store):,} pictures x {store.views} views, {store.spec}, tokenizer "
            f"{self.fingerprint}, content {store.content}" + (", read and found whole" if self.request.verify else "")
        )
        return store

    def export(self, store: TokenStore, form: str, path: str) -> None:
        """Write the store as one of FORMS."""
        if isinstance(store.spec, Continuous):
            raise UserError(f"--to {form} writes codes; {store.path} holds {store.spec}.")
        with progress_line(self.world, len(store), f"write {form}") as report:
            if form == "official":
                export_numbered(store, path, self.world, report)
            elif self.world.is_main:
                export_jsonl(store, path, report)
        self.world.say(f"written to {path}")

    # -- looking at it ------------------------------------------------------------------------------------------------
    def show(self, store: TokenStore) -> None:
        """Decode some tokens into preview.png, below the crops they came from where those are at hand."""
        chosen = [(index, i % store.views) for i, index in enumerate(spread(len(store), SHOWN))]
        with torch.no_grad():
            stored = store.tokens(*zip(*chosen)).to(self.world.device)
            decoded = self.tokenizer.decode(self.tokenizer.from_stored(stored)).float().cpu()
        shown, text = to_uint8(decoded, "nearest"), "decoded"
        if self.pictures is not None and store.is_of(self.pictures):
            images = crops(self.pictures, store.transform, chosen)
            rows = [store.rows(tokens.array_of(store.spec))[index, view] for index, view in chosen]
            share = agreement(rows, self._codes_of(images))
            quality = psnr(images / 255, to_unit_range(decoded, clamp=True)).mean()
            text = f"PSNR {quality:.2f} dB, {share:.1%} of the tokens made again; pictures above, decoded below"
            shown = torch.cat([torch.cat(pair) for pair in zip(images.split(8), shown.split(8))])
        save_png(grid(shown, columns=8), store.path / "preview.png")
        self.world.say(f"{len(chosen)} pictures in {store.path / 'preview.png'}: {text}")

    @torch.no_grad()
    def _codes_of(self, images: Tensor) -> Tensor:
        """(B, ...) what the tokenizer makes of crops, on the CPU."""
        return self.tokenizer.precompute(to_model_range(images.to(self.world.device))).cpu()


def crops(pictures: DataSource, transform: Transform, chosen: list[tuple[int, int]]) -> Tensor:
    """(B, 3, H, W) uint8 of (index, view) pairs."""
    samples = [read_or_replace(pictures, index, "replace")[0] for index, _ in chosen]
    return torch.stack([transform.apply_view(s.image, view) for s, (_, view) in zip(samples, chosen)])


def agreement(rows: list[np.ndarray], again: Tensor) -> float:
    """Share of stored values that are as the tokenizer makes them again; real vectors to within 1 %."""
    stored = torch.stack([torch.tensor(row.astype("int64") if row.dtype.kind in "iu" else row) for row in rows])
    if again.is_floating_point():
        return float(torch.isclose(stored.float(), again.float(), rtol=1e-2, atol=1e-2).double().mean())
    return float((stored == again).double().mean())
