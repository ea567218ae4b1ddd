"""What a launcher told this process: which rank it is. Only the standard library: it is read before torch.

run_*.sh, torchrun and `accelerate launch` say it in the environment. An empty variable is one that is not set.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from core.errors import UserError

_MEETING = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; `local` counts those of one machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def is_one_of_several() -> bool:
    """Whether a launcher seems to have started more than this process. Never raises."""
    return _value("WORLD_SIZE") not in ("", "1")


def speaks() -> bool:
    """Whether messages for the user are this process's: rank 0, or one that is no rank at all."""
    return _value("RANK") in ("", "0") or not is_one_of_several()


def ranks() -> Ranks:
    """From RANK, WORLD_SIZE and LOCAL_RANK; UserError for what a launcher would not set, as leftovers of another one."""
    given = {name: _value(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if given["WORLD_SIZE"] in ("", "1") and given["RANK"] in ("", "0") and given["LOCAL_RANK"] in ("", "0"):
        return Ranks()
    missing = [name for name in ("RANK", "WORLD_SIZE", *_MEETING) if not _value(name)]
    numbers = {name: int(text) for name, text in given.items() if text.isdecimal()}
    wrong = [name for name, text in given.items() if text and name not in numbers]
    if not missing and not wrong and numbers["RANK"] < numbers["WORLD_SIZE"]:
        return Ranks(numbers["RANK"], numbers["WORLD_SIZE"], numbers.get("LOCAL_RANK", 0))
    shown = ", ".join(f"{name}={text}" for name, text in given.items() if text)
    reason = f"{' and '.join(missing)} not set" if missing else "not a rank among that many"
    raise UserError(f"{shown} in the environment, but {reason}: leftovers of another launcher? For one process: unset "
                    "RANK WORLD_SIZE LOCAL_RANK. For several, let run_*.sh, torchrun or accelerate launch start them.")


def _value(name: str) -> str:
    return os.environ.get(name, "").strip()
