#!/usr/bin/env python3
"""Store what a tokenizer makes of every picture: python -m scripts.pretokenize CONFIG [key=value ...] [options]

What may follow CONFIG:

  data.url=folder://data/imagenet data.crop=ten     ten crops of every picture
  data.crop=center data.flip=true                   centre crop and its mirror image
  --import maskgitvq.jsonl data.crop=ten            from reAR's file, or from FQGAN's folder; needs no pictures, and checks
                                                    them where they are
  --to official DIR | --to jsonl FILE               also write the store in that form

CONFIG is any training config with tokenizer.weights, or weights: of a tokenizer, which then encodes the pictures that it was
trained on as far as its file tells them (else folder://data/imagenet/train), or a run of either kind, with its own config.
The store goes to --out, by default to the folder of a data.url tokens://DIR (the pictures are then data.pictures), else
to work_dir/tokens/<name>. A finished store is used as it is; a
killed job goes on when it is started again, on any number of processes. At the end some tokens are decoded: look at
preview.png in the store. Train from it with data.url=tokens://DIR.
"""

from core import cli
from scripts import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("python -m scripts.pretokenize", __doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", help="folder of the store")
    parser.add_argument("--import", dest="foreign", metavar="PATH", help="take tokens from a .jsonl or code folder")
    parser.add_argument("--classes", type=int, default=1000, help="of imported tokens when no pictures are given")
    parser.add_argument("--to", nargs=2, metavar=("FORM", "PATH"), help="write the store as official or jsonl")
    parser.add_argument("--batch", type=int, default=256, help="crops per forward pass")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the tokenizer")
    parser.add_argument("--verify", action="store_true", help="also read the whole store and compare its digests")
    parser.add_argument("--check", action="store_true", help="only look for mistakes")
    options = vars(command_line.parse(parser, "pretokenize", arguments))

    from run.pretokenize import Request, check, config_of, pretokenize

    config = config_of(options.pop("config"), options.pop("overrides"))
    only_check, request = options.pop("check"), Request(**options)
    pictures = check(config, request)
    return 0 if only_check else pretokenize(config, request, pictures)


if __name__ == "__main__":
    cli.run(main)
