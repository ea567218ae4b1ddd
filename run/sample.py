"""The sampling program: folders of pictures that depend on (seed, label, index) and the settings alone.

The same request with a larger `num`, or after a kill, adds what is missing; a folder with pictures of other settings is
refused. Finding and loading what is sampled from is run/target.py.
"""

from __future__ import annotations

import inspect
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from core.chunks import Chunks, enter, require_same_job
from core.dist import World
from core.errors import UserError, nearest
from core.files import explain_os_errors
from core.images import finite_uint8, grid, save_png, to_model_range
from core.lock import locked
from core.nn.precision import bf16_products
from core.rng import Draws, hash64
from core.train.log import progress_line
from core.weights import hub
from data.transforms import center_crop, to_tensor
from evaluation.pictures import NpzPictures, NpzWriter, pieces
from run import streaming
from run.reconstruct import read_files
from run.sharing import in_words
from run.target import Sampler, Target, lay_out, open_generator

SHOWN = 64  # pictures in grid.png
COLUMNS = 16  # of grid.png at most, one per label
STRIPS = 8  # pictures in stages.png
ANIMATIONS = {None: (), "webp": (".webp",), "gif": (".webp", ".gif")}  # what --preview writes
AT_LEAST = 16  # pictures without --num
READ = 64  # pictures that are read back at a time
MANIFEST = "sample.json"


@dataclass
class Request:
    """What to draw; the options of scripts/sample.py.

    Attributes:
        labels: "207, 10-19, tree frog".
        num: pictures in all; None: at least AT_LEAST, as many of each label.
        batch: pictures at once per GPU.
        npz: also one .npz with arr_0, as ADM's evaluator reads it.
        preview: a key of ANIMATIONS; None: no stages.
        layout: a picture; all begin with the codes of its first `layout_groups` stages.
    """

    labels: str
    out: str
    num: int | None = None
    batch: int = 32
    npz: str | None = None
    preview: str | None = None
    layout: str | None = None
    layout_groups: int = 1

    def check(self) -> None:
        if (self.num is not None and self.num < 1) or self.batch < 1:
            raise UserError(f"--num {self.num} and --batch {self.batch}: give 1 or more")
        if self.npz and not self.npz.endswith(".npz"):
            raise UserError(f"--npz {self.npz}: choose a name that ends in .npz")


def check(target: Target, request: Request) -> None:
    """UserError for what `sample` would refuse, without loading weights."""
    sampler = lay_out(target)
    parse_labels(request.labels, sampler.num_classes, sampler.class_names)
    if request.preview:
        streaming.check(sampler.generator, sampler.tokenizer)
    check_alike(sampler, request)
    if request.layout is not None:
        list(read_files([request.layout]))


def sample(target: Target, request: Request, world: World) -> None:
    """Load, draw, make the grid. Collective."""
    sampler = open_generator(target, world)
    config = sampler.config
    labels = parse_labels(request.labels, sampler.num_classes, sampler.class_names)
    if request.preview:
        streaming.check(sampler.generator, sampler.tokenizer)
    count = request.num or len(labels) * max(1, -(-AT_LEAST // len(labels)))
    folder = SampleFolder(Path(request.out), labels, count, ANIMATIONS[request.preview])
    facts = {
        **sampler.facts,
        **{f"sample.{key}": value for key, value in config.sample.facts().items() if key != "guide"},
        **begin_alike(sampler, request, labels[0], world.device),
        "seed": config.seed,
        "labels": labels,
        "precision": config.train.precision,
    }
    with locked(folder.path, world):
        require_same_job(world, facts)
        world.on_main(lambda: folder.claim(facts))
        sampler.prepare(count // (request.batch * world.size), world.device)
        new = folder.draw(sampler, request.batch, world)
        if world.is_main:
            _finish(folder, request, sampler.image_size, new)


def _finish(folder: SampleFolder, request: Request, size: int, new: int) -> None:
    """The grid, and what else was asked for, of pictures that are all there."""
    print(f"{folder.count} pictures in {folder.path} ({new} new on this rank); look at {folder.write_grid()}")
    if request.preview:
        print(f"how they came about: {folder.write_stages()}")
    if request.npz:
        folder.write_npz(Path(request.npz), size)
        print(f"written to {request.npz}")


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------
def parse_labels(text: str, num_classes: int, names: list[str], said: str = "--labels") -> list[int]:
    """Class numbers of "207, 10-19, tree frog"; UserError for one that does not exist. `said`: where they were named."""
    by_name: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        by_name.setdefault(_plain(name), []).append(i)
    parts: dict[str, list[int]] = {}  # "tench" of "tench, Tinca tinca", unless a class is called so alone
    for i, name in enumerate(names):
        for part in dict.fromkeys(_plain(name).split(", ")) if "," in name else ():
            parts.setdefault(part, []).append(i)
    by_name = {**parts, **by_name}
    labels: list[int] = []
    for word in _words(text, set(by_name)):
        numbers = re.fullmatch(r"([0-9]+)(?:\s*(?:-|\.\.)\s*([0-9]+))?", word)
        called = by_name.get(_plain(word)) or by_name.get(_plain(in_words(word)), [])
        if numbers is None and len(called) > 1:  # ImageNet has two cranes
            raise UserError(
                f'{said}: "{word}" is the name of classes {" and ".join(map(str, called))}; give the number.'
            )
        if numbers is None and called:
            labels += called
            continue
        if numbers is None:
            hint = nearest(word, names) if names else " Names need data.url of the pictures it was trained on."
            raise UserError(
                f'{said}: "{word}" is neither a class number, a range such as 10-19 nor a class name.{hint}'
            )
        first, last = (
            int(number) if len(number) < 19 else num_classes for number in (numbers[1], numbers[2] or numbers[1])
        )
        if last < first or last >= num_classes:
            raise UserError(
                f"{said} {word}: the generator knows classes 0 to {num_classes - 1}, the smaller number first."
            )
        labels += range(first, last + 1)
        if called and called != [first]:  # folders 0 ... 11 are sorted as words: 0, 1, 10, 11, 2
            print(
                f"{said} {word}: class number {first}, called {names[first]}; the class that is called {word} has "
                f"number {called[0]}"
            )
    return labels


def _plain(name: str) -> str:
    """A class name however it is spaced and whatever its capitals."""
    return ", ".join(part.strip() for part in name.split(",")).casefold()


def _words(text: str, names: set[str]) -> list[str]:
    """`text` at its commas, but those inside a class name ("tench, Tinca tinca"): the longest name counts."""
    parts, words = [part.strip() for part in text.split(",")], []
    longest = max((name.count(",") for name in names), default=0) + 1
    while parts:
        lengths = range(min(longest, len(parts)), 1, -1)
        length = next((n for n in lengths if _plain(",".join(parts[:n])) in names), 1)
        words.append(", ".join(parts[:length]))
        parts = parts[length:]
    return words


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class SampleFolder:
    """Pictures 0 ... count - 1 as <index>_<label>.png; picture i shows label i modulo their number.

    Args:
        animations: suffixes of those beside each picture, with a filmstrip of its stages; () for neither.
    """

    path: Path
    labels: list[int]
    count: int
    animations: tuple[str, ...] = ()

    def label(self, i: int) -> int:
        return self.labels[i % len(self.labels)]

    def picture(self, i: int) -> Path:
        return self.path / f"{i:06d}_{self.label(i)}.png"

    def filmstrip(self, i: int) -> Path:
        return self.path / f"{self.picture(i).stem}_stages.png"

    def is_whole(self, i: int) -> bool:
        """Whether the picture is there, with its previews if there shall be any."""
        files = [self.picture(i)]
        if self.animations:
            files += [self.filmstrip(i), *(self.picture(i).with_suffix(suffix) for suffix in self.animations)]
        return all(file.is_file() for file in files)

    def claim(self, facts: dict[str, Any]) -> None:
        """Note the settings in the folder, or check that its pictures were made with these."""
        if not (self.path / MANIFEST).is_file() and any(self.path.glob("[0-9]*.png")):
            raise UserError(f"{self.path} holds pictures of unknown settings. Choose another --out.")
        enter(self.path / MANIFEST, facts, "pictures of other settings", "Choose another --out.")

    def draw(self, sampler: Sampler, batch: int, world: World) -> int:
        """Make what is missing; how many pictures this rank made. Collective."""
        chunks = Chunks(self.count, 1, world, self.is_whole)
        mine = chunks.mine()

        def share(missing: list[int]) -> None:
            with ThreadPoolExecutor(4) as pool, explain_os_errors(self.path):
                writing: list[Future] = []
                for start in range(0, len(missing), batch):
                    part = missing[start : start + batch]
                    stages = self._make(sampler, part, world)
                    images = [finite_uint8(stage.float(), "nearest", part) for stage in stages][-1].cpu()
                    for earlier in writing:
                        earlier.result()
                    writing = [
                        pool.submit(self._write, i, image, [stage[j : j + 1] for stage in stages])
                        for j, (i, image) in enumerate(zip(part, images))
                    ]
                    chunks.advance(len(part))
                for last in writing:
                    last.result()

        shown = 0 if self.animations else self.count  # previews tell of each batch
        with progress_line(world, shown, "samples", done=len(chunks.done)) as report:
            chunks.run(share, report)
        return len(mine)

    def _make(self, sampler: Sampler, part: list[int], world: World) -> list[Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] of these numbers: the whole ones last, before them their stages if any."""
        draws = Draws(hash64(sampler.config.seed, "samples"), torch.tensor(part, device=world.device))
        labels = torch.tensor([self.label(i) for i in part], device=world.device)
        if not self.animations:
            return [sampler.sample(labels, draws)]
        streamed = sampler.stream(labels, draws)
        world.say(
            f"{len(part)} pictures from number {part[0]} on, seconds to each stage: "
            + " ".join(f"{seconds:.2f}" for seconds in streamed.seconds)
            + f"; the first after {100 * streamed.first_share:.0f} % of the time"
        )
        return [picture.cpu() for picture in streamed.pictures]

    def _write(self, i: int, image: Tensor, stages: list[Tensor]) -> None:
        """One picture (3, H, W) uint8, with its previews."""
        save_png(image, self.picture(i))
        if self.animations:
            streaming.write_filmstrip(stages, self.filmstrip(i))
        for suffix in self.animations:
            streaming.write_animation(stages, self.picture(i).with_suffix(suffix))

    def read(self, start: int, stop: int) -> Tensor:
        """Pictures start ... stop - 1, (n, 3, H, W) uint8."""
        return torch.stack([to_tensor(Image.open(self.picture(i)).convert("RGB")) for i in range(start, stop)])

    def write_grid(self) -> Path:
        """The first pictures, one column per label where those are few."""
        path, each = self.path / "grid.png", len(self.labels)
        shown = self.read(0, min(self.count, SHOWN // each * each if each <= SHOWN else SHOWN))
        save_png(grid(shown, columns=each if 1 < each <= COLUMNS else None), path)
        return path

    def write_stages(self) -> Path:
        """The filmstrips of the first pictures."""
        path = self.path / "stages.png"
        streaming.stack_filmstrips([self.filmstrip(i) for i in range(min(self.count, STRIPS))], path)
        return path

    def write_npz(self, path: Path, size: int) -> None:
        """All pictures in one file; one that holds them is left as it is, as after a kill in the last moment."""
        if path.exists():
            if not self._are_in(NpzPictures(path)):
                raise UserError(f"{path} exists already; the pictures are in {self.path}. Choose another --npz.")
            return
        with NpzWriter(path, self.count, (size, size)) as writer:
            for start in range(0, self.count, READ):
                writer.write(start, self.read(start, min(start + READ, self.count)))
            writer.flush()
            writer.finish()

    def _are_in(self, stored: NpzPictures) -> bool:
        return len(stored) == self.count and all(
            torch.equal(stored.read(piece.start, piece.stop), self.read(piece.start, piece.stop))
            for piece in pieces(range(self.count))
        )


# ---------------------------------------------------------------------------------------------------------------------
# How pictures begin
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def check_alike(sampler: Sampler, request: Request) -> int:
    """How many codes sample.shared lets all samples share; UserError where that or --layout cannot be done."""
    shared = sampler.task.sample_options.get("shared") or 0
    if request.layout is not None and shared:
        raise UserError("--layout and sample.shared both say how pictures begin; give one of them.")
    wanted = request.layout is not None or shared
    if wanted and "prefix" not in inspect.signature(sampler.generator.sample).parameters:
        raise UserError(
            f"{type(sampler.generator).__name__} cannot continue codes that are given, so there is no --layout."
        )
    if shared > getattr(sampler.tokenizer.spec, "length", shared):
        raise UserError(
            f"sample.shared={shared}: a picture has {sampler.tokenizer.spec.length} codes; give at most those."
        )
    return shared


def begin_alike(sampler: Sampler, request: Request, first_label: int, device: torch.device) -> dict[str, Any]:
    """Let all samples begin with the same codes, if --layout or sample.shared ask for it; facts about them.

    Both become a `prefix` for the generator, so that a picture does not depend on those in its batch.
    """
    shared = check_alike(sampler, request)
    options = sampler.task.sample_options
    options.pop("shared", None)
    if request.layout is None and not shared:
        return {}
    if request.layout is not None:
        ((_, picture),) = read_files([request.layout])
        image = to_model_range(to_tensor(center_crop(picture, sampler.image_size))[None]).to(device)
        options["prefix"] = streaming.layout_prefix(sampler.tokenizer, image, request.layout_groups)
        return {
            "layout": request.layout,
            "layout_groups": request.layout_groups,
            "layout_fingerprint": hub.fingerprint({"codes": options["prefix"]}),
        }
    draws = Draws(hash64(sampler.config.seed, "samples"), torch.zeros(1, dtype=torch.int64, device=device))
    label = torch.tensor([first_label], device=device)
    with bf16_products(device, sampler.bf16):
        codes = sampler.task.latents(label, draws)
    options["prefix"] = codes[:, :shared]
    return {}
