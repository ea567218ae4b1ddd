#!/usr/bin/env python3
"""Find the best sampling settings of a generator.

    bash run_sweep.sh work_dirs/MY_RUN --scale 1:8
    bash run_sweep.sh reAR-L.safetensors --scale 2:10:0.5 --schedule constant,cosine --power 1,2 --num 10000
    bash run_sweep.sh configs/rectok/ditdh_xl.yaml --scale 1:2:0.1 --interval 0:1,0.1:0.9 --ema true,false

All combinations are compared by FID on few pictures, the better part on more, the last ones on all (--num): about a third
of the pictures of the whole grid. Picture i has the same noise and label everywhere. Writes report.html with curves,
sweep.csv, best.yaml (a config snippet) and best.txt, which run_sample.sh and run_eval_generator.sh take:
bash run_sample.sh GENERATOR --labels 0-9 --out DIR $(cat OUT/best.txt). The same command continues after a kill.

Without a GENERATOR: tiny/rear, a tiny model that comes with the code. Such ones have 400 pictures in the last comparison.
Values: 1,2.5,4 or FROM:TO (steps of 1) or FROM:TO:STEP; one per codebook: [3,2]. Without any, --scale 1:8.

options:
  --scale --temperature --top-k --top-p --steps --power V    numbers
  --interval A:B,C:D    guide only while t is inside
  --schedule WORDS      of the scale: constant, linear, cosine
  --ema true,false      moving average or weights as trained; or files of generator weights, to choose one of them
  --by fid|is           what decides (default fid: the Frechet distance of the protocol's network)
  --num N               pictures of the last comparison (default eval.num_images, else 50000)
  --first N             pictures of the first comparison (default: as few as make the sweep cost 40 % of the grid)
  --bootstrap N         replicates of the intervals (default 20; 0: none)
  --weights FILE, --tokenizer FILE     as for run_sample.sh
  --out FOLDER          default work_dirs/sweep/<name>
  --again               begin anew
  --check               only look for mistakes
"""

import argparse

from core import cli
from scripts import command_line

TINY, TINY_NUM = "tiny/rear", 400
AXES = ("scale", "interval", "schedule", "power", "temperature", "top_k", "top_p", "steps", "ema")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str], dict[str, str]]:
    parser = command_line.parser_of(
        "bash run_sweep.sh", __doc__, "bash run_sweep.sh GENERATOR [key=value ...] [options]"
    )
    parser.add_argument("target", nargs="?")
    parser.add_argument("settings", nargs="*")
    command_line.add_options(parser, str, **dict.fromkeys((*AXES, "weights", "tokenizer", "out")))
    command_line.add_options(parser, int, num=None, first=None, bootstrap=20)
    parser.add_argument("--by", choices=("fid", "is"), default="fid", help=argparse.SUPPRESS)
    command_line.add_flags(parser, "again", "check")
    options = command_line.parse(parser, "evaluate_generator", arguments)
    options.target, settings = command_line.target_of(options.target, options.weights, options.settings, "")
    options.taken = ""
    if not options.target:
        options.target, options.taken = TINY, f"no generator was named: sweeping {TINY}; "
    settings += command_line.overrides_of({"tokenizer.weights": options.tokenizer, "eval.num_images": options.num})
    options.taken += command_line.few_of_tiny([options.target], settings, options.num, TINY_NUM)
    options.infinity = False
    return options, settings, {name: getattr(options, name) for name in AXES if getattr(options, name) is not None}


def main(arguments: list[str]) -> int:
    options, settings, axes = parse(arguments)
    from core import launch
    from run import sweep

    launch.say(options.taken)
    sweep.prepare(options, settings, axes)  # before a network is loaded
    if options.check:
        return 0
    from core import dist

    with dist.start("auto") as world:
        return sweep.sweep(options, settings, axes, world)


if __name__ == "__main__":
    cli.run(main)
