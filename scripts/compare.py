#!/usr/bin/env python3
"""Compare tokenizers, or generators, under one protocol on one page.

    bash run_compare.sh work_dirs/A work_dirs/B pretrained_models/C.pt --data folder://data/imagenet/val --num 5000
    bash run_compare.sh reAR-B.safetensors reAR-L.safetensors --num 10000 --bootstrap 50

Tokenizers: what is compared (training data, resolution, crop, pictures, rounding, parameters, tokens), rFID, PSNR, SSIM and
LPIPS with 95 % intervals and paired differences against the first one, bits per pixel as they are and entropy coded,
codebook use by branch and scale, speed and memory, a rate-distortion plot, and the regions where they disagree most; with
optional packages also whether texts are still read and faces recognised (TokBench's T-ACC, T-NED, F-Sim).
Generators: FID, IS, precision and recall of samples. Writes report.html, compare.csv, compare.tex and metrics.json; what
the evaluation of each one writes lies in a folder beside them. The same command continues after a kill. Without targets
the tokenizers of pretrained_models/tiny are compared.

options:
  --data URL         pictures for tokenizers (default those that their training left out, as far as their weights tell, else
                     folder://data/imagenet/val): a URL, folder or .npz
  --num N            the first N pictures, or N samples
  --probe URL        also linear-probe accuracies on these labelled pictures (train, of which --num says how many, and val)
  --bootstrap N      replicates of the intervals of FID and IS (default 20; 0: none)
  --text-and-faces N the first N pictures in which texts and faces are looked for, where their recognisers are installed
                     (default 1,000; 0: none)
  --texts FILE       what the texts say, as JSON lines (docs/compare.md); otherwise what is read in the originals
  --seconds S        time for each speed (default 5; 0: no speeds)
  --precision P      of tokenizers' matrix products, bf16 or fp32 (default)
  --workers N        decoding processes per rank (default 4)
  --out FOLDER       default work_dirs/compare/<names>
  --again            measure anew
  --check            only look for mistakes
key=value: eval.protocol=NAME (default adm), eval.batch ...; for generators any key of a config.
"""

import argparse

from core import cli
from scripts import command_line

TINY_NUM = 1000  # samples of tiny generators


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = command_line.parser_of(
        "bash run_compare.sh", __doc__, "bash run_compare.sh A B [C ...] [key=value ...] [options]"
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    command_line.add_options(parser, str, data=None, probe=None, texts=None, out=None)
    command_line.add_options(parser, int, num=None, bootstrap=20, text_and_faces=1000, workers=command_line.WORKERS)
    command_line.add_options(parser, float, seconds=5.0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help=argparse.SUPPRESS)
    command_line.add_flags(parser, "again", "check")
    options = command_line.parse(parser, "evaluate", arguments)
    options.targets, settings = command_line.split_settings(options.words)
    options.taken = ""
    if not options.targets:
        from core.weights import released

        options.targets = released.shipped()
        options.taken = f"no model was named: comparing the tiny tokenizers {', '.join(options.targets)}"
    return options, [*settings, *command_line.overrides_of({"eval.num_images": options.num})]


def main(arguments: list[str]) -> int:
    options, settings = parse(arguments)
    from core import launch
    from run import compare

    launch.say(options.taken)
    if compare.prepare(options, settings) == "generator":  # before a network is loaded
        launch.say(command_line.few_of_tiny(options.targets, settings, options.num, TINY_NUM))
    if options.check:
        return 0
    from core import dist

    with dist.start("auto") as world:
        return compare.compare(options, settings, world)


if __name__ == "__main__":
    cli.run(main)
