"""FSQ (finite scalar quantisation, Mentzer et al. 2023, arXiv 2309.15505) in a plain convolutional tokenizer.

Every channel is squeezed into a few whole numbers; a code is their mixed-radix number. There is no table to learn, so
there is nothing that can collapse: no codebook loss, no commitment, no entropy term.

Shape letters: D channels of a code, L_d levels of channel d, V = product of the levels, (..., D) any leading dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.limits import Count, Whole
from core.nn.precision import no_autocast
from tokenizer.vq.maskgit import ConvTokenizer
from tokenizer.vq.quantizer import Quantized, Quantizer

MOST_CODES = 2**20  # generators have a row per code
_SQUEEZE = 1e-3  # keeps the outermost levels within reach of tanh (the paper's epsilon)


class FiniteScalarQuantizer(Quantizer):
    """Rounds each channel to one of its levels (paper, section 3 and appendix A).

    Args:
        levels: L_d >= 2 of each channel. The paper's choices (table 1): [8, 5, 5, 5] for about 2^10 codes,
            [7, 5, 5, 5, 5] for 2^12, [8, 8, 8, 6, 5] for 2^14, [8, 8, 8, 5, 5, 5] for 2^16.
        usage_window: how many of the latest assignments `track` remembers; 0 for none.

    Raises:
        UserError: levels below 2, none at all, or more codes than generators can have rows for (2^20).
    """

    losses = ()

    def __init__(self, levels: list[int], *, usage_window: int = 0):
        levels = [int(level) for level in levels]
        vocab = math.prod(levels)
        if not levels or min(levels) < 2 or vocab > MOST_CODES:
            raise UserError(
                f"levels {levels} make {vocab:,} codes: give two or more levels for each channel, "
                f"{MOST_CODES:,} codes at most (for example [8, 5, 5, 5])."
            )
        super().__init__(vocab, len(levels), usage_window=usage_window)
        # Constants that are in no file: real also under torch.device("meta").
        sizes = torch.tensor(levels, device="cpu")
        places = torch.tensor([math.prod(levels[:d]) for d in range(len(levels))], device="cpu")
        for name, value in (("levels", sizes), ("places", places)):
            self.register_buffer(name, value, persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """(..., D) -> (..., D) fp32 between the lowest and the highest level, which are whole numbers around 0.

        An even number of levels has one more below 0 than above.
        """
        half = (self.levels - 1) * (1 - _SQUEEZE) / 2
        offset = (self.levels % 2 == 0) * 0.5
        return torch.tanh(z.float() + torch.tan(offset / half)) * half - offset

    def _rows(self, rounded: Tensor) -> Tensor:
        """Whole numbers around 0 -> [-1, 1]."""
        return rounded / (self.levels // 2)

    def encode(self, z: Tensor) -> Tensor:
        """(..., D) -> codes (...) int64."""
        with no_autocast(z):
            return ((self.bound(z).round().long() + self.levels // 2) * self.places).sum(-1)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (...) -> rows (..., D) fp32 in [-1, 1]."""
        return self._rows((codes[..., None] // self.places % self.levels - self.levels // 2).float())

    def forward(self, z: Tensor) -> Quantized:
        """Quantise (..., D); the gradient passes the rounding unchanged and is bent by tanh."""
        with no_autocast(z):
            bounded = self.bound(z)
            rounded = bounded.round()
            return Quantized(self._rows(bounded + (rounded - bounded).detach()), self.encode(z), self._rows(bounded))


class FSQ(ConvTokenizer):
    """core.specs.Tokenizer with one FSQ code per position.

    Args:
        levels: of each channel, see FiniteScalarQuantizer; their product is the number of codes.
        usage_window: latest assignments whose distinct share is logged in training; 0: not at all.
        others: see ConvTokenizer.
    """

    def __init__(self, *, levels: list[Count] = (8, 5, 5, 5), usage_window: Whole = 0, **others: Any):
        super().__init__(FiniteScalarQuantizer(list(levels), usage_window=usage_window), **others)
