#!/usr/bin/env bash
# Train a diffusion generator on the latents of a tokenizer on every GPU found.
#   bash run_train_diffusion.sh configs/rectok/ditdh_xl.yaml tokenizer.weights=work_dirs/rectok_stage2
# The first argument is a config, the others override it; add --dry-run for the cost, --help for every setting.
# Several nodes, launcher and exit codes: see scripts/launch.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts/train.py "$@"
