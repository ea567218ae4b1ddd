#!/usr/bin/env python3
"""The whole pipeline at toy size on embedded pictures: train, sample, measure, and write a report to look at.

    python -m scripts.quickstart [SYSTEM] [--smoke]        (bash run_quickstart.sh also makes the environment)

SYSTEM: rectok (default), fqgan, rear, dar or imagefolder. --smoke shows in a minute that everything runs. Ctrl-C any
time; the same command continues where it stopped.
"""

import sys

from core import cli
from core.errors import UserError


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    options = [word for word in arguments if word.startswith("-")]
    if unknown := [word for word in options if word != "--smoke"]:
        raise UserError(f"unknown option {unknown[0]}; the only one is --smoke")
    systems = [word for word in arguments if word not in options]
    if len(systems) > 1:
        raise UserError(f"give one system, not {' '.join(systems)}")
    from run import quickstart

    return quickstart.run(systems[0] if systems else "rectok", smoke=bool(options))


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)
    cli.run(main)
