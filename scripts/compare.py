#!/usr/bin/env python3
"""Compare tokenizers, or generators, under one protocol on one page.

    bash run_compare.sh work_dirs/A work_dirs/B pretrained_models/C.pt --data folder://data/imagenet/val --num 5000
    bash run_compare.sh reAR-B.safetensors reAR-L.safetensors --num 10000 --bootstrap 50

Tokenizers: what is compared (training data, resolution, crop, pictures, rounding, parameters, tokens), rFID, PSNR, SSIM and
LPIPS with 95 % intervals and paired differences against the first one, bits per pixel as they are and entropy coded,
codebook use by branch and scale, speed and memory, a rate-distortion plot, and the regions where they disagree most.
Generators: FID, IS, precision and recall of samples. Writes report.html, compare.csv, compare.tex and metrics.json; what
the evaluation of each one writes lies in a folder beside them. The same command continues after a kill. Without targets
the tokenizers of pretrained_models/tiny are compared.

options:
  --data URL         pictures for tokenizers (default those that their training left out, as far as their weights tell, else
                     folder://data/imagenet/val): a URL, folder or .npz
  --num N            the first N pictures, or N samples
  --probe URL        also linear-probe accuracies on these labelled pictures (train and val)
  --bootstrap N      replicates of the intervals of FID and IS (default 20; 0: none)
  --seconds S        time for each speed (default 5; 0: no speeds)
  --precision P      of tokenizers' matrix products, bf16 or fp32 (default)
  --workers N        decoding processes per rank (default 4)
  --out FOLDER       default work_dirs/compare/<names>
  --again            measure anew
  --check            only look for mistakes
key=value: eval.protocol=NAME (default adm), eval.batch ...; for generators any key of a config.
"""

import argparse
import os

from core import cli
from scripts import command_line

TINY_NUM = 1000  # samples of tiny generators


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="bash run_compare.sh",
        usage="bash run_compare.sh A B [C ...] [key=value ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for name, kind, default in (
        ("--data", str, None),
        ("--num", int, None),
        ("--probe", str, None),
        ("--bootstrap", int, 20),
        ("--seconds", float, 5.0),
        ("--workers", int, min(4, os.cpu_count() or 1)),
        ("--out", str, None),
    ):
        parser.add_argument(name, type=kind, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help=argparse.SUPPRESS)
    for flag in ("--again", "--check"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    options = command_line.parse(parser, "evaluate", arguments)
    settings = [w for w in options.words if "=" in w and "://" not in w.split("=")[0]]
    options.targets = [w for w in options.words if w not in settings]
    options.taken = ""
    if not options.targets:
        from core.weights import released

        options.targets = released.shipped()
        options.taken = f"no model was named: comparing the tiny tokenizers {', '.join(options.targets)}"
    if options.num is not None:
        settings.append(f"eval.num_images={options.num}")
    return options, settings


def main(arguments: list[str]) -> int:
    options, settings = parse(arguments)
    from core import launch
    from run import compare

    if options.taken and launch.speaks():
        print(options.taken, flush=True)
    if compare.prepare(options, settings) == "generator":  # before a network is loaded
        taken = command_line.few_of_tiny(options.targets, settings, options.num, TINY_NUM)
        if taken and launch.speaks():
            print(taken, flush=True)
    if options.check:
        return 0
    from core import dist

    world = dist.start("auto")
    try:
        return compare.compare(options, settings, world)
    finally:
        world.stop()


if __name__ == "__main__":
    cli.run(main)
