#!/usr/bin/env bash
# Train a diffusion generator on the latents of a tokenizer on every GPU found.
#   bash run_train_diffusion.sh EXP                              EXP: name of the stage-2 run, a released file or a path
#   bash run_train_diffusion.sh EXP configs/rectok/ditdh_s.yaml  another recipe, here the model for autoguidance
# key=value settings override the config; --dry-run tells the cost, --help every setting.
# Several nodes, launcher and exit codes: see scripts/launch.sh.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.train --stage=diffusion "$@"
