#!/usr/bin/env bash
# Measure how well a tokenizer reconstructs, on every GPU found.
#   bash run_eval_tokenizer.sh WEIGHTS [URL] [eval.key=value ...]    WEIGHTS: run folder, checkpoint, released file or hf://
#   bash run_eval_tokenizer.sh --original DIR --reconstructed DIR    two folders or .npz files
# Metrics and conventions: eval.protocol=NAME (docs/evaluation.md). --help lists the options.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.evaluate "$@"
