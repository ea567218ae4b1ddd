"""Originals and reconstructions are paired by name, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from evaluation.pairs import paired
from evaluation.pictures import ArrayPictures, open_any


def folder(place, shades: dict[str, int], size=(8, 8)) -> str:
    """Pictures of one shade each."""
    for name, shade in shades.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (shade,) * 3).save(place / name)
    return str(place)


def shades(pictures) -> list[int]:
    return pictures.read(0, len(pictures))[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize(
    "theirs",
    [
        {"10.png": 10, "2.png": 2, "1.png": 1},
        {"0010.png": 10, "0002.png": 2, "0001.png": 1},
        {"a/0010.png": 10, "b/02.png": 2, "b/1.png": 1},
    ],
    ids=["same", "zeros", "classes"],
)
def test_names_decide(tmp_path, theirs, size):
    original = open_any(folder(tmp_path / "a", {"c/1.png": 1, "c/10.png": 10, "d/2.png": 2}), size)
    recon = paired(original, open_any(folder(tmp_path / "b", theirs), size))
    assert shades(recon) == shades(original) and sorted(shades(original)) == [1, 2, 10]
    assert recon.read(1, 2)[0, 0, 0, 0] == shades(original)[1]


def test_another_order_is_another_set(tmp_path):
    folder(tmp_path / "a", {"c/1.png": 1, "c/10.png": 10, "d/2.png": 2})
    other = open_any(folder(tmp_path / "b", {"1.png": 1, "2.png": 2, "10.png": 10}))
    again = paired(open_any(str(tmp_path / "a")), other)
    assert again.fingerprint() != other.fingerprint() and shades(other) == [1, 2, 10]
    assert paired(other, other) is other  # and one in the same order is the same, also for jobs that go on


def test_classes_that_share_names(tmp_path):
    original = open_any(folder(tmp_path / "a", {"c/0.png": 1, "d/0.png": 2}))
    assert shades(paired(original, open_any(folder(tmp_path / "b", {"d/00.png": 2, "c/00.png": 1})))) == [1, 2]
    with pytest.raises(UserError, match="cannot be paired.*a has c/0.png, d/0.png under one name; .*e alone has x.png"):
        paired(original, open_any(folder(tmp_path / "e", {"0.png": 2, "x.png": 1})))


def test_numbered_ones_and_arrays_are_in_order(tmp_path):
    original = open_any(folder(tmp_path / "a", {"cat.png": 3, "dog.png": 4}))
    assert shades(paired(original, open_any(folder(tmp_path / "b", {"000000.png": 5, "000001.png": 6})))) == [5, 6]
    array = ArrayPictures(np.zeros((2, 8, 8, 3), dtype=np.uint8))
    assert paired(original, array) is array and paired(array, original) is original


def test_what_does_not_pair_is_named(tmp_path):
    original = open_any(folder(tmp_path / "a", {"cat.png": 1, "dog.png": 2}))
    with pytest.raises(
        UserError, match="a alone has dog.png; .*b alone has cow.png. Give each reconstruction the name"
    ):
        paired(original, open_any(folder(tmp_path / "b", {"cat.png": 1, "cow.png": 2})))
    with pytest.raises(UserError, match="has 2 pictures and .* has 1: .*a alone has dog.png, .*c has no other picture"):
        paired(original, open_any(folder(tmp_path / "c", {"cat.png": 1})))
    with pytest.raises(UserError, match="8 x 8, .* of 6 x 7"):
        paired(original, open_any(folder(tmp_path / "d", {"cat.png": 1, "dog.png": 2}, (7, 6))))
