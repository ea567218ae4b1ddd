#!/usr/bin/env python3
"""Measure how well a tokenizer reconstructs, or compare two sets of pictures.

    bash run_eval_tokenizer.sh pretrained_models/RecTok_decft.pth
    bash run_eval_tokenizer.sh work_dirs/MY_RUN folder://data/imagenet/val --num 5000
    bash run_eval_tokenizer.sh --original ORIGINALS --reconstructed RECONSTRUCTIONS        folders or .npz files

WEIGHTS: run folder, checkpoint, released file, hf://owner/repo/file or a config; URL: pictures, default
those that its training left out, as far as its weights tell, else folder://data/imagenet/val; or a folder of pictures, or an .npz with arr_0 of the tokenizer's size. rFID, PSNR, SSIM, LPIPS
and codebook use, as eval.protocol=NAME defines them: by default the protocol of the tokenizer's authors, or that of the
run's config. The reference of rFID is the cropped originals themselves, a file that the protocol names, or
eval.reference=FILE with their statistics. What the weights do not tell is given as in a config: tokenizer.length=32.
Writes metrics.json, report.html and PNGs to --out. A killed job goes on where it stopped.

options:
  --num N            the first N pictures
  --out FOLDER       default work_dirs/eval/<name>-<facts>
  --write npz|png    keep the reconstructions too: reconstructions.npz (arr_0, as ADM's evaluator reads it) or
                     reconstructions/000000.png ...
  --precision P      of matrix products, bf16 or fp32 (default)
  --perturb A,B,D    also pFID, of codes disturbed so: in a share B of the pictures each code is replaced with
                     probability A by one of its D nearest, itself among them (say 0.5,0.1,50)
  --bootstrap N      confidence intervals of rFID from N replicates (those of PSNR, SSIM and LPIPS always come)
  --infinity         also rFID extrapolated to infinitely many pictures
  --raw              the weights as trained, not their moving average
  --size N           with --original: crop all pictures to N x N as ADM does
  --workers N        decoding processes per rank (default 4)
  --again            measure anew although --out holds the result
  --check            only look for mistakes
"""

import argparse

from core import cli
from scripts import command_line


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = command_line.parser_of(
        "bash run_eval_tokenizer.sh", __doc__, "bash run_eval_tokenizer.sh WEIGHTS [URL] [eval.key=value ...]"
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    command_line.add_options(parser, int, num=None, batch=None, size=None, workers=command_line.WORKERS, bootstrap=0)
    command_line.add_options(parser, str, out=None, perturb=None, original=None, reconstructed=None)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--write", choices=("npz", "png"), default=None, help=argparse.SUPPRESS)
    command_line.add_flags(parser, "raw", "infinity", "again", "check")
    words, known = command_line.tokenizer_settings(arguments)
    options = command_line.parse(parser, "evaluate", words)
    options.tokenizer = known
    positional, settings = command_line.split_settings(options.words)
    settings += command_line.overrides_of({"eval.num_images": options.num, "eval.batch": options.batch})
    if (options.original is None) != (options.reconstructed is None):
        parser.error("--original and --reconstructed go together")
    if len(positional) != 0 if options.original else not 1 <= len(positional) <= 2:
        parser.error("give WEIGHTS and perhaps a URL, or --original and --reconstructed")
    if options.original and options.write:
        parser.error("--write keeps what a tokenizer makes; --reconstructed names pictures that are there")
    if options.original and options.perturb:
        parser.error("--perturb disturbs the codes of a tokenizer; pictures alone have none")
    options.weights, options.url = [*positional, None, None][:2]
    return options, settings


def main(arguments: list[str]) -> int:
    options, settings = parse(arguments)
    from run import evaluate

    if options.check:
        evaluate.check_reconstructions(options, settings)
        return 0
    from core import dist

    with dist.start("auto") as world:
        measurement = evaluate.by_folders if options.original else evaluate.by_tokenizer
        return measurement(options, settings, world).run()


if __name__ == "__main__":
    cli.run(main)
