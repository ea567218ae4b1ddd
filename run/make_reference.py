"""What run_make_reference.sh does: statistics of a set of pictures, in a file that evaluations compare with."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from core.dist import World
from core.errors import UserError
from core.schema import EvalConfig
from core.signals import finishing
from core.train.log import progress_line
from data.base import spread
from data.checks import say_left_out
from evaluation import measure, networks, protocols, references
from evaluation.pictures import Pictures, first_pictures, open_any

STAND_IN = "--network lite0 takes the stand-in that comes with the code, whose distances are never called FID"


@contextlib.contextmanager
def _offering_the_stand_in(network: str) -> Iterator[None]:
    """Where FID's network, which nobody may have asked for, cannot be had."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} {STAND_IN}." if network == "inception" else str(error)) from None


def check(options: argparse.Namespace) -> Pictures:
    """The pictures; UserError for what is wrong with the command."""
    out = Path(options.out)
    protocol = protocols.get(options.protocol)
    if options.check:
        with _offering_the_stand_in(options.network):
            networks.look_for_net(options.network, protocol)
        if lines := measure.lacking(EvalConfig(network=options.network), protocol, "generation"):
            print(f"not here: {lines[0]}; {STAND_IN}")
    if out.suffix not in (".npz", ".safetensors"):
        raise UserError(f"{out}: choose a name that ends in .npz or .safetensors.")
    if options.keep_pictures and out.suffix != ".npz":
        raise UserError(f"{out}: pictures are kept in .npz files only. Choose a name that ends in .npz.")
    if out.exists():
        raise UserError(f"{out} is there already. Choose another name, or delete it first.")
    split = "train" if options.purpose == "generation" else "val"
    pictures = first_pictures(open_any(options.url, options.size, options.workers, split), options.num)
    if len(pictures) < 2:
        raise UserError(f"{options.url} holds {len(pictures)} picture; a covariance needs at least 2.")
    return pictures


def make_reference(options: argparse.Namespace, pictures: Pictures, world: World) -> int:
    """Collective; returns the exit code."""
    out = Path(options.out)
    say_left_out(world.say, pictures.source, options.url)
    protocol = protocols.get(options.protocol, options.purpose or "generation")
    with _offering_the_stand_in(options.network):
        net = networks.feature_net(world.device, options.network, protocol)
    transform = f"ADM centre crop to {options.size}" if options.size else "as they are"
    rounding = protocol.original_rounding if options.purpose == "reconstruction" else None
    facts = references.Facts(options.purpose, transform=transform, rounding=rounding)
    work = out.with_name(f".{out.name}.work")
    with progress_line(world, len(pictures), "features") as progress:
        statistics = references.make_statistics(pictures, net, world, options.batch, work, facts, progress)
    if statistics is None:
        return 0
    kept = None
    if options.keep_pictures:
        chosen = spread(len(pictures), options.keep_pictures)
        kept = np.concatenate([pictures.read(i, i + 1).permute(0, 2, 3, 1).numpy() for i in chosen])
    finishing()
    references.save(out, statistics, kept, options.dtype)
    for tap, (mean, _) in statistics.moments.items():
        if note := protocols.few_pictures(len(pictures), len(mean)):
            print(f"note ({tap}): {note}")
    print(
        f"{out}: {len(pictures):,} pictures of {pictures.size[0]} px, network {net.name}, fingerprint "
        f"{statistics.facts.source}" + (f", {len(kept):,} of them kept" if kept is not None else "")
    )
    return 0
