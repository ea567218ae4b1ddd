#!/usr/bin/env python3
"""Make reference statistics from pictures: what FID, sFID and rFID compare with.

    bash run_make_reference.sh folder://data/imagenet/train data/fid_stats/train256.npz --size 256 --for generation
    bash run_make_reference.sh folder://data/imagenet/val   data/fid_stats/val256.npz   --size 256 --for reconstruction
    bash run_make_reference.sh samples.npz                  stats.safetensors

URL: a data URL, a folder of pictures, or an .npz with arr_0. OUT: .npz (mu, sigma, mu_s, sigma_s: ADM's evaluator,
pytorch-fid and RecTok read it too) or .safetensors. The file records count, network, input, size and a fingerprint of
the pictures, and is refused where they do not fit. A killed job goes on where it stopped.

options:
  --size N           crop to N x N as ADM does; without it pictures are taken as they are
  --for PURPOSE      generation (a training set) or reconstruction (originals of a tokenizer); default: either.
                     Decides which split is read where URL has several: train, otherwise val
  --num N            the first N pictures
  --keep-pictures N  also keep N pictures, spread over the set, as arr_0: precision, recall and KID need them
  --dtype NAME       of means and covariances in an .npz: torch-fidelity (default: float32 and float64, which that
                     library and RecTok's evaluation assert), float32 or float64 (both alike)
  --network NAME     inception (default), lite0 (the offline stand-in), or a file of Inception weights
  --protocol NAME    whose input to the network (default adm; pytorch-fid resizes differently)
  --batch N, --workers N
  --check            only look for mistakes
"""

import argparse

from core import caller, cli
from scripts import command_line


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_line.parser_of(
        "bash run_make_reference.sh", __doc__, "bash run_make_reference.sh URL OUT [options]"
    )
    parser.add_argument("url")
    parser.add_argument("out")
    parser.add_argument(
        "--for", dest="purpose", choices=("generation", "reconstruction"), default=None, help=argparse.SUPPRESS
    )
    command_line.add_options(parser, str, network="inception", protocol="adm")
    parser.add_argument(
        "--dtype", choices=("torch-fidelity", "float32", "float64"), default="torch-fidelity", help=argparse.SUPPRESS
    )
    command_line.add_options(parser, int, size=None, num=None, keep_pictures=0, batch=64, workers=command_line.WORKERS)
    command_line.add_flags(parser, "check")
    options = command_line.parse(parser, "make_reference", arguments)
    options.out = caller.written(options.out)
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    from run.make_reference import check, make_reference

    pictures = check(options)
    if options.check:
        return 0
    from core import dist

    with dist.start("auto") as world:
        return make_reference(options, pictures, world)


if __name__ == "__main__":
    cli.run(main)
