#!/usr/bin/env bash
# Sample from a generator and measure the samples (FID and so on), on every GPU found.
#   bash run_eval_generator.sh CONFIG_OR_WEIGHTS [key=value ...]     a config, run folder, checkpoint or released file
#   bash run_eval_generator.sh [CONFIG] --weights FILE [--tokenizer FILE]     any file of generator weights
#   bash run_eval_generator.sh SAMPLES [eval.key=value ...]          an .npz with arr_0, or a folder of pictures
# Metrics and conventions: eval.protocol=NAME (docs/evaluation.md). --help lists the options.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.evaluate_generator "$@"
