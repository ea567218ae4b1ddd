#!/usr/bin/env python3
"""Train a tokenizer or a generator: python scripts/train.py CONFIG [key=value ...] [--check | --dry-run]

Config -> task -> Trainer. This file only puts the pieces together; the loop is core/train/trainer.py.
"""

import _root  # noqa: F401

from core import cli

USAGE = """usage: train.py CONFIG [key=value ...] [--check] [--dry-run] [--help]

  train.py configs/rectok/tokenizer.yaml                          start, or continue where it stopped
  train.py configs/rectok/tokenizer.yaml train.global_batch=256   any setting can be overridden
  train.py configs/rectok/ditdh_xl.yaml --dry-run                 parameters, FLOPs and memory, then stop
  train.py configs/rectok/ditdh_xl.yaml --check                   only look for mistakes in the config

Exit codes: 0 done, 2 a mistake you can fix, 75 stopped on request or by time limit (run the same again to continue).
"""


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments or not arguments:
        from core.config import help_text

        print(USAGE + "\nSettings [default]:\n" + help_text())
        return 0 if arguments else 2
    flags = {a for a in arguments if a in ("--check", "--dry-run")}
    path, *overrides = [a for a in arguments if a not in flags]
    import assemble

    config = assemble.load_config(path, overrides)
    if "--check" in flags:
        assemble.check_inputs(config)
        return 0
    if "--dry-run" in flags:
        import estimate

        print(estimate.describe(config))
        return 0
    return assemble.train(config)


if __name__ == "__main__":
    cli.run(main)
