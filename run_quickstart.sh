#!/usr/bin/env bash
# Look at what the shipped tiny models make, train a generator beside the shipped one, and look at the report.
#   bash run_quickstart.sh [SYSTEM] [--from-scratch] [--smoke]     SYSTEM: rectok (default), fqgan, rear, dar or imagefolder
# Ctrl-C and run again to continue.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
exec "$PYTHON" -m scripts.quickstart "$@"
