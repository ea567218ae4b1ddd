#!/usr/bin/env bash
# Run the tests (CPU, a few minutes): bash run_tests.sh [pytest arguments]
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
exec "$PYTHON" -m pytest tests "$@"
