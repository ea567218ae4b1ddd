#!/usr/bin/env python3
"""Sample from a generator and measure the samples, or measure samples that exist.

    bash run_eval_generator.sh work_dirs/MY_RUN [key=value ...]
    bash run_eval_generator.sh reAR-L.safetensors             a released file, as its number was published
    bash run_eval_generator.sh configs/rectok/ditdh_xl.yaml --weights FILE sample.scale=1.3
    bash run_eval_generator.sh FILE.pth --tokenizer FILE.pth eval.protocol=rectok
    bash run_eval_generator.sh samples.npz eval.reference=data/fid_stats/VIRTUAL_imagenet256_labeled.npz
    bash run_eval_generator.sh folder/of/pngs eval.protocol=torch-fidelity eval.reference=...

No picture touches the disk unless --write asks for it. Picture i depends on (seed, its label, i) alone, so the number
of GPUs, the batch size and interruptions change nothing: the same command goes on where it was killed. Writes
metrics.json, report.html and samples.png to --out.

A released file in pretrained_models/ is known by its name: its tokenizer, guidance and protocol are those of its published
number (core/weights/released.toml), unless settings say otherwise. A config stands for the run it trained, or for the file
that was released for it.

options:
  --weights FILE    weights of the generator, where no config is named first; or other weights for it
  --tokenizer FILE  the tokenizer that decodes its latents
  --num N           pictures (default eval.num_images, else 50000, of tiny models 1000; all of existing samples)
  --out FOLDER      default work_dirs/eval/<name>-<facts>
  --write npz|png   keep the samples too: samples.npz (arr_0, as ADM's evaluator reads it) or samples/000000.png ...
  --bootstrap N     confidence intervals from N replicates
  --infinity        also FID and IS extrapolated to infinitely many pictures
  --keep            keep the features (features.safetensors)
  --again           measure anew although --out holds the result
  --check           only look for mistakes
"""

import argparse

from core import cli
from scripts import command_line

TINY_NUM = 1000


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = command_line.parser_of(
        "bash run_eval_generator.sh", __doc__, "bash run_eval_generator.sh TARGET [key=value ...] [options]"
    )
    parser.add_argument("target", nargs="?")
    parser.add_argument("settings", nargs="*")
    command_line.add_options(parser, int, num=None, bootstrap=0)
    command_line.add_options(parser, str, weights=None, tokenizer=None, out=None)
    parser.add_argument("--write", choices=("npz", "png"), default=None, help=argparse.SUPPRESS)
    command_line.add_flags(parser, "infinity", "keep", "again", "check")
    options = command_line.parse(parser, "evaluate_generator", arguments)
    options.target, settings = command_line.target_of(options.target, options.weights, options.settings)
    settings += command_line.overrides_of({"tokenizer.weights": options.tokenizer, "eval.num_images": options.num})
    options.taken = command_line.few_of_tiny([options.target], settings, options.num, TINY_NUM)
    return options, settings


def main(arguments: list[str]) -> int:
    options, settings = parse(arguments)
    from core import launch
    from run import evaluate_generator

    launch.say(options.taken)
    existing = evaluate_generator.holds_pictures(options.target)
    if options.check or not existing:  # before a network is loaded
        evaluate_generator.check_samples(options, settings, existing)
    if options.check:
        return 0
    from core import dist

    with dist.start("auto") as world:
        measurement = evaluate_generator.existing_samples if existing else evaluate_generator.generated_samples
        return measurement(options, settings, world).run()


if __name__ == "__main__":
    cli.run(main)
