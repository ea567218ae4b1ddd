"""Rehearse run_reproduce.sh: python -m tests.rehearsal.reproduce [SYSTEM or ROW ...]

The same command in a house of tiny random files, 8 pictures a row. What it prints has nothing to do with the published
numbers; that every row downloads, samples and is measured, and that a second run measures nothing again, has.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import numpy

from tests.rehearsal.frozen import INCEPTION
from tests.rehearsal.house import Done, House

PICTURES = 8
# What a tiny file needs beside its published settings: 64 channels do not tell the heads, and 150 steps are many.
WORDS = {"D-AR-": "generator.size.heads=1", "ditdh": "sample.steps=4", "admnet": "eval.reference=real.npz"}
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
            if f'file = "{beginning}' in row and "tokenizer" not in row:
                stated = re.search(r"settings = \[(.*)\]", row)
                rows[i] = (
                    row.replace(stated[0], f'settings = [{stated[1]}, "{word}"]')
                    if stated
                    else f'{row.rstrip()}\nsettings = ["{word}"]\n'
                )
    table.write_text("".join(rows))


def rehearse(house: House, words: list[str]) -> Done:
    """run_reproduce.sh of these rows, and again; the first run, which ends with 0 or fails."""
    command = f"bash run_reproduce.sh {' '.join(words)} {STAND_IN} --num {PICTURES} --bootstrap 2"
    first = house.run(command)
    if first.code == 0:
        again = house.run(command).expect()
        assert "published" not in again.output.split("Usual causes")[0].replace("published |", ""), again.output
    return first


def main(words: list[str]) -> int:
    """One command a system, or a word."""
    house, code = House(Path(tempfile.mkdtemp(prefix="tessera_")) / "tessera"), 0
    try:
        furnish(house)
        for word in words or ["evaluation", "rectok", "fqgan", "rear", "dar", "imagefolder"]:
            done = rehearse(house, [word])
            code = code or done.code
            print(done.output)
            print(f"{word}: rehearsed in {done.seconds:.0f} s with random files: the numbers mean nothing", flush=True)
    finally:
        house.close()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
