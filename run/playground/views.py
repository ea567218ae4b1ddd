"""What the playground shows: a picture through a tokenizer, pictures of a generator; plain data, ready for JSON.

Which controls a model gets follows from its spec and protocols (run/alter.py) and from the options that its `sample` takes.
Every answer names the command that makes the same files in a shell.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import json
import math
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.images import finite_uint8, png, to_model_range
from core.rng import Draws, hash64
from core.specs import Codes, Continuous, MultiScale, Tokenizer
from core.weights import released
from data.base import spread
from data.decode import decode_named
from data.sources import open_source
from data.transforms import center_crop, to_tensor
from evaluation.images import psnr, ssim
from run import edit as editing
from run.alter import Changes, branch_names, parts_of
from run.models import GeneratorModel, TokenizerModel, load_generator, load_tokenizer
from run.reconstruct import difference, file_stem
from run.sample import SampleFolder, parse_labels
from run.target import Sampler
from run.weights import kinds_of

MOST = 32  # pictures at once: a batch of run_sample.sh
GAIN = 4.0  # of the error map, as in scripts/reconstruct.py
EXAMPLES = ("embedded://emoji64", 8)
COLUMNS = 16  # of a sequence without places
# What a generator's `sample` may take and the page offers, with what is said about it there.
OPTIONS = {
    "temperature": "of the draw; 0: the likeliest code",
    "top_k": "among the k likeliest codes; 0: all",
    "top_p": "among the likeliest that make up p; 0: all",
    "steps": "points of the time grid",
}
SSIM_NEEDS = 7  # pixels a side

Fields = dict[str, Any]


@dataclass
class Entry:
    """A model of the page. One computation at a time runs in it, the others wait for `lock`."""

    reference: str
    kind: str  # "tokenizer" or "generator"
    model: Any = None
    error: str = ""  # why there is no model
    words: list[str] = field(default_factory=list)  # of a command, behind the reference
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """The end of the reference that tells it from others: tiny/fqgan/tokenizer.safetensors -> fqgan/tokenizer."""
        path = PurePath(self.reference.rstrip("/"))
        stem = path.stem if path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".yaml") else path.name
        return f"{path.parent.name}/{stem}" if path.parent.name else stem


# ---------------------------------------------------------------------------------------------------------------------
# Which models
# ---------------------------------------------------------------------------------------------------------------------
class Models:
    """The models of a playground; what cannot be loaded is an entry that says why.

    Args:
        references: run folders, files of weights, hf:// addresses; a generator brings its tokenizer.
        log: is told what is being loaded.
    """

    def __init__(self, references: Sequence[str], log: Callable[[str], None] = lambda _: None):
        self.entries: list[Entry] = []
        for reference in references:
            try:
                is_generator = reference.endswith((".yaml", ".yml")) or "generator" in kinds_of(reference)
            except UserError as error:
                self.entries.append(Entry(reference, "", error=str(error)))
                continue
            log(f"loading {reference}")
            self._add(reference, "generator" if is_generator else "tokenizer")
        if all(entry.error for entry in self.entries):
            raise UserError(self.entries[0].error)

    def _add(self, reference: str, kind: str) -> None:
        """The entry of a reference, and that of the tokenizer of a generator."""
        entry = Entry(reference, kind)
        self.entries.append(entry)
        try:
            if kind == "tokenizer":
                entry.model = load_tokenizer(reference)
            else:
                entry.model = load_generator(reference)
                self._add_tokenizer(entry.model)
        except UserError as error:
            entry.error = str(error)

    def _add_tokenizer(self, generator: GeneratorModel) -> None:
        """The tokenizer of a generator as scripts/reconstruct.py would load it, unless it is there already."""
        section = dict(generator.sampler.config.tokenizer)
        reference = str(section.pop("weights"))
        place = released.resolve(reference, "tokenizer")
        for other in self.entries:
            if other.kind == "tokenizer" and released.resolve(other.reference, "tokenizer") == place:
                return
        raw = section.pop("use_ema", True) is False
        settings: Fields = {
            key: value
            for key, value in section.items()
            if key not in ("name", "view", "latent_stats") and isinstance(value, (int, float, str))
        }
        words = [f"tokenizer.{key}={value}" for key, value in settings.items()] + ["--raw"] * raw
        entry = Entry(reference, "tokenizer", words=words)
        self.entries.append(entry)
        try:
            entry.model = load_tokenizer(reference, use_ema=not raw, **settings)
        except UserError as error:
            entry.error = str(error)

    def find(self, number: Any, kind: str) -> Entry:
        """The entry of a number that `describe` gave; UserError for one that is not of this kind."""
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(self.entries):
            entry = self.entries[number]
            if entry.kind == kind and entry.model is not None:
                return entry
        raise UserError(f"there is no {kind} with the number {_quoted(number)} here; reload the page.")

    def describe(self) -> Fields:
        """All models with their controls."""
        described = []
        for number, entry in enumerate(self.entries):
            facts = {"number": number, "name": entry.name, "reference": entry.reference, "kind": entry.kind}
            if entry.error:
                facts["error"] = entry.error
            elif entry.kind == "tokenizer":
                facts |= tokenizer_controls(entry.model.module)
            else:
                facts |= generator_controls(entry.model)
            described.append(facts)
        return {"models": described, "most": MOST}


def tokenizer_controls(tokenizer: Tokenizer) -> Fields:
    """What can be changed between encoding and decoding."""
    spec, parts = tokenizer.spec, parts_of(tokenizer)
    facts: Fields = {"size": tokenizer.image_size, "latents": str(spec), "noise": isinstance(spec, Continuous)}
    if parts is not None:
        facts["kept"] = vars(parts)
    if not isinstance(spec, Continuous):
        facts |= {"vocab": spec.vocab, "branches": branch_names(spec), "maps": code_maps(spec)}
    return facts


def code_maps(spec: Codes | MultiScale) -> list[Fields]:
    """How the codes of a branch are laid out: `count` cells from place `start` on, `columns` a row, under a title."""
    if isinstance(spec, MultiScale):
        starts = [sum(side * side for side in spec.scales[:i]) for i in range(len(spec.scales))]
        sides = enumerate(zip(spec.scales, starts))
        return [_map(f"scale {i + 1}, {side} x {side}", start, side * side, side) for i, (side, start) in sides]
    if spec.grid is None:
        columns = min(COLUMNS, math.ceil(math.sqrt(spec.length)))
        return [_map("in their order, row by row", 0, spec.length, columns)]
    return [_map(f"{spec.grid[0]} x {spec.grid[1]}", 0, spec.length, spec.grid[1])]


def _map(title: str, start: int, count: int, columns: int) -> Fields:
    return {"title": title, "start": start, "count": count, "columns": columns}


def generator_controls(model: GeneratorModel) -> Fields:
    """The options of its `sample` that the page offers, with what they are unless told."""
    sampler = model.sampler
    parameters = inspect.signature(sampler.generator.sample).parameters
    options = {"scale": {"value": sampler.config.sample.scale, "meaning": "1: none"}}
    for name, meaning in OPTIONS.items():
        if name in parameters:
            value = sampler.task.sample_options.get(name, parameters[name].default)
            options[name] = {"value": _plain(value), "meaning": meaning}
    options["scale"]["value"] = _plain(options["scale"]["value"])
    classes = model.class_names or [str(i) for i in range(sampler.num_classes)]
    return {"size": sampler.image_size, "options": options, "classes": classes}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------------------------------------------------------
# What a request says
# ---------------------------------------------------------------------------------------------------------------------
def _quoted(value: Any) -> str:
    """What was given, for a message: short, whatever it is."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def read_whole(request: Fields, name: str, default: int, low: int, high: int) -> int:
    """A whole number of the request."""
    value = request.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"{name}: give a whole number from {low} to {high}, not {_quoted(value)}.")
    return value


def read_number(value: Any, name: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{name}: give a number, not {_quoted(value)}.")
    return value


def read_list(request: Fields, name: str) -> list[Any]:
    value = request.get(name) or []
    if not isinstance(value, list):
        raise UserError(f"{name}: a list was expected, not {_quoted(value)}.")
    return value


def read_picture(request: Fields, name: str, upright: bool = False) -> tuple[str, Any]:
    """(name of its file, picture in RGB) of {"name": ..., "data": base64}, turned as its EXIF data says where `upright`."""
    upload = request.get(name)
    if not isinstance(upload, dict) or not isinstance(upload.get("data"), str):
        raise UserError(f"{name}: choose a picture first.")
    title = PurePath(str(upload.get("name") or "picture.png").replace("\\", "/")).name or "picture.png"
    try:
        data = base64.b64decode(upload["data"], validate=True)
    except binascii.Error:
        raise UserError(f"{title}: its bytes did not arrive whole; choose it again.") from None
    return title, decode_named(data, title, upright)


def read_changes(request: Fields, tokenizer: Tokenizer) -> tuple[Changes, list[str]]:
    """What the page changes, checked, and the words of scripts/reconstruct.py that say so."""
    spec, words = tokenizer.spec, []
    kept = None if request.get("kept") is None else read_whole(request, "kept", 1, 1, spec.length)
    noise = read_number(request.get("noise", 0), "noise")
    put = []
    for item in read_list(request, "put"):
        if not isinstance(item, list) or len(item) != 3 or not all(type(x) is int for x in item):
            raise UserError(f"an exchanged code is [branch, place, code], three whole numbers, not {_quoted(item)}.")
        put.append(tuple(item))
    branches = read_list(request, "branches")
    if not all(type(branch) is int for branch in branches):
        raise UserError(f"branches are whole numbers, not {_quoted(branches)}.")
    title, donor = read_picture(request, "donor") if branches else ("", None)
    changes = Changes(kept, noise, tuple(put), donor, tuple(branches))
    changes.check(tokenizer)
    if kept is not None:
        words += ["--kept", str(kept)]
    if noise:
        words += ["--noise", f"{noise:g}"]
    if put:
        several = not isinstance(spec, Continuous) and spec.branches > 1
        words += ["--put", ",".join(f"{b}:{p}={c}" if several else f"{p}={c}" for b, p, c in put)]
    if branches:
        words += ["--donor", title, "--branches", ",".join(map(str, branches))]
    return changes, words


# ---------------------------------------------------------------------------------------------------------------------
# The views
# ---------------------------------------------------------------------------------------------------------------------
def data_url(image: Tensor) -> str:
    """A (3, H, W) uint8 picture."""
    return f"data:image/png;base64,{base64.b64encode(png(image.cpu())).decode()}"


def _argument(title: str) -> str:
    """The name of a file so that no program takes it for an option."""
    return f"./{title}" if title.startswith("-") or "=" in title else title


def tokenize(models: Models, request: Fields) -> Fields:
    """A picture, what the tokenizer makes of it, and its codes.

    Request: model, picture, and what `read_changes` reads.
    """
    entry = models.find(request.get("model"), "tokenizer")
    model: TokenizerModel = entry.model
    title, picture = read_picture(request, "picture")
    changes, words = read_changes(request, model.module)
    original = to_tensor(center_crop(picture, model.image_size))[None]
    with entry.lock:
        begun = time.perf_counter()
        draws = Draws(hash64(0, "decode"), torch.zeros(1, dtype=torch.int64, device=model.device))
        latents = changes.latents(model.module, to_model_range(original.to(model.device)), draws)
        decoded = changes.decode(model.module, latents, draws)
        rebuilt = finite_uint8(decoded.float(), "nearest", [0]).cpu()
        seconds = time.perf_counter() - begun
    pair = original / 255, rebuilt / 255
    command = ["python", "-m", "scripts.reconstruct", "--weights", entry.reference, _argument(title)]
    command += [*words, *entry.words]
    return {
        "original": data_url(original[0]),
        "rebuilt": data_url(rebuilt[0]),
        "error_map": data_url(difference(original[0], rebuilt[0], GAIN)),
        "file": f"{file_stem(0, PurePath(title).stem)}_rebuilt.png",
        "psnr": float(psnr(*pair)),
        "ssim": float(ssim(*pair)) if model.image_size >= SSIM_NEEDS else None,
        "codes": latents[0].T.tolist() if not latents.is_floating_point() else None,
        "seconds": seconds,
        "command": shlex.join([*command, "--rebuilt", "--out", "panels"]),
    }


@dataclass
class Drawing:
    """What is to be drawn, of a request with model, labels (as --labels of run_sample.sh), num, seed and options {name: a
    number, or one per codebook}. `sampler` is tuned as the options say; `words` say so to a program."""

    entry: Entry
    sampler: Sampler
    text: str
    labels: list[int]
    num: int
    seed: int
    words: list[str]

    @classmethod
    def read(cls, models: Models, request: Fields) -> Drawing:
        entry = models.find(request.get("model"), "generator")
        model: GeneratorModel = entry.model
        text = request.get("labels")
        if not isinstance(text, str) or not text.strip():
            raise UserError("labels: name a class, or several, separated by commas.")
        labels = parse_labels(text, model.sampler.num_classes, model.class_names, "classes")
        num = read_whole(request, "num", min(len(labels), MOST), 1, MOST)
        seed = read_whole(request, "seed", 0, 0, (1 << 63) - 1)
        options = read_options(request, entry)
        words = ["--num", str(num), "--seed", str(seed), *(f"sample.{key}={value}" for key, value in options.items())]
        return cls(entry, model.tuned(options), text, labels, num, seed, words)

    def name(self, label: int) -> str:
        """Of a class."""
        names = self.sampler.class_names
        return names[label] if names else str(label)


def generate(models: Models, request: Fields, send: Callable[[Fields], None]) -> None:
    """Send looks at pictures on their way, {"pictures": [...]}, then {"done": [...], "command": ...}.

    Request: see Drawing.
    """
    drawing = Drawing.read(models, request)
    num, device = drawing.num, drawing.entry.model.tokenizer.device
    folder = SampleFolder(Path("samples"), drawing.labels, num)
    numbers = torch.arange(num, device=device)
    asked = torch.tensor([folder.label(i) for i in range(num)], device=device)

    def show(pictures: Tensor) -> None:
        send({"pictures": [data_url(p) for p in finite_uint8(pictures, "nearest", numbers)]})

    with drawing.entry.lock:
        begun = time.perf_counter()
        images = drawing.sampler.watch(asked, Draws(hash64(drawing.seed, "samples"), numbers), show)
        seconds = time.perf_counter() - begun
    pixels = finite_uint8(images, "nearest", numbers)
    command = ["bash", "run_sample.sh", drawing.entry.reference, "--labels", drawing.text, *drawing.words]
    done = [
        {"data": data_url(pixels[i]), "file": folder.picture(i).name, "class": drawing.name(folder.label(i))}
        for i in range(num)
    ]
    send({"done": done, "seconds": seconds, "command": shlex.join([*command, "--out", "samples"])})


def edit(models: Models, request: Fields) -> Fields:
    """A photo with what is white in the mask drawn anew, run/edit.py.

    Request: see Drawing; picture; mask, of the size of the model's pictures or of the photo's.
    """
    drawing = Drawing.read(models, request)
    title, photo = read_picture(request, "picture", upright=True)
    _, mask = read_picture(request, "mask")
    sampler, device, rules = drawing.sampler, drawing.entry.model.tokenizer.device, editing.Rules()
    canvas = editing.inpainting(photo, mask, sampler.image_size)
    labels = [drawing.labels[i % len(drawing.labels)] for i in range(drawing.num)]
    with drawing.entry.lock:
        begun = time.perf_counter()
        edited = editing.edit(sampler, canvas, labels, rules, device, drawing.seed)
        seconds = time.perf_counter() - begun
    paths = editing.places(Path("edited.png"), labels)
    command = ["bash", "run_edit.sh", drawing.entry.reference, _argument(title), "--mask", "mask.png"]
    command += ["--label", drawing.text, *drawing.words, "--out", "edited.png"]
    return {
        "done": [
            {"data": data_url(pixels), "file": path.name, "class": drawing.name(label), "says": _measured(facts)}
            for pixels, path, label, facts in zip(edited.pictures, paths, labels, edited.facts)
        ],
        "remarks": [f"{edited.kept} are kept. {MEASURED}", *editing.remarks(sampler, canvas, edited, rules)],
        "seconds": seconds,
        "command": shlex.join(command),
    }


MEASURED = (
    "Below each picture: PSNR outside the mask before the photo is put back, afterwards the two are equal; mean step from pixel "
    "to pixel across the mask's border and inside it, in grey levels."
)


def _measured(facts: dict[str, float]) -> str:
    """The measurements of an edited picture, as MEASURED explains them."""
    words = [f"{facts['outside_psnr']:.1f} dB"] if "outside_psnr" in facts else []
    words += [f"{name} {facts[key]:.0f}" for name, key in (("border", "seam"), ("inside", "inside")) if key in facts]
    return ", ".join(words)


def read_options(request: Fields, entry: Entry) -> dict[str, str]:
    """Sampling options that are not what they are anyway, as run_sample.sh takes them."""
    options, known = request.get("options") or {}, generator_controls(entry.model)["options"]
    if not isinstance(options, dict):
        raise UserError(f"options: name and value of each were expected, not {_quoted(options)}.")
    chosen = {}
    for name, value in options.items():
        if name not in known:
            raise UserError(f"options: {entry.name} has no {_quoted(name)}; it takes {', '.join(known)}.")
        for number in value if isinstance(value, list) else [value]:
            read_number(number, name)
        if value != known[name]["value"]:
            chosen[name] = json.dumps(value, separators=(",", ":"))
    return chosen


def examples() -> list[Fields]:
    """A few pictures to begin with."""
    url, count = EXAMPLES
    source = open_source(url, "val")
    samples = [source[i] for i in spread(len(source), count)]
    return [{"name": f"example_{i}.png", "data": data_url(to_tensor(sample.image))} for i, sample in enumerate(samples)]
