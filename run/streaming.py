"""Pictures while their codes are still being made: what `sample.py --preview` and `reconstruct.py --stages` share.

A tokenizer that Streams (core/specs.py) decodes a growing sequence; a generator that makes codes one after another takes
`on_codes`. One trajectory serves all previews: nothing is computed twice (D-AR, arXiv 2505.23660).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.files import replacing
from core.images import finite_uint8, grid, save_png, to_uint8
from core.rng import Draws
from core.specs import Generator, Guidance, Previews, Streams, Tokenizer
from generator.sampling import draw_latents


@dataclass
class Streamed:
    """`pictures[k]` (B, 3, H, W) in [-1, 1] is what could be seen after stage k, `seconds[k]` after its start."""

    codes: Tensor
    pictures: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def first_share(self) -> float:
        """Time to the first picture as a share of the time to the last, the whole one."""
        return self.seconds[0] / self.seconds[-1]


def check_previews(tokenizer: Tokenizer) -> None:
    """UserError unless a part of this tokenizer's codes is a picture already."""
    if not isinstance(tokenizer, Previews):
        raise UserError(
            f"{type(tokenizer).__name__} decodes all of its latents at once, so there are no stages to show. "
            "D-AR's and ImageFolder's tokenizers have them."
        )


def check(generator: Generator | None, tokenizer: Tokenizer) -> None:
    """UserError unless this pair can show pictures before it is done."""
    if not isinstance(tokenizer, Streams):
        raise UserError(
            f"{type(tokenizer).__name__} needs all codes for its first picture, so there is nothing to preview."
            " D-AR's tokenizer decodes as codes arrive."
        )
    if generator is not None and "on_codes" not in inspect.signature(generator.sample).parameters:
        raise UserError(
            f"{type(generator).__name__} does not report codes while it samples, so there is nothing to preview."
        )


@torch.no_grad()
def stream(
    generator: Generator,
    tokenizer: Tokenizer,
    labels: Tensor,
    draws: Draws,
    guidance: Guidance,
    options: dict[str, Any],
    show: Callable[[int, Tensor], None] | None = None,
) -> Streamed:
    """Sample codes and decode them as they come.

    Args:
        options: of the generator's `sample`.
        show: called as show(stage, pictures) the moment a stage is there.
    """
    check(generator, tokenizer)
    assert isinstance(tokenizer, Streams)
    result, begun, fed = Streamed(torch.empty(0)), time.perf_counter(), 0
    decoder = tokenizer.stream(len(labels), draws.fork("decode"))

    def arrived(codes: Tensor) -> None:
        nonlocal fed
        if codes.shape[1] < decoder.needed and codes.shape[1] < tokenizer.spec.length:
            return  # codes enter the decoder a stage at a time
        for picture in decoder.feed(codes[:, fed:]):
            if picture.device.type == "cuda":
                torch.cuda.synchronize()
            result.seconds.append(time.perf_counter() - begun)
            result.pictures.append(picture.float())
            if show:
                show(len(result.pictures) - 1, picture.float())
        fed = codes.shape[1]

    result.codes = draw_latents(generator, labels, draws, guidance, on_codes=arrived, **options)
    return result


def layout_prefix(tokenizer: Tokenizer, image: Tensor, groups: int) -> Tensor:
    """The codes of the first `groups` stages of a reference picture (1, 3, H, W) in [-1, 1]: (1, n, K)."""
    check(None, tokenizer)
    assert isinstance(tokenizer, Streams)
    if not 1 <= groups <= tokenizer.groups:
        raise UserError(
            f"--layout-groups {groups}: this tokenizer has {tokenizer.groups} groups of codes; give 1 to "
            f"{tokenizer.groups}."
        )
    with torch.no_grad():
        codes = tokenizer.encode(image)
    return codes[:, : groups * tokenizer.spec.length // tokenizer.groups]


def filmstrip(pictures: list[Tensor], originals: Tensor | None = None) -> Tensor:
    """(3, H', W') uint8: one row per picture, one column per stage, and last the originals (B, 3, H, W) uint8 if any."""
    stages = [finite_uint8(stage.float(), "nearest", range(len(stage))).cpu() for stage in pictures]
    stages += [] if originals is None else [originals.cpu()]
    return grid(torch.stack(stages, dim=1).flatten(0, 1), columns=len(stages))


def write_filmstrip(pictures: list[Tensor], path: Path, originals: Tensor | None = None) -> None:
    """`filmstrip` as a PNG."""
    save_png(filmstrip(pictures, originals), path)


def stack_filmstrips(strips: list[Path], path: Path) -> None:
    """Filmstrips of equal size, one below the other."""
    from PIL import Image

    from data.transforms import to_tensor

    save_png(torch.cat([to_tensor(Image.open(strip).convert("RGB")) for strip in strips], dim=1), path)


def write_animation(pictures: list[Tensor], path: Path, milliseconds: int = 350) -> None:
    """All pictures side by side, a frame per stage, the last one held; WebP or GIF by the file's suffix."""
    from PIL import Image

    frames = [Image.fromarray(grid(to_uint8(stage, "nearest").cpu()).permute(1, 2, 0).numpy()) for stage in pictures]
    durations = [milliseconds] * (len(frames) - 1) + [5 * milliseconds]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    with replacing(path, sync=False) as temporary:
        frames[0].save(
            temporary,
            format=path.suffix[1:].upper(),
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            **options,
        )
