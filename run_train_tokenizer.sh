#!/usr/bin/env bash
# Train a tokenizer on every GPU found.
#   bash run_train_tokenizer.sh                                  the published RecTok recipe
#   bash run_train_tokenizer.sh configs/rectok/tokenizer_512.yaml train.micro_batch=16
# A config, if any, comes first, key=value settings override it; --dry-run tells the cost, --help every setting.
# Several nodes, launcher and exit codes: see scripts/launch.sh.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.train --stage=tokenizer "$@"
