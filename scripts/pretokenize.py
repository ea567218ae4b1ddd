#!/usr/bin/env python3
"""Store what a tokenizer makes of every picture: pretokenize.py CONFIG [key=value ...] [options]

  pretokenize.py CONFIG data.url=folder://data/imagenet data.crop=ten      ten crops of every picture
  pretokenize.py CONFIG data.crop=center data.flip=true                    centre crop and its mirror image
  pretokenize.py CONFIG --import maskgitvq.jsonl data.crop=ten             from reAR's file, or from FQGAN's folder; needs
                                                                           no pictures, and checks them where they are
  pretokenize.py CONFIG --to official DIR | --to jsonl FILE                also write the store in that form

CONFIG is any training config with tokenizer.weights. The store goes to --out, by default to the folder of a data.url
tokens://DIR (the pictures are then data.pictures), else to work_dir/tokens/<name>. A finished store is used as it is; a
killed job goes on when it is started again, on any number of processes. At the end some tokens are decoded: look at
preview.png in the store. Train from it with data.url=tokens://DIR.
"""

import argparse
from pathlib import Path

from core import cli
from core.weights import released
from scripts import command_line

SHOWN = 16  # pictures that are decoded for the preview
AGREEMENT = 0.95  # share of imported codes that the tokenizer must make again


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="pretokenize.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
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
    options = command_line.parse(parser, "pretokenize", arguments)

    from core import dist
    from core.errors import UserError
    from data.base import require_labels
    from data.sources import exists
    from run.data import open_pictures
    from run.load import load_config

    if options.batch < 1 or options.classes < 1:
        raise UserError(f"--batch {options.batch} and --classes {options.classes}: give at least 1.")
    if options.to and options.to[0] not in ("official", "jsonl"):
        raise UserError(f'--to {options.to[0]}: write "--to official DIR" or "--to jsonl FILE".')
    config = load_config(options.config, options.overrides)
    if not config.tokenizer.get("weights"):
        raise UserError("tokenizer.weights is not set, and tokens of an untrained tokenizer are useless.")
    released.resolve(config.tokenizer["weights"])
    dist.pick_device(config.train.device)
    pictures = None
    if options.foreign and not config.data.pictures and not exists(config.data.url):
        print(f"data.url={config.data.url} is not here: the tokens are taken without their pictures")
    else:
        pictures = open_pictures(config)
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
    from core import dist
    from core.chunks import Stopped
    from core.train.signals import REQUEUE_EXIT_CODE
    from data.tokens import TokenStore
    from run.load import load_tokenizer

    world = dist.start(config.train.device)

    def say(message: str) -> None:
        if world.is_main:
            print(message, flush=True)

    try:
        folder = store_folder(config, options.out)
        tokenizer, fingerprint = load_tokenizer(config.tokenizer)
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
        say(
            f"{folder}: {len(store):,} pictures x {store.views} views, {store.spec}, tokenizer {fingerprint}, "
            f"content {store.content}" + (", read and found whole" if options.verify else "")
        )
        if world.is_main:
            show(store, tokenizer, pictures, world.device, say)
        if options.to:
            _export(store, *options.to, world, say)
        world.barrier()
    finally:
        world.stop()
    return 0


def _encode(config, options, pictures, folder: Path, tokenizer, fingerprint: str, world, say) -> None:
    """Tokens of the pictures."""
    import functools

    from core.images import to_model_range
    from core.train.signals import StopRequest
    from data import tokens
    from run.data import compute_once, make_transform

    transform = make_transform(config, tokenizer.image_size)
    transform.view_of((0, 0))  # refuses crops without views
    say(f"tokens of {len(pictures):,} pictures x {transform.views} views ({transform.crop}) -> {folder}")

    def encode(images):
        return tokenizer.precompute(to_model_range(images.to(world.device)))

    build = functools.partial(tokens.build, folder, pictures, transform, tokenizer.spec, encode, fingerprint)
    batch = max(1, options.batch // transform.views)
    with StopRequest() as request:
        compute_once(config, "tokens", tokenizer, world, say, build, options.precision, batch, request.requested)


def _import(config, options, pictures, folder: Path, tokenizer, fingerprint: str, world, say) -> None:
    """Tokens from files of another code base; with the pictures at hand each entry is given to its own."""
    from core.errors import UserError
    from core.rng import hash64
    from core.specs import Continuous
    from core.train.log import ProgressLine
    from core.train.signals import StopRequest
    from data import tokens
    from data.cache import Builder
    from data.token_files import copy_to, open_import
    from run.data import make_transform

    if isinstance(tokenizer.spec, Continuous):
        raise UserError(f"--import reads codes; this tokenizer makes {tokenizer.spec}.")
    transform = make_transform(config, tokenizer.image_size)
    path = Path(options.foreign).expanduser()
    size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.glob("*.jsonl")))

    def line(total: int, unit: str, label: str):
        return ProgressLine(total, unit, label) if world.is_main else None

    counting = line(size, "B", "counting lines") if size else None
    reader = open_import(path, tokenizer.spec, transform.views or 1, counting.update if counting else None)
    if counting:
        counting.close()
    views, places, labels = reader.views, None, None
    if pictures is None:
        count, names = reader.samples, [str(i) for i in range(options.classes)]
        source = f"{hash64('imported', path.name, count, views, size):016x}"
        say(f"no pictures are given: {path} is taken as {count:,} pictures x {views} views, without a comparison")
    else:
        check_count(reader, pictures, path)
        order = world.on_main(lambda: pair(reader, pictures, transform, tokenizer, world.device, path, say))
        places = order.places(pictures, reader.samples)
        count, names, source = len(pictures), pictures.class_names, pictures.fingerprint()
        labels = pictures.labels if pictures.num_classes > 1 else None
    plan = tokens.plan(count, views, source, transform, tokenizer.spec, fingerprint, names)
    bar = line(count, "img", "import")
    try:
        with StopRequest() as request:
            copy_to(
                reader,
                Builder(folder, plan, world),
                places,
                labels,
                (lambda done, total: bar.update(done)) if bar else None,
                request.requested,
            )
    finally:
        if bar:
            bar.close()


def check_count(reader, pictures, path: Path) -> None:
    """UserError unless the entries of a token file can be about as many pictures."""
    from core.errors import UserError
    from data.pairing import filled_up

    if filled_up(reader.samples, len(pictures)):
        return
    lines = reader.samples * reader.views
    fitting = [v for v in (1, 2, 10) if lines % v == 0 and filled_up(lines // v, len(pictures))]
    setting = {1: "data.crop=center data.flip=false", 2: "data.crop=center data.flip=true", 10: "data.crop=ten"}
    advice = (
        f"with {fitting[-1]} views of a picture it would fit: {setting[fitting[-1]]}"
        if fitting
        else "name its pictures (data.pictures), or take it without: data.url=tokens://DIR"
    )
    raise UserError(
        f"{path} has {reader.samples:,} entries of {reader.views} views, {len(pictures):,} pictures are "
        f"given; {advice}."
    )


def pair(reader, pictures, transform, tokenizer, device, path: Path, say):
    """The data.pairing.Order in which a token file lists the pictures: the one that the tokenizer agrees with best.

    UserError below AGREEMENT, for then none of the known orders is the right one.
    """
    from core.errors import UserError
    from core.rng import permutation
    from data.pairing import orders

    # drawn, not evenly spaced: multiples of a number of ranks would lie alike in many orders
    chosen = permutation(len(pictures), "pairing")[:SHOWN].tolist()
    views = [i % reader.views for i in range(len(chosen))]
    again = made_of(crops(pictures, transform, list(zip(chosen, views))), tokenizer, device)
    known: dict[tuple[int, int], float] = {}

    def share(row: int, place: int) -> float:
        if (row, place) not in known:
            known[row, place] = agreement([reader.row(place)[0][views[row]]], again[row : row + 1])
        return known[row, place]

    best, found, tried = -1.0, None, 0
    for order, places in orders(pictures, reader.samples, chosen):
        tried, total = tried + 1, 0.0
        for row, place in enumerate(places):
            total += share(row, place)
            if (total + len(places) - row - 1) / len(places) <= max(best, 0.5):
                break  # cannot become the best any more
        else:
            best, found = total / len(places), order
        if best == 1.0:
            break
    if found is None or best < AGREEMENT:
        raise UserError(
            f"{path}: the tokenizer reproduces only {max(best, 0.0):.1%} of the codes in the best of {tried} "
            f"known orders of lines ({found or 'none came above 50 %'}). They are of another tokenizer, of "
            "other pictures, or of another crop (data.crop)."
        )
    say(f"{path} lists the pictures in {found}: the tokenizer makes {best:.1%} of the codes of {len(chosen)} of them")
    return found


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

    return torch.stack(
        [transform.apply_view(read_or_replace(pictures, index, "replace")[0].image, view) for index, view in chosen]
    )


def made_of(images, tokenizer, device):
    """(B, ...) what the tokenizer makes of crops, on the CPU."""
    import torch

    from core.images import to_model_range

    with torch.no_grad():
        return tokenizer.precompute(to_model_range(images.to(device))).cpu()


def agreement(rows, again) -> float:
    """Share of stored values that are as the tokenizer makes them again; real vectors to within 1 %."""
    import torch

    stored = torch.stack([torch.as_tensor(row.astype("int64") if row.dtype.kind in "iu" else row) for row in rows])
    if again.is_floating_point():
        return float(torch.isclose(stored.float(), again.float(), rtol=1e-2, atol=1e-2).double().mean())
    return float((stored == again).double().mean())


def show(store, tokenizer, pictures, device, say) -> None:
    """Decode some tokens into preview.png, below the crops they came from where those are at hand."""
    import torch

    from core.images import grid, save_png, to_uint8, to_unit_range
    from data.tokens import array_of
    from evaluation.images import psnr

    chosen = spread(len(store), store.views)
    with torch.no_grad():
        stored = store.tokens([i for i, _ in chosen], [v for _, v in chosen]).to(device)
        decoded = tokenizer.decode(tokenizer.from_stored(stored)).float().cpu()
    shown, text = to_uint8(decoded, "nearest"), "decoded"
    if pictures is not None and pictures.fingerprint() == store.fingerprint():
        images = crops(pictures, store.transform, chosen)
        rows = [store.rows(array_of(store.spec))[index, view] for index, view in chosen]
        share = agreement(rows, made_of(images, tokenizer, device))
        quality = psnr(images / 255, to_unit_range(decoded, clamp=True)).mean()
        text = f"PSNR {quality:.2f} dB, {share:.1%} of the tokens made again; pictures above, decoded below"
        shown = torch.cat([torch.cat(pair) for pair in zip(images.split(8), shown.split(8))])
    save_png(grid(shown, columns=8), store.path / "preview.png")
    say(f"{len(chosen)} pictures in {store.path / 'preview.png'}: {text}")


if __name__ == "__main__":
    cli.run(main)
