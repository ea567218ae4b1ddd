"""What everything else is built on."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  whoever starts a program with another Python is told so
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    needed = "3.11 or newer is needed: use that of .venv, which run_*.sh make."
    print(f"error: this is Python {version}, and {needed}", file=sys.stderr)
    sys.exit(2)
