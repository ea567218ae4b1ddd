#!/usr/bin/env bash
# Train a tokenizer on every GPU found.
#   bash run_train_tokenizer.sh configs/rectok/tokenizer.yaml
# The first argument is a config, the others override it; add --dry-run for the cost, --help for every setting.
# Several nodes, launcher and exit codes: see scripts/launch.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts/train.py "$@"
