#!/usr/bin/env bash
# Share a run on the Hugging Face hub: weights that say what they are, and a model card.
#   bash run_publish.sh work_dirs/RUN owner/name [--licence apache-2.0] [--private]
#   bash run_publish.sh work_dirs/RUN owner/name --dry-run        put the folder together and send nothing
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
exec "$PYTHON" -m scripts.publish "$@"
