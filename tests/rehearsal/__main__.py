"""Rehearse recipes: python -m tests.rehearsal [RECIPE ...] [--start] [--direct] [--keep DIR]

RECIPE: a name below configs/ without .yaml (rectok/ditdh_xl), or a part of it; default: all. The whole chain of each is
run, or its first two steps alone with --start. --direct: every command with the real interpreter instead of a server that
has torch imported. --keep DIR: make the copy of the project there and leave it, to look at what came out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.rehearsal.house import House
from tests.rehearsal.recipes import published
from tests.rehearsal.steps import Rehearsal


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    chosen = [r for r in published() if not options.recipes or any(word in r.name for word in options.recipes)]
    if not chosen:
        parser.error(f"no recipe is called {' or '.join(options.recipes)}")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="tessera_")) / "tessera"
    house = House(folder)
    rehearsal, failed = Rehearsal(house), 0
    try:
        for recipe in chosen:
            try:
                rehearsal.start(recipe) if options.start else rehearsal.chain(recipe, options.direct)
            except AssertionError as error:
                failed += 1
                print(f"{recipe.name}: {error}\n", file=sys.stderr)
            print("\n".join(rehearsal.lines()), flush=True)
    finally:
        house.close(keep=options.keep is not None)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
