#!/usr/bin/env bash
# RecTok's evaluation of a diffusion generator: 50,000 samples, 150 steps, FID and IS as torch-fidelity computes them,
# against data/fid_stats/adm_in256_stats.npz, with autoguidance 1.29 and without guidance.
#   bash run_eval_diffusion.sh TOKENIZER GENERATOR [AUTOGUIDANCE_MODEL] [scales=1.29,1.0] [key=value ...] [options]
#   bash run_eval_diffusion.sh pretrained_models/RecTok_decft.pth pretrained_models/ditdhxl_epoch_0599.pth \
#        pretrained_models/ditdhs_epoch_0029.pth
# Without a third model, scales above 1 are classifier-free guidance. Settings and options: run_eval_generator.sh --help.
# Results: work_dirs/gen_model_training/RecTok_eval/scale_<scale>/{metrics.json,report.html}
set -euo pipefail
export TESSERA_CALLER="$PWD" # where paths on this command line start from
cd "$(dirname "${BASH_SOURCE[0]}")"
usage() { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit "${1:-2}"; }
case "${1:-}" in -h | --help) usage 0 ;; esac
for word in "$@"; do
    case "$word" in *[![:space:]]*) ;; *)
        echo "error: a word of this command is blank: \"\\\" continues a line only as its very last character, without a comment behind it." >&2
        exit 2 ;;
    esac
done
[ $# -ge 2 ] || usage >&2

tokenizer="$1" generator="$2"
shift 2
guide=""
case "${1:-}" in "" | -* | *=*) ;; *) guide="$1"; shift ;; esac
scales="1.0"
[ -z "$guide" ] || scales="1.29,1.0"
out="$PWD/work_dirs/gen_model_training/RecTok_eval"
rest=()
while [ $# -gt 0 ]; do
    case "$1" in
        scales=*) scales="${1#scales=}" ;;
        out=* | --out=*) out="${1#*=}" ;;
        --out) [ $# -ge 2 ] || usage >&2; out="$2"; shift ;; # of all scales, each of which has a folder in it
        *) rest+=("$1") ;;
    esac
    shift
done
source scripts/signals.sh
hear_signals
for scale in ${scales//,/ }; do
    guidance=(sample.guidance=cfg)
    [ -z "$guide" ] || guidance=(sample.guidance=auto sample.guide="$guide")
    attend bash scripts/launch.sh scripts.evaluate_generator "$generator" tokenizer.weights="$tokenizer" sample.steps=150 \
        sample.scale="$scale" "${guidance[@]}" eval.protocol=rectok --out "$out/scale_$scale" ${rest[@]+"${rest[@]}"}
    if [ -n "$asked" ]; then stopped; fi # between two scales
done
