#!/usr/bin/env python3
"""Store what a tokenizer makes of every picture: pretokenize.py CONFIG [key=value ...] [options]

  pretokenize.py CONFIG data.url=folder://data/imagenet data.crop=ten      ten crops of every picture
  pretokenize.py CONFIG data.crop=center data.flip=true                    centre crop and its mirror image
  pretokenize.py CONFIG --import maskgitvq.jsonl data.crop=ten             from reAR's file, or from FQGAN's folder
  pretokenize.py CONFIG --to official DIR | --to jsonl FILE                also write the store in that form

CONFIG is any training config with tokenizer.weights. The store goes to --out, by default to the folder of a data.url
tokens://DIR (the pictures are then data.pictures), else to work_dir/tokens/<name>. A finished store is used as it is; a
killed job goes on when it is started again, on any number of processes. At the end some tokens are decoded: look at
preview.png in the store. Train from it with data.url=tokens://DIR.
"""

import _root  # noqa: F401
import argparse
from pathlib import Path

import flags
from core import cli

SHOWN = 16  # pictures that are decoded for the preview
AGREEMENT = 0.5  # share of imported codes that the tokenizer must reproduce; rounding alone stays above 0.9


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="pretokenize.py", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", help="folder of the store")
    parser.add_argument("--import", dest="foreign", metavar="PATH", help="take tokens from a .jsonl or code folder")
    parser.add_argument("--classes", type=int, default=1000, help="of imported tokens when no pictures are given")
    parser.add_argument("--to", nargs=2, metavar=("FORM", "PATH"), help="write the store as official or jsonl")
    parser.add_argument("--batch", type=int, default=256, help="crops per forward pass")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the tokenizer")
    parser.add_argument("--verify", action="store_true", help="also read the whole store and compare its digests")
    parser.add_argument("--check", action="store_true", help="only look for mistakes")
    options = flags.parse(parser, arguments)

    import assemble
    from core import dist, hub
    from core.errors import UserError
    from data.base import require_labels

    if options.batch < 1 or options.classes < 1:
        raise UserError(f"--batch {options.batch} and --classes {options.classes}: give at least 1.")
    if options.to and options.to[0] not in ("official", "jsonl"):
        raise UserError(f'--to {options.to[0]}: write "--to official DIR" or "--to jsonl FILE".')
    config = assemble.load_config(options.config, options.overrides)
    if not config.tokenizer.get("weights"):
        raise UserError("tokenizer.weights is not set, and tokens of an untrained tokenizer are useless.")
    hub.resolve(config.tokenizer["weights"])
    dist.pick_device(config.train.device)
    pictures = assemble.open_pictures(config)
    require_labels(pictures)
    if not options.foreign and pictures is None and not store_folder(config, options.out).exists():
        raise UserError(f"data.url={config.data.url} is where the tokens go; set data.pictures to the pictures.")
    if options.check:
        return 0
    return pretokenize(config, options, pictures)


def store_folder(config, out: str | None) -> Path:
    """Where the store goes."""
    if out:
        return Path(out).expanduser()
    if config.data.url.startswith("tokens://"):
        return Path(config.data.url.removeprefix("tokens://")).expanduser()
    return Path(config.work_dir) / "tokens" / config.name


def pretokenize(config, options, pictures) -> int:
    """Make, check and export one store. Returns the exit code."""
    import assemble
    from core import dist
    from core.train.signals import REQUEUE_EXIT_CODE
    from data.tokens import TokenStore

    world = dist.start(config.train.device)

    def say(message: str) -> None:
        if world.is_main:
            print(message, flush=True)

    try:
        folder = store_folder(config, options.out)
        tokenizer, fingerprint = assemble.load_tokenizer(config.tokenizer)
        tokenizer.to(world.device)
        finished = folder.exists()
        world.barrier()
        try:
            if not finished and options.foreign:
                _import(config, options, pictures, folder, tokenizer, fingerprint, world, say)
            elif not finished:
                _encode(config, options, pictures, folder, tokenizer, fingerprint, world, say)
        except Stopped as stopped:
            say(f"stopped ({stopped}); start the same command again to go on")
            return REQUEUE_EXIT_CODE
        store = TokenStore(folder)
        store.check_tokenizer(tokenizer.spec, fingerprint, tokenizer.image_size)
        if options.verify and world.is_main:
            store.verify()
        say(f"{folder}: {len(store):,} pictures x {store.views} views, {store.spec}, tokenizer {fingerprint}, "
            f"content {store.content}" + (", read and found whole" if options.verify else ""))
        if world.is_main:
            show(store, tokenizer, pictures, world.device, say)
        if options.to:
            _export(store, *options.to, world, say)
        world.barrier()
    finally:
        world.stop()
    return 0


class Stopped(Exception):
    """Raised between two batches when a signal asks for it."""


def _stoppable(report):
    """(context, progress function that reports and raises Stopped when a signal came)"""
    from core.train.signals import StopRequest

    request = StopRequest()

    def progress(*done: int) -> None:
        if report:
            report(*done)
        if reason := request.requested():
            raise Stopped(reason)

    return request, progress


def _encode(config, options, pictures, folder: Path, tokenizer, fingerprint: str, world, say) -> None:
    """Tokens of the pictures."""
    import assemble
    from core.images import to_model_range
    from data import tokens

    transform = assemble.make_transform(config, tokenizer.image_size)
    transform.view_of((0, 0))  # refuses crops without views
    say(f"tokens of {len(pictures):,} pictures x {transform.views} views ({transform.crop}) -> {folder}")

    def build(progress, **rest):
        request, stoppable = _stoppable(progress)
        with request:
            return tokens.build(folder, pictures, transform, tokenizer.spec,
                                lambda images: tokenizer.precompute(to_model_range(images.to(world.device))),
                                fingerprint, progress=stoppable, **rest)

    assemble.compute_once(config, "tokens", tokenizer, world, say, build, options.precision,
                          batch=max(1, options.batch // transform.views))


def _import(config, options, pictures, folder: Path, tokenizer, fingerprint: str, world, say) -> None:
    """Tokens from files of another code base, after a look at whether they are this tokenizer's."""
    import assemble
    from core.errors import UserError
    from core.rng import hash64
    from core.specs import Continuous
    from core.train.log import ProgressLine
    from data import tokens
    from data.cache import CHUNK
    from data.token_files import open_import

    if isinstance(tokenizer.spec, Continuous):
        raise UserError(f"--import reads codes; this tokenizer makes {tokenizer.spec}.")
    transform = assemble.make_transform(config, tokenizer.image_size)
    path = Path(options.foreign).expanduser()
    size = path.stat().st_size if path.is_file() else 0

    def line(total: int, unit: str, label: str):
        return ProgressLine(total, unit, label) if world.is_main else None

    counting = line(size, "B", "counting lines") if size else None
    reader = open_import(path, tokenizer.spec, transform.views or 1, CHUNK, counting.update if counting else None)
    if counting:
        counting.close()
    views = reader.views
    same = pictures is not None and len(pictures) == reader.samples
    if pictures is not None and not same:
        say(f"{path} has {reader.samples:,} pictures, {len(pictures):,} are given: tokens are not compared with them")
    names = pictures.class_names if pictures is not None else [str(i) for i in range(options.classes)]
    source = pictures.fingerprint() if same else f"{hash64('imported', path.name, reader.samples, views, size):016x}"
    target = tokens.builder(folder, reader.samples, views, source, transform, tokenizer.spec, fingerprint, names,
                            rank=world.rank, world=world.size, barrier=world.barrier)
    bar = line(reader.samples, "img", "import")
    request, progress = _stoppable((lambda done: bar.update(done * world.size)) if bar else None)
    try:
        if same and world.is_main:
            chosen = spread(reader.samples, views)
            rows = [reader.row(index)[0][view] for index, view in chosen]
            share = agreement(rows, crops(pictures, transform, chosen), tokenizer, world.device)
            say(f"the tokenizer makes {share:.1%} of these codes of the same pictures")
            if share < AGREEMENT:
                raise UserError(f"{path}: the tokenizer reproduces only {share:.1%} of the codes. They are of another "
                                "tokenizer, of other pictures, or of another crop (data.crop).")
        with request:
            reader.copy_to(target, progress)
    except BaseException:
        target.abandon()
        raise
    finally:
        if bar:
            bar.close()
    target.finish()


def _export(store, form: str, path: str, world, say) -> None:
    from core.errors import UserError
    from core.specs import Continuous
    from core.train.log import ProgressLine
    from data.token_files import export_jsonl, export_numbered

    if isinstance(store.spec, Continuous):
        raise UserError(f"--to {form} writes codes; {store.path} holds {store.spec}.")
    line = ProgressLine(len(store), label=f"write {form}") if world.is_main else None
    report = (lambda done: line.update(done)) if line else None
    try:
        if form == "official":
            export_numbered(store, path, world.rank, world.size, report)
        elif world.is_main:
            export_jsonl(store, path, report)
    finally:
        if line:
            line.close()
    say(f"written to {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Looking at it
# ---------------------------------------------------------------------------------------------------------------------
def spread(samples: int, views: int) -> list[tuple[int, int]]:
    """(index, view) of some pictures all over the store."""
    count = min(SHOWN, samples)
    return [(i * samples // count, i % views) for i in range(count)]


def crops(pictures, transform, chosen: list[tuple[int, int]]):
    """(B, 3, H, W) uint8 of (index, view) pairs."""
    import torch

    from data.loader import read_or_replace

    return torch.stack([transform.apply_view(read_or_replace(pictures, index, "replace")[0].image, view)
                        for index, view in chosen])


def agreement(rows, images, tokenizer, device) -> float:
    """Share of stored values that the tokenizer makes of the same crops; real vectors to within 1 %."""
    import torch

    from core.images import to_model_range

    with torch.no_grad():
        again = tokenizer.precompute(to_model_range(images.to(device))).cpu()
    stored = torch.stack([torch.as_tensor(row.astype("int64") if row.dtype.kind in "iu" else row) for row in rows])
    if again.is_floating_point():
        return float(torch.isclose(stored.float(), again.float(), rtol=1e-2, atol=1e-2).double().mean())
    return float((stored == again).double().mean())


def show(store, tokenizer, pictures, device, say) -> None:
    """Decode some tokens into preview.png, below the crops they came from where those are at hand."""
    import torch

    from core.images import grid, save_png, to_uint8, to_unit_range
    from data.tokens import array_of
    from evaluation.image_metrics import psnr

    chosen = spread(len(store), store.views)
    with torch.no_grad():
        stored = store.tokens([i for i, _ in chosen], [v for _, v in chosen]).to(device)
        decoded = tokenizer.decode(tokenizer.from_stored(stored)).float().cpu()
    shown, text = to_uint8(decoded, "nearest"), "decoded"
    if pictures is not None and pictures.fingerprint() == store.fingerprint():
        images = crops(pictures, store.transform, chosen)
        rows = [store.rows(array_of(store.spec))[index, view] for index, view in chosen]
        share = agreement(rows, images, tokenizer, device)
        quality = psnr(images / 255, to_unit_range(decoded, clamp=True)).mean()
        text = f"PSNR {quality:.2f} dB, {share:.1%} of the tokens made again; pictures above, decoded below"
        shown = torch.cat([torch.cat(pair) for pair in zip(images.split(8), shown.split(8))])
    save_png(grid(shown, columns=8), store.path / "preview.png")
    say(f"{len(chosen)} pictures in {store.path / 'preview.png'}: {text}")


if __name__ == "__main__":
    cli.run(main)
