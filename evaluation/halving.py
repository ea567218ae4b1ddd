"""Successive halving (Jamieson & Talwalkar 2016): the best of many settings without measuring all of them in full.

    ladder = plan(settings=16, full=50_000)       [Rung(16, 10912), ..., Rung(2, 50000)]
    best = climb(names, ladder, measure)

All settings are measured on the first few pictures, the better part of them on more, the last ones on all. The pictures
of a rung are among those of the next, so that each setting is paid for once. Settings are compared on the same number of
pictures of the same noise and labels only: the bias of a Frechet distance for few pictures, and what a noise happens to
give, are then about alike for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from core.errors import UserError

BUDGET = 0.4  # of the pictures that the whole grid would take
SMALLEST = 64  # pictures of the first rung: with fewer the order is luck
KEEP = (2, 3, 4, 8)  # one setting in so many goes on to the next rung; the gentlest first
T = TypeVar("T")


@dataclass(frozen=True)
class Rung:
    """`kept` settings are measured on their first `pictures` pictures."""

    kept: int
    pictures: int


def cost(ladder: Sequence[Rung]) -> int:
    """Pictures that have to be drawn."""
    before = [0, *(rung.pictures for rung in ladder)]
    return sum(rung.kept * (rung.pictures - drawn) for rung, drawn in zip(ladder, before))


def plan(settings: int, full: int, first: int | None = None, budget: float = BUDGET) -> list[Rung]:
    """The gentlest ladder that costs at most `budget` of the whole grid; where none does, the cheapest.

    Args:
        settings: how many there are.
        full: pictures of the last rung.
        first: pictures of the first rung; None: as many as the budget allows.
    """
    if first is not None and not 2 <= first <= full:
        raise UserError(f"--first {first}: the first comparison takes 2 to {full} pictures, which are all (--num).")
    if settings == 1 or first == full:
        return [Rung(settings, full)]
    kept = [_kept(settings, keep, finalists) for finalists in (2, 1) if finalists < settings for keep in KEEP]
    allowed = budget * settings * full
    smallest = first or min(SMALLEST, full)
    for counts in kept:
        if cost(_ladder(counts, smallest, full)) <= allowed:
            sizes = [first] if first else range(smallest, full)
            return _ladder(counts, max(n for n in sizes if cost(_ladder(counts, n, full)) <= allowed), full)
    return min([[Rung(settings, full)], *(_ladder(counts, smallest, full) for counts in kept)], key=cost)


def _kept(settings: int, keep: int, finalists: int) -> list[int]:
    """How many settings are in each rung, if one in `keep` goes on."""
    kept = [settings]
    while kept[-1] > finalists:
        kept.append(max(finalists, -(-kept[-1] // keep)))
    return kept


def _ladder(kept: Sequence[int], first: int, full: int) -> list[Rung]:
    """Rungs whose pictures grow by one factor."""
    growth = (full / first) ** (1 / (len(kept) - 1))
    inner = (round(first * growth**i) for i in range(1, len(kept) - 1))
    return [Rung(count, pictures) for count, pictures in zip(kept, (first, *inner, full))]


def climb(settings: Sequence[T], ladder: Sequence[Rung], measure: Callable[[T, int], float]) -> list[T]:
    """The settings that reached the last rung, the best first.

    Args:
        measure: (setting, first so many pictures) -> a value, of which lower is better. Called rung by rung.
    """
    left = list(settings)
    for rung in ladder:
        values = {place: measure(setting, rung.pictures) for place, setting in enumerate(left[: rung.kept])}
        left = [left[place] for place in sorted(values, key=lambda place: (values[place], place))]
    return left
