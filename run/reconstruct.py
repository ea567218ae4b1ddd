"""Encode and decode pictures, and show originals beside what the tokenizer made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from core.files import explain_os_errors, refuse_device
from core.images import finite_uint8, grid, save_png, to_model_range
from core.rng import Draws, hash64
from core.signals import finishing
from core.specs import Codes, MultiScale, Previews, Tokenizer
from data.base import spread
from data.checks import say_left_out
from data.decode import UnreadablePicture, decode_named
from data.sources import open_source
from data.transforms import center_crop, to_tensor
from evaluation.images import psnr
from run import streaming
from run.alter import Changes

BATCH = 8
SHOWN = 64  # rows of grid.png
Named = tuple[str, Image.Image]
UNCHANGED = Changes()


def read_files(names: list[str], upright: bool = False) -> Iterator[Named]:
    """(name, picture) of each file, turned as its EXIF data says where `upright`; UserError for the first that cannot be
    read."""
    for name in names:
        refuse_device(name)
        with explain_os_errors(name):
            data = Path(name).read_bytes()
        yield Path(name).stem, decode_named(data, name, upright)


def read_source(url: str, count: int) -> Iterator[Named]:
    """(name, picture) of `count` pictures spread over a data source."""
    source = open_source(url, "val")
    say_left_out(print, source, url)
    for i in spread(len(source), count):
        try:
            sample = source[i]
        except UnreadablePicture as error:
            print(f"passed over: {error}")
            continue
        yield Path(sample.key).stem, sample.image


def panel(original: Tensor, rebuilt: Tensor, gain: float) -> Tensor:
    """(3, H, W) uint8 each -> original | reconstruction | difference, (3, H, 3W + 4)."""
    gap = original.new_full((3, original.shape[1], 2), 255)
    return torch.cat((original, gap, rebuilt, gap, difference(original, rebuilt, gain)), 2)


def difference(original: Tensor, rebuilt: Tensor, gain: float) -> Tensor:
    """uint8 pictures -> one that is grey where they are alike, and shows what was added or lost `gain` times as strong."""
    return (128 + gain * (rebuilt.float() - original.float())).round().clamp(0, 255).to(torch.uint8)


def reconstruct(
    tokenizer: Tokenizer,
    pictures: Iterable[Named],
    folder: Path,
    gain: float,
    with_stages: bool,
    changes: Changes = UNCHANGED,
    alone: bool = False,
) -> None:
    """Write <name>_psnr<dB>.png of each picture and grid.png, with stages also filmstrips; print what was measured.

    Args:
        tokenizer: on the device to use.
        gain: of the difference.
        changes: to the latents, before they are decoded.
        alone: also write each reconstruction by itself, <name>_rebuilt.png.
    """
    device = next(tokenizer.parameters()).device
    named = [(name, to_tensor(center_crop(picture, tokenizer.image_size))) for name, picture in pictures]
    panels, values, codes, strips = [], [], [], []
    for start in range(0, len(named), BATCH):
        names, originals = zip(*named[start : start + BATCH])
        batch = torch.stack(originals)
        draws = Draws(hash64(0, "decode"), torch.arange(start, start + len(batch), device=device))
        with torch.no_grad():
            latents = changes.latents(tokenizer, to_model_range(batch.to(device)), draws)
            if with_stages:
                assert isinstance(tokenizer, Previews)
                stages = tokenizer.previews(latents, draws)
            else:
                stages = [changes.decode(tokenizer, latents, draws)]
            rebuilt = [finite_uint8(stage.float(), "nearest", draws.positions) for stage in stages][-1].cpu()
        codes.append(latents.cpu())
        for i, (name, value) in enumerate(zip(names, psnr(batch / 255, rebuilt / 255).tolist())):
            stem = file_stem(start + i, name)
            place = folder / f"{stem}_psnr{value:.2f}.png"
            panels.append(panel(batch[i], rebuilt[i], gain))
            values.append(value)
            save_png(panels[-1], place)
            if alone:
                save_png(rebuilt[i], folder / f"{stem}_rebuilt.png")
            print(f"{value:6.2f} dB  {place}")
            if with_stages:
                strips.append(folder / f"{stem}_stages.png")
                streaming.write_filmstrip([stage[i : i + 1] for stage in stages], strips[-1], batch[i : i + 1])
    if strips:
        streaming.stack_filmstrips(strips[:SHOWN], folder / "stages.png")
    finishing()
    save_png(grid(torch.stack(panels[:SHOWN]), columns=1 if len(panels) < 8 else 2), folder / "grid.png")
    if strips:
        print(f"what each part of the codes adds, then the original: {folder / 'stages.png'}")
    print(f"{sum(values) / len(values):6.2f} dB  mean of {len(values)}; all of them in {folder / 'grid.png'}")
    if isinstance(tokenizer.spec, (Codes, MultiScale)):
        print_usage(tokenizer.spec, torch.cat(codes))


def file_stem(number: int, name: str) -> str:
    """How the files of a picture begin."""
    safe = re.sub(r"[^\w.-]+", "_", name)
    return f"{number:03d}_{safe}"


def print_usage(spec: Codes | MultiScale, codes: Tensor) -> None:
    """How many rows of each codebook occur in codes (B, L, K)."""
    names = getattr(spec, "names", ()) or range(spec.branches)
    for name, used in zip(names, codes.unbind(-1)):
        print(f"codebook {name}: {len(used.unique()):,} of {spec.vocab:,} codes used in {used.numel():,} places")
