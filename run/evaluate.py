"""What run_eval_tokenizer.sh and run_eval_generator.sh do: one `Measurement` per command.

    by_tokenizer(options, overrides, world).run()        reconstructions by a tokenizer
    by_folders(options, overrides, world).run()          two sets of pictures that are there
    generated_samples(options, overrides, world).run()   samples of a generator
    existing_samples(options, overrides, world).run()    an .npz or a folder of samples

Each of these four functions reads what was asked for, loads the networks and says what decides the result. The rest is
the same for all: a folder that is continued or refused, measuring in chunks, the table, the report and metrics.json.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from core import images as image_tools
from core.arrays import NpzFile
from core.devices import pictures_at_once
from core.dist import World
from core.errors import UserError
from core.files import sorted_facts, write_atomic
from core.rng import hash64
from core.schema import EvalConfig, RunConfig
from core.specs import DataSource
from core.train.log import progress_line
from core.train.parallel import compile_blocks
from core.weights import released
from data.checks import say_left_out
from data.sources import SCHEMES, has_pictures, open_source
from evaluation import measure, networks, protocols, references
from evaluation.chunks import Work
from evaluation.images import Perturbation, picture_metrics
from evaluation.measure import ByPairs, ByTokenizer, Evaluation, Produce, Progress, Rebuild, Result
from evaluation.networks import FeatureNet
from evaluation.pairs import paired
from evaluation.pictures import NpzPictures, Pictures, first_pictures, open_any
from evaluation.protocols import Protocol
from evaluation.references import Statistics
from run.data import class_names, open_pictures
from run.load import lay_out_tokenizer, load_config, read_tokenizer, read_weights
from run.measurement import Measurement, Shown, Table, enough, eval_settings, evaluation_of, sizes_of
from run.target import Sampler, Target, lay_out, open_generator, read_target
from run.unseen import LEFT_OUT, choose, told_data, unseen

SAMPLES = 50_000  # what published numbers are measured on
SHOWN = 40
ENOUGH_TO_COMPILE = 5_000  # reconstructions
BEST_AND_WORST = 6
CLASSES_SHOWN = 30
PER_PICTURE = "per_picture.safetensors"  # metric -> (N,), and (scales, K, V) counts of codes
IMAGENET_CLASSES, IMAGENET_VAL_EACH = 1000, 50


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------
def holds_pictures(target: str) -> bool:
    """Whether `target` names samples (a file, a folder or a data URL) rather than a generator."""
    path = Path(target)
    if target.endswith((".npz", ".npy", ".tar")) or target.partition("://")[0] in SCHEMES:
        return True
    if path.is_dir() and not any(path.iterdir()):
        raise UserError(
            f"{target} is empty. Name a run, a checkpoint or weights, or samples: an .npz or a folder of pictures."
        )
    if not path.is_dir() or (path / "checkpoints").is_dir() or (path / "manifest.json").is_file():
        return False
    return has_pictures(path)


def check_samples(options: argparse.Namespace, overrides: list[str], existing: bool) -> None:
    """Find mistakes without loading a generator; with --check also those that only its sizes or the files of the
    comparison show."""
    if existing:
        settings, pictures = eval_settings(overrides), open_any(options.target)
        enough(settings.num_images, len(pictures), options.target, options)
        protocol = protocols.get(settings.protocol)
        if options.check and check_comparison(settings, protocol, references.side_of(pictures), "generation", True):
            no_reference(protocol, settings.network, references.side_of(pictures))
        return
    target = read_target(options.target, overrides)
    settings = target.config.eval
    enough(settings.num_images, settings.num_images or SAMPLES, "eval.num_images", options)
    protocol = protocols.get(settings.protocol)
    if options.check:
        check_generated(target)
    elif settings.reference:
        references.choose_reference(settings.reference, protocol, None, 0, "generation", True)


def check_generated(target: Target) -> None:
    """UserError for what `generated_samples` would refuse, but for the values of weights."""
    generator, settings = lay_out(target), target.config.eval
    protocol = protocols.get(settings.protocol)
    labels_of(target.config, protocol, generator.num_classes)
    published = generator.num_classes == IMAGENET_CLASSES
    if check_comparison(settings, protocol, generator.image_size, "generation", published):
        training_pictures(target.config, published)


def check_comparison(
    settings: EvalConfig, protocol: Protocol, size: references.Side, purpose: str, published: bool
) -> bool:
    """Whether there is no file to compare pictures of `size` with; UserError where feature network or reference cannot
    be used. `published`: see `references.choose_reference`. Tells what would be downloaded or left out."""
    net = networks.look_for_net(settings.network, protocol)
    for line in measure.lacking(settings, protocol, purpose):
        _tell(line)
    path = references.choose_reference(settings.reference, protocol, net, size, purpose, published)
    if path is not None:
        reference = references.load(path)
        if net is not None:
            references.check_reference(reference, net, purpose, size)
    return path is None and net is not None


@functools.cache  # one line, however many are compared
def _tell(line: str) -> None:
    print(f"not here: {line}")


def no_reference(protocol: Protocol, network: str, size: references.Side) -> NoReturn:
    raise UserError(
        f'nothing to compare with: protocol "{protocol.name}" names no reference for pictures of {size} px and '
        f'the network "{network}". Give eval.reference=FILE (run_make_reference.sh makes one).'
    )


def labels_of(config: RunConfig, protocol: Protocol, num_classes: int) -> Tensor:
    """The classes of the samples, (N,) int64."""
    kind = config.eval.labels or protocol.labels
    val = validation_labels(config, num_classes) if kind == "val" else None
    return protocols.make_labels(kind, config.eval.num_images or SAMPLES, num_classes, config.seed, val)


class FirstSamples:
    """A writer that keeps the first pictures as a grid."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, start: int, images: Tensor) -> None:
        if start == 0:
            image_tools.save_png(image_tools.grid(images[:SHOWN].cpu(), columns=8), self.path)

    def flush(self) -> None:
        """Written at once."""


@dataclass(kw_only=True)
class Samples(Measurement):
    """Samples, by indices, against a reference.

    Args:
        produce: indices -> pictures, a function of the indices alone.
        reference_path: the file of the reference, whose pictures (arr_0) some metrics need.
    """

    produce: Produce
    reference_path: Path | None

    noun = "samples"
    not_in_chunks = ("bootstrap", "infinity", "reference")

    def prepare(self) -> None:
        """Features of the pictures in the reference's file, where a metric needs them."""
        how, path = self.how, self.reference_path
        has_moments = how.world.on_main(lambda: how.reference is not None and bool(how.reference.moments))
        needs = {"kid", "precision", "recall"} & set(how.protocol.generation) or not has_moments
        if path is None or path.suffix != ".npz" or not needs:
            return
        with NpzFile(path) as file:
            if "arr_0" not in file.names:
                return
        pictures = NpzPictures(path)
        with progress_line(how.world, len(pictures), "features of the reference") as progress:
            how.real = measure.picture_features(pictures, how.feature_net, how.world, how.batch, progress)

    def measure(self, work: Work, writers: tuple, progress: Progress) -> Result | None:
        assert work.folder is not None
        writers = (FirstSamples(work.folder / "samples.png"), *writers)
        return self.how.of_samples(self.produce, work, writers, progress)

    def shown(self, result: Result, folder: Path) -> list[Shown]:
        return [("Samples", folder / "samples.png", "The first samples in index order.")]

    def write(self, result: Result, folder: Path, unfinished: Path) -> None:
        if self.options.keep:
            labels = self.how.labels if self.how.labels is not None else torch.full((self.count,), -1)
            tensors = {f"taps/{tap}": values for tap, values in result.features.items()} | {"labels": labels}
            facts = {"net": self.how.feature_net.name, "fingerprint": "samples"}
            write_atomic(folder / "features.safetensors", sorted_facts(to_bytes(tensors, metadata=facts)))
        super().write(result, folder, unfinished)


def existing_samples(options: argparse.Namespace, overrides: list[str], world: World) -> Samples:
    """Samples that are there: an .npz or a folder."""
    settings = eval_settings(overrides)
    protocol = protocols.get(settings.protocol)
    pictures = open_any(options.target)
    say_left_out(world.say, pictures.source, options.target)
    count = enough(settings.num_images, len(pictures), options.target, options)
    size = references.side_of(pictures)
    net = networks.feature_net(world.device, settings.network, protocol)
    path = references.choose_reference(settings.reference, protocol, net, size, "generation", True)
    if path is None:
        no_reference(protocol, net.name, size)
    reference = references.load_reference(path, net, "generation", size, world)
    job = {
        "samples": options.target,
        "pictures": pictures.fingerprint(),
        **sizes_of("samples", pictures, world),
        "count": count,
        "protocol": protocol.name,
        "network": net.name,
        "reference": str(path),
        "reference_sha256": world.on_main(lambda: reference and reference.sha256),
        "bootstrap": options.bootstrap,
        "infinity": options.infinity,
    }
    return Samples(
        options=options,
        how=evaluation_of(options, settings, protocol, net, world, reference=reference),
        title=f"Samples of {options.target}",
        stem=Path(options.target).stem,
        image_size=pictures.size[0],
        job=job,
        produce=lambda indices: pictures.read(indices.start, indices.stop),
        reference_path=path,
    )


@dataclass
class Drawing:
    """How the samples of a generator are drawn and measured, whatever its sampling settings.

    Attributes:
        how: what is measured, with the reference and the labels.
        labels_from: where the labels come from, a kind of protocols.make_labels.
        reference_path: None where the reference is the training pictures.
        reference: facts about it.
    """

    how: Evaluation
    labels_from: str
    reference_path: Path | None
    reference: dict[str, Any]
    rounding: str
    bf16_pixels: bool
    batch: int

    @property
    def labels(self) -> Tensor:
        assert self.how.labels is not None
        return self.how.labels

    def facts(self, generator: Sampler) -> dict[str, Any]:
        """What decides the pictures and their numbers, beside count and extras."""
        config, protocol = generator.config, self.how.protocol
        return {
            **generator.facts,
            "sample": config.sample.facts(),
            "seed": config.seed,
            "labels": self.labels_from,
            "labels_fingerprint": f"{hash64(self.labels.numpy().tobytes().hex()):016x}",
            "rounding": self.rounding,
            "precision": config.train.precision,
            "bf16_pixels": self.bf16_pixels,
            "count": len(self.labels),
            "protocol": protocol.name,
            "network": self.how.feature_net.name,
            **self.reference,
        }

    def produce(self, generator: Sampler) -> Produce:
        """indices -> pictures."""
        dtype = measure.pixel_dtype(self.how.protocol, generator.bf16)
        device, seed = self.how.world.device, generator.config.seed
        return measure.producer(generator.sample, self.labels, seed, self.batch, device, self.rounding, dtype)


def drawing(options: argparse.Namespace, generator: Sampler, world: World) -> Drawing:
    """Labels, reference and network of a generator's protocol. Collective."""
    say = print if world.is_main else (lambda *_: None)
    config, settings, size = generator.config, generator.config.eval, generator.image_size
    protocol = protocols.get(settings.protocol)
    labels = labels_of(config, protocol, generator.num_classes)
    net = networks.feature_net(world.device, settings.network, protocol)
    published = generator.num_classes == IMAGENET_CLASSES
    path = references.choose_reference(settings.reference, protocol, net, size, "generation", published)
    if path is not None:
        reference = references.load_reference(path, net, "generation", size, world)
        facts = {"reference": str(path), "reference_sha256": world.on_main(lambda: reference and reference.sha256)}
    else:
        train = training_pictures(config, published and net.name == "lite0")
        named = config.data.pictures or config.data.url
        say(f"reference: statistics of the training pictures ({named})")
        say_left_out(say, train, named)
        reference = references.training_statistics(config, train, size, net, world)
        contents = world.on_main(lambda: f"{hash64(train.fingerprint(), train.file_sizes() or ''):016x}")
        facts = {"reference": config.data.url, "reference_sizes": contents}
    return Drawing(
        evaluation_of(options, settings, protocol, net, world, reference=reference, labels=labels),
        settings.labels or protocol.labels,
        path,
        facts,
        settings.rounding or protocol.rounding,
        generator.bf16 and protocol.bf16_pixels,
        pictures_at_once(settings.batch, world.device, size),
    )


def generated_samples(options: argparse.Namespace, overrides: list[str], world: World) -> Samples:
    """Samples of a generator."""
    say = print if world.is_main else (lambda *_: None)
    generator = open_generator(read_target(options.target, overrides, say), world)
    drawn = drawing(options, generator, world)
    job = drawn.facts(generator) | {
        "write": options.write,
        "bootstrap": options.bootstrap,
        "infinity": options.infinity,
    }
    generator.prepare(job["count"] // (drawn.batch * world.size), world.device)
    return Samples(
        options=options,
        how=drawn.how,
        title=f"Samples of {job.get('weights')}",
        stem=Path(options.target.rstrip("/")).stem,
        image_size=generator.image_size,
        job=job,
        context={"label_counts": protocols.describe_labels(drawn.labels, generator.num_classes)},
        produce=drawn.produce(generator),
        reference_path=drawn.reference_path,
    )


def validation_labels(config: RunConfig, num_classes: int) -> list[int] | None:
    """Of data.val_url. ImageNet's are known without its pictures, 50 of each class in the order of folders."""
    url = config.data.val_url
    if not url:
        return None
    try:
        return measure.val_labels(open_source(url, "val"), num_classes, class_names(config))
    except UserError:
        if num_classes != IMAGENET_CLASSES or not url.rstrip("/").endswith("imagenet/val"):
            raise
        return [i // IMAGENET_VAL_EACH for i in range(IMAGENET_CLASSES * IMAGENET_VAL_EACH)]


def training_pictures(config: RunConfig, stand_in: bool) -> DataSource:
    """What samples are compared with where there is no reference file."""
    problem = f"the run trained on stored tokens ({config.data.url})"
    try:
        train = open_pictures(config)
    except UserError as error:
        train, problem = None, str(error).rstrip(".")
    if train is None:
        advice = (
            " For FID as published fetch its network and its reference: bash run_download.sh evaluation."
            if stand_in
            else ""
        )
        raise UserError(
            f"nothing to compare with: {problem}. Name the training pictures, data.pictures=folder://... (or data.url), or "
            f"give eval.reference=FILE (run_make_reference.sh makes one).{advice}"
        )
    return train


# ---------------------------------------------------------------------------------------------------------------------
# Reconstructions
# ---------------------------------------------------------------------------------------------------------------------
def together(*checks: Callable[[], Any]) -> None:
    """Run them all; UserError with every mistake that they find."""
    problems = []
    for look in checks:
        try:
            look()
        except UserError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} mistakes:\n" + "\n".join(f"  - {problem}" for problem in problems))


def check_reconstructions(options: argparse.Namespace, overrides: list[str]) -> None:
    """Find mistakes without loading a tokenizer; with --check also those in the files of the comparison."""
    settings = eval_settings(overrides)
    if options.original:
        sides = [open_any(p, options.size) for p in (options.original, options.reconstructed)]
        paired(*sides)
        enough(settings.num_images, len(sides[0]), options.original, options)
        size = references.side_of(sides[0])
    else:
        if options.perturb:
            Perturbation.parse(options.perturb)
        together(lambda: tokenizer_section(options.weights), lambda: originals(options, settings, None))
        settings = eval_settings(with_protocol(options.weights, overrides, options.tokenizer))
        size = 0
        if options.check:
            size = lay_out_tokenizer({**options.tokenizer, **tokenizer_section(options.weights)}).image_size
            originals(options, settings, size)
    protocol = protocols.get(settings.protocol, "reconstruction")
    if options.check:
        check_comparison(settings, protocol, size, "reconstruction", False)
    elif settings.reference:
        references.choose_reference(settings.reference, protocol, None, 0, "reconstruction", False)


def originals(options: argparse.Namespace, settings: EvalConfig, size: int | None) -> Pictures:
    """The pictures to reconstruct, cropped to `size`: a data URL, a folder, or an .npz of pictures of that size."""
    if options.url is None:
        try:
            data = told_data(tokenizer_section(options.weights)["weights"], options.tokenizer)
        except UserError:  # which is said where the tokenizer is looked for
            data = {}
        options.url = choose(unseen(data), LEFT_OUT, f"bash run_eval_tokenizer.sh {options.weights}")
    pictures = open_any(options.url, size, options.workers)
    enough(settings.num_images, len(pictures), options.url, options)
    return first_pictures(pictures, settings.num_images)


def tokenizer_section(target: str) -> dict[str, Any]:
    """Where a tokenizer comes from: a run, a file, or the run of a config."""
    if target.endswith((".yaml", ".yml")):
        config = load_config(target, [])
        if config.task == "generator" and not config.tokenizer.get("weights"):
            raise UserError(f"{target} names no tokenizer.weights. Name the tokenizer's run or file itself.")
        target = config.tokenizer["weights"] if config.task == "generator" else str(config.run_dir)
    released.resolve(target, "tokenizer")
    return {"weights": target}


def with_protocol(target: str, overrides: list[str], known: dict[str, Any] | None = None) -> list[str]:
    """`overrides` with a protocol: the one they name, that of a run or config, or that of the tokenizer's authors."""
    if any(o.startswith("eval.protocol=") for o in overrides):
        return overrides
    if target.endswith((".yaml", ".yml")):
        name = load_config(target, []).eval.protocol
    else:
        weights = read_weights("tokenizer", target, known)
        trained = weights.trained
        name = trained["eval"]["protocol"] if trained else protocols.of_tokenizer(weights.settings["name"])
    return [f"eval.protocol={name}", *overrides]


@dataclass(kw_only=True)
class Reconstructions(Measurement):
    """Reconstructions against their originals.

    Args:
        rebuild: indices -> pairs, a function of the indices alone.
        pictures: the originals.
        left_out: metrics of pictures that cannot be had -> why.
        tokenizer: what reconstructs; None where the reconstructions are there.
    """

    rebuild: Rebuild
    pictures: Pictures
    left_out: dict[str, str]
    tokenizer: nn.Module | None = None

    noun = "reconstructions"

    def measure(self, work: Work, writers: tuple, progress: Progress) -> Result | None:
        result = self.how.of_reconstructions(self.rebuild, work, writers, progress)
        if result is not None:
            result.left_out |= self.left_out
        return result

    def shown(self, result: Result, folder: Path) -> list[Shown]:
        if self.tokenizer is None:
            return self.extremes(result, folder)
        path = folder / "reconstructions.png"
        image_tools.save_png(measure.reconstruction_grid(self.tokenizer, self.pictures, self.how.world.device), path)
        grid = ("Reconstructions", path, "Originals; below each row its reconstructions.")
        return [grid, *self.extremes(result, folder)]

    def write(self, result: Result, folder: Path, unfinished: Path) -> None:
        if getattr(self.options, "keep", False):
            counts = {} if result.code_counts is None else {"codes": result.code_counts}
            tensors = {f"picture/{name}": values for name, values in result.per_picture.items()} | counts
            write_atomic(folder / PER_PICTURE, to_bytes(tensors))
        super().write(result, folder, unfinished)

    @torch.no_grad()
    def extremes(self, result: Result, folder: Path) -> list[Shown]:
        """The worst and the best reconstructions; originals above."""
        if "psnr" not in result.per_picture:
            return []
        order = result.per_picture["psnr"].argsort()
        shown = []
        for name, chosen in (("worst", order[:BEST_AND_WORST]), ("best", order.flip(0)[:BEST_AND_WORST])):
            pairs = [next(self.rebuild(range(i, i + 1))) for i in chosen.tolist()]
            rows = torch.cat([pair.original for pair in pairs] + [pair.recon for pair in pairs]).cpu()
            image_tools.save_png(image_tools.grid(rows, columns=len(chosen)), folder / f"{name}.png")
            values = ", ".join(f"{float(result.per_picture['psnr'][i]):.1f}" for i in chosen)
            shown.append((f"The {name} by PSNR", folder / f"{name}.png", f"Originals above; {values} dB."))
        return shown

    def tables(self, result: Result) -> list[Table]:
        """Means by class, worst PSNR first, where there are classes."""
        source = self.pictures.source if self.tokenizer is not None else None
        if source is None or len(source.class_names) < 2 or not result.per_picture:
            return []
        labels = torch.tensor(measure.source_labels(source)[: self.count])
        columns = list(result.per_picture)
        rows = []
        for label in torch.unique(labels).tolist():
            chosen = labels == label
            means = [f"{float(result.per_picture[column][chosen].mean()):.4f}" for column in columns]
            rows.append([source.class_names[label], int(chosen.sum()), *means])
        rows.sort(key=lambda row: float(row[2]))
        title = (
            "By class" if len(rows) <= CLASSES_SHOWN else f"The {CLASSES_SHOWN} classes with the lowest {columns[0]}"
        )
        return [(title, ["class", "pictures", *columns], rows[:CLASSES_SHOWN])]


def reconstruction_evaluation(
    options: argparse.Namespace, settings: EvalConfig, pictures: Pictures, world: World
) -> tuple[Evaluation, str, dict[str, str]]:
    """(how reconstructions of `pictures` are measured, against what, metric of pictures -> why it is left out)."""
    protocol = protocols.get(settings.protocol, "reconstruction")
    net = networks.feature_net(world.device, settings.network, protocol)
    against, reference = reference_for(settings, protocol, net, pictures, world)
    metrics, left_out = picture_metrics(protocol, world.device)
    how = evaluation_of(options, settings, protocol, net, world, reference=reference, metrics=metrics)
    return how, against, left_out


def reference_for(
    settings: EvalConfig, protocol: Protocol, net: FeatureNet, pictures: Pictures, world: World
) -> tuple[str, Statistics | None]:
    """(what reconstructions are compared with, its statistics on the main rank or None for the originals)."""
    size = references.side_of(pictures)
    path = references.choose_reference(settings.reference, protocol, net, size, "reconstruction", False)
    known = references.KNOWN.get(path.name) if path else None
    if path and not settings.reference and known and known.count != len(pictures):
        path = None  # the protocol's file is about the whole validation set; this is a part of it or another set
    if path is None:
        return "originals", None
    return str(path), references.load_reference(path, net, "reconstruction", size, world, pictures)


def asked_for(options: argparse.Namespace) -> dict[str, Any]:
    """Facts of a job that it has only where they were asked for."""
    return {
        name: getattr(options, name)
        for name in ("bootstrap", "infinity", "write", "tokenizer")
        if getattr(options, name)
    }


def reconstruction_context(how: Evaluation, fingerprint: str | None) -> dict[str, Any]:
    """What metrics.json says beside the job."""
    return {
        "rounding": how.protocol.reconstruction_rounding,
        "original_rounding": how.protocol.original_rounding,
        "reference_fingerprint": fingerprint,
    }


def is_compiled(settings: EvalConfig, count: int, device: torch.device) -> bool:
    """Whether a tokenizer is compiled for this many reconstructions of a rank."""
    if settings.compile == "auto":  # it takes a minute or so
        return device.type == "cuda" and count >= ENOUGH_TO_COMPILE
    return settings.compile == "always"


def by_tokenizer(options: argparse.Namespace, overrides: list[str], world: World) -> Reconstructions:
    """Reconstructions by a tokenizer."""
    check_reconstructions(options, overrides)  # before a network is loaded
    settings = eval_settings(with_protocol(options.weights, overrides, options.tokenizer))
    section = {**options.tokenizer, **tokenizer_section(options.weights), "use_ema": not options.raw}
    loaded = read_tokenizer(section, world=world)
    tokenizer, fingerprint = loaded.module.to(world.device), loaded.fingerprint
    pictures = originals(options, settings, tokenizer.image_size)
    say_left_out(world.say, pictures.source, options.url)
    how, against, left_out = reconstruction_evaluation(options, settings, pictures, world)
    perturb = Perturbation.parse(options.perturb) if options.perturb else None
    job = {
        "weights": options.weights,
        "weights_fingerprint": fingerprint,
        "use_ema": not options.raw,
        "pictures": options.url,
        "pictures_fingerprint": pictures.fingerprint(),
        **sizes_of("pictures", pictures, world),
        "count": len(pictures),
        "protocol": how.protocol.name,
        "network": how.feature_net.name,
        "reference": against,
        "precision": options.precision,
        "seed": 0,
        **({"perturbation": asdict(perturb)} if perturb else {}),
        **asked_for(options),
    }
    if is_compiled(settings, len(pictures) // world.size, world.device):
        compile_blocks(tokenizer)
    rebuild = ByTokenizer(
        tokenizer,
        pictures,
        how.protocol,
        pictures_at_once(settings.batch, world.device, tokenizer.image_size),
        world.device,
        bf16=options.precision == "bf16",
        perturb=perturb,
    )
    return Reconstructions(
        options=options,
        how=how,
        title=f"Reconstructions by {options.weights}",
        stem=Path(options.weights.rstrip("/")).stem,
        image_size=tokenizer.image_size,
        job=job,
        context=reconstruction_context(how, job["pictures_fingerprint"]),
        rebuild=rebuild,
        pictures=pictures,
        left_out=left_out,
        tokenizer=tokenizer,
    )


def by_folders(options: argparse.Namespace, overrides: list[str], world: World) -> Reconstructions:
    """Two sets of pictures, paired by name or in order (evaluation/pairs.py)."""
    settings = eval_settings(overrides)
    original, recon = (open_any(p, options.size, options.workers) for p in (options.original, options.reconstructed))
    for pictures in (original, recon):
        say_left_out(world.say, pictures.source, pictures.name)
    recon = paired(original, recon)
    count = enough(settings.num_images, len(original), options.original, options)
    how, against, left_out = reconstruction_evaluation(options, settings, original, world)
    if "codebook" in how.protocol.reconstruction:
        left_out["codebook"] = "pictures alone do not show codes"
    job = {
        "original": options.original,
        "reconstructed": options.reconstructed,
        "count": count,
        "protocol": how.protocol.name,
        "original_fingerprint": original.fingerprint(),
        "reconstructed_fingerprint": recon.fingerprint(),
        **sizes_of("original", original, world),
        **sizes_of("reconstructed", recon, world),
        "network": how.feature_net.name,
        "reference": against,
        "size": options.size,
        **asked_for(options),
    }
    return Reconstructions(
        options=options,
        how=how,
        title=f"{options.reconstructed} against {options.original}",
        stem=Path(options.reconstructed.rstrip("/")).stem,
        image_size=original.size[0],
        job=job,
        context=reconstruction_context(how, None),
        rebuild=ByPairs(original, recon, how.batch, world.device),
        pictures=original,
        left_out=left_out,
    )
