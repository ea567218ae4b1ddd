"""train.init_from with train.new_classes, from the released containers of every system: two steps, then samples."""

from __future__ import annotations

import pytest

from tests.rehearsal.recipes import Recipe
from tests.rehearsal.steps import SHORT

FILES = {  # recipe -> released file
    "rear/rear_l": "reAR-L.safetensors",
    "rear/rar_b": "rar_b.bin",
    "dar/ar_l": "D-AR-L-360K.pt",
    "imagefolder/var_d17": "imagenet-var-4096.pt",
    "rectok/ditdh_xl": "ditdhxl_epoch_0599.pth",
}
SLOW = [name for name in FILES if name != "rear/rear_l"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in FILES])
def test_new_classes_from_a_released_file(rehearsal, name):
    recipe = Recipe(name)
    for run in recipe.needs:
        rehearsal.need(run)
    run = f"adapted_{recipe.path.stem}"
    start = [f"train.init_from={FILES[name]}", "'train.new_classes=from:tench,mean,207,tabby'", "train.trunk_lr=0.1"]
    command = f"{recipe.training(*SHORT, f'name={run}')} {' '.join(start)}"
    if "rectok" in name:
        command += " tokenizer.weights=RecTok_decft.pth"
    rehearsal.run(name, "adapt", command)
    rehearsal.run(name, "sample", f"bash run_sample.sh work_dirs/{run} --labels 0-3 --num 4 --out out/{run} --seed 1")
    assert len([p for p in (rehearsal.house.folder / "out" / run).glob("*.png") if p.stem != "grid"]) == 4
