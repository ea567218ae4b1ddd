#!/usr/bin/env python3
"""Prove and measure this code on one GPU within some minutes; nothing is downloaded.

    bash run_gpu_check.sh                                   eight minutes: the stages below, the most valuable first
    bash run_gpu_check.sh --minutes 3 --only tests,benchmark
    bash run_gpu_check.sh --device cpu --rehearse           every stage at toy size, without a GPU

Stages, each with its share of the time, in a process of its own:
  tests         tests that need a GPU
  parity_fp32   the recordings of the originals ($TESSERA_PARITY or ../shared/parity; else the small set in tests/parity)
  parity_bf16   the same under autocast
  graphs        codes sampled with CUDA graphs and kernel by kernel are the same; a second call records nothing
  compile       losses of compiled and eager training steps agree
  train         60 steps of a tokenizer, then of a generator on what it made, on embedded emoji
  benchmark     pictures per second of all five systems beside their floors: sampling at batch 1, 64 and 256, then encoding
                and decoding, then training steps
compile, train and benchmark read configs, with the package omegaconf, and tests needs pytest: without them these are not begun.
A stage that fails or runs out of time says so, and the next one begins; later stages get some of what earlier ones leave of
their time. Everything is kept in --out, with a log per stage beside it: the same command goes on where this one stopped. At
the end a section of --markdown gets the tables.
"""

import argparse
from pathlib import Path

from core import cli
from core.errors import UserError, nearest
from scripts import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("bash run_gpu_check.sh", __doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default 8)")
    parser.add_argument("--only", help="of those above, separated by commas (default: all)")
    parser.add_argument(
        "--out", default="work_dirs/gpu_check/results.json", help="default work_dirs/gpu_check/results.json"
    )
    parser.add_argument("--markdown", help="default docs/benchmarks.md; of a rehearsal benchmarks.md beside --out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, to see that every stage runs")
    parser.add_argument("--again", action="store_true", help="forget what is in --out")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)  # a stage in a process of its own
    options = command_line.within(parser.parse_intermixed_args(arguments))

    from run import gpu_check, gpu_stages

    out = Path(options.out)
    if options.work:
        return gpu_stages.work(options.work, options.device, options.rehearse, out)
    wanted = options.only.split(",") if options.only else list(gpu_check.NAMES)
    for name in wanted:
        if name not in gpu_check.NAMES:
            raise UserError(f'--only: "{name}" is not known.{nearest(name, gpu_check.NAMES)}')
    if options.minutes <= 0:
        raise UserError(f"--minutes {options.minutes:g}: give more than 0")
    markdown = Path(options.markdown or (out.parent / "benchmarks.md" if options.rehearse else "docs/benchmarks.md"))
    check = gpu_check.Check(options.device, options.rehearse, out, markdown, 60 * options.minutes)
    return check.run(wanted, options.again)


if __name__ == "__main__":
    cli.run(main)
