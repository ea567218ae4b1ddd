#!/usr/bin/env bash
# Run the tests (CPU, a few minutes): bash run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
exec "$PYTHON" -m pytest tests "$@"
