#!/usr/bin/env python3
"""Top-1 accuracy of a linear classifier on the frozen features of a tokenizer (ImageFolder's ACC).

    bash run_linear_probe.sh pretrained_models/imagenet-4096.pt folder://data/imagenet
    bash run_linear_probe.sh work_dirs/MY_RUN embedded://emoji64

WEIGHTS: run folder, checkpoint, released file, hf://owner/repo/file or a config. URL: pictures with train and val
splits (default folder://data/imagenet). Every feature that the tokenizer offers is probed: latents of continuous
tokenizers; embedded codes per branch and of all branches of discrete ones; what a tokenizer's own probe_features
names. Features are averaged over tokens, of centre crops, kept in work_dirs/cache and computed once.

options:
  --epochs N --batch N --lr X --weight-decay X --schedule cosine|constant --seed N     of the classifier
  --num N            the first N training pictures (a subset spread over the classes)
  --features NAMES   only these, comma-separated
  --raw              the weights as trained, not their moving average
  --out FOLDER, --workers N, --encode-batch N
  --check            only look for mistakes
"""

import argparse
import os
from pathlib import Path

from core import cli
from scripts import command_line


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash run_linear_probe.sh",
        usage="bash run_linear_probe.sh WEIGHTS [URL] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights")
    parser.add_argument("url", nargs="?", default="folder://data/imagenet")
    for name, kind, default in (
        ("--epochs", int, 10),
        ("--batch", int, 256),
        ("--lr", float, 1e-3),
        ("--weight-decay", float, 1e-4),
        ("--seed", int, 0),
        ("--num", int, None),
        ("--features", str, None),
        ("--out", str, None),
        ("--workers", int, min(4, os.cpu_count() or 1)),
        ("--encode-batch", int, 64),
    ):
        parser.add_argument(name, type=kind, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help=argparse.SUPPRESS)
    for flag in ("--raw", "--check"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    words, known = command_line.tokenizer_settings(arguments)
    options = command_line.parse(parser, "linear_probe", words)
    options.tokenizer = known
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    from core.errors import UserError
    from data.base import require_labels
    from data.sources import open_source
    from run import evaluate

    section = {**options.tokenizer, **evaluate.tokenizer_section(options.weights), "use_ema": not options.raw}
    train, val = open_source(options.url, "train"), open_source(options.url, "val")
    require_labels(train)
    require_labels(val)
    if train.num_classes < 2 or train.num_classes != val.num_classes:
        raise UserError(
            f"{options.url}: a probe needs at least 2 classes, the same in train and val; found {train.num_classes} "
            f"and {val.num_classes}."
        )
    if train.class_names != val.class_names:
        first = next(i for i, (a, b) in enumerate(zip(train.class_names, val.class_names)) if a != b)
        raise UserError(
            f"{options.url}: class {first} is {train.class_names[first]} in train and {val.class_names[first]} in val. "
            "Name the classes of both with ?classes=FILE."
        )
    if train.fingerprint() == val.fingerprint():
        raise UserError(
            f"{options.url} gives the same pictures for training and testing. Name a folder with train/ and val/, or "
            "a URL with {split} in it."
        )
    if options.check:
        return 0

    from core import dist
    from core.files import human_bytes
    from core.rng import permutation
    from core.train.log import progress_line
    from evaluation.measure import Result, Stopwatch
    from evaluation.pictures import SourcePictures
    from evaluation.probe import ProbeSettings, pooled_features, train_probe
    from evaluation.scores import Score
    from run.load import load_tokenizer
    from run.measurement import write_result

    world = dist.start("auto")
    try:
        loaded = load_tokenizer(section)
        tokenizer, fingerprint = loaded.module, loaded.fingerprint
        tokenizer.to(world.device)
        count = min(options.num or len(train), len(train))
        rows = range(count) if count == len(train) else sorted(permutation(len(train), "probe")[:count].tolist())
        watch, sides = Stopwatch(world.device), []
        for name, source, chosen in (("train", train, rows), ("val", val, range(len(val)))):
            pictures = SourcePictures(source, tokenizer.image_size, options.workers, chosen, f"{options.url} ({name})")
            with progress_line(world, len(pictures), f"features of {name}") as progress, watch("features"):
                sides.append(pooled_features(tokenizer, pictures, world, options.encode_batch, fingerprint, progress))
        if not world.is_main:
            return 0
        (features, labels), (val_features, val_labels) = sides
        wanted = options.features.split(",") if options.features else list(features)
        if unknown := [name for name in wanted if name not in features]:
            raise UserError(f"{options.weights} offers no features {', '.join(unknown)}; it has {', '.join(features)}.")
        settings = ProbeSettings(
            options.epochs, options.batch, options.lr, options.weight_decay, options.schedule, 1, options.seed
        )
        scores = []
        for name in wanted:
            with watch("training"):
                found = train_probe(
                    features[name], labels, val_features[name], val_labels, train.num_classes, settings, world.device
                )
            note = (
                f"best in epoch {found.best_epoch} of {options.epochs}; {features[name].shape[1]} dimensions; "
                f"{found.train_accuracy:.1%} of training pictures"
            )
            scores += [
                Score(f"probe_top1_{name}", found.last, len(val), "linear probe", options.url, note=note),
                Score(f"probe_top1_{name}_best_epoch", found.best, len(val), "linear probe", options.url),
            ]
        job = {
            "weights": options.weights,
            "weights_fingerprint": fingerprint,
            "use_ema": not options.raw,
            "url": options.url,
            "train": count,
            "val": len(val),
            "settings": vars(settings),
        }
        folder = Path(options.out or f"work_dirs/eval/probe-{Path(options.weights.rstrip('/')).stem}")
        context = {
            **job,
            "job": job,
            "count": len(val),
            "net": "linear probe",
            "seed": options.seed,
            "protocol": "linear probe",
            "views": "centre crop, no augmentation",
            "kept": human_bytes(sum(f.nbytes for f in features.values())),
        }
        result = Result(scores, seconds=dict(watch.seconds))
        write_result(folder, f"Linear probe of {options.weights}", result, context, world.device)
        return 0
    finally:
        world.stop()


if __name__ == "__main__":
    cli.run(main)
