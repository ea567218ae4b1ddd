"""Which entry of a token file belongs to which picture.

Files of tokens name classes, not pictures: an entry is told by its place alone, and the place follows from how the
programs that wrote the file walked through the pictures. `orders` lists the known walks; whoever has the tokenizer tries
them on a few pictures and takes the one that the tokenizer agrees with (`best_order`).

A walk is a list of the pictures (as our source has them, by name, by class and name, or shuffled by torch's
DistributedSampler) that ranks share: each takes every W-th picture, or a contiguous part. The file then holds the ranks'
entries one rank after another, in the order of their numbers or of these as words, or alternating. Samplers may fill up
the last round with the first pictures, so that there are more entries than pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.errors import UserError
from core.specs import DataSource

MAX_RANKS = 1024
SEEDS = (0, 42)  # of shuffling samplers: torch's own, and the one of reAR's recipes
VIEWS = {  # of a picture: the settings that ask for them
    1: "data.crop=center data.flip=false",
    2: "data.crop=center data.flip=true",
    10: "data.crop=ten",
}
WALKS = {
    "listed": "the order of the source",
    "name": "sorted by name",
    "class": "sorted by class, then name",
    **{f"shuffled {seed}": f"shuffled by a DistributedSampler with seed {seed}" for seed in SEEDS},
}
MERGES = {  # name: (how many ranks make it differ from the others, text)
    "strided": (1, "{ranks} ranks that took pictures in turn, one rank's after the other's"),
    "strided, ranks as words": (
        11,
        "{ranks} ranks that took pictures in turn, one rank's after the other's as 0, 1, 10",
    ),
    "alternating": (2, "{ranks} ranks with a part each, their entries in turn"),
}


@dataclass(frozen=True)
class Order:
    """A way to list pictures in a file."""

    walk: str  # key of WALKS
    merge: str = "strided"  # key of MERGES
    ranks: int = 1

    def __str__(self) -> str:
        walked = WALKS[self.walk]
        return walked if self.ranks == 1 else f"{walked}, {MERGES[self.merge][1].format(ranks=self.ranks)}"

    def places(self, source: DataSource, entries: int) -> np.ndarray:
        """(len(source),) where each picture is among the `entries`."""
        return merged(walked(source, self.walk), entries, self.merge, self.ranks)


def walked(source: DataSource, walk: str) -> np.ndarray:
    """(len(source),) at which position each picture is met."""
    count = len(source)
    if walk == "listed":
        return np.arange(count)
    if walk.startswith("shuffled"):
        drawn = torch.Generator().manual_seed(int(walk.split()[1]))
        order = torch.randperm(count, generator=drawn).numpy()  # parity: torch.utils.data.DistributedSampler, epoch 0
    else:
        keys = np.array([source.key(i) for i in range(count)], dtype=object)
        order = np.argsort(keys, kind="stable")
        if walk == "class":
            order = order[np.argsort(np.asarray(source.labels)[order], kind="stable")]
    positions = np.empty(count, dtype=np.int64)
    positions[order] = np.arange(count)
    return positions


def merged(positions: np.ndarray, entries: int, merge: str, ranks: int) -> np.ndarray:
    """Where in the file the pictures at these positions of a walk are, whose ranks wrote `entries` in all."""
    lengths = np.array([entries // ranks + (r < entries % ranks) for r in range(ranks)])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    if merge == "alternating":
        rank = np.searchsorted(starts, positions, side="right") - 1
        step = positions - starts[rank]
        return step * ranks + rank  # the last round has the longer parts, which are the first
    if merge == "strided, ranks as words":
        order = np.array(sorted(range(ranks), key=str))
        starts = np.empty_like(starts)
        starts[order] = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
    return starts[positions % ranks] + positions // ranks


def orders(source: DataSource, entries: int, chosen: list[int]) -> Iterator[tuple[Order, list[int]]]:
    """Every known way in which `entries` may list the pictures of `source`, likelier ones first, and where the pictures
    `chosen` are then."""
    count = len(source)
    walks = {"listed": walked(source, "listed")}
    for walk in ("class", "name") if hasattr(source, "key") else ():
        positions = walked(source, walk)
        if not any(np.array_equal(positions, other) for other in walks.values()):
            walks[walk] = positions
    walks |= {f"shuffled {seed}": walked(source, f"shuffled {seed}") for seed in SEEDS}
    for walk, positions in walks.items():
        positions = positions[chosen]
        for ranks in range(1, min(MAX_RANKS, count) + 1):
            if entries not in (count, -(-count // ranks) * ranks):
                continue  # neither one entry a picture nor a last round that was filled up
            for merge, (least, _) in MERGES.items():
                if ranks >= least:
                    yield Order(walk, merge, ranks), merged(positions, entries, merge, ranks).tolist()


def best_order(
    source: DataSource, entries: int, chosen: list[int], share: Callable[[int, int], float]
) -> tuple[float, Order | None, int]:
    """The known order in which a tokenizer agrees best with a file, if more than half; stops at a perfect one.

    Args:
        chosen: pictures to look at.
        share: (number in `chosen`, entry) -> share of the entry's codes that the tokenizer makes of that picture.

    Returns: (mean share, 0 without an order; the order; how many were tried).
    """
    best, order, tried = 0.0, None, 0
    for candidate, places in orders(source, entries, chosen):
        tried, total = tried + 1, 0.0
        for row, place in enumerate(places):
            total += share(row, place)
            if (total + len(places) - row - 1) / len(places) <= max(best, 0.5):
                break  # cannot become the best any more
        else:
            best, order = total / len(places), candidate
        if best == 1.0:
            break
    return best, order, tried


def filled_up(entries: int, count: int) -> bool:
    """Whether a file of `entries` can be about `count` pictures."""
    return entries == count or any(
        -(-count // ranks) * ranks == entries for ranks in range(2, min(MAX_RANKS, count) + 1)
    )


def check_count(path: Path, entries: int, views: int, pictures: int) -> None:
    """UserError unless the entries of a token file, of so many views, can be about as many pictures."""
    if filled_up(entries, pictures):
        return
    lines = entries * views
    fitting = [v for v in VIEWS if lines % v == 0 and filled_up(lines // v, pictures)]
    advice = (
        f"with {fitting[-1]} views of a picture it would fit: {VIEWS[fitting[-1]]}"
        if fitting
        else "name its pictures (data.pictures), or take it without: data.url=tokens://DIR"
    )
    raise UserError(f"{path} has {entries:,} entries of {views} views, {pictures:,} pictures are given; {advice}.")
