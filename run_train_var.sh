#!/usr/bin/env bash
# Train a scale-by-scale generator on the codes of a multi-scale tokenizer on every GPU found.
#   bash run_train_var.sh                                        the published recipe on imagenet-4096.pt
#   bash run_train_var.sh EXP configs/imagefolder/var_d17.yaml   EXP: name of a tokenizer run, a released file or a path
# key=value settings override the config; --dry-run tells the cost, --help every setting.
# Several nodes, launcher and exit codes: see scripts/launch.sh.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.train --stage=var "$@"
