"""The steps that the evaluation commands share: check, load, measure in pieces, write what was found."""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from core import config as config_module
from core import images as image_tools
from core.arrays import NpzFile
from core.config import EvalConfig, RunConfig
from core.dist import World
from core.errors import UserError
from core.files import read_json, write_atomic
from core.rng import hash64
from core.specs import DataSource
from core.train.log import progress_line
from data.sources import SCHEMES, has_pictures, open_source
from evaluation import measure, protocols, record, runner
from evaluation.intervals import check_extras
from evaluation.networks import FeatureNet
from evaluation.pictures import NpzPictures, NpzWriter, PngWriter, open_any
from evaluation.protocols import Protocol
from evaluation.references import Statistics
from evaluation.work import Work
from run.data import open_pictures
from run.sample import open_generator, read_config

SAMPLES = 50_000  # what published numbers are measured on
SHOWN = 40
IMAGENET_CLASSES, IMAGENET_VAL_EACH = 1000, 50


# ---------------------------------------------------------------------------------------------------------------------
# What was asked for
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


def eval_settings(overrides: list[str]) -> EvalConfig:
    """The `eval` section from key=value words, where there is no config around it."""
    foreign = [o for o in overrides if not o.startswith("eval.")]
    if foreign:
        raise UserError(
            f"{' '.join(foreign)}: only eval.* settings mean something here; there is no generator to set up."
        )
    stub = {
        "name": "eval",
        "task": "tokenizer",
        "tokenizer": {"name": "none"},
        "data": {"url": "none"},
        "objective": {},
        "train": {"duration": "0ep", "global_batch": 1, "optimizer": {"lr": 0.0}},
    }
    return config_module.override(lambda: stub, overrides, {}, source="the command line").eval


def chosen_protocol(settings: EvalConfig, purpose: str) -> Protocol:
    return protocols.get(settings.protocol, purpose)


def check(options: argparse.Namespace, overrides: list[str], existing: bool) -> None:
    """Find mistakes without loading a network."""
    if existing:
        settings = eval_settings(overrides)
        pictures = open_any(options.target)
        enough(min(settings.num_images or len(pictures), len(pictures)), options.target, options)
    else:
        settings = read_config(options.target, overrides)[0].eval
        enough(settings.num_images or SAMPLES, "eval.num_images", options)
    chosen_protocol(settings, "generation")
    if settings.reference and measure.find_reference(settings.reference) is None:
        measure.choose_reference(settings.reference, protocols.get(settings.protocol), None, 0, "generation", True)


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a result
# ---------------------------------------------------------------------------------------------------------------------
def open_folder(given: str | None, name: str, job: dict[str, Any], again: bool, world: World) -> tuple[Path, bool]:
    """(folder, whether the result is there already). Without `given` the name follows from the job. Collective."""
    folder = Path(given or f"work_dirs/eval/{name}-{hash64(repr(sorted(job.items()))):016x}"[:200])

    def look() -> bool:
        path = folder / "metrics.json"
        if not path.is_file() or again:
            return False
        before = read_json(path).get("context", {}).get("job")
        if before == job:
            return True
        changed = sorted(k for k in {**(before or {}), **job} if (before or {}).get(k) != job.get(k))
        raise UserError(
            f"{folder} holds the result of another evaluation (different: {', '.join(changed)}). Choose another "
            "--out, or add --again to replace it."
        )

    return folder, world.on_main(look)


def print_stored(folder: Path) -> int:
    """Show a result that is there."""
    for name, entry in read_json(folder / "metrics.json")["metrics"].items():
        print(f"{name:<32} {entry['value']}")
    print(f"measured before, in {folder}; --again measures anew")
    return 0


def enough(count: int, name: str, options: argparse.Namespace) -> int:
    """`count`; UserError when there are too few pictures to measure anything, or what the options add to it."""
    if count < 2:
        raise UserError(
            f"{name}: {count} picture cannot be measured. A Frechet distance needs at least 2, a published one 50,000."
        )
    check_extras(options.bootstrap, options.infinity, count)
    return count


class Shown:
    """A writer that keeps the first pictures as <folder>/samples.png."""

    def __init__(self, folder: Path):
        self.path = folder / "samples.png"

    def write(self, start: int, images: Tensor) -> None:
        if start == 0:
            image_tools.save_png(image_tools.grid(images[:SHOWN].cpu(), columns=8), self.path)

    def flush(self) -> None:
        """Written at once."""


def open_writer(kind: str | None, name: str, folder: Path, work: Work, size: int, again: bool):
    """The writer of --write into <folder>/<name>, or None; finished chunks without their pictures are done again.
    Collective."""
    if kind is None:
        return None
    final, world = folder / (name if kind == "png" else f"{name}.npz"), work.world

    def make():
        if kind == "png":
            return PngWriter(final, unfinished=work.folder / name)
        return NpzWriter(final, work.count, (size, size), work.folder)

    def make_first() -> None:
        if final.exists() and not again and not work.done:
            raise UserError(f"{final} is there already. Choose another --out, or add --again to replace it.")
        made.append(make())

    made: list = []
    world.on_main(make_first)  # on the main rank before the others
    writer = made[0] if made else make()
    work.keep_only(writer.has)
    return writer


def real_features(
    reference: Path | None, wanted: Protocol, net: FeatureNet, world: World, batch: int, moments_known: bool
) -> dict[str, Tensor] | None:
    """Features of the pictures in a reference file, on the main rank, where a metric needs them. Collective."""
    needs = {"kid", "precision", "recall"} & set(wanted.generation) or not moments_known
    if reference is None or reference.suffix != ".npz" or not needs:
        return None
    with NpzFile(reference) as file:
        if "arr_0" not in file.names:
            return None
    pictures = NpzPictures(reference)
    with progress_line(world, len(pictures), "features of the reference") as progress:
        return runner.picture_features(pictures, net, world, batch, progress)


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------
def existing_samples(options: argparse.Namespace, overrides: list[str], world: World) -> int:
    """Measure samples that are there: an .npz or a folder."""
    settings = eval_settings(overrides)
    protocol = chosen_protocol(settings, "generation")
    pictures = open_any(options.target)
    count = enough(min(settings.num_images or len(pictures), len(pictures)), options.target, options)
    size = pictures.size[0]
    net = measure.feature_net(world.device, settings.network, protocol)
    path = measure.choose_reference(settings.reference, protocol, net, size, "generation", True)
    if path is None:
        raise UserError(
            f'nothing to compare with: protocol "{protocol.name}" names no reference for pictures of {size} px and '
            f'the network "{net.name}". Give eval.reference=FILE (run_make_reference.sh makes one).'
        )
    reference = measure.load_reference(path, net, "generation", size, world)
    job = {
        "samples": options.target,
        "pictures": pictures.fingerprint(),
        "count": count,
        "protocol": protocol.name,
        "network": net.name,
        "reference": str(path),
        "bootstrap": options.bootstrap,
        "infinity": options.infinity,
    }
    folder, known = open_folder(options.out, Path(options.target).stem, job, options.again, world)
    if known:
        return print_stored(folder) if world.is_main else 0
    context = {"job": job, "count": count, "net": net.name, "samples": options.target, "seed": None}

    def produce(indices: range) -> Tensor:
        return pictures.read(indices.start, indices.stop)

    return _measure_samples(
        options, settings, protocol, produce, count, size, net, reference, path, None, context, folder, world
    )


def validation_labels(config: RunConfig, num_classes: int) -> list[int] | None:
    """Of data.val_url. ImageNet's are known without its pictures, 50 of each class in the order of folders."""
    try:
        return measure.val_labels(open_source(config.data.val_url, "val"), num_classes) if config.data.val_url else None
    except UserError:
        if num_classes != IMAGENET_CLASSES or not config.data.val_url.rstrip("/").endswith("imagenet/val"):
            raise
        return [i // IMAGENET_VAL_EACH for i in range(IMAGENET_CLASSES * IMAGENET_VAL_EACH)]


def _training_pictures(config: RunConfig, stand_in: bool) -> DataSource:
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


def generated_samples(options: argparse.Namespace, overrides: list[str], world: World) -> int:
    """Sample and measure."""
    say = print if world.is_main else (lambda *_: None)
    made = open_generator(options.target, overrides, world, say)
    config, settings = made.config, made.config.eval
    protocol = chosen_protocol(settings, "generation")
    count = settings.num_images or SAMPLES
    kind = settings.labels or protocol.labels
    val = validation_labels(config, made.num_classes) if kind == "val" else None
    labels = protocols.make_labels(kind, count, made.num_classes, config.seed, val)
    rounding = settings.rounding or protocol.rounding
    net = measure.feature_net(world.device, settings.network, protocol)
    published = made.num_classes == IMAGENET_CLASSES
    path = measure.choose_reference(settings.reference, protocol, net, made.image_size, "generation", published)
    if path is not None:
        reference = measure.load_reference(path, net, "generation", made.image_size, world)
    else:
        train = _training_pictures(config, published and net.name == "lite0")
        say(f"reference: statistics of the training pictures ({config.data.pictures or config.data.url})")
        reference = measure.training_statistics(config, train, made.image_size, net, world)
    sampling = {
        "sample": {k: v for k, v in asdict(config.sample).items() if v is not None},
        "seed": config.seed,
        "labels": kind,
        "labels_fingerprint": f"{hash64(labels.numpy().tobytes().hex()):016x}",
        "rounding": rounding,
        "precision": config.train.precision,
        "bf16_pixels": made.bf16 and protocol.bf16_pixels,
    }
    job = {
        **made.facts,
        **sampling,
        "count": count,
        "protocol": protocol.name,
        "network": net.name,
        "write": options.write,
        "reference": str(path) if path else config.data.url,
        "bootstrap": options.bootstrap,
        "infinity": options.infinity,
    }
    folder, known = open_folder(options.out, Path(options.target.rstrip("/")).stem, job, options.again, world)
    if known:
        return print_stored(folder) if world.is_main else 0
    produce = measure.producer(
        made.sample,
        labels,
        config.seed,
        settings.batch,
        world.device,
        rounding,
        measure.pixel_dtype(protocol, made.bf16),
    )
    context = {
        "job": job,
        **made.facts,
        **sampling,
        "count": count,
        "net": net.name,
        "label_counts": protocols.describe_labels(labels, made.num_classes),
    }
    return _measure_samples(
        options,
        settings,
        protocol,
        produce,
        count,
        made.image_size,
        net,
        reference,
        path,
        labels,
        context,
        folder,
        world,
    )


def _measure_samples(
    options: argparse.Namespace,
    settings: EvalConfig,
    protocol: Protocol,
    produce: runner.Produce,
    count: int,
    size: int,
    net: FeatureNet,
    reference: Statistics | None,
    path: Path | None,
    labels: Tensor | None,
    context: dict[str, Any],
    folder: Path,
    world: World,
) -> int:
    moments_known = world.on_main(lambda: bool(reference.moments))
    real = real_features(path, protocol, net, world, settings.batch, moments_known)
    job = {k: v for k, v in context["job"].items() if k not in ("bootstrap", "infinity", "reference")}
    with Work(count, world, folder / "work", job) as work:
        writer = open_writer(options.write, "samples", folder, work, size, options.again)
        with progress_line(world, count, "samples") as progress, writer or contextlib.nullcontext():
            result = runner.evaluate_generation(
                produce,
                work,
                net,
                protocol,
                batch=settings.batch,
                reference=reference,
                real=real,
                writers=tuple(w for w in (Shown(work.folder), writer) if w),
                progress=progress,
                labels=labels,
                replicates=options.bootstrap,
                infinity=options.infinity,
            )
        if writer is not None:
            world.on_main(writer.finish)
        if result is None:
            return 0
        if options.keep:
            held = labels if labels is not None else torch.full((count,), -1)
            kept = {f"taps/{tap}": values for tap, values in result.features.items()} | {"labels": held}
            facts = {"net": net.name, "fingerprint": "samples"}
            write_atomic(folder / "features.safetensors", to_bytes(kept, metadata=facts))
        context |= {
            "protocol": protocol.name,
            "protocol_settings": asdict(protocol),
            "reference": reference.name,
            "reference_sha256": reference.sha256,
            "reference_fingerprint": reference.facts.source,
            "reference_facts": asdict(reference.facts),
            "inception_sha256": getattr(net, "weights_sha256", None),
            "preprocess": measure.preprocess_of(net),
        }
        finish(
            folder,
            f"Samples of {context['job'].get('weights', context.get('samples'))}",
            result,
            context,
            world,
            [("Samples", work.folder / "samples.png", "The first samples in index order.")],
        )
    work.forget()
    return 0


def finish(
    folder: Path,
    title: str,
    result: runner.Result,
    context: dict[str, Any],
    world: World,
    shown: list[tuple[str, Path, str]],
    tables: list = (),
) -> None:
    """Print and write what was found. Pictures move into the folder; metrics.json, which means "finished", is last."""
    from PIL import Image

    context = record.facts(world.device, **context)
    print(record.table(result))
    pictures = [(name, Image.open(path), caption) for name, path, caption in shown if path.is_file()]
    record.page(folder, title, result, context, pictures, tables)
    for _, path, _ in shown:
        if path.is_file():
            os.replace(path, folder / path.name)
    record.write(folder, result, context)
    print(f"written to {folder}: metrics.json, report.html")
