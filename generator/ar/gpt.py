"""The plain LlamaGen decoder (Sun et al. 2024) of D-AR (arXiv 2505.23660): FAR with one codebook, no head layers and
positions on a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from core.limits import Count, Whole
from generator.ar import far


@dataclass(frozen=True)
class Size(far.Size):
    """Shape of a trunk alone."""

    head_layers: Whole = 0


SIZES = {
    "b": Size(768, 12, 12),
    "l": Size(1024, 24, 16),
    "xl": Size(1280, 36, 20),
    "xxl": Size(1536, 48, 24),
    "xxxl": Size(2560, 48, 40),
    "1b": Size(2048, 22, 32),
    "3b": Size(3200, 24, 32),
    "7b": Size(4096, 32, 32),
}


class GPT(far.FAR):
    """core.specs.Generator of one sequence of codes.

    Args:
        size: a name in SIZES or {width, layers, heads}, optionally with hidden and kv_heads.
        others: see generator.ar.far.FAR. More than one codebook needs size.head_layers, as there.
        rotary: "line" numbers the positions; "auto" turns them by their place on the grid, as LlamaGen does.
    """

    size_type, sizes = Size, SIZES

    def __init__(
        self,
        *,
        size: str | Annotated[dict, Size] = "l",
        branches: Count = 1,
        rotary: Literal["auto", "line"] = "line",
        **others: Any,
    ):
        super().__init__(size=size, branches=branches, rotary=rotary, **others)
