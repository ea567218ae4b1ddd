"""Is a generator for new classes better adapted than trained anew? Emoji of three classes, held out.

    python -m tests.tools.adapt_emoji --minutes 13 --out work_dirs/adapt_emoji         or --steps 5000 on a busy machine

A base generator learns the other six classes on the codes of a shipped tiny tokenizer (which has seen all nine). Then, for the
same number of steps each: "adapted" starts from the base (train.init_from, train.new_classes=mean), "lora" as well but changes its
blocks by low-rank products alone, at a rate of its own, "from scratch" does not start from it; all else is equal. The steps are
a share of those that the base made in so many minutes. What is reported is the share of samples that the tests' classifier
(nine classes, chance 11 %) tells as the class asked for, over so many training seeds. The same command continues after a kill.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import run
from core import images as image_tools
from core.train.checkpoint import Checkpoint
from data.base import ListedSource
from data.sources import open_source
from evaluation import toy
from tests.tools import tiny

CLASSES = "animals,flags,food"
WARM_UP = 25  # steps that only store codes


def write_folders(folder: Path, new: list[str], most: int | None) -> None:
    """old/CLASS and new/CLASS with the first `most` training pictures of each, as they are in the shards."""
    source = open_source("embedded://emoji64", "train")
    assert isinstance(source, ListedSource)
    if unknown := {*new} - {*source.class_names}:
        raise SystemExit(f"no classes of the emoji: {', '.join(sorted(unknown))}; there are {source.class_names}")
    taken = Counter[str]()
    for i, label in enumerate(source.labels.tolist()):
        name = source.class_names[label]
        taken[name] += 1
        if most is not None and taken[name] > most:
            continue
        place = folder / ("new" if name in new else "old") / name
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:05d}.png").write_bytes(source.read(i))


def train(folder: Path, system: str, name: str, pictures: str, steps: int, *words: str) -> float:
    """Train or go on until `steps` are done; seconds that it took now."""
    program = "var" if system == "imagefolder" else "ar"
    command = [sys.executable, "-m", "scripts.train", f"configs/tiny/{system}/generator.yaml"]
    settings = [
        f"name={name}",
        f"work_dir={folder}",
        f"data.url=folder://{folder / 'pictures' / pictures}",
        "data.val_url=null",
        f"data.cache_dir={folder / 'cache'}",
        "train.preview_every=never",
        "train.checkpoint_every=100step",
        "train.ema=[0.99]",  # short runs: an average over more steps would still be at its start
        f"train.duration={steps}step",
        f"train.schedule.warmup={min(20, steps)}step",
    ]
    started = time.perf_counter()
    done = subprocess.run([*command, *settings, *words], stdout=sys.stderr)
    if done.returncode not in (0, 75):
        raise SystemExit(f"run_train_{program}.sh of {name} ended with code {done.returncode}")
    return time.perf_counter() - started


def accuracy(folder: Path, reference: str, names: list[str], each: int) -> dict[str, float]:
    """Share of `each` samples of every class that are told as it; the pictures lie beside the run."""
    generator = run.load_generator(reference, "cpu")
    classes = open_source("embedded://emoji64", "val").class_names
    pictures = generator.sample(names, num=each * len(names), seed=0, output="uint8")
    assert isinstance(pictures, torch.Tensor)
    image_tools.save_png(image_tools.grid(pictures[: 8 * len(names)], columns=len(names)), folder)
    net = tiny.feature_network()
    features = torch.cat([net.taps(part)[toy.CLASS_TAP] for part in pictures.split(30)])
    told = tiny.classifier().predict(features)
    wanted = torch.tensor([classes.index(names[i % len(names)]) for i in range(len(pictures))])
    right = (told == wanted).double()
    by_class = {name: float(right[i :: len(names)].mean()) for i, name in enumerate(names)}
    return {"all": float(right.mean()), **by_class}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=13, help="of the base; the others make a share of its steps")
    parser.add_argument(
        "--steps", type=int, help="of the base, in the place of --minutes: on a machine that others use too"
    )
    parser.add_argument("--share", type=float, default=0.1, help="of those steps, for the others")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind, with these seeds from 0 on")
    parser.add_argument("--classes", default=CLASSES)
    parser.add_argument("--system", default="imagefolder")
    parser.add_argument("--rank", type=int, default=32, help="of the low-rank changes")
    parser.add_argument("--lora-lr", type=float, default=6e-3, help="their rate; that of the recipe is 2e-3")
    parser.add_argument("--pictures", type=int, help="of each class to train on (default all)")
    parser.add_argument("--trunk-lr", type=float, default=1.0)
    parser.add_argument("--each", type=int, default=80, help="samples of each class and training")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/adapt_emoji"))
    options = parser.parse_args()
    folder, new = options.out.resolve(), sorted(options.classes.split(","))
    noted = folder / "steps.json"
    if not noted.is_file():
        write_folders(folder / "pictures", new, options.pictures)
        train(folder, options.system, "warm", "old", WARM_UP)  # codes are stored; else nothing
        limit = [] if options.steps else [f"train.time_limit_minutes={options.minutes}"]
        most = options.steps or 1_000_000
        seconds = train(folder, options.system, "base", "old", most, "train.schedule.kind=constant", *limit)
        steps = Checkpoint(folder / "base" / "checkpoints" / "latest").step
        noted.write_text(json.dumps({"steps": steps, "minutes": seconds / 60}) + "\n")
    base = json.loads(noted.read_text())
    steps = max(1, round(options.share * base["steps"]))
    print(f"base: {base['steps']} steps of 32 in {base['minutes']:.1f} minutes on {torch.get_num_threads()} thread(s)")
    start = [f"train.init_from={folder / 'base'}", "train.new_classes=mean"]
    slower = f"_{options.trunk_lr:g}" if options.trunk_lr != 1 else ""
    lora = [
        f"train.lora.rank={options.rank}",
        f"train.lora.alpha={options.rank}",
        f"train.optimizer.lr={options.lora_lr}",
    ]
    runs = {
        f"adapted_{steps}{slower}": [*start, f"train.trunk_lr={options.trunk_lr}"],
        f"lora{options.rank}_{options.lora_lr:g}_{steps}": [*start, *lora],
        f"scratch_{steps}": [],
    }
    results = {}
    for label, words in runs.items():
        seconds, shares = 0.0, []
        for seed in range(options.seeds):
            name = f"{label}_seed{seed}"
            seconds += train(folder, options.system, name, "new", steps, *words, f"seed={seed}")
            shares.append(accuracy(folder / f"{name}.png", str(folder / name), new, options.each))
        results[label] = {key: sum(share[key] for share in shares) / len(shares) for key in shares[0]}
        part = results[label]["all"]
        error = math.sqrt(part * (1 - part) / (options.each * len(new) * options.seeds))
        shown = ", ".join(f"{key} {value:.0%}" for key, value in results[label].items())
        minutes = seconds / 60 / options.seeds
        each = ", ".join(f"{share['all']:.0%}" for share in shares)
        print(f"{label}: {steps} steps in {minutes:.1f} minutes: {shown} (+- {error:.0%}; {each})", flush=True)
    (folder / f"results_{steps}.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
