#!/usr/bin/env python3
"""Edit a photo: python -m scripts.edit [GENERATOR] PHOTO --mask M.PNG --label 207 [--out X.PNG] [key=value ...]

What is white in the mask is drawn anew as a picture of the class; everything else stays, pixel for pixel. GENERATOR is
what run_sample.sh takes: a config, run folder, checkpoint or released file; without one tiny/rectok. PHOTO may have any size: its middle square is
seen, in the tokenizer's size, in which X.PNG comes; --full adds X_full.png, the photo in its own size with the new part.

The mask has the photo's size, its proportions, or the size of what the model sees; transparent counts as white. A code
is kept if no pixel of its cell is white (--cover SHARE: if no more than that share is; --margin N: the mask is widened by
N pixels for that). Codes without places (D-AR, TiTok): the first half is kept (--first SHARE).
Where codes are drawn one after another, --heed 1 continues what is kept, --heed 0 lets the label alone decide.
--outpaint SHARE instead of a mask: the whole photo in the middle, SHARE of the picture on either side of its longer side.

Also written: X_panel.png (photo, mask, as decoded, with the photo put back) and X.json: PSNR outside the mask before
the photo is put back, the step across the mask's border against steps inside it, settings and weights.
Several labels or --num N: X_000_207.png and so on. The same seed, label and number give the same picture.
"""

from core import cli
from core.errors import UserError
from scripts import command_line

TINY = "tiny/rectok"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


def named(words: list[str]) -> tuple[str | None, str, list[str]]:
    """(generator or None, photo, key=value words). UserError where there is no photo, or more than the two."""
    names, settings = command_line.split_settings(words)
    if len(names) == 1 and names[0].lower().endswith(PICTURES):
        return None, names[0], settings
    if len(names) != 2:
        generator = names[0] if len(names) == 1 else "GENERATOR"
        raise UserError(
            f"{' '.join(names) or 'no words'}: name the generator and the photo, or the photo alone for {TINY}: "
            f"bash run_edit.sh {generator} photo.png --mask white_where_it_changes.png --label CLASS"
        )
    return names[0], names[1], settings


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("bash run_edit.sh", __doc__)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[GENERATOR] PHOTO [key=value ...]",
        help="generator: config, run folder, checkpoint, released file or hf:// address",
    )
    parser.add_argument("--label", "--labels", help="class number or name; several: 207,tree frog")
    parser.add_argument("--mask", help="picture whose white pixels are to change")
    parser.add_argument("--outpaint", type=float, metavar="SHARE", help="draw around the photo; 0 fills up to a square")
    parser.add_argument("--out", help="PNG to write (default PHOTO_edit.png)")
    parser.add_argument("--num", type=int, help="pictures (default: one per label)")
    parser.add_argument("--full", action="store_true", help="also the photo in its own size")
    parser.add_argument(
        "--margin", type=int, default=0, help="pixels beside the mask whose codes are not kept (default 0)"
    )
    parser.add_argument("--cover", type=float, default=0.0, help="share of a kept cell that may be masked (default 0)")
    parser.add_argument("--first", type=float, default=0.5, help="share kept of codes without places (default 0.5)")
    parser.add_argument(
        "--heed", type=float, help="how much what is kept decides beside the label, 0 to 1 (default 0.3)"
    )
    parser.add_argument("--tokenizer", help="its weights, for a generator that does not name them")
    parser.add_argument("--guide", help="weights of the weaker model of autoguidance")
    parser.add_argument("--scale", help="guidance scale, or one per codebook: 1.5 or [3,2]")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    options = command_line.parse(parser, "edit", arguments)

    options.generator, options.photo, settings = named(options.words)
    if options.label is None:
        raise UserError(
            "say as what the part is drawn anew: --label with a number or name of a class, which bash run_sample.sh "
            f"{options.generator or TINY} --list-labels prints."
        )
    if options.generator is None:
        options.generator = TINY
        print(f"no generator was named: editing with {TINY}, a tiny model that comes with the code", flush=True)
    overrides = [*settings, *command_line.sampling_overrides(options)]

    import dataclasses
    from pathlib import Path

    from core import caller, dist
    from evaluation.measure import alone
    from run import edit
    from run.target import open_generator, read_target

    options.out = options.out or caller.written(f"{Path(options.photo).stem}_edit.png")
    request, rules = (
        kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})
        for kind in (edit.Request, edit.Rules)
    )
    request.check()
    target = read_target(options.generator, overrides, print)
    device = dist.pick_device(target.config.train.device)
    edit.run(open_generator(target, alone(device)), request, rules, device)
    return 0


if __name__ == "__main__":
    cli.run(main)
