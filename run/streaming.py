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

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError
from core.files import replacing
from core.images import finite_uint8, grid, save_png, to_uint8
from core.rng import Draws
from core.specs import Codes, Generator, Previews, Streams, Tokenizer
from generator.task import GeneratorTask
from run.alter import blank_codes


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
    task: GeneratorTask, labels: Tensor, draws: Draws, show: Callable[[int, Tensor], None] | None = None
) -> Streamed:
    """Sample codes and decode them as they come.

    Args:
        show: called as show(stage, pictures) the moment a stage is there.
    """
    tokenizer = task.tokenizer
    check(task.generator, tokenizer)
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

    result.codes = task.latents(labels, draws, on_codes=arrived)
    return result


WATCHED = 12  # looks at a batch on its way, at most


@torch.no_grad()
def watch(task: GeneratorTask, labels: Tensor, draws: Draws, show: Callable[[Tensor], None]) -> Tensor:
    """Sample, and show what can be seen of the pictures meanwhile, whatever the pair is; the pictures at the end.

    These are the ones that are drawn without a look. A tokenizer that streams shows each stage at no cost; others decode
    again at every look: codes of the first scales, a raster with grey where codes are missing, latents on their way.

    Args:
        show: called with pictures (B, 3, H, W) in [-1, 1], of the last ones too.
    """
    tokenizer = task.tokenizer
    accepted, looks = inspect.signature(task.generator.sample).parameters, 0
    if "on_codes" in accepted and isinstance(tokenizer, Streams):
        return stream(task, labels, draws, lambda _, pictures: show(pictures)).pictures[-1]

    def arrived(codes: Tensor) -> None:
        nonlocal looks
        if codes.shape[1] < tokenizer.spec.length and codes.shape[1] * WATCHED >= (looks + 1) * tokenizer.spec.length:
            looks = codes.shape[1] * WATCHED // tokenizer.spec.length
            show(_unfinished(tokenizer, codes, draws.fork("decode")))

    def moved(latents: Tensor, share: float) -> None:
        nonlocal looks
        if (looks + 1) / WATCHED <= share < 1:
            looks = int(share * WATCHED)
            show(tokenizer.decode(latents, draws.fork("decode")).float())

    hooks = {name: hook for name, hook in (("on_codes", arrived), ("on_latents", moved)) if name in accepted}
    latents = task.latents(labels, draws, **hooks)
    if not hooks and isinstance(tokenizer, Previews):
        pictures = [picture.float() for picture in tokenizer.previews(latents, draws.fork("decode"))]
    else:
        pictures = [tokenizer.decode(latents, draws.fork("decode")).float()]
    for picture in pictures:
        show(picture)
    return pictures[-1]


def _unfinished(tokenizer: Tokenizer, codes: Tensor, draws: Draws) -> Tensor:
    """A picture of the first codes (B, n, K)."""
    spec = tokenizer.spec
    if isinstance(tokenizer, Previews):
        return tokenizer.previews(codes, draws)[-1].float()
    known = codes.shape[1]
    whole = blank_codes(tokenizer).expand(len(codes), spec.length, -1).clone()
    whole[:, :known] = codes
    pictures = tokenizer.decode(whole, draws).float()
    if not isinstance(spec, Codes) or spec.grid is None:
        return pictures
    there = (torch.arange(spec.length, device=codes.device) < known).view(1, 1, *spec.grid)
    return pictures * F.interpolate(there.float(), pictures.shape[-2:])


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
