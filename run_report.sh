#!/usr/bin/env bash
# Write the page of a run again, or put several runs beside each other on one page.
#   bash run_report.sh work_dirs/RUN                            its report.html, as while it trains
#   bash run_report.sh work_dirs/ONE work_dirs/OTHER [--out PAGE.html]
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
exec "$PYTHON" -m scripts.report "$@"
