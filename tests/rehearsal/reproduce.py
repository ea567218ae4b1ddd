"""Rehearse run_reproduce.sh: python -m tests.rehearsal.reproduce [SYSTEM or ROW ...] [--out DIR]

The same command in a house of tiny random files, 10 pictures a row. What it prints has nothing to do with the published
numbers; that every row downloads, samples and is measured, and that a second run measures nothing again, has. The house is
DIR/house and goes when the rehearsal ends; what was measured stays in DIR, and the same command goes on with it after a kill.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from pathlib import Path

import numpy

from core import cli
from core.lock import Lock
from run import reproduce as product
from tests.rehearsal.frozen import INCEPTION
from tests.rehearsal.house import Done, House

PICTURES = 10  # RecTok's Inception Score has ten parts
# What a tiny file needs beside its published settings: 64 channels do not tell the heads, 64 codes not whether they are unit
# vectors, and 150 steps are many.
WORDS = {
    "D-AR-": "generator.size.heads=1",
    "ditdh": "sample.steps=4",
    "admnet": "eval.reference=real.npz",
    "vqgan_plus": "tokenizer.normalise=false",
}
STAND_IN = f"eval.network=pretrained_models/{INCEPTION} eval.batch=4"


def furnish(house: House) -> None:
    """ADM's samples with pictures to hold them against, and the words above in the table of this house."""
    shots = numpy.random.default_rng(1).integers(0, 256, (PICTURES, 256, 256, 3), dtype=numpy.uint8)
    for name in (
        "admnet_guided_upsampled_imagenet256.npz",
        "real.npz",
    ):  # no statistics, so any network may measure them
        numpy.savez_compressed(house.folder / "data" / "fid_stats" / name, arr_0=shots[::-1])
    table = house.folder / "configs" / "reproduce.toml"
    rows = re.split(r"(?m)^(?=\[)", table.read_text())
    for i, row in enumerate(rows):
        for beginning, word in WORDS.items():
            if f'file = "{beginning}' in row and "-tokenizer" not in row.partition("\n")[0]:
                stated = re.search(r"settings = \[(.*)\]", row)
                rows[i] = (
                    row.replace(stated[0], f'settings = [{stated[1]}, "{word}"]')
                    if stated
                    else f'{row.rstrip()}\nsettings = ["{word}"]\n'
                )
    table.write_text("".join(rows))


def command(words: list[str], out: str = "work_dirs/reproduce") -> str:
    """run_reproduce.sh of these rows, of all without words."""
    return f"bash run_reproduce.sh {' '.join(words)} {STAND_IN} --num {PICTURES} --bootstrap 2 --out {out}"


def rehearse(house: House, words: list[str]) -> Done:
    """The first run, which ends with 0 or fails; after that it was run again."""
    first = house.run(command(words))
    if first.code == 0:
        check_again(house.run(command(words)).expect())
    return first


def check_again(done: Done) -> None:
    """AssertionError where a row was measured that had been measured."""
    assert not re.search(r"(?m)^\[\d+ of \d+\] .*: published", done.output), done.output


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal.reproduce", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="SYSTEM")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/rehearsal"))
    options = parser.parse_args(arguments)
    product.rows(options.words)  # names that are none
    out, started = options.out.resolve(), time.monotonic()
    lock = Lock(out / "house")
    lock.take()
    shutil.rmtree(out / "house" / "tessera", ignore_errors=True)  # of a rehearsal that was killed
    print(f"making a copy of this project with tiny random files in {out / 'house'}", flush=True)
    house = House(out / "house" / "tessera")
    try:
        furnish(house)
        line = command(options.words, str(out))
        if code := product.attend(["bash", "-c", line], house.folder, house.environment()):
            return code
        check_again(house.run(line).expect())
        print(f"rehearsed in {time.monotonic() - started:.0f} s with random files: the numbers mean nothing")
    finally:
        house.close()
        lock.release()
    return 0


if __name__ == "__main__":
    cli.run(main)
