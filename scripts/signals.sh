# Sourced by shell programs that wait for others, so that they can be stopped at any moment like the programs themselves:
# what is being waited for is told, and exit code 75 says that running again continues.

asked= heard=0 child=
tells=self # whom a signal is handed to: the child itself, or its children (a launcher would kill its ranks after 30 seconds)

stopped() { echo "stopped (received $asked); run the same command again to continue" >&2; exit 75; }

hear() { # SIGNAL
    asked="$1" heard=$((heard + 1))
    [ -n "$child" ] || stopped
    { [ "$tells" = children ] && pkill -TERM -P "$child"; } || kill -TERM "$child" 2>/dev/null || true
}

hear_signals() {
    local name
    for name in TERM INT USR1; do trap "hear SIG$name" "$name"; done
}

attend() { # COMMAND...: its exit code. A shell obeys signals only where it waits for what runs beside it.
    local code=127 again before
    "$@" &
    child=$!
    while before=$heard; do
        again=0
        wait "$child" || again=$?
        [ "$again" = 127 ] || code=$again # 127: told before, together with a signal
        [ "$heard" != "$before" ] || break
    done
    child=
    return "$code"
}
