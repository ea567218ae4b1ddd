# Sourced by the run_*.sh scripts: sets PYTHON to an interpreter that has requirements.txt installed.
#
#   TESSERA_PYTHON=/path/to/python   use that one as it is
#   --help, -h, --list               any Python: they need the standard library alone, so nothing is installed for them
#   otherwise                        .venv in the repository, made with uv (or venv + pip) and stamped with the hash of
#                                    requirements.txt, so that the next start takes no time

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
ASKS= # only a question
for word in "$@"; do
    case "$word" in -h | --help | --list) ASKS=yes ;; esac
done
fail() { echo "error: $*" >&2; exit 2; }

check_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$1 is $("$1" --version 2>&1); Tessera needs Python 3.11 or newer. Set PYTHON_FOR_VENV=/path/to/python3.11"
}

install() { # requirements.txt into $venv, made with $base
    free_mb="$(df -Pm "$ROOT" | awk 'NR==2 {print $4}')"
    [ "$free_mb" -ge 9000 ] || [ -x "$PYTHON" ] ||
        fail "only ${free_mb} MB free in $ROOT; the environment needs about 9000. Free some space or set TESSERA_PYTHON"
    echo "Installing requirements.txt into .venv (once, a few minutes) ..."
    if command -v uv >/dev/null; then
        uv venv --quiet --allow-existing --python "$base" "$venv" &&
            uv pip install --quiet --python "$PYTHON" -r "$ROOT/requirements.txt" || fail "uv could not install the requirements"
    else
        "$base" -m venv "$venv" || fail "$base cannot make virtual environments (on Debian: apt install python3-venv)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt" ||
            fail "pip could not install the requirements (see above; is the disk full or the network down?)"
    fi
    echo "$wanted" >"$stamp"
}

if [ -n "${TESSERA_PYTHON:-}" ]; then
    command -v "$TESSERA_PYTHON" >/dev/null || fail "TESSERA_PYTHON=$TESSERA_PYTHON is not a program"
    check_python "$TESSERA_PYTHON"
    PYTHON="$TESSERA_PYTHON"
else
    venv="$ROOT/.venv"
    stamp="$venv/requirements.sha256"
    PYTHON="$venv/bin/python"
    wanted="$( (sha256sum "$ROOT/requirements.txt" 2>/dev/null || shasum -a 256 "$ROOT/requirements.txt") | cut -d' ' -f1)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        base="${PYTHON_FOR_VENV:-}"
        for candidate in python3.13 python3.12 python3.11 python3; do  # a name on PATH may be a shim that does not run
            if [ -z "$base" ] && "$candidate" -c '' 2>/dev/null; then base="$candidate"; fi
        done
        [ -n "$base" ] || fail "no python3 found; install Python 3.11 or newer, or set TESSERA_PYTHON"
        check_python "$base"
        if [ -n "$ASKS" ]; then PYTHON="$base"; else install; fi
    fi
fi
export PYTHON
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" # python -m scripts.NAME finds the packages from any folder
