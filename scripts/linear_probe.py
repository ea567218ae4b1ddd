#!/usr/bin/env python3
"""Top-1 accuracy of a linear classifier on the frozen features of a tokenizer (ImageFolder's ACC).

    bash run_linear_probe.sh pretrained_models/imagenet-4096.pt folder://data/imagenet
    bash run_linear_probe.sh work_dirs/MY_RUN embedded://emoji64

WEIGHTS: run folder, checkpoint, released file, hf://owner/repo/file or a config. URL: pictures with train and val
splits (default those of its training, as far as its weights tell them, else folder://data/imagenet). Every feature that the tokenizer offers is probed: latents of continuous
tokenizers; embedded codes per branch and of all branches of discrete ones; what a tokenizer's own probe_features
names. Features are averaged over tokens, of centre crops, kept in work_dirs/cache and computed once.

options:
  --epochs N (default 10, more where that is less than 1,000 steps)
  --batch N --lr X --weight-decay X --schedule cosine|constant --seed N     of the classifier
  --num N            the first N training pictures (a subset spread over the classes)
  --features NAMES   only these, comma-separated
  --raw              the weights as trained, not their moving average
  --out FOLDER, --workers N, --encode-batch N
  --again            measure anew although --out holds the result
  --check            only look for mistakes
"""

import argparse

from core import cli
from scripts import command_line


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_line.parser_of(
        "bash run_linear_probe.sh", __doc__, "bash run_linear_probe.sh WEIGHTS [URL] [options]"
    )
    parser.add_argument("weights")
    parser.add_argument("url", nargs="?")
    command_line.add_options(parser, int, epochs=None, batch=256, seed=0, num=None, encode_batch=64)
    command_line.add_options(parser, int, workers=command_line.WORKERS)
    command_line.add_options(parser, float, lr=1e-3, weight_decay=1e-4)
    command_line.add_options(parser, str, features=None, out=None)
    parser.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help=argparse.SUPPRESS)
    command_line.add_flags(parser, "raw", "again", "check")
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

    with dist.start("auto") as world:
        return linear_probe(options, train, val, world)


if __name__ == "__main__":
    cli.run(main)
