#!/usr/bin/env python3
"""Write the page of a run again, or one page of several: python -m scripts.report RUN [RUN ...] [--out PAGE.html]

One RUN: its own report.html, as while it trains. Several: comparison.html beside the first one's folder, with the curves of
all in the same charts, their previews, what was measured, and the settings in which they differ.
"""

from pathlib import Path

from core import cli
from scripts import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("python -m scripts.report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, living or done")
    parser.add_argument("--out", type=Path, help="where the page goes")
    options = parser.parse_args(arguments)

    from run import page

    print(f"look at {page.write(options.runs, options.out)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
