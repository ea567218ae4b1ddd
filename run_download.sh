#!/usr/bin/env bash
# Fetch released weights and statistics.
#   bash run_download.sh rectok                      or fqgan, rear, dar, imagefolder, evaluation, auxiliary, or one file name
#   bash run_download.sh --list                      every file, its size, where it goes
# --dry-run says what would be fetched, --all takes optional files too. TESSERA_OFFLINE=1 forbids downloads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
exec "$PYTHON" -m scripts.download "$@"
