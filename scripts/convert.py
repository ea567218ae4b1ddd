#!/usr/bin/env python3
"""Convert, check and describe weight files: python -m scripts.convert [--describe | --check-layout] PATH ... [options]

  python -m scripts.convert --describe FILE ...                               what it is: settings, sizes, parameters, what is unused
  python -m scripts.convert --check-layout LAYOUT.json ...                    does our model take exactly these tensors? (loads nothing)
  python -m scripts.convert RecTok.pth RecTok.safetensors                     released file -> our safetensors, which say what they are
  python -m scripts.convert work_dirs/my_run my_run.safetensors               the newest checkpoint of a run -> the same
  python -m scripts.convert work_dirs/my_run small.safetensors --weights ema --dtype bf16      a quarter of the room
  python -m scripts.convert work_dirs/my_run mine.pth --to official           -> the layout that the official code loads
  python -m scripts.convert RecTok.safetensors again.pth --to official
  python -m scripts.convert my_far.pt my_far.safetensors --set size.heads=16  what the file does not say, once for all

FILE and the input are run folders, checkpoints, files, names in pretrained_models/ or hf://owner/repo/file. Averaged
(EMA) and raw weights are both kept where the target has room for both; --weights ema or raw keeps one.
Exit codes: 0 all is well, 1 some file does not fit, 2 a mistake in the command.
"""

from pathlib import Path

from core import cli
from core.errors import UserError
from core.signals import finishing
from scripts import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("python -m scripts.convert", __doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--describe", action="store_true")
    mode.add_argument("--check-layout", action="store_true")
    parser.add_argument("--to", choices=("tessera", "official"), default="tessera")
    parser.add_argument("--weights", choices=("both", "ema", "raw"), default="both")
    parser.add_argument("--kind", choices=("tokenizer", "generator"), help="of a file that holds both")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="what the file does not say, size.heads=16 and the like",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights in a file of ours")
    parser.add_argument("--tokenizer", help="to be held by an official file of VAR beside the generator")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    options = command_line.parse(parser, "convert", arguments)

    from core.config import read_overrides
    from run import convert

    if options.describe or options.check_layout:
        look, good = convert.check_layout if options.check_layout else convert.describe, True
        for path in options.paths:
            try:
                good &= look(path)
            except UserError as error:
                good = False
                print(f"FAIL {error}")
        return 0 if good else 1
    if len(options.paths) != 2:
        raise UserError(
            "give IN and OUT, or --describe FILE ..., or --check-layout LAYOUT.json ...; see python -m scripts.convert --help"
        )
    source, target = options.paths
    conversion = convert.Conversion(
        source,
        Path(target),
        options.to == "official",
        options.weights,
        options.kind,
        read_overrides(options.set),
        options.tokenizer,
        options.force,
        options.dtype == "bf16",
        finishing,
    )
    print(conversion.run())
    return 0


if __name__ == "__main__":
    cli.run(main)
