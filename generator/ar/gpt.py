"""The plain LlamaGen decoder (Sun et al. 2024) of D-AR (arXiv 2505.23660): FAR with one codebook, no head layers and
positions on a line."""

from __future__ import annotations

from typing import Literal

from core import sizes
from generator.ar.far import FAR, Size

SIZES = {
    "b": Size(768, 12, 12, 0),
    "l": Size(1024, 24, 16, 0),
    "xl": Size(1280, 36, 20, 0),
    "xxl": Size(1536, 48, 24, 0),
    "xxxl": Size(2560, 48, 40, 0),
    "1b": Size(2048, 22, 32, 0),
    "3b": Size(3200, 24, 32, 0),
    "7b": Size(4096, 32, 32, 0),
}


class GPT(FAR):
    """core.specs.Generator of one sequence of codes.

    Args:
        size: a name in SIZES or {width, layers, heads}, optionally with hidden and kv_heads.
        others: see generator.ar.far.FAR. More than one codebook needs size.head_layers, as there.
        rotary: "line" numbers the positions; "auto" turns them by their place on the grid, as LlamaGen does.
    """

    def __init__(
        self,
        *,
        size: str | dict = "l",
        length: int = 256,
        branches: int = 1,
        vocab: int = 16384,
        grid: list[int] | None = None,
        num_classes: int = 1000,
        label_drop: float = 0.1,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        path_dropout: float = 0.0,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        rotary: Literal["auto", "line"] = "line",
        rear: dict | None = None,
        code_dim: int = 8,
    ):
        shape = {"head_layers": 0, **size} if isinstance(size, dict) else vars(sizes.pick(size, Size, SIZES))
        super().__init__(
            size=shape,
            length=length,
            branches=branches,
            vocab=vocab,
            grid=grid,
            num_classes=num_classes,
            label_drop=label_drop,
            token_dropout=token_dropout,
            residual_dropout=residual_dropout,
            ffn_dropout=ffn_dropout,
            path_dropout=path_dropout,
            rope_theta=rope_theta,
            norm_eps=norm_eps,
            rotary=rotary,
            rear=rear,
            code_dim=code_dim,
        )
