# Sourced by the run_*.sh scripts: sets PYTHON to an interpreter that has requirements.txt installed.
#
#   TESSERA_PYTHON=/path/to/python   use that one as it is
#   --help, -h, --list               any Python: they need the standard library alone, so nothing is installed for them
#   otherwise                        .venv in the repository, made with uv (or venv + pip) and stamped with the hash of
#                                    what was installed, so that the next start takes no time
#   TESSERA_EXTRAS=yes               requirements-extras.txt too (wandb, tensorboard, datasets)
#   TESSERA_DRIVER=550               take the torch for this driver of NVIDIA: on a login node, which has no GPU to ask

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/signals.sh"
hear_signals # from now on; what is started with exec hears them itself
ASKS= # only a question
for word in "$@"; do
    case "$word" in -h | --help | --list) ASKS=yes ;; esac
done
fail() { echo "error: $*" >&2; exit 2; }
if [ -n "${TMPDIR:-}" ] && ! { [ -d "$TMPDIR" ] && [ -w "$TMPDIR" ]; }; then # of the node where the job was sent off, say
    echo "TMPDIR=$TMPDIR is no folder that can be written to; /tmp is used" >&2
    unset TMPDIR
fi
fail_unless_stopped() { [ -z "$asked" ] || stopped; fail "$@"; }

check_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$1 is $("$1" --version 2>&1); Tessera needs Python 3.11 or newer. Set PYTHON_FOR_VENV=/path/to/python3.11"
}

# The builds of torch that PyPI offers, newest first: from which driver of NVIDIA on, torch, torchvision.
# CUDA 13 needs driver 580, CUDA 12 (its minor versions are compatible with each other) needs 525.
BUILDS="
580 -      -        # as requirements.txt says (CUDA 13)
525 2.10.0 0.25.0   # the last one for CUDA 12 (12.8)
"

choose_build() { # sets TORCH and VISION, "-" for those of requirements.txt
    local from driver
    TORCH=- VISION=-
    driver="${TESSERA_DRIVER:-$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)}" || true
    [[ "$driver" =~ ^[0-9]+ ]] || return 0 # no GPU: the newest runs on the CPU
    while read -r from TORCH VISION _; do
        if [ -n "$from" ] && [ "${driver%%.*}" -ge "$from" ]; then return 0; fi
    done <<<"$BUILDS"
    fail "the driver $driver of this machine's GPU is older than 525, and no torch >= 2.8 on PyPI runs on it. Update the driver," \
        "or install torch for it yourself and set TESSERA_PYTHON"
}

pinned() { # FILE: its lines, with the torch that this machine can use
    sed -E -e "$([ "$TORCH" = - ] || echo "s/^torch==[^ ]+/torch==$TORCH/;s/^torchvision==[^ ]+/torchvision==$VISION/")" "$ROOT/$1"
}

lock() { # one process at a time makes .venv: the nodes of a job share a disk, and so do jobs
    local owner said=
    until mkdir "$venv.lock" 2>/dev/null; do
        [ -d "$venv.lock" ] || fail "$ROOT cannot be written to, and there is no environment in it: set TESSERA_PYTHON"
        owner="$(cat "$venv.lock/owner" 2>/dev/null)" || true
        if [ "${owner% *}" = "$(uname -n)" ] && ! kill -0 "${owner##* }" 2>/dev/null; then
            rm -rf "$venv.lock" # of one that was killed
            continue
        fi
        [ -n "$said" ] || echo "Waiting for .venv, which process ${owner:-of another node} makes (if it does not live: rm -r $venv.lock) ..."
        said=yes
        attend sleep 1
        [ -z "$asked" ] || stopped
    done
    trap 'rm -rf "$venv.lock"' EXIT
    echo "$(uname -n) $$" >"$venv.lock/owner"
}

unlock() { rm -rf "$venv.lock"; trap - EXIT; }

incomplete() { # whether .venv lacks one of the files $needed
    local file
    for file in $needed; do
        if [ "$(cat "$venv/$file.sha256" 2>/dev/null)" != "$(stamp "$file")" ]; then return 0; fi
    done
    return 1
}

install() { # the files $needed into $venv, made with $base
    local free_mb lists file site
    choose_build
    free_mb="$(df -Pm "$ROOT" | awk 'NR==2 {print $4}')"
    [ "$free_mb" -ge 9000 ] || [ -x "$PYTHON" ] ||
        fail "only ${free_mb} MB free in $ROOT; the environment needs about 9000. Free some space or set TESSERA_PYTHON"
    echo "Installing $needed into .venv (once, a few minutes)$([ "$TORCH" = - ] || echo ", with torch $TORCH for this driver") ..."
    lists="$(mktemp -d)"
    for file in $needed; do pinned "$file" >"$lists/$file"; done
    set -- # -r FILE -r FILE ...
    for file in $needed; do set -- "$@" -r "$lists/$file"; done
    if command -v uv >/dev/null; then
        uv venv --quiet --allow-existing --python "$base" "$venv" &&
            attend uv pip install --quiet --python "$PYTHON" "$@" || fail_unless_stopped "uv could not install the requirements"
    else
        "$base" -m venv "$venv" || fail "$base cannot make virtual environments (on Debian: apt install python3-venv)"
        attend "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@" ||
            fail_unless_stopped "pip could not install the requirements (see above; is the disk full or the network down?)"
    fi
    rm -rf "$lists"
    # What an editable installation would write: python scripts/NAME.py and notebooks find the packages from any folder.
    site="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    if [ -d "$site" ]; then echo "$ROOT" >"$site/tessera.pth"; fi
    for file in $needed; do stamp "$file" >"$venv/$file.sha256"; done
}

stamp() { (sha256sum "$ROOT/$1" 2>/dev/null || shasum -a 256 "$ROOT/$1") | cut -d' ' -f1; }

if [ -n "${TESSERA_PYTHON:-}" ]; then
    command -v "$TESSERA_PYTHON" >/dev/null || fail "TESSERA_PYTHON=$TESSERA_PYTHON is not a program"
    check_python "$TESSERA_PYTHON"
    PYTHON="$TESSERA_PYTHON"
else
    venv="$ROOT/.venv"
    PYTHON="$venv/bin/python"
    needed="requirements.txt${TESSERA_EXTRAS:+ requirements-extras.txt}${TESSERA_DEV:+ requirements-extras.txt requirements-dev.txt}"
    if [ -n "$ASKS" ]; then needed=requirements.txt; fi
    if incomplete; then
        base="${PYTHON_FOR_VENV:-}"
        for candidate in python3.13 python3.12 python3.11 python3; do  # a name on PATH may be a shim that does not run
            if [ -z "$base" ] && "$candidate" -c '' 2>/dev/null; then base="$candidate"; fi
        done
        [ -n "$base" ] || fail "no python3 found; install Python 3.11 or newer, or set TESSERA_PYTHON"
        check_python "$base"
        if [ -n "$ASKS" ]; then
            PYTHON="$base"
        else
            lock
            if incomplete; then install; fi # another one may have been faster
            unlock
        fi
    fi
fi
export PYTHON
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" # python -m scripts.NAME finds the packages from any folder
