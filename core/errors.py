"""The one exception that means "the user can fix this": scripts print its sentence and exit with code 2."""


class UserError(Exception):
    """Raised with one clear message: what was given, what was expected, what to change. Never shows a traceback."""

    exit_code = 2


def nearest(word: object, choices) -> str:
    """' Did you mean "x"?' for the closest choice, or the list of choices when none is close."""
    import difflib

    choices = sorted(choices)
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    if close:
        return f' Did you mean "{close[0]}"?'
    return f" Known: {', '.join(choices)}." if choices else ""


def check_choice(setting: str, value: object, choices) -> None:
    """UserError with the nearest choice unless `value` is one of them."""
    if value not in choices:
        raise UserError(f'{setting} "{value}" is not known.{nearest(value, choices)}')


def lost_worker(error: BaseException) -> UserError | None:
    """What torch means by its RuntimeError about a decoding process that is gone; None for any other error."""
    said = f"{error} {error.__cause__ or error.__context__}"  # the signal is named by one of them
    if "DataLoader worker" not in said:
        return None
    how = next((f" ({word})" for word in ("Killed", "Bus error", "Segmentation fault") if word in said), "")
    advice = {
        " (Killed)": "The memory of this machine, or of the job, most likely ran out: ask for more of it, or set fewer "
        "decoding processes (data.workers, --workers)",
        " (Bus error)": "/dev/shm most likely ran out: set workers=0 (data.workers, --workers), or give the container more "
        "(docker run --shm-size=8g)",
    }.get(how, "Set workers=0 (data.workers, --workers) to see why")
    return UserError(f"a process that decodes pictures was ended by the system{how}. {advice}; then start again.")
