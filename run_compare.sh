#!/usr/bin/env bash
# Compare tokenizers, or generators, under one protocol: one page, CSV and LaTeX.
#   bash run_compare.sh A B C [--data URL] [--num N]     runs, checkpoints, released files or configs
#   bash run_compare.sh                                  the tiny tokenizers that come with the code
# What is measured and how: docs/compare.md. --help lists the options.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.compare "$@"
