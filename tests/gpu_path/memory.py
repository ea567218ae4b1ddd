"""What a GPU must hold in the published recipes: `python -m tests.gpu_path memory` prints it. It takes minutes."""

from __future__ import annotations

from run.estimate import Plan
from run.load import load_config
from tests.conftest import ROOT

CEILING = 75 * 2**30  # bytes, of the 80 GB that the recipes are written for
GPUS = 8
FOLDERS = ("rectok", "fqgan", "rear", "dar", "imagefolder")
RECIPES = sorted(str(p.relative_to(ROOT)) for folder in FOLDERS for p in (ROOT / "configs" / folder).glob("*.yaml"))


def table() -> str:
    """Every recipe, one line each."""
    lines = [
        "| recipe | pictures at a time, per GPU | weights, gradients, AdamW, averages | frozen networks | most alive in "
        "a step | sum, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for path in RECIPES:
        plan = Plan(load_config(path, []), GPUS)
        sizes = plan.memory.state, plan.memory.frozen, plan.memory.peak, plan.memory.total
        held = " | ".join(f"{size / 2**30:.1f}" for size in sizes)
        lines.append(f"| {path.removeprefix('configs/')} | {plan.micro} of {plan.per_gpu} | {held} |")
    return "\n".join(lines)
