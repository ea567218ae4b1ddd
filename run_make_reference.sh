#!/usr/bin/env bash
# Make reference statistics (mu, sigma, mu_s, sigma_s) from pictures, on every GPU found.
#   bash run_make_reference.sh URL OUT [--size 256] [--for generation|reconstruction]      --help lists the options
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.make_reference "$@"
