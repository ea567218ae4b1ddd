#!/usr/bin/env bash
# Run the tests, on the CPU.
#   bash run_tests.sh [pytest arguments]     all but the slow ones, as CI does
#   bash run_tests.sh --all [...]            the slow ones too
# It tells what it runs, at the end how long it took, and which ten tests took longest: 13 minutes for all but the slow ones on
# two CPU cores. Without arguments it uses every core.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")"
words=() which="all but the slow ones" chosen=
for word in "$@"; do
    # pytest.ini leaves slow ones out
    if [ "$word" = --all ]; then words+=(-m "") which="all of them"; else words+=("$word") chosen=yes; fi
done
TESSERA_DEV=yes
source scripts/environment.sh
trap - TERM INT USR1 # nothing to continue
if [ -z "$chosen" ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then # a process per core, each test with one thread
    words+=(-n logical --dist worksteal)
fi
echo "tests: $which${*:+ (run_tests.sh $*)}, $("$PYTHON" --version), $(getconf _NPROCESSORS_ONLN) CPU cores"
SECONDS=0 code=0
"$PYTHON" -m pytest ${words[@]+"${words[@]}"} || code=$?
echo "tests took $((SECONDS / 60)) min $((SECONDS % 60)) s"
exit "$code"
