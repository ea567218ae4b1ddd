"""A program whose second rank meets a full disk; the first waits for it. See tests/scripts/test_launched_ranks.py."""

import os
import time

from core import cli
from core.errors import UserError


def main(_) -> int:
    if os.environ["RANK"] == "1":
        raise UserError("the disk is full")
    time.sleep(60)  # until the launcher ends it
    return 0


if __name__ == "__main__":
    cli.run(main)
