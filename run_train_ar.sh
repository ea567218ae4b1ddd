#!/usr/bin/env bash
# Train a generator of codes (FAR, RAR, reAR, D-AR's Llama) on every GPU found.
#   bash run_train_ar.sh configs/fqgan/far_b_dual.yaml
#   bash run_train_ar.sh configs/fqgan/far_b_dual.yaml tokenizer.weights=work_dirs/mine data.url=tokens://my/codes
# key=value settings override the config; --dry-run tells the cost, --help every setting.
# Several nodes, launcher and exit codes: see scripts/launch.sh.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.train "$@"
