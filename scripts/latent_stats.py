#!/usr/bin/env python3
"""Latent statistics of a tokenizer: python -m scripts.latent_stats WEIGHTS [URL] [--num N] [--from OLD.pkl] [--out FILE]

A generator models latents of unit variance, so its tokenizer needs their mean and standard deviation, which released
files lack. This measures them on pictures of URL (default folder://data/imagenet/train), or takes them from the
official stats.pkl (--from work_dirs/stats.pkl, or stats.pkl#KEY where it holds several), and writes a small portable
file, by default beside a weight file: RecTok_decft.pth -> RecTok_decft.latent_stats.safetensors. It is found there
whenever these weights are loaded; tokenizer.latent_stats=FILE names another. Training measures by itself.
"""

from pathlib import Path

from core import cli
from scripts import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("python -m scripts.latent_stats", __doc__)
    parser.add_argument("weights")
    parser.add_argument("url", nargs="?", default="folder://data/imagenet/train")
    parser.add_argument("--num", type=int, default=10_000, help="pictures; 0: all. 10,000 give 2.5 million values each")
    parser.add_argument("--split", default="train", help="of sources that have several; val needs no training set")
    parser.add_argument("--from", dest="pickle", help="the official stats.pkl, or stats.pkl#KEY")
    parser.add_argument("--raw", action="store_true", help="of the raw weights instead of the averaged ones")
    parser.add_argument("--out", help="file to write")
    words, known = command_line.tokenizer_settings(arguments)
    options = command_line.parse(parser, "latent_stats", words)

    from core import dist
    from core.errors import UserError
    from core.files import require_place
    from core.specs import Continuous
    from core.weights.encoding import encoding_fingerprint
    from data.checks import say_left_out
    from data.sources import open_source
    from run.latent_stats import measure
    from run.load import read_tokenizer
    from tokenizer.continuous.stats import default_place, read_stats, save_stats

    source = None if options.pickle else open_source(options.url, options.split)
    section = {**known, "weights": options.weights, "use_ema": not options.raw, "latent_stats": "none"}
    tokenizer = read_tokenizer(section)
    module = tokenizer.module
    if not isinstance(module.spec, Continuous):
        raise UserError(f"{options.weights} gives {module.spec}: only continuous latents have statistics.")
    place = options.out or default_place(tokenizer.weights.path)
    if place is None:
        raise UserError(
            f"{options.weights} is a run of ours, whose generators measure statistics themselves: give --out FILE."
        )
    require_place(Path(place).parent)
    if source is None:
        stats = read_stats(options.pickle)
        module.set_latent_stats(stats.mean, stats.std)  # checks that they fit
    else:
        say_left_out(print, source, options.url)
        stats = measure(module, source, options.num, dist.pick_device("auto"))
    save_stats(place, stats, tokenizer.fingerprint, encoding_fingerprint(module))
    print(f"written to {Path(place)}: {module.spec.channels} channels, of tokenizer weights {tokenizer.fingerprint}")
    return 0


if __name__ == "__main__":
    cli.run(main)
