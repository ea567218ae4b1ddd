"""How every script ends: 0 done, 2 the user can fix it (one sentence), 75 stopped on request, run me again."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Callable

from core.errors import UserError


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call main(arguments) and exit. A UserError becomes its message on stderr and exit code 2."""
    try:
        code = main(sys.argv[1:]) or 0
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of our output went away, as in `... | head`
        sys.stderr.close()
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    # torchrun turns every failure of a worker into exit code 1; the launch script reads the real one from here.
    exit_file = os.environ.get("TESSERA_EXIT_FILE")
    if exit_file and int(os.environ.get("RANK", 0)) == 0:
        Path(exit_file).write_text(str(code))
    sys.exit(code)
