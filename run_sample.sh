#!/usr/bin/env bash
# Draw pictures of chosen classes on every GPU found.
#   bash run_sample.sh CONFIG --labels 207,360 --out DIR       CONFIG: a config, run folder, checkpoint or released file
#   bash run_sample.sh reAR-L.safetensors --labels 207 --out DIR                    guided as published, with its tokenizer
#   bash run_sample.sh --weights FILE --tokenizer FILE --labels 207 --guide FILE --scale 1.29 --out DIR
# The same command continues after a kill; --help tells the rest. Several nodes and exit codes: see scripts/launch.sh.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.sample "$@"
