#!/usr/bin/env bash
# Draw pictures of chosen classes on every GPU found.
#   bash run_sample.sh CONFIG --labels 207,360 --out DIR       CONFIG: a config, run folder, checkpoint or released file
#   bash run_sample.sh ditdhxl_epoch_0599.pth --tokenizer RecTok_decft.pth --labels 207 --guide ditdhs_epoch_0029.pth --scale 1.29 --out DIR
# The same command continues after a kill; --help tells the rest. Several nodes and exit codes: see scripts/launch.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts/sample.py "$@"
