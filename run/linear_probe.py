"""What run_linear_probe.sh does: features of a tokenizer, a linear classifier on each of them, and the report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from core.dist import World
from core.errors import UserError
from core.files import human_bytes
from core.rng import hash64, permutation
from core.specs import DataSource
from core.train.log import progress_line
from data.checks import require_labels, say_left_out
from data.sources import open_source
from evaluation.measure import Result, Stopwatch
from evaluation.pictures import SourcePictures
from evaluation.probe import ProbeSettings, features_fingerprint, pooled_features, train_probe
from evaluation.report import precision_of
from evaluation.scores import Score
from run.evaluate import tokenizer_section
from run.load import read_tokenizer
from run.measurement import open_folder, print_stored, write_result
from run.unseen import both_halves, choose, training_data

# At least so many of both: ten epochs of a thousand pictures are 40 steps, which teach nothing.
EPOCHS, STEPS = 10, 1000


def section_of(options: argparse.Namespace) -> dict[str, Any]:
    """The tokenizer that was asked for, as a section of a config."""
    return {**options.tokenizer, **tokenizer_section(options.weights), "use_ema": not options.raw}


def open_sources(url: str) -> tuple[DataSource, DataSource]:
    """(training pictures, test pictures), of the same classes; UserError where they are not fit for a probe."""
    train, val = open_source(url, "train"), open_source(url, "val")
    require_labels(train)
    require_labels(val)
    if train.num_classes < 2 or train.num_classes != val.num_classes:
        raise UserError(
            f"{url}: a probe needs at least 2 classes, the same in train and val; found {train.num_classes} "
            f"and {val.num_classes}."
        )
    if train.class_names != val.class_names:
        first = next(i for i, (a, b) in enumerate(zip(train.class_names, val.class_names)) if a != b)
        raise UserError(
            f"{url}: class {first} is {train.class_names[first]} in train and {val.class_names[first]} in val. "
            "Name the classes of both with ?classes=FILE."
        )
    if train.fingerprint() == val.fingerprint():
        raise UserError(
            f"{url} gives the same pictures for training and testing. Name a folder with train/ and val/, or "
            "a URL with {split} in it."
        )
    return train, val


def name_pictures(options: argparse.Namespace) -> None:
    """Where no URL was named: both halves of what the tokenizer was trained on, or ImageNet."""
    if options.url is None:
        data = training_data(tokenizer_section(options.weights)["weights"], options.tokenizer)
        options.url = choose(both_halves(data), "its training's", f"bash run_linear_probe.sh {options.weights}")


def count_of(options: argparse.Namespace, train: DataSource) -> int:
    """How many pictures the classifier learns from."""
    return min(options.num or len(train), len(train))


def settings_of(options: argparse.Namespace, count: int) -> ProbeSettings:
    """Of the classifier that learns from `count` pictures."""
    epochs = options.epochs
    if epochs is None:
        epochs = max(EPOCHS, -(-STEPS // max(1, count // options.batch)))
    return ProbeSettings(epochs, options.batch, options.lr, options.weight_decay, options.schedule, 1, options.seed)


def job_of(options: argparse.Namespace, encoding: str, train: DataSource, val: DataSource) -> dict[str, Any]:
    """What decides the accuracies, as metrics.json has it.

    Args:
        encoding: evaluation.probe.features_fingerprint.
    """
    pictures = [source.fingerprint() for source in (train, val)]
    sizes = [source.file_sizes() or "" for source in (train, val)]
    return {
        "encoding_fingerprint": encoding,
        "url": options.url,
        "url_sizes": f"{hash64(*pictures, *sizes):016x}",
        "train": count_of(options, train),
        "val": len(val),
        "settings": vars(settings_of(options, count_of(options, train))),
        "features": options.features,
    }


def linear_probe(options: argparse.Namespace, train: DataSource, val: DataSource, world: World) -> int:
    """Probe every feature that was asked for, and write the accuracies. Collective; returns the exit code."""
    loaded = read_tokenizer(section_of(options), world=world)
    tokenizer = loaded.module.to(world.device)
    encoding = features_fingerprint(tokenizer)
    job = job_of(options, encoding, train, val)
    stem = f"probe-{Path(options.weights.rstrip('/')).stem}"
    folder, is_known = open_folder(options.out, stem, job, options.again, world)
    if is_known:
        return print_stored(folder) if world.is_main else 0
    count = count_of(options, train)
    rows = range(count) if count == len(train) else sorted(permutation(len(train), "probe")[:count].tolist())
    watch, sides = Stopwatch(world.device), []
    for name, source, chosen in (("train", train, rows), ("val", val, range(len(val)))):
        say_left_out(world.say, source, f"{options.url} ({name})")
        pictures = SourcePictures(source, tokenizer.image_size, options.workers, chosen, f"{options.url} ({name})")
        with progress_line(world, len(pictures), f"features of {name}") as progress, watch("features"):
            whose = encoding, loaded.fingerprint
            sides.append(pooled_features(tokenizer, pictures, world, options.encode_batch, *whose, progress))
    if not world.is_main:
        return 0
    settings = settings_of(options, count)
    scores = train_probes(options, sides, train.num_classes, settings, watch, world)
    context = {
        **job,
        "job": job,
        "weights": options.weights,
        "weights_fingerprint": loaded.fingerprint,
        "use_ema": not options.raw,
        "count": len(val),
        "net": "linear probe",
        "seed": options.seed,
        "protocol": "linear probe",
        "views": "centre crop, no augmentation",
        "precision": precision_of(world.device),
        "kept": human_bytes(sum(values.nbytes for values in sides[0][0].values())),
    }
    result = Result(scores, seconds=dict(watch.seconds))
    write_result(folder, f"Linear probe of {options.weights}", result, context)
    return 0


def train_probes(
    options: argparse.Namespace,
    sides: list[tuple[dict[str, Tensor], Tensor]],
    num_classes: int,
    settings: ProbeSettings,
    watch: Stopwatch,
    world: World,
) -> list[Score]:
    """Two accuracies, of the last and of the best epoch, of each feature.

    Args:
        sides: of training and of testing, (feature -> (N, D), labels (N,)).
    """
    (features, labels), (val_features, val_labels) = sides
    wanted = options.features.split(",") if options.features else list(features)
    if unknown := [name for name in wanted if name not in features]:
        raise UserError(f"{options.weights} offers no features {', '.join(unknown)}; it has {', '.join(features)}.")
    scores = []
    for name in wanted:
        with watch("training"):
            probe = train_probe(
                features[name], labels, val_features[name], val_labels, num_classes, settings, world.device
            )
        note = (
            f"best in epoch {probe.best_epoch} of {settings.epochs}; {features[name].shape[1]} dimensions; "
            f"{probe.train_accuracy:.1%} of training pictures"
        )
        scores += [
            Score(f"probe_top1_{name}", probe.last, len(val_labels), "linear probe", options.url, note=note),
            Score(f"probe_top1_{name}_best_epoch", probe.best, len(val_labels), "linear probe", options.url),
        ]
    return scores
