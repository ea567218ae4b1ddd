#!/usr/bin/env python3
"""Encode and decode pictures: python -m scripts.reconstruct --weights W IMAGE ... [--url URL --num N] [--out DIR]

For each picture writes DIR/<name>_psnr<dB>.png: original | reconstruction | difference, side by side, and
DIR/grid.png of all of them. W is a run folder, a checkpoint, a released file or hf://owner/repo/file. Pictures of any
mode and size are brought to the tokenizer's size by ADM's centre crop. PSNR compares 8-bit pictures. The difference
is grey where there is none and shows it --gain times as strong. Tokenizers with codebooks also tell how many of their
codes were used. What the weights do not tell is given as in a config: tokenizer.length=32.
--stages adds DIR/<name>_stages.png, what each further part of the codes adds, and DIR/stages.png of the first pictures:
for tokenizers whose first codes are a picture already (groups of D-AR, scales of ImageFolder).
--kept, --noise, --put, and --donor with --branches change latents before they are decoded; run_playground.sh shows the same
in a browser.
"""

from pathlib import Path

from core import cli
from core.errors import UserError
from scripts import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("python -m scripts.reconstruct", __doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--url", help="take pictures of a data source too: embedded://photos256, folder://DIR ...")
    parser.add_argument("--num", type=int, default=8, help="how many of --url (default 8)")
    parser.add_argument("--out", help="folder (default work_dirs/reconstruct_<weights>)")
    parser.add_argument(
        "--size", type=int, help="another size than the tokenizer's own, where it can be rebuilt for it"
    )
    parser.add_argument("--gain", type=float, default=4.0, help="of the difference (default 4)")
    parser.add_argument("--stages", action="store_true", help="also what each part of the codes adds")
    parser.add_argument("--rebuilt", action="store_true", help="also each reconstruction alone: DIR/<name>_rebuilt.png")
    parser.add_argument(
        "--kept", type=int, metavar="N", help="only the first N groups, scales or tokens of the latents"
    )
    parser.add_argument(
        "--noise", type=float, default=0.0, metavar="SHARE", help="of noise in continuous latents, 0 to 1"
    )
    parser.add_argument(
        "--put", metavar="PLACE=CODE,...", help="other codes; BRANCH:PLACE=CODE where there are several"
    )
    parser.add_argument("--donor", metavar="PICTURE", help="take the codes of --branches from this picture")
    parser.add_argument("--branches", metavar="NAMES", help="names or numbers of branches: semantic")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of averaged ones")
    words, known = command_line.tokenizer_settings(arguments)
    options = command_line.parse(parser, "reconstruct", words)

    if not options.images and not options.url:
        raise UserError("name some pictures, or a data source with --url embedded://photos256")
    if options.num < 1 or options.gain <= 0 or (options.size is not None and options.size < 1):
        raise UserError(
            f"--num {options.num}, --gain {options.gain}, --size {options.size}: these are positive numbers"
        )

    from itertools import chain

    from core import dist
    from run import alter, streaming
    from run.load import read_tokenizer
    from run.reconstruct import read_files, read_source, reconstruct

    section = {**known, "weights": options.weights, "use_ema": not options.raw}
    if options.size:
        section["image_size"] = options.size
    tokenizer = read_tokenizer(section).module
    if options.stages:
        streaming.check_previews(tokenizer)
    spec = tokenizer.spec
    changes = alter.Changes(
        options.kept,
        options.noise,
        alter.parse_put(options.put, spec) if options.put else (),
        next(read_files([options.donor]))[1] if options.donor else None,
        alter.parse_branches(options.branches, spec) if options.branches else (),
    )
    changes.check(tokenizer)
    if options.stages and options.kept is not None:
        raise UserError("--stages shows all parts of the latents, --kept the first ones alone; give one of them.")
    folder = Path(options.out or f"work_dirs/reconstruct_{Path(options.weights.rstrip('/')).stem}")
    if (folder / "grid.png").exists():
        raise UserError(f"{folder} holds reconstructions already. Choose another --out, or remove it.")
    size = tokenizer.image_size
    print(f"{type(tokenizer).__name__}: {size} x {size} pictures, latents {tokenizer.spec}")
    pictures = chain(read_files(options.images), read_source(options.url, options.num) if options.url else ())
    reconstruct(
        tokenizer.to(dist.pick_device("auto")), pictures, folder, options.gain, options.stages, changes, options.rebuilt
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
