#!/usr/bin/env bash
# Store what a tokenizer makes of every picture, on every GPU found; train from it with data.url=tokens://DIR.
#   bash run_pretokenize.sh CONFIG data.url=folder://data/imagenet data.crop=ten --out data/tokens/imagenet
#   bash run_pretokenize.sh tiny/fqgan --out data/tokens/emoji    weights as CONFIG: by the pictures they were trained on
#   bash run_pretokenize.sh CONFIG --import maskgitvq.jsonl data.crop=ten --out data/tokens/imagenet
# A killed job goes on when started again; --help lists the options, scripts/launch.sh explains several nodes.
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
exec bash scripts/launch.sh scripts.pretokenize "$@"
