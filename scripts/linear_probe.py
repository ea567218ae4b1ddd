#!/usr/bin/env python3
"""Top-1 accuracy of a linear classifier on the frozen features of a tokenizer (ImageFolder's ACC).

    bash run_linear_probe.sh pretrained_models/imagenet-4096.pt folder://data/imagenet
    bash run_linear_probe.sh work_dirs/MY_RUN embedded://emoji64

WEIGHTS: run folder, checkpoint, released file, hf://owner/repo/file or a config. URL: pictures with train and val
splits (default those of its training, as far as its weights tell them, else folder://data/imagenet). Every feature that the tokenizer offers is probed: latents of continuous
tokenizers; embedded codes per branch and of all branches of discrete ones; what a tokenizer's own probe_features
names. Features are averaged over tokens, of centre crops, kept in work_dirs/cache and computed once.

options:
  --epochs N --batch N --lr X --weight-decay X --schedule cosine|constant --seed N     of the classifier
  --num N            the first N training pictures (a subset spread over the classes)
  --features NAMES   only these, comma-separated
  --raw              the weights as trained, not their moving average
  --out FOLDER, --workers N, --encode-batch N
  --again            measure anew although --out holds the result
  --check            only look for mistakes
"""

import argparse
import os

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
    parser.add_argument("url", nargs="?")
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
    for flag in ("--raw", "--again", "--check"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    words, known = command_line.tokenizer_settings(arguments)
    options = command_line.parse(parser, "linear_probe", words)
    options.tokenizer = known
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    from run.linear_probe import linear_probe, name_pictures, open_sources, section_of
    from run.load import lay_out_tokenizer

    lay_out_tokenizer(section_of(options))  # before the pictures are looked at
    name_pictures(options)
    train, val = open_sources(options.url)
    if options.check:
        return 0
    from core import dist

    world = dist.start("auto")
    try:
        return linear_probe(options, train, val, world)
    finally:
        world.stop()


if __name__ == "__main__":
    cli.run(main)
