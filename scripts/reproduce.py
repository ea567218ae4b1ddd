#!/usr/bin/env python3
"""Measure published numbers again: bash run_reproduce.sh [SYSTEM ...] [--num 50000|5000] [--list]

SYSTEM: rectok, fqgan, rear, dar, imagefolder, evaluation (ADM's own samples, a check of the evaluator), a released file or
a row of configs/reproduce.toml; default all. Files that are missing are downloaded. Every row is one call of
run_eval_tokenizer.sh or run_eval_generator.sh on all GPUs; the same command goes on after a kill. key=value words are
settings of every row. Prints published | measured | difference | verdict | why and writes OUT/report.html.
--rehearse does all that in a copy of this project with tiny random files, and --out (default work_dirs/rehearsal) gets its page.
"""

import sys
from pathlib import Path

from core import cli
from core.errors import UserError
from scripts import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("bash run_reproduce.sh", __doc__)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM")
    parser.add_argument("--num", type=int, default=50000, help="pictures (default 50000; fewer cannot be compared)")
    parser.add_argument("--out", type=Path, help="default work_dirs/reproduce")
    parser.add_argument("--bootstrap", type=int, default=50, help="replicates behind intervals of samples (default 50)")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    parser.add_argument("--dry-run", action="store_true", help="print what would be fetched, and hours, and stop")
    parser.add_argument("--gpus", type=int, default=8, help="that --dry-run shares the hours among (default 8)")
    parser.add_argument(
        "--rehearse", action="store_true", help="the whole table with tiny random files, 10 pictures each, in minutes"
    )
    options = command_line.within(parser.parse_intermixed_args(arguments))
    for name, least in (("num", 2), ("bootstrap", 2), ("gpus", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: give {least} or more.")
    settings = [word for word in options.systems if "=" in word]
    words = [word for word in options.systems if word not in settings]
    from run import reproduce

    chosen = reproduce.rows(words)
    if options.list:
        print(reproduce.listing(chosen))
    elif options.dry_run:
        reproduce.plan(chosen, options.num, options.gpus)
    elif options.rehearse:
        out = ["--out", str(options.out)] if options.out else []
        return reproduce.attend([sys.executable, "-m", "tests.rehearsal.reproduce", *words, *out], reproduce.ROOT)
    else:
        out = options.out or Path("work_dirs/reproduce")
        return 1 if reproduce.reproduce(chosen, options.num, out, settings, options.bootstrap) else 0
    return 0


if __name__ == "__main__":
    cli.run(main)
