#!/usr/bin/env bash
# Train only the decoder of a tokenizer (stage 2) on every GPU found.
#   bash run_decoder_finetune_tokenizer.sh EXP                   EXP: name of the stage-1 run, a released file or a path
#   bash run_decoder_finetune_tokenizer.sh configs/rectok/decoder_finetune.yaml train.init_from=work_dirs/rectok_stage1
# key=value settings override the config; --dry-run tells the cost, --help every setting.
# Several nodes, launcher and exit codes: see scripts/launch.sh.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.train --stage=decoder "$@"
