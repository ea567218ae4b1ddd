"""What run_eval_generator.sh does, one `Measurement` per command; what run_eval_tokenizer.sh does is in evaluate.py.

generated_samples(options, overrides, world).run()   samples of a generator
existing_samples(options, overrides, world).run()    an .npz or a folder of samples
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from core import images as image_tools
from core.arrays import NpzFile
from core.devices import pictures_at_once
from core.dist import World
from core.errors import UserError
from core.files import sorted_facts, write_atomic
from core.rng import hash64
from core.schema import RunConfig
from core.specs import DataSource
from core.train.log import progress_line
from data.checks import say_left_out
from data.sources import SCHEMES, has_pictures, open_source
from evaluation import measure, networks, protocols, references
from evaluation.chunks import Work
from evaluation.measure import Evaluation, Produce, Progress, Result
from evaluation.pictures import NpzPictures, open_any
from evaluation.protocols import Protocol
from run.data import class_names, open_pictures
from run.load import IMAGENET_CLASSES
from run.measurement import (
    PICTURES_ARE_THERE,
    Measurement,
    Shown,
    check_comparison,
    enough,
    eval_settings,
    evaluation_of,
    sizes_of,
)
from run.target import Sampler, Target, lay_out, open_generator, read_target

SAMPLES = 50_000  # what published numbers are measured on
SHOWN = 40
IMAGENET_VAL_EACH = 50


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
        settings, pictures = eval_settings(overrides, idle=PICTURES_ARE_THERE), open_any(options.target)
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
    settings = eval_settings(overrides, idle=PICTURES_ARE_THERE)
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
        how=evaluation_of(options, settings, protocol, net, world, reference=reference, labels=pictures.labels()),
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
    protocol = protocols.get(settings.protocol, rounding=settings.rounding)
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
        protocol.rounding,
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
