#!/usr/bin/env python3
"""Fetch released files: python -m scripts.download SYSTEM|FILE|hf://owner/repo/file ... [--all] [--dry-run] [--list]

  python -m scripts.download --list                  every known file, with its size and whether it is here
  python -m scripts.download rectok                  what the README of that system needs
  python -m scripts.download rectok --all            optional files too
  python -m scripts.download auxiliary               teachers, perceptual losses, Inception: what recipes look through
  python -m scripts.download ditdhxl_epoch_0599.pth  one file

Weights go to pretrained_models/, statistics to data/fid_stats/, tokens to data/tokens/. Files that are here are kept.
Without network, copy files there by hand: names and addresses are in --list, core/weights/released.toml
and core/weights/helpers.toml. offline_models.zip is unpacked into offline_models/.
"""

from core import cli
from core.errors import UserError
from scripts import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("python -m scripts.download", __doc__)
    parser.add_argument("what", nargs="*", metavar="SYSTEM|FILE")
    parser.add_argument("--list", action="store_true", help="show files instead of fetching them")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched")
    parser.add_argument("--all", action="store_true", help="optional files of a system too")
    options = parser.parse_args(arguments)

    from run.download import choose, fetch, listing, table

    if options.list:
        print(listing(choose(options.what, True) if options.what else table()))
        return 0
    if not options.what:
        systems = ", ".join(dict.fromkeys(f.system for f in table()))
        raise UserError(f"name a system ({systems}) or a file; --list shows them all.")
    files = choose(options.what, options.all)
    if options.dry_run:
        for file in files:
            print(f"{'here' if file.found() else 'would fetch':<12} {file.reference} -> {file.place}")
        return 0
    failures = []
    for file in files:
        try:
            print(fetch(file), flush=True)
        except UserError as error:
            failures.append(str(error))
            print(f"failed   {file.place}: {error}", flush=True)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(files)} files could not be had; what arrived is kept. Run the same again, or "
            "copy them by hand."
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
