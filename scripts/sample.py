#!/usr/bin/env python3
"""Draw pictures: python -m scripts.sample GENERATOR --labels 207,360 --out DIR [--num N] [key=value ...]

GENERATOR, and what may follow:

  configs/rectok/ditdh_xl.yaml --labels 207,360              the run that this config trained
  work_dirs/my_run --labels 0-9 --num 100 --scale 1.5        a run folder or a checkpoint
  reAR-L.safetensors --labels 207,"tree frog"                a released file, guided as published
  FILE.pth --tokenizer RecTok_decft.pth --labels 207 --scale 1.29 --guide ditdhs_epoch_0029.pth

LABELS: numbers, ranges (10-19) and names of classes, separated by commas; picture i shows label i modulo their count.
Writes DIR/<index>_<label>.png, grid.png (one column per label) and sample.json. Picture i depends on (seed, label, i)
and the settings alone, not on batch, GPUs or --num: the same command with a larger --num, or after a kill, adds what is
missing. A folder with pictures of other settings is refused. --scale, --guide and --steps are short for
sample.scale=..., sample.guide=... (with sample.guidance=auto) and sample.steps=...; every key of the config can follow.
--preview shows pictures while their codes are still being made, where tokenizer and generator can: it prints when each
stage was there and adds <index>_<label>_stages.png and .webp (--preview gif: a .gif too); stages.png has the first.
--layout PICTURE --layout-groups N: all pictures begin with the codes of the first N stages of that picture.
sample.shared=N: they begin with the first N codes of picture 0.
--list-labels prints the classes that GENERATOR knows; ImageNet's names are known without its pictures.
Several GPUs: bash run_sample.sh, see scripts/launch.sh.
"""

import dataclasses

from core import cli
from core.errors import UserError
from scripts import command_line

PREVIEWS = ("webp", "gif")


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("python -m scripts.sample", __doc__)
    parser.add_argument("generator", nargs="?", help="config, run folder, checkpoint, released file or hf:// address")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--weights", help="the generator, where no config or run is named first; or other weights for it"
    )
    parser.add_argument("--tokenizer", help="its weights, for a released generator")
    parser.add_argument("--labels", help="needed, as --out is")
    parser.add_argument("--out")
    parser.add_argument("--list-labels", action="store_true", help="print the classes with their names, and stop")
    parser.add_argument("--num", type=int, help="pictures in all (default: at least 16, as many of each label)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--batch", type=int, default=32, help="pictures at once per GPU (default 32)")
    parser.add_argument("--scale", help="guidance scale, or one per codebook: 1.5 or [3,2]")
    parser.add_argument("--guide", help="weights of the weaker model of autoguidance")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--npz", help="also one .npz with arr_0, as ADM's evaluator reads it")
    parser.add_argument(
        "--preview", nargs="?", const="webp", choices=PREVIEWS, help="stages as filmstrip and animation"
    )
    parser.add_argument("--layout", metavar="PICTURE", help="let all pictures begin with the codes of this one")
    parser.add_argument("--layout-groups", type=int, default=1, help="how many of its stages (default 1)")
    parser.add_argument("--check", action="store_true", help="only look for mistakes")
    # "--preview" alone may stand before a config
    arguments = [
        f"{a}=webp" if a == "--preview" and following not in PREVIEWS and not following.isdigit() else a
        for a, following in zip(arguments, [*arguments[1:], ""])
    ]
    options = command_line.parse(parser, "sample", arguments)

    target, overrides = command_line.target_of(options.generator, options.weights, options.overrides)
    overrides += command_line.sampling_overrides(options)

    from core import dist, launch
    from run.sample import Request, check, sample
    from run.target import list_labels, read_target

    missing = [f"--{name}" for name in ("labels", "out") if not getattr(options, name)]
    if missing and not options.list_labels:
        raise UserError(
            f"{' and '.join(missing)} missing: bash run_sample.sh {target} --labels {options.labels or '0-3'} --out "
            f"{options.out or 'samples'}; --list-labels prints the names of its classes."
        )
    request = Request(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Request)})
    request.check()
    silent = options.check or options.list_labels or not launch.speaks()
    chosen = read_target(target, overrides, (lambda _: None) if silent else print)
    if options.list_labels:
        print(list_labels(chosen))
        return 0
    if options.check:
        check(chosen, request)
        return 0
    with dist.start(chosen.config.train.device, chosen.config.train.rank_timeout) as world:
        sample(chosen, request, world)
    return 0


if __name__ == "__main__":
    cli.run(main)
