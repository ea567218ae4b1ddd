#!/usr/bin/env bash
# Measure published numbers again, on every GPU found.
#   bash run_reproduce.sh rear --num 5000            or rectok, fqgan, dar, imagefolder, a released file; no word: all
#   bash run_reproduce.sh --list                     the numbers, their files and sources
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
export TESSERA_PYTHON="$PYTHON"
exec "$PYTHON" -m scripts.reproduce "$@"
