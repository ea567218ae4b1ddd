"""What happens to the latents of a picture between encoding and decoding: fewer of them, noise, other codes.

Shared by `scripts/reconstruct.py` and the playground, so that a command makes what the page shows. Which changes a
tokenizer allows follows from its spec and from whether its first latents are a picture already (core.specs.Previews).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from core.errors import UserError, nearest
from core.images import to_model_range
from core.rng import Draws
from core.specs import Codes, Continuous, MultiScale, Previews, Streams, Tokenizer, codebook_rows
from data.transforms import center_crop, to_tensor


@dataclass(frozen=True)
class Parts:
    """What can be kept of the latents of a picture: the first `fewest` ... `count` `unit`s, of `tokens` tokens each (0: unequal)."""

    count: int
    unit: str
    tokens: int
    fewest: int = 1


def parts_of(tokenizer: Tokenizer) -> Parts | None:
    """None where all latents are needed: those on a grid, each of which is a place of the picture."""
    spec = tokenizer.spec
    if isinstance(tokenizer, Previews) and isinstance(spec, MultiScale):
        return Parts(len(spec.scales), "scale", 0)
    if isinstance(tokenizer, Previews) and isinstance(tokenizer, Streams) and isinstance(spec, Codes):
        tokens = spec.length // tokenizer.groups
        return Parts(tokenizer.groups, "group", tokens, -(-tokenizer.stream(1).needed // tokens))
    if isinstance(spec, Codes) and spec.grid is None and not isinstance(tokenizer, Previews):
        return Parts(spec.length, "token", 1)
    return None


def branch_names(spec: Codes | MultiScale) -> list[str]:
    """What the branches are called, numbers where they have no names."""
    return [*getattr(spec, "names", ())] or [str(k) for k in range(spec.branches)]


def blank_codes(tokenizer: Tokenizer) -> Tensor:
    """(K,) int64: the code of each branch that says least, the nearest to the mean of its codebook."""
    rows = codebook_rows(tokenizer, next(tokenizer.parameters()).device)  # (V, K, D)
    return (rows - rows.mean(0)).square().sum(-1).argmin(0)


@dataclass(frozen=True)
class Changes:
    """What to change; nothing by default.

    Attributes:
        kept: the first so many parts (`parts_of`). What a tokenizer that cannot decode less lacks then are blank codes.
        noise: share t of noise: (1 - t) latents + t s noise, s the standard deviation of the picture's latents.
        put: (branch, place, code): other codes at single places.
        donor: a picture whose codes are taken in `branches`.
        branches: numbers of branches.
    """

    kept: int | None = None
    noise: float = 0.0
    put: tuple[tuple[int, int, int], ...] = ()
    donor: Image.Image | None = None
    branches: tuple[int, ...] = ()

    def check(self, tokenizer: Tokenizer) -> None:
        """UserError for the first change that this tokenizer does not allow."""
        name, spec, parts = type(tokenizer).__name__, tokenizer.spec, parts_of(tokenizer)
        if self.kept is not None and parts is None:
            raise UserError(f"{name} needs all of its latents for a picture, so none can be left out (--kept).")
        if self.kept is not None and parts is not None and not parts.fewest <= self.kept <= parts.count:
            raise UserError(
                f"--kept {self.kept}: {name} has {parts.count} {parts.unit}s; give {parts.fewest} to {parts.count}."
            )
        if not 0 <= self.noise <= 1:
            raise UserError(f"--noise {self.noise:g}: give a share from 0 (none) to 1 (nothing but noise).")
        if self.noise and not isinstance(spec, Continuous):
            raise UserError(f"{name} has codes, to which no noise can be added (--noise); exchange some of them.")
        if self.put or self.branches:
            self._check_codes(name, spec)
        if (self.donor is None) != (not self.branches):
            raise UserError("branches are taken from another picture: give --donor PICTURE and --branches together.")

    def _check_codes(self, name: str, spec: Any) -> None:
        if isinstance(spec, Continuous):
            raise UserError(f"{name} has continuous latents, so there are no codes to exchange.")
        for branch, place, code in self.put:
            limits = (("branch", branch, spec.branches), ("place", place, spec.length), ("code", code, spec.vocab))
            for what, value, limit in limits:
                if not 0 <= value < limit:
                    raise UserError(f"{what} {value} does not exist: {name} has {limit:,}, 0 to {limit - 1}.")
        for branch in self.branches:
            if not 0 <= branch < spec.branches:
                raise UserError(
                    f"branch {branch} does not exist: {name} has {spec.branches}, 0 to {spec.branches - 1}."
                )

    @torch.no_grad()
    def latents(self, tokenizer: Tokenizer, images: Tensor, draws: Draws) -> Tensor:
        """The changed latents of pictures (B, 3, H, W) in [-1, 1]; all of them, whatever is kept."""
        latents = tokenizer.encode(images)
        if self.donor is not None:
            crop = to_tensor(center_crop(self.donor, tokenizer.image_size))[None]
            donated = tokenizer.encode(to_model_range(crop.to(images.device)))
            latents = latents.clone()
            latents[..., list(self.branches)] = donated[..., list(self.branches)]
        if self.put:
            latents = latents.clone()
        for branch, place, code in self.put:
            latents[:, place, branch] = code
        if self.noise:
            spread = latents.flatten(1).std(1).view(-1, *[1] * (latents.ndim - 1))
            noise = draws.normal("noise of changes", tuple(latents.shape[1:]))
            latents = (1 - self.noise) * latents + self.noise * spread * noise
        return latents

    @torch.no_grad()
    def decode(self, tokenizer: Tokenizer, latents: Tensor, draws: Draws) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of the parts that are kept."""
        if self.kept is None:
            return tokenizer.decode(latents, draws)
        if isinstance(tokenizer, Streams):
            return tokenizer.decode(latents[:, : self.kept * tokenizer.spec.length // tokenizer.groups], draws)
        if isinstance(tokenizer, Previews):
            return tokenizer.previews(latents, draws)[self.kept - 1]
        latents = latents.clone()
        latents[:, self.kept :] = blank_codes(tokenizer)
        return tokenizer.decode(latents, draws)


def parse_put(text: str, spec: Any) -> tuple[tuple[int, int, int], ...]:
    """((branch, place, code), ...) of "3=17,visual:5=2": a name or number of a branch, the first one unless told."""
    exchanges = []
    for word in text.split(","):
        parts = re.fullmatch(r"(?:([^:=]+):)?([0-9]{1,18})=([0-9]{1,18})", word.strip())
        if parts is None:
            raise UserError(f'--put "{word}": give PLACE=CODE or BRANCH:PLACE=CODE, for example 3=17 or 1:3=17.')
        branch = parse_branches(parts[1], spec)[0] if parts[1] else 0
        exchanges.append((branch, int(parts[2]), int(parts[3])))
    return tuple(exchanges)


def parse_branches(text: str, spec: Any) -> tuple[int, ...]:
    """Numbers of "semantic" or "0,1"."""
    if isinstance(spec, Continuous):
        raise UserError(f"these latents are {spec}: they have no branches of codes.")
    names, numbers = branch_names(spec), []
    for word in (word.strip() for word in text.split(",")):
        if word not in names and not (word.isdecimal() and len(word) < 19):
            raise UserError(f'branch "{word}" does not exist.{nearest(word, names)}')
        numbers.append(names.index(word) if word in names else int(word))
    return tuple(numbers)
