"""The one exception that means "the user can fix this": scripts print its sentence and exit with code 2."""


class UserError(Exception):
    """Raised with one clear message: what was given, what was expected, what to change. Never shows a traceback."""


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
