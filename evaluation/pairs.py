"""Originals and reconstructions, paired by name.

Two folders list their pictures in orders of their own: 10.png before or after 2.png, by class or not. So names decide,
where both sides have some: with the folders of their classes or without, whatever the extension and the zeros before
numbers. Only a side whose names are nothing but consecutive numbers, as programs write what they make one after another,
and arrays, which have no names, are taken in the order of the other side.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter

from core.errors import UserError
from evaluation.pictures import FolderPictures, Pictures, SourcePictures, same_pictures

SHOWN = 3  # names in a message


def paired(originals: Pictures, reconstructions: Pictures) -> Pictures:
    """The reconstructions in the order of their originals; UserError where they do not belong together."""
    ours, theirs = names(originals), names(reconstructions)
    if ours is None or theirs is None:
        same_pictures(originals, reconstructions)
        return reconstructions
    if len(ours) != len(theirs) and not (is_counted(ours) or is_counted(theirs)):
        raise UserError(
            f"{originals.name} has {len(ours)} pictures and {reconstructions.name} has {len(theirs)}: each "
            f"reconstruction needs its original, and {lonely(ours, theirs, originals.name)}, "
            f"{lonely(theirs, ours, reconstructions.name)}."
        )
    for of in (path, base):
        places = {of(name): i for i, name in enumerate(theirs)}
        wanted = [of(name) for name in ours]
        if len(places) == len(theirs) and places.keys() == set(wanted):
            same_pictures(originals, reconstructions)
            return reordered(reconstructions, [places[name] for name in wanted])
    if not (is_counted(ours) or is_counted(theirs)):
        raise UserError(
            f"{reconstructions.name} and {originals.name} cannot be paired by the names of their pictures: "
            f"{lonely(ours, theirs, originals.name)}; {lonely(theirs, ours, reconstructions.name)}. Give each "
            "reconstruction the name of its original, or number them in the order of the originals: 000000.png ..."
        )
    same_pictures(originals, reconstructions)
    return reconstructions


def names(pictures: Pictures) -> list[str] | None:
    """Of each picture, as the source lists it; None where they have none."""
    key = getattr(pictures.source, "key", None)
    return (
        [key(row) for row in pictures.rows] if key and isinstance(pictures, (FolderPictures, SourcePictures)) else None
    )


def path(name: str) -> str:
    """Without its extension and the zeros before numbers."""
    return re.sub(r"[0-9]+", lambda number: str(int(number[0])), os.path.splitext(name)[0])


def base(name: str) -> str:
    """`path` without folders."""
    return path(os.path.basename(name))


def is_counted(listed: list[str]) -> bool:
    """Whether the names are consecutive numbers, in this order."""
    numbers = [base(name) for name in listed]
    if not all(number.isdecimal() for number in numbers):
        return False
    return [int(number) for number in numbers] == list(range(int(numbers[0]), int(numbers[0]) + len(numbers)))


def lonely(listed: list[str], others: list[str], where: str) -> str:
    """The first names without one of the same name among the others, or that are there twice."""
    known = {base(name) for name in others}
    alone = [name for name in listed if base(name) not in known]
    if not alone:
        count = Counter(map(base, listed))
        twice = [name for name in listed if count[base(name)] > 1]
        return f"{where} has {', '.join(twice[:SHOWN]) or 'no other picture'}{' under one name' if twice else ''}"
    more = f" and {len(alone) - SHOWN} more" if len(alone) > SHOWN else ""
    return f"{where} alone has {', '.join(alone[:SHOWN])}{more}"


def reordered(pictures: Pictures, places: list[int]) -> Pictures:
    """The same set in another order."""
    if places == list(range(len(places))):
        return pictures
    result = copy.copy(pictures)
    result.rows = [pictures.rows[place] for place in places]
    return result
