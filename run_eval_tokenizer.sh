#!/usr/bin/env bash
# Measure how well a tokenizer reconstructs.
#   bash run_eval_tokenizer.sh WEIGHTS [URL]        WEIGHTS: run folder, checkpoint, released file or hf://owner/repo/file
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
exec "$PYTHON" scripts/evaluate.py "$@"
