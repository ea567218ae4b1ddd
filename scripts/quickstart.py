#!/usr/bin/env python3
"""The whole pipeline at toy size on embedded pictures, in two acts, with a report to look at.

    python -m scripts.quickstart [SYSTEM] [--from-scratch] [--smoke]        (bash run_quickstart.sh also makes the environment)

SYSTEM: rectok (default), fqgan, rear, dar or imagefolder. First the shipped tiny models reconstruct and sample; then a
generator is trained on the shipped tokenizer's codes for at most five minutes and shown beside the shipped one.
--from-scratch trains every stage instead, tokenizer included: about ten minutes on two CPU cores.
--smoke shows in a minute that everything runs. Ctrl-C any time; the same command continues where it stopped.
"""

import sys

from core import cli
from core.errors import UserError

OPTIONS = ("--from-scratch", "--smoke")


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    options = [word for word in arguments if word.startswith("-")]
    if unknown := [word for word in options if word not in OPTIONS]:
        raise UserError(f"unknown option {unknown[0]}; there are {' and '.join(OPTIONS)}")
    systems = [word for word in arguments if word not in options]
    if len(systems) > 1:
        raise UserError(f"give one system, not {' '.join(systems)}")
    from run import quickstart

    return quickstart.run(systems[0] if systems else "rectok", "--smoke" in options, "--from-scratch" in options)


if __name__ == "__main__":
    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)
    cli.run(main)
