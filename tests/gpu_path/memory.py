"""What a GPU must hold in the published recipes: `python -m tests.gpu_path memory` prints it. It takes minutes."""

from __future__ import annotations

import multiprocessing

from run.estimate import Plan
from run.load import load_config
from tests.conftest import ROOT

CEILING = 75 * 2**30  # bytes, of the 80 GB that the recipes are written for
GPUS = 8
FOLDERS = ("rectok", "fqgan", "rear", "dar", "imagefolder")
RECIPES = sorted(str(p.relative_to(ROOT)) for folder in FOLDERS for p in (ROOT / "configs" / folder).glob("*.yaml"))


def _row(path: str) -> str:
    plan = Plan(load_config(path, []), GPUS)
    sizes = plan.memory.state, plan.memory.frozen, plan.memory.peak, plan.memory.total
    held = " | ".join(f"{size / 2**30:.1f}" for size in sizes)
    return f"| {path.removeprefix('configs/')} | {plan.micro} of {plan.per_gpu} | {held} |"


def print_table(recipes: list[str] = RECIPES) -> None:
    """Every recipe, one line each, in a process of its own: some networks are kept for the life of one."""
    print(
        "| recipe | pictures at a time, per GPU | weights and all that follows them | frozen | alive in a step | sum, GiB |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for row in pool.imap(_row, recipes, chunksize=1):
            print(row, flush=True)
