#!/usr/bin/env bash
# Train only the decoder of a tokenizer (stage 2) on every GPU found.
#   bash run_finetune_decoder.sh configs/rectok/decoder_finetune.yaml train.init_from=work_dirs/rectok_stage1
# The first argument is a config, the others override it; add --dry-run for the cost, --help for every setting.
# Several nodes, launcher and exit codes: see scripts/launch.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts/train.py "$@"
