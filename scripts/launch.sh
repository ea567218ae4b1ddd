#!/usr/bin/env bash
# Start a training or evaluation program on every GPU of this node, and of all nodes.
#
#   bash scripts/launch.sh scripts/train.py CONFIG [key=value ...]
#
# NPROC            processes on this node (default: one per visible GPU, else 1)
# NNODES NODE_RANK MASTER_ADDR MASTER_PORT   several nodes; taken from SLURM where it sets them
# LAUNCHER         torchrun (default) or accelerate
# Exit codes: 0 done, 2 a mistake you can fix, 75 stopped on request or by a time limit: run the same again to continue.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ -n "$ASKS" ]; then exec "$PYTHON" "$@"; fi

if [ -z "${NPROC:-}" ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        NPROC="$(awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES")"
    else
        NPROC="$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)"
    fi
    [ "${NPROC:-0}" -ge 1 ] || NPROC=1
fi
NNODES="${NNODES:-${SLURM_NNODES:-1}}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}"
if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ] && command -v scontrol >/dev/null; then
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")" # whole: "| head" may end scontrol, and pipefail this script
    MASTER_ADDR="${hosts%%$'\n'*}"
fi
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
MASTER_PORT="${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-$$} % 20000))}"

if [ "$NPROC" = 1 ] && [ "$NNODES" = 1 ]; then
    exec "$PYTHON" "$@"
fi

# Mistakes are found here, once and without a GPU, instead of on every rank.
"$PYTHON" "$@" --check || exit $?

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(getconf _NPROCESSORS_ONLN) / NPROC > 0 ? $(getconf _NPROCESSORS_ONLN) / NPROC : 1))}"
TESSERA_EXIT_FILE="$(mktemp)"
export TESSERA_EXIT_FILE
trap 'rm -f "$TESSERA_EXIT_FILE" "$TESSERA_EXIT_FILE.claimed"' EXIT
case "${LAUNCHER:-torchrun}" in
    torchrun)
        command=("$PYTHON" -m torch.distributed.run --nproc-per-node "$NPROC" --nnodes "$NNODES" --node-rank "$NODE_RANK"
            --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT") ;;
    accelerate)
        command=("$PYTHON" -m accelerate.commands.launch --num_processes "$((NPROC * NNODES))" --num_machines "$NNODES"
            --machine_rank "$NODE_RANK" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"
            --mixed_precision no --dynamo_backend no --multi_gpu) ;; # on CPUs too: --cpu would start a single process
    *) fail "LAUNCHER is torchrun or accelerate, not $LAUNCHER" ;;
esac

# The launchers would take an option of ours for an abbreviation of theirs (--num), but not behind "--".
"${command[@]}" -- "$@" &
child=$!
# SLURM and users signal this shell: hand it to the ranks themselves (the launcher would kill them after 30 seconds).
trap 'pkill -TERM -P "$child" || kill -TERM "$child" 2>/dev/null' TERM INT USR1
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child" || code=$?; done
written="$(cat "$TESSERA_EXIT_FILE" 2>/dev/null || true)"
exit "${written:-$code}"
