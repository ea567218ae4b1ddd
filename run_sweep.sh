#!/usr/bin/env bash
# Find the best sampling settings of a generator (guidance, its schedule and interval, temperature, filters, steps, EMA).
#   bash run_sweep.sh MODEL --scale 1:8 --interval 0:1,0.1:0.9     a config, run folder, checkpoint or released file
#   bash run_sweep.sh                                              a tiny generator that comes with the code
# Curves, the best setting as a config snippet and what it cost: docs/compare.md. --help lists the options.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.sweep "$@"
