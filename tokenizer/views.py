"""Other ways to look at a tokenizer's latents, so that generators of another family can model them.

    tokenizer: {weights: work_dirs/fqgan, view: vectors}      codes as a grid of real vectors, for DiT^DH
    tokenizer: {weights: work_dirs/imagefolder, view: sequence}   codes of all scales as one sequence, for FAR, GPT, RAR

A view is a core.specs.Tokenizer itself and has no weights of its own: what it wraps is trained, saved and fingerprinted
as before.

Shape letters: B batch, L positions, K codebooks, V codebook size, D width of a code, h x w grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core.errors import UserError
from core.rng import Draws
from core.specs import Codes, Continuous, MultiScale, Recon, Tokenizer, codebook_rows
from tokenizer.continuous.gaussian import ContinuousTokenizer
from tokenizer.vq.quantizer import nearest_codes

VIEWS = ("vectors", "sequence")


class View(Tokenizer):
    """What all views share: the wrapped tokenizer does the work."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.image_size, self.term_names = tokenizer.image_size, tokenizer.term_names

    def forward(self, images: Tensor, draws: Draws) -> Recon:
        return self.tokenizer(images, draws)

    def precompute(self, images: Tensor) -> Tensor:
        """The codes: what is stored does not depend on the view."""
        return self.tokenizer.precompute(images)

    def encode(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        return self.from_stored(self.precompute(images), draws)

    def probe_features(self, images: Tensor) -> dict[str, Tensor]:
        return self.tokenizer.probe_features(images)


class Sequence(View):
    """MultiScale codes as Codes: coarse scales first, in the order they are stored in."""

    def __init__(self, tokenizer: Tokenizer):
        if not isinstance(tokenizer.spec, MultiScale):
            raise UserError(
                f"tokenizer.view: sequence is for codes at several scales, this tokenizer gives {tokenizer.spec}."
            )
        super().__init__(tokenizer)
        self.spec = tokenizer.spec.flatten()

    def from_stored(self, stored: Tensor, draws: Draws | None = None) -> Tensor:
        return self.tokenizer.from_stored(stored, draws)

    def embed(self, codes: Tensor) -> Tensor:
        return self.tokenizer.embed(codes)

    def decode(self, latents: Tensor, draws: Draws | None = None) -> Tensor:
        return self.tokenizer.decode(latents, draws)


class Vectors(View, ContinuousTokenizer):
    """Codes as Continuous: the K codebook rows of a position side by side are its K D channels, normalised. Decoding
    takes the nearest row of every codebook.

    A sequence without places (D-AR) is laid on a square, row by row.
    """

    def __init__(self, tokenizer: Tokenizer):
        spec = tokenizer.spec
        if not isinstance(spec, Codes):
            raise UserError(
                f"tokenizer.view: vectors is for one grid or sequence of codes, this tokenizer gives {spec}."
            )
        side = math.isqrt(spec.length)
        if spec.grid is None and side * side != spec.length:
            raise UserError(f"tokenizer.view: vectors lays codes on a square, and {spec.length} make none.")
        super().__init__(tokenizer)
        self.codes = spec
        self.spec = Continuous(tuple(spec.grid or (side, side)), spec.branches * spec.dim)
        self.keep_latent_stats()
        with torch.no_grad():
            rows = codebook_rows(tokenizer, next(tokenizer.parameters()).device)
        self.register_buffer("table", rows.transpose(0, 1).contiguous().float(), persistent=False)  # (K, V, D)

    def state_dict(self, *arguments, **options):
        """That of the wrapped tokenizer, so that fingerprints do not depend on the view."""
        return self.tokenizer.state_dict(*arguments, **options)

    def set_latent_stats(self, mean: Tensor, std: Tensor) -> None:
        """Per-channel (C,) or scalar statistics that make latents unit variance; channels that never change stay as they are."""
        super().set_latent_stats(mean, torch.as_tensor(std, dtype=torch.float32).clamp_min(1e-6))

    def moments(self, stored: Tensor) -> Tensor:
        """(B, L, 2 K D): the vectors and zeros, as latent statistics are measured on."""
        vectors = self.tokenizer.embed(self.tokenizer.from_stored(stored)).flatten(2)
        return torch.cat((vectors, torch.zeros_like(vectors)), dim=-1)

    def from_stored(self, stored: Tensor, draws: Draws | None = None) -> Tensor:
        vectors = self.tokenizer.embed(self.tokenizer.from_stored(stored, draws)).flatten(2)  # (B, L, K D)
        return self.normalised(vectors)

    def decode(self, latents: Tensor, draws: Draws | None = None) -> Tensor:
        vectors = self.restored(latents.float()).unflatten(2, (self.codes.branches, self.codes.dim))  # (B, L, K, D)
        codes = [nearest_codes(vectors[:, :, k], self.table[k]) for k in range(self.codes.branches)]
        return self.tokenizer.decode(torch.stack(codes, dim=-1), draws)


def view(tokenizer: Tokenizer, name: str | None) -> Tokenizer:
    """`tokenizer`, or the view of it that a config asks for."""
    if name is None:
        return tokenizer
    return {"vectors": Vectors, "sequence": Sequence}[name](tokenizer)
