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
Several GPUs: bash run_sample.sh, see scripts/launch.sh.
"""

import argparse
import re
from pathlib import Path

from core import cli
from scripts import command_line

SHOWN = 64  # pictures in grid.png
STRIPS = 8  # pictures in stages.png
ANIMATIONS = {"webp": (".webp",), "gif": (".webp", ".gif")}  # what --preview writes
AT_LEAST = 16  # pictures without --num
MANIFEST = "sample.json"


def parse_labels(text: str, num_classes: int, names: list[str]) -> list[int]:
    """Class numbers of "207, 10-19, tree frog"; UserError for one that does not exist."""
    from core.errors import UserError, nearest

    by_name: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        by_name.setdefault(name.casefold(), []).append(i)
    labels: list[int] = []
    for word in (w.strip() for w in text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\s*(?:-|\.\.)\s*(\d+))?", word)
        found = by_name.get(word.casefold(), [])
        if match is None and len(found) > 1:  # ImageNet has two cranes
            raise UserError(
                f'--labels: "{word}" is the name of classes {" and ".join(map(str, found))}; give the number.'
            )
        if match is None and found:
            labels += found
            continue
        if match is None:
            hint = nearest(word, names) if names else " Names need data.url of the pictures it was trained on."
            raise UserError(
                f'--labels: "{word}" is neither a class number, a range such as 10-19 nor a class name.{hint}'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= num_classes:
            raise UserError(
                f"--labels {word}: the generator knows classes 0 to {num_classes - 1}, the smaller number first."
            )
        labels += range(first, last + 1)
        if found and found != [first]:  # folders 0 ... 11 are sorted as words: 0, 1, 10, 11, 2
            print(
                f"--labels {word}: class number {first}, called {names[first]}; the class that is called {word} has "
                f"number {found[0]}"
            )
    return labels


def class_names(url: str, split: str) -> list[str]:
    """Of the training pictures; [] where they are not on this machine."""
    from core.errors import UserError
    from data.sources import open_source

    try:
        return open_source(url, split).class_names
    except UserError:
        return []


def claim(folder: Path, facts: dict) -> None:
    """Note the settings in the folder, or check that its pictures were made with these."""
    from core.errors import UserError
    from core.files import explain_os_errors, read_json, write_json

    place = folder / MANIFEST
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not place.is_file():
        if any(folder.glob("[0-9]*.png")):
            raise UserError(f"{folder} holds pictures of unknown settings. Choose another --out.")
        write_json(place, facts)
        return
    before = read_json(place)
    # weights count by what they are, not by where they lie
    changed = [
        f"{key} was {before.get(key)!r}, now {facts.get(key)!r}"
        for key in sorted(before.keys() | facts.keys())
        if before.get(key) != facts.get(key) and f"{key}_fingerprint" not in before.keys() & facts.keys()
    ]
    if changed:
        raise UserError(f"{folder} holds pictures of other settings ({'; '.join(changed)}). Choose another --out.")


def preview_files(place: Path, animations: tuple[str, ...]) -> list[Path]:
    """The filmstrip and the animations beside a picture."""
    return [place.with_name(f"{place.stem}_stages.png"), *(place.with_suffix(suffix) for suffix in animations)]


def write_previews(stages: list, place: Path, animations: tuple[str, ...]) -> None:
    """Of one picture, from its stages (1, 3, H, W) in [-1, 1]."""
    from run import streaming

    strip, *films = preview_files(place, animations)
    streaming.write_filmstrip(stages, strip)
    for film in films:
        streaming.write_animation(stages, film)


def draw(made, labels, folder: Path, count: int, batch: int, seed: int, world, animations: tuple[str, ...] = ()) -> int:
    """Write the pictures that are missing, with previews if there are `animations`; how many this rank made."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from core.files import explain_os_errors
    from core.images import save_png, to_uint8
    from core.rng import Draws, hash64
    from core.train.log import ProgressLine

    def place(i: int) -> Path:
        return folder / f"{i:06d}_{labels[i % len(labels)]}.png"

    def complete(i: int) -> bool:
        return all(p.is_file() for p in [place(i), *(preview_files(place(i), animations) if animations else ())])

    missing = [i for i in range(count) if not complete(i)]
    world.barrier()  # nobody writes before all have looked
    mine = missing[world.rank :: world.size]
    line = ProgressLine(len(mine), label="samples") if world.is_main and mine and not animations else None
    try:
        with ThreadPoolExecutor(4) as pool, explain_os_errors(folder), torch.no_grad():
            waiting: list = []
            for start in range(0, len(mine), batch):
                part = mine[start : start + batch]
                draws = Draws(hash64(seed, "samples"), torch.tensor(part, device=world.device))
                wanted = torch.tensor([labels[i % len(labels)] for i in part], device=world.device)
                stages = []
                if animations:
                    streamed = made.stream(wanted, draws)
                    stages, images = [p.cpu() for p in streamed.pictures], streamed.pictures[-1]
                    if world.is_main:
                        print(
                            f"{len(part)} pictures from number {part[0]} on, seconds to each stage: "
                            + " ".join(f"{s:.2f}" for s in streamed.seconds)
                            + f"; the first after {100 * streamed.first_share:.0f} % of the time",
                            flush=True,
                        )
                else:
                    images = made.sample(wanted, draws).float()
                images = to_uint8(images, "nearest").cpu()
                for done in waiting:
                    done.result()
                waiting = [pool.submit(save_png, image, place(i)) for i, image in zip(part, images)]
                waiting += [
                    pool.submit(write_previews, [p[j : j + 1] for p in stages], place(i), animations)
                    for j, i in enumerate(part)
                    if animations
                ]
                if line:
                    line.update(start + len(part))
            for done in waiting:
                done.result()
    finally:
        if line:
            line.close()
    world.barrier()
    return len(mine)


def begin_alike(made, picture: str | None, groups: int, first_label: int, seed: int, device) -> dict:
    """Let all samples of `made` begin with the same codes, if --layout or sample.shared ask for it; facts about them.

    Both become a `prefix` for the generator, so that a picture does not depend on those in its batch.
    """
    import inspect

    import torch

    from core.errors import UserError
    from core.images import to_model_range
    from core.rng import Draws, hash64
    from core.weights import hub
    from data.transforms import center_crop, to_tensor
    from run import streaming
    from scripts import reconstruct

    options = made.task.sample_options
    shared = options.pop("shared", 0)
    if picture is None and not shared:
        return {}
    if picture is not None and shared:
        raise UserError("--layout and sample.shared both say how pictures begin; give one of them.")
    if "prefix" not in inspect.signature(made.generator.sample).parameters:
        raise UserError(
            f"{type(made.generator).__name__} cannot continue codes that are given, so there is no --layout."
        )
    if picture is None:
        if shared > made.tokenizer.spec.length:
            raise UserError(
                f"sample.shared={shared}: a picture has {made.tokenizer.spec.length} codes; give at most those."
            )
        draws = Draws(hash64(seed, "samples"), torch.zeros(1, dtype=torch.int64, device=device))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=made.bf16):
            label = torch.tensor([first_label], device=device)
            codes = made.generator.sample(label, draws, made.task.guidance, **options)
        options["prefix"] = codes[:, :shared]
        return {}
    ((_, opened),) = reconstruct.read_files([picture])
    image = to_model_range(to_tensor(center_crop(opened, made.image_size))[None]).to(device)
    options["prefix"] = streaming.layout_prefix(made.tokenizer, image, groups)
    return {
        "layout": picture,
        "layout_groups": groups,
        "layout_fingerprint": hub.fingerprint({"codes": options["prefix"]}),
    }


def read_back(folder: Path, labels: list[int], start: int, stop: int):
    """Pictures start ... stop - 1 of the folder, (n, 3, H, W) uint8."""
    import torch
    from PIL import Image

    from data.transforms import to_tensor

    return torch.stack(
        [
            to_tensor(Image.open(folder / f"{i:06d}_{labels[i % len(labels)]}.png").convert("RGB"))
            for i in range(start, stop)
        ]
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sample", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("generator", nargs="?", help="config, run folder, checkpoint, released file or hf:// address")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--weights", help="the generator, where no config or run is named first; or other weights for it"
    )
    parser.add_argument("--tokenizer", help="its weights, for a released generator")
    parser.add_argument("--labels", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--num", type=int, help=f"pictures in all (default: at least {AT_LEAST}, as many of each label)"
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--batch", type=int, default=32, help="pictures at once per GPU (default 32)")
    parser.add_argument("--scale", help="guidance scale, or one per codebook: 1.5 or [3,2]")
    parser.add_argument("--guide", help="weights of the weaker model of autoguidance")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--npz", help="also one .npz with arr_0, as ADM's evaluator reads it")
    parser.add_argument(
        "--preview", nargs="?", const="webp", choices=tuple(ANIMATIONS), help="stages as filmstrip and animation"
    )
    parser.add_argument("--layout", metavar="PICTURE", help="let all pictures begin with the codes of this one")
    parser.add_argument("--layout-groups", type=int, default=1, help="how many of its stages (default 1)")
    parser.add_argument("--check", action="store_true", help="only look for mistakes")
    # "--preview" alone may stand before a config
    arguments = [
        f"{a}=webp" if a == "--preview" and following not in ANIMATIONS and not following.isdigit() else a
        for a, following in zip(arguments, [*arguments[1:], ""])
    ]
    options = command_line.parse(parser, "sample", arguments)

    from core.errors import UserError

    target, overrides = command_line.target_of(options.generator, options.weights, options.overrides)
    short = {
        "sample.scale": options.scale,
        "sample.guide": options.guide,
        "sample.steps": options.steps,
        "tokenizer.weights": options.tokenizer,
        "seed": options.seed,
    }
    if options.guide:
        short["sample.guidance"] = "auto"
    overrides += [f"{key}={value}" for key, value in short.items() if value is not None]
    if (options.num is not None and options.num < 1) or options.batch < 1:
        raise UserError(f"--num {options.num} and --batch {options.batch}: give 1 or more")
    if options.npz and not options.npz.endswith(".npz"):
        raise UserError(f"--npz {options.npz}: choose a name that ends in .npz")

    from core import dist
    from run.sample import read_config

    if options.check:
        read_config(target, overrides)
        return 0
    world = dist.start(read_config(target, overrides)[0].train.device)
    try:
        return sample(options, target, overrides, world)
    finally:
        world.stop()


def sample(options: argparse.Namespace, target: str, overrides: list[str], world) -> int:
    """Load, draw, make the grid."""
    from dataclasses import asdict

    from core.images import grid, save_png
    from run import streaming
    from run.sample import open_generator

    made = open_generator(target, overrides, world, print if world.is_main else lambda *_: None)
    config, folder = made.config, Path(options.out)
    labels = parse_labels(options.labels, made.num_classes, class_names(config.data.url, config.data.split))
    count = options.num or len(labels) * max(1, -(-AT_LEAST // len(labels)))
    chosen = {
        f"sample.{key}": value for key, value in asdict(config.sample).items() if value is not None and key != "guide"
    }
    if options.preview:
        streaming.check(made.generator, made.tokenizer)
    alike = begin_alike(made, options.layout, options.layout_groups, labels[0], config.seed, world.device)
    facts = {
        **made.facts,
        **chosen,
        **alike,
        "seed": config.seed,
        "labels": labels,
        "precision": config.train.precision,
    }
    world.on_main(lambda: claim(folder, facts))
    new = draw(made, labels, folder, count, options.batch, config.seed, world, ANIMATIONS.get(options.preview, ()))
    if not world.is_main:
        return 0
    shown = read_back(
        folder,
        labels,
        0,
        min(count, max(len(labels), SHOWN // len(labels) * len(labels)) if len(labels) <= SHOWN else SHOWN),
    )
    save_png(grid(shown, columns=len(labels) if 1 < len(labels) <= 16 else None), folder / "grid.png")
    print(f"{count} pictures in {folder} ({new} new on this rank); look at {folder / 'grid.png'}")
    if options.preview:
        strips = [folder / f"{i:06d}_{labels[i % len(labels)]}_stages.png" for i in range(min(count, STRIPS))]
        streaming.stack_filmstrips(strips, folder / "stages.png")
        print(f"how they came about: {folder / 'stages.png'}")
    if options.npz:
        write_npz(Path(options.npz), folder, labels, count, made.image_size)
        print(f"written to {options.npz}")
    return 0


def write_npz(path: Path, folder: Path, labels: list[int], count: int, size: int) -> None:
    """All pictures of the folder in one .npz."""
    from core.errors import UserError
    from evaluation.pictures import NpzWriter

    if path.exists():
        raise UserError(f"{path} exists already; the pictures are in {folder}. Choose another --npz.")
    with NpzWriter(path, count, (size, size)) as writer:
        for start in range(0, count, 64):
            stop = min(start + 64, count)
            writer.write(start, read_back(folder, labels, start, stop))
        writer.flush()
        writer.finish()


if __name__ == "__main__":
    cli.run(main)
