#!/usr/bin/env bash
# Top-1 accuracy of a linear classifier on a tokenizer's features (ImageFolder's ACC).
#   bash run_linear_probe.sh CONFIG_OR_WEIGHTS [URL] [options]       --help lists the options
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.linear_probe "$@"
