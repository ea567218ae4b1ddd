#!/usr/bin/env bash
# Draw a part of a photo anew, as a picture of another class.
#   bash run_edit.sh GENERATOR photo.png --mask m.png --label 207 --out x.png      white in the mask is what changes
#   bash run_edit.sh GENERATOR photo.png --outpaint 0.2 --label "tree frog" --out x.png      draw what is around the photo
# GENERATOR: a config, run folder, checkpoint or released file, as for run_sample.sh; --help tells the rest.
# Without one: tiny/rectok, a tiny model that comes with the code.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh
exec "$PYTHON" -m scripts.edit "$@"
