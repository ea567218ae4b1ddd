#!/usr/bin/env bash
# A page in the browser to look into finished models: reconstructions and their codes, samples as they come about.
#   bash run_playground.sh                                       the small models that come with the code
#   bash run_playground.sh work_dirs/RUN reAR-L.safetensors      runs, files of weights, hf:// addresses
#   bash run_playground.sh --host 0.0.0.0                        for other machines, by an address with a token
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
exec "$PYTHON" -m scripts.playground "$@"
