#!/usr/bin/env bash
# Train a small tokenizer and a small generator on embedded pictures, here and now, and look at the report.
#   bash run_quickstart.sh [SYSTEM] [--smoke]     SYSTEM: rectok (default), fqgan, rear, dar or imagefolder
# Ctrl-C and run again to continue.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
exec "$PYTHON" -m scripts.quickstart "$@"
