#!/usr/bin/env python3
"""Encode and decode pictures: python -m scripts.reconstruct --weights W IMAGE ... [--url URL --num N] [--out DIR]

For each picture writes DIR/<name>_psnr<dB>.png: original | reconstruction | difference, side by side, and
DIR/grid.png of all of them. W is a run folder, a checkpoint, a released file or hf://owner/repo/file. Pictures of any
mode and size are brought to the tokenizer's size by ADM's centre crop. PSNR compares 8-bit pictures. The difference
is grey where there is none and shows it --gain times as strong. Tokenizers with codebooks also tell how many of their
codes were used. What the weights do not tell is given as in a config: tokenizer.length=32.
--stages adds DIR/<name>_stages.png, what each further part of the codes adds, and DIR/stages.png of the first pictures:
for tokenizers whose first codes are a picture already (groups of D-AR, scales of ImageFolder).
"""

import argparse
import re
from pathlib import Path

from core import cli
from scripts import command_line

BATCH = 8
SHOWN = 64  # rows of grid.png


def read_files(names: list[str]):
    """(name, PIL picture) of each file; UserError for the first that cannot be read."""
    from core.errors import UserError
    from core.files import explain_os_errors
    from data.decode import UnreadablePicture, decode_rgb

    for name in names:
        with explain_os_errors(name):
            data = Path(name).read_bytes()
        try:
            yield Path(name).stem, decode_rgb(data, name)
        except UnreadablePicture as error:
            raise UserError(f"{error}. Give a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM picture.") from error


def read_source(url: str, count: int):
    """(name, PIL picture) of `count` pictures spread over a data source."""
    from data.decode import UnreadablePicture
    from data.sources import open_source

    source = open_source(url, "val")
    count = min(count, len(source))
    for i in range(count):
        try:
            sample = source[i * len(source) // count]
        except UnreadablePicture as error:
            print(f"passed over: {error}")
            continue
        yield Path(sample.key).stem, sample.image


def panel(original, rebuilt, gain: float):
    """(3, H, W) uint8 each -> original | reconstruction | difference, (3, H, 3W + 4)."""
    import torch

    difference = (128 + gain * (rebuilt.float() - original.float())).round().clamp(0, 255).to(torch.uint8)
    gap = original.new_full((3, original.shape[1], 2), 255)
    return torch.cat((original, gap, rebuilt, gap, difference), 2)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.reconstruct", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--url", help="take pictures of a data source too: embedded://photos256, folder://DIR ...")
    parser.add_argument("--num", type=int, default=8, help="how many of --url (default 8)")
    parser.add_argument("--out", help="folder (default work_dirs/reconstruct_<weights>)")
    parser.add_argument(
        "--size", type=int, help="another size than the tokenizer's own, where it can be rebuilt for it"
    )
    parser.add_argument("--gain", type=float, default=4.0, help="of the difference (default 4)")
    parser.add_argument("--stages", action="store_true", help="also what each part of the codes adds")
    parser.add_argument("--raw", action="store_true", help="raw weights instead of averaged ones")
    words, known = command_line.tokenizer_settings(arguments)
    options = command_line.parse(parser, "reconstruct", words)

    from core.errors import UserError

    if not options.images and not options.url:
        raise UserError("name some pictures, or a data source with --url embedded://photos256")
    if options.num < 1 or options.gain <= 0 or (options.size is not None and options.size < 1):
        raise UserError(
            f"--num {options.num}, --gain {options.gain}, --size {options.size}: these are positive numbers"
        )

    import torch

    from core import dist
    from core.images import grid, save_png, to_model_range, to_uint8
    from core.rng import Draws, hash64
    from core.specs import Codes, MultiScale
    from data.transforms import center_crop, to_tensor
    from evaluation.images import psnr
    from run import streaming
    from run.load import load_tokenizer

    section = {**known, "weights": options.weights, "use_ema": not options.raw}
    if options.size:
        section["image_size"] = options.size
    tokenizer, _ = load_tokenizer(section)
    if options.stages:
        streaming.check_previews(tokenizer)
    device = dist.pick_device("auto")
    tokenizer.to(device)
    folder = Path(options.out or f"work_dirs/reconstruct_{Path(options.weights.rstrip('/')).stem}")
    if (folder / "grid.png").exists():
        raise UserError(f"{folder} holds reconstructions already. Choose another --out, or remove it.")
    spec, size = tokenizer.spec, tokenizer.image_size
    print(f"{type(tokenizer).__name__}: {size} x {size} pictures, latents {spec}")

    named = [(name, to_tensor(center_crop(picture, size))) for name, picture in read_files(options.images)]
    if options.url:
        named += [
            (name, to_tensor(center_crop(picture, size))) for name, picture in read_source(options.url, options.num)
        ]
    panels, values, codes, strips = [], [], [], []
    for start in range(0, len(named), BATCH):
        names, originals = zip(*named[start : start + BATCH])
        batch = torch.stack(originals)
        draws = Draws(hash64(0, "decode"), torch.arange(start, start + len(batch), device=device))
        with torch.no_grad():
            latents = tokenizer.encode(to_model_range(batch.to(device)))
            stages = tokenizer.previews(latents, draws) if options.stages else [tokenizer.decode(latents, draws)]
            rebuilt = to_uint8(stages[-1].float(), "nearest").cpu()
        if isinstance(spec, (Codes, MultiScale)):
            codes.append(latents.cpu())
        for i, (name, dB) in enumerate(zip(names, psnr(batch / 255, rebuilt / 255).tolist())):
            panels.append(panel(batch[i], rebuilt[i], options.gain))
            values.append(dB)
            safe = re.sub(r"[^\w.-]+", "_", name)
            place = folder / f"{start + i:03d}_{safe}_psnr{dB:.2f}.png"
            save_png(panels[-1], place)
            print(f"{dB:6.2f} dB  {place}")
            if options.stages:
                strips.append(folder / f"{start + i:03d}_{safe}_stages.png")
                streaming.write_filmstrip([stage[i : i + 1] for stage in stages], strips[-1], batch[i : i + 1])
    save_png(grid(torch.stack(panels[:SHOWN]), columns=1 if len(panels) < 8 else 2), folder / "grid.png")
    if strips:
        streaming.stack_filmstrips(strips[:SHOWN], folder / "stages.png")
        print(f"what each part of the codes adds, then the original: {folder / 'stages.png'}")
    print(f"{sum(values) / len(values):6.2f} dB  mean of {len(values)}; all of them in {folder / 'grid.png'}")
    if codes:
        for branch, used in enumerate(torch.cat(codes).unbind(-1)):
            name = (getattr(spec, "names", ()) or range(spec.branches))[branch]
            print(f"codebook {name}: {len(used.unique()):,} of {spec.vocab:,} codes used in {used.numel():,} places")
    return 0


if __name__ == "__main__":
    cli.run(main)
