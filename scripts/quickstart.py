#!/usr/bin/env python3
"""The whole pipeline at toy size on embedded pictures: train, sample, measure, and write a report to look at.

    python -m scripts.quickstart [SYSTEM] [--smoke]        (bash run_quickstart.sh also makes the environment)

configs/quickstart/<SYSTEM>/quickstart.yaml lists the stages. Every stage is an ordinary training run, so Ctrl-C and the
same command continue where it stopped.
"""

import shutil
import sys
import time
from pathlib import Path

from core import cli
from core.errors import UserError, nearest
from core.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs" / "quickstart"


def read_plan(system: str) -> dict:
    """quickstart.yaml of a system."""
    import yaml

    systems = sorted(p.parent.name for p in FOLDER.glob("*/quickstart.yaml"))
    if system not in systems:
        raise UserError(f'there is no quickstart for "{system}".{nearest(system, systems)}')
    return yaml.safe_load((FOLDER / system / "quickstart.yaml").read_text())


def overrides_for(plan: dict, stage: str, modes: list[str], work_dir: str) -> list[str]:
    """Overrides of one stage; sections of the plan named by `modes` ("cpu", "cpu_bf16", "gpu", "smoke") add up."""
    found = [f"work_dir={work_dir}"]
    for mode in modes:
        settings = plan.get(mode) or {}
        found += [*(settings.get("all") or []), *(settings.get(stage) or [])]
    return found


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    unknown = [a for a in arguments if a.startswith("-") and a != "--smoke"]
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; the only one is --smoke")
    names = [a for a in arguments if not a.startswith("-")]
    if len(names) > 1:
        raise UserError(f"give one system, not {' '.join(names)}")
    system, smoke = names[0] if names else "rectok", "--smoke" in arguments
    plan = read_plan(system)
    started = time.perf_counter()

    import torch

    from core import dist
    from run import assemble, quickstart_report

    gpu = torch.cuda.is_available()
    modes = ["gpu"] if gpu else ["cpu", "cpu_bf16"] if dist.cpu_multiplies_bf16() else ["cpu"]
    if smoke:  # on a GPU too: it is the same small thing everywhere
        modes = ["smoke"]
    work_dir = f"work_dirs/quickstart_{system}" + ("_smoke" if smoke else "")
    if smoke:  # a smoke run shows that everything runs, so it starts from nothing
        shutil.rmtree(work_dir, ignore_errors=True)
    print(
        f"Quickstart of {system} on {'a GPU' if gpu else f'{torch.get_num_threads()} CPU threads'}, "
        f"into {work_dir}. Ctrl-C any time; the same command continues.",
        flush=True,
    )
    clock = Path(work_dir) / "seconds.json"  # spent on each stage, interrupted attempts included
    seconds = read_json(clock) if clock.is_file() else {}
    configs = {}
    for number, stage in enumerate(plan["stages"], 1):
        print(f"\n== stage {number} of {len(plan['stages']) + 1}: {stage} ==", flush=True)
        begun = time.perf_counter()
        config = assemble.load_config(
            str(FOLDER / system / f"{stage}.yaml"), overrides_for(plan, stage, modes, work_dir)
        )
        try:
            code = assemble.train(config)
        finally:
            seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begun
            if Path(work_dir).is_dir():
                write_json(clock, seconds)
        if code:
            return code
        configs[stage] = config
    print(f"\n== stage {len(plan['stages']) + 1} of {len(plan['stages']) + 1}: samples, metrics, report ==", flush=True)
    begun = time.perf_counter()
    report = quickstart_report.make(plan, configs, smoke, Path(work_dir), seconds, begun)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Open {report}", flush=True)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    cli.run(main)
