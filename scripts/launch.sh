#!/usr/bin/env bash
# Start a training or evaluation program on every GPU of this node, and of all nodes.
#
#   bash scripts/launch.sh scripts.train CONFIG [key=value ...]
#
# NPROC            processes on this node (default: one per visible GPU, else 1; CUDA_VISIBLE_DEVICES= means no GPU)
# NNODES NODE_RANK MASTER_ADDR MASTER_PORT   several nodes; taken from SLURM where it sets them,
#                  but for the address from mpirun
# LAUNCHER         torchrun (default) or accelerate
# Exit codes: 0 done, 2 a mistake you can fix, 75 stopped on request or by a time limit: run the same again to continue.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

[ $# -gt 0 ] || fail "say which program: bash scripts/launch.sh scripts.train CONFIG"
program="${1%.py}" # scripts/train.py is answered too
program="${program//\//.}"
shift
if [ -n "$ASKS" ]; then exec "$PYTHON" -m "$program" "$@"; fi

whole() { # NAME VALUE LOW HIGH
    [[ "$2" =~ ^[0-9]{1,6}$ ]] && [ "$2" -ge "$3" ] && [ "$2" -le "$4" ] || fail "$1=$2 should be a whole number from $3 to $4"
}

# This script is the launcher. Ranks inside ranks would all write into one run folder.
for name in RANK WORLD_SIZE LOCAL_RANK; do
    case "$name=${!name:-}" in
        *= | RANK=0 | LOCAL_RANK=0 | WORLD_SIZE=1) unset "$name" ;;
        *) fail "$name=${!name} is set, as another launcher does, but run_*.sh start the ranks themselves. Call them once per" \
            "node, or unset RANK WORLD_SIZE LOCAL_RANK; NPROC, NNODES and NODE_RANK say how many there are" ;;
    esac
done
tasks="${SLURM_STEP_TASKS_PER_NODE:-}" # of this srun; the shell of sbatch or salloc is one task, whatever was asked for
if [ -z "$tasks" ] && [ -n "${SLURM_PROCID:-}" ] && [ "${ENVIRONMENT:-}" != BATCH ]; then tasks="${SLURM_NTASKS_PER_NODE:-}"; fi
if [ "${tasks%%[!0-9]*}" -gt 1 ] 2>/dev/null; then
    [ "${SLURM_PROCID:-0}" = 0 ] || exit 2 # one sentence is enough
    fail "srun started $tasks tasks per node, but run_*.sh start one process per GPU themselves: use --ntasks-per-node=1"
fi
local_ranks="${OMPI_COMM_WORLD_LOCAL_SIZE:-${MPI_LOCALNRANKS:-1}}" # of mpirun, by Open MPI and by MPICH
if [ "$local_ranks" -gt 1 ] 2>/dev/null; then
    [ "${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}" = 0 ] || exit 2
    fail "mpirun started $local_ranks processes per node, but run_*.sh start one process per GPU themselves: start one per node"
fi

if [ -z "${NPROC:-}" ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        NPROC="$(awk -F, '{for (i = 1; i <= NF && $i != "" && $i != -1; i++) n++; print n + 0}' <<<"$CUDA_VISIBLE_DEVICES")"
    else
        NPROC="$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)"
    fi
    [ "${NPROC:-0}" -ge 1 ] || NPROC=1
fi
NNODES="${NNODES:-${SLURM_NNODES:-${OMPI_COMM_WORLD_SIZE:-1}}}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-${OMPI_COMM_WORLD_RANK:-0}}}"
whole NPROC "$NPROC" 1 1024
whole NNODES "$NNODES" 1 100000
whole NODE_RANK "$NODE_RANK" 0 "$((NNODES - 1))"

for word in "$@"; do
    case "$word" in --check | --dry-run | --list-labels) NPROC=1 NNODES=1 ;; esac # questions, which one process answers
done
if [ "$NPROC" = 1 ] && [ "$NNODES" = 1 ]; then
    exec "$PYTHON" -m "$program" "$@"
fi

if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ] && command -v scontrol >/dev/null; then
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")" # whole: "| head" may end scontrol, and pipefail this script
    MASTER_ADDR="${hosts%%$'\n'*}"
fi
[ "$NNODES" = 1 ] || [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$NNODES needs MASTER_ADDR, the address of the node with NODE_RANK=0"
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
port_is_free() { "$PYTHON" -c 'import socket, sys; socket.create_server(("", int(sys.argv[1]))).close()' "$1" 2>/dev/null; }
chosen=
if [ -z "${MASTER_PORT:-}" ]; then
    job="${SLURM_JOB_ID:-$$}" # the same on all nodes; 12_4 is a task of an array
    if [ "$NNODES" != 1 ] && [ -z "${SLURM_JOB_ID:-}" ]; then job=9500; fi # no number that all nodes have: port 29500
    [[ "$job" =~ ^[0-9]+(_[0-9]+)?$ ]] || fail "SLURM_JOB_ID=$job is not the number of a job: set MASTER_PORT, the same on all nodes"
    digits="00000${job/_/}"
    MASTER_PORT="$((20000 + 10#${digits: -5} % 20000))" chosen=yes
fi
whole MASTER_PORT "$MASTER_PORT" 1 65535
if [ "$NODE_RANK" = 0 ]; then
    for _ in {1..100}; do
        if port_is_free "$MASTER_PORT"; then break; fi
        [ -n "$chosen" ] && [ "$NNODES" = 1 ] || fail "port $MASTER_PORT cannot be used on this node, another program has it: set" \
            "MASTER_PORT to a free one, the same on all nodes"
        MASTER_PORT="$((20000 + (MASTER_PORT - 19999) % 20000))"
    done
fi

# Mistakes are found here, once and without a GPU, instead of on every rank.
code=0
attend "$PYTHON" -m "$program" "$@" --check >/dev/null || code=$?
if [ -n "$asked" ] && [ "$code" != 75 ]; then stopped; fi # 75: it has said so
[ "$code" = 0 ] || exit "$code"

cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)" # those that the job may use
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / NPROC > 0 ? cores / NPROC : 1))}"
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

start_ranks() {
    trap '' USR1 # a scheduler may signal a whole process group, and a launcher that gets this one dies
    # The launchers would take an option of ours for an abbreviation of theirs (--num), but not behind "--".
    exec "${command[@]}" -m -- "$program" "$@"
}
tells=children
attend start_ranks "$@" || code=$?
# The first rank to fail has left its code and its sentence, which comes after whatever the launcher had to say.
{ read -r written && message="$(cat)"; } <"$TESSERA_EXIT_FILE" || written='' message=''
[ -z "$message" ] || echo "$message" >&2
if [ -z "$written" ] && [ -n "$asked" ] && [ "$code" != 0 ]; then stopped; fi # the ranks were only starting
exit "${written:-$code}"
