#!/usr/bin/env python3
"""Measure published numbers again: python -m scripts.reproduce [SYSTEM ...] [--num 50000|5000] [--list]

SYSTEM: rectok, fqgan, rear, dar, imagefolder, a released file or a row of configs/reproduce.toml; default all. Files that are
missing are downloaded, never at --list. Every row is one call of run_eval_tokenizer.sh or run_eval_generator.sh on all GPUs;
the same command goes on after a kill. key=value words are settings of every row. Prints published | measured | difference | verdict and writes OUT/report.html.
"""

import argparse
from pathlib import Path

from core import cli
from core.errors import UserError


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.reproduce", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("systems", nargs="*", metavar="SYSTEM")
    parser.add_argument("--num", type=int, default=50000, help="pictures (default 50000; fewer cannot be compared)")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/reproduce"))
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    options = parser.parse_intermixed_args(arguments)
    from run import reproduce

    if options.num < 2:
        raise UserError(f"--num {options.num}: give 2 or more.")
    settings = [word for word in options.systems if "=" in word]
    chosen = reproduce.rows([word for word in options.systems if word not in settings])
    if options.list:
        print(reproduce.listing(chosen))
        return 0
    return 1 if reproduce.reproduce(chosen, options.num, options.out, settings) else 0


if __name__ == "__main__":
    cli.run(main)
