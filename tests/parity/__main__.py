"""Run fixtures and print one line per file: every recorded output with its error, worst first.

    python -m tests.parity                                  the small set beside this file, and all of ../shared/parity
                                                            (or $TESSERA_PARITY) where there is such a folder
    python -m tests.parity ../shared/parity/rectok          one folder, or files
    python -m tests.parity --known                          only files of a kind that some module handles
    python -m tests.parity --device cuda --precision bf16   elsewhere and otherwise than recorded: tests/parity/setting.py
    python -m tests.parity --describe [KIND]                the settings that a kind (all kinds) understands

Exits with 0 only if there was something to run and everything passed; an unknown kind is a failure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tests.parity import FIELDS, default_folders, discover, find, run
from tests.parity.setting import Setting


def describe(name: str) -> int:
    """Print what every kind of this name ("" for all; "rear/gen" for that of one system) understands."""
    wanted = [kind for kind in sorted(FIELDS) if name in ("", kind[1], "/".join(kind))]
    for system, kind in wanted:
        print(f"{system}/{kind}: " + (", ".join(FIELDS[system, kind].describe()) or "no settings"))
    if not wanted:
        print(f'no kind "{name}"; there are {", ".join("/".join(kind) for kind in sorted(FIELDS))}')
    return 0 if wanted else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, help="fixtures or folders of them")
    parser.add_argument("--known", action="store_true", help="skip kinds that no module handles")
    parser.add_argument("--device", default="cpu", help="compute there, cuda say (default: cpu, as recorded)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--describe", nargs="?", const="", metavar="KIND", help="print known settings; run nothing")
    options = parser.parse_args(arguments)
    if options.describe is not None:
        discover()
        return describe(options.describe)

    torch.set_num_threads(1)  # fixtures were recorded on one thread
    discover()
    folders = options.paths or default_folders()
    files = find(folders)
    if not files:
        print("no fixtures found in " + ", ".join(map(str, folders)))
        return 1
    setting = None
    if (options.device, options.precision) != ("cpu", "fp32"):
        setting = Setting(torch.device(options.device), options.precision)
    outcomes = []
    for path in files:
        if setting and setting.skips(path):
            continue
        outcome = run(path, setting)
        if options.known and outcome.failure.startswith("unknown kind"):
            continue
        print(outcome, flush=True)
        outcomes.append(outcome)
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} passed")
    return 0 if outcomes and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
