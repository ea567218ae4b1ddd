#!/usr/bin/env bash
# Prove and measure this code on one GPU within eight minutes. Nothing is downloaded.
#   bash run_gpu_check.sh [--minutes 8] [--only tests,benchmark] [--out FILE.json] [--markdown docs/benchmarks.md]
#   bash run_gpu_check.sh --device cpu --rehearse       every stage at toy size, without a GPU
# What was finished is not done again by the same command; --again starts anew. See --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
TESSERA_DEV=yes # pytest
source scripts/environment.sh
exec "$PYTHON" -m scripts.gpu_check "$@"
