#!/usr/bin/env python3
"""Train a tokenizer or a generator: python -m scripts.train CONFIG [key=value ...] [--check | --dry-run]

The run_train_*.sh scripts call it with --stage=NAME; what they take instead of a CONFIG is in stages.py.

Config -> task -> Trainer. This file only puts the pieces together; the loop is core/train/trainer.py.
"""

import os

from core import cli, launch
from core.errors import UserError, check_choice

USAGE = """usage: python -m scripts.train CONFIG [key=value ...] [--check] [--dry-run] [--help]

  configs/rectok/tokenizer.yaml                          start, or continue where it stopped
  configs/rectok/tokenizer.yaml train.global_batch=256   any setting can be overridden
  configs/rectok/ditdh_xl.yaml --dry-run                 parameters, FLOPs, memory and hours, then stop; needs no weights,
                                                         data or GPU. With --gpus N (those here, else 8), --gpu-gb 80 and
                                                         --tflops 400 (each, assumed)
  configs/rectok/ditdh_xl.yaml --check                   look for mistakes and for missing files, then stop

Exit codes: 0 done, 2 a mistake you can fix, 75 stopped on request or by time limit (run the same again to continue).
"""


HARDWARE = {"--gpus": (int, "a whole number"), "--gpu-gb": (float, "a number"), "--tflops": (float, "a number")}


def take_hardware(words: list[str]) -> tuple[dict[str, float], list[str]]:
    """(keyword arguments of estimate.describe, the other words)."""
    hardware, rest, waiting = {}, [], iter(words)
    for word in waiting:
        option, equals, value = word.partition("=")
        if option not in HARDWARE:
            rest.append(word)
            continue
        kind, expected = HARDWARE[option]
        value = value if equals else next(waiting, "")
        try:
            hardware[option[2:].replace("-", "_")] = kind(value)
        except ValueError:
            raise UserError(f'{option}: {expected} follows, not "{value}".') from None
        if kind(value) <= 0:
            raise UserError(f"{option}: {expected} above 0 follows, not {value}.")
    return hardware, rest


def main(arguments: list[str]) -> int:
    stages = [a.removeprefix("--stage=") for a in arguments if a.startswith("--stage=")]
    arguments = [a for a in arguments if not a.startswith("--stage=")]
    if "--help" in arguments or "-h" in arguments or not (arguments or stages):
        from scripts.settings_help import settings_help

        print(USAGE + settings_help(arguments))
        return 0 if arguments else 2
    modes = {a for a in arguments if a in ("--check", "--dry-run")}
    hardware, words = take_hardware([a for a in arguments if a not in modes])
    from run import translate
    from scripts.stages import STAGES, resolve

    for stage in stages:
        check_choice("--stage", stage, STAGES)
    if len(stages) > 1:
        raise UserError(f"--stage={stages[1]}: this program has --stage={stages[0]} already.")
    if any(a.startswith("--") for a in words):
        # the tokenizer script runs RecTok's recipe by default, but users of every system type it
        recipes = [STAGES[stage].config for stage in stages if stage != "tokenizer"]
        named = words if any(w.endswith((".yaml", ".yml")) for w in words) else [*words, *recipes]
        raise UserError(
            translate.explain(named, translate.tasks_of(named, *stages), options=("--check", "--dry-run", "--help"))
        )
    translate.refuse(words)
    if not stages and (not words or ("=" in words[0] and not os.path.exists(words[0]))):
        raise UserError("say which CONFIG; --help shows examples.")
    path, overrides = resolve(stages[0], words) if stages else (words[0], words[1:])
    set_here = {o.partition("=")[0] for o in overrides}
    asked = [setting for setting in launch.asked_by_accelerate() if setting.partition("=")[0] not in set_here]
    if asked:
        launch.say(f"accelerate's config sets {' '.join(asked)}; the same key behind CONFIG overrules it.")
    from run import check, estimate
    from run.load import load_config
    from run.train import train

    config = load_config(path, asked + overrides)
    if "--check" in modes:
        print(check.check(config))
    elif "--dry-run" in modes:
        print(estimate.describe(config, **hardware))
        print(check.report(config))
    else:
        return train(config, path)
    return 0


if __name__ == "__main__":
    cli.run(main)
