"""evaluation/instances.py: what is said of texts and faces, against slow and plain computations of the same."""

from __future__ import annotations

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from data.transforms import center_crop
from evaluation.images import interval_of
from evaluation.instances import (
    FaceRow,
    TextRow,
    Values,
    bounds,
    by_size,
    cosine,
    cut,
    edit_distance,
    face_metrics,
    in_crop,
    likeness,
    listed_texts,
    text_metrics,
    text_rows,
)


def slow_distance(a: str, b: str) -> int:
    """By its definition, all ways tried."""

    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(same, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))


def test_edit_distance_is_levenshteins():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "ab"), ("ab", "ba"))] == [3, 2, 2]
    words = ["".join(w) for n in range(4) for w in itertools.product("ab", repeat=n)]
    assert all(edit_distance(a, b) == slow_distance(a, b) for a in words for b in words)


@pytest.mark.parametrize(
    ("truth", "read", "value"),
    [("No Parking", "noparking", 1), ("STOP", "ST0P", 0.75), ("Exit", "", 0), ("a", "abcd", 0.25), ("ab", "xy", 0)],
)
def test_likeness_leaves_case_and_spaces_aside(truth, read, value):
    assert likeness(truth, read) == likeness(read, truth) == value


def test_metrics_are_means_over_instances():
    box = (0.0, 0.0, 10.0, 4.0)
    rows = [
        TextRow(0, box, "Stop", "STOP", "stop"),
        TextRow(0, box, "Exit", "Exit", "Ex"),
        TextRow(2, box, "A", "B", ""),
    ]
    of = text_metrics(rows, 40)
    assert of["t_acc"].mean() == pytest.approx(1 / 3) and of["t_ned"].mean() == pytest.approx(1.5 / 3)
    originals = text_metrics(rows, 40, of_originals=True)
    assert originals["t_acc"].mean() == pytest.approx(2 / 3)
    assert of["t_acc"].sizes.tolist() == [0.1] * 3 and of["t_acc"].pictures.tolist() == [0, 0, 2]
    faces = face_metrics([FaceRow(1, box, 0.5), FaceRow(3, box, 1.0)], 40)
    assert faces["f_sim"].mean() == 0.75


def test_cosine_is_that_of_the_rows():
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cosine_similarity(a.double(), b.double()).numpy()
    assert np.allclose(cosine(a.numpy(), b.numpy()), expected, atol=1e-12)
    assert cosine(np.zeros((1, 3)), np.ones((1, 3))) == 0


def test_classes_of_sizes():
    sizes = torch.tensor([0.049, 0.05, 0.099, 0.1, 0.9], dtype=torch.float64)
    of = Values(torch.arange(5.0, dtype=torch.float64), torch.arange(5), sizes)
    assert {name: part.values.tolist() for name, part in by_size("text", of).items()} == {
        "small": [0],
        "medium": [1, 2],
        "large": [3, 4],
    }
    assert set(by_size("faces", of)) == {"small", "large"}


def test_intervals_draw_pictures_with_all_that_is_in_them():
    rng = np.random.default_rng(0)
    single = Values(torch.from_numpy(rng.random(50)), torch.arange(50), torch.zeros(50))
    assert single.interval() == pytest.approx(interval_of(single.values))
    # the same values ten times in their picture say nothing new: the interval stays
    many = Values(single.values.repeat_interleave(10), torch.arange(50).repeat_interleave(10), torch.zeros(500))
    assert many.interval() == pytest.approx(single.interval())
    apart = Values(many.values, torch.arange(500), torch.zeros(500))
    assert apart.interval()[1] - apart.interval()[0] < 0.5 * (many.interval()[1] - many.interval()[0])


def test_intervals_hold_the_truth():
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        counts = rng.integers(1, 6, 60)
        chance = rng.random(60).repeat(counts)  # of a picture; its texts share it; the mean over all is a half
        values = torch.from_numpy((rng.random(len(chance)) < chance).astype(np.float64))
        low, high = Values(values, torch.arange(60).repeat_interleave(torch.from_numpy(counts)), values).interval(200)
        held += low <= 0.5 <= high
    assert 0.9 <= held / 200 <= 0.98


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (200, 517), (1000, 333), (65, 64)])
def test_boxes_go_where_the_crop_puts_them(size):
    width, height = size
    box = (0.45 * width, 0.4 * height, 0.6 * width, 0.55 * height)
    picture = np.zeros((height, width, 3), dtype=np.uint8)
    left, top, right, bottom = (round(x) for x in box)
    picture[top:bottom, left:right] = 255
    crop = np.asarray(center_crop(Image.fromarray(picture), 64))[..., 0] > 127
    rows, columns = np.flatnonzero(crop.any(1)), np.flatnonzero(crop.any(0))
    seen = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    assert np.abs(np.array(in_crop((left, top, right, bottom), size, 64)) - seen).max() <= 1.01


def test_boxes_that_are_cut_are_left_out():
    assert in_crop((0, 10, 50, 20), (300, 100), 64) is None and in_crop((280, 10, 299, 20), (300, 100), 64) is None
    assert in_crop((110, 10, 150, 20), (300, 100), 64) is not None
    picture = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    assert (cut(picture, (1.2, 1.0, 3.1, 2.0)) == picture[1:2, 1:4]).all()
    assert cut(picture, (5.9, 4.9, 9, 9)).shape == (1, 1, 3)


def test_texts_of_a_list_or_those_that_are_read():
    class Reader:
        def find(self, picture):
            return [(0, 0, 2, 2), (2, 0, 4, 2)]

        def read(self, crops):
            return ["" if crop.max() == 0 else str(crop.max()) for crop in crops]

    original, recon = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    original[:2, :2], recon[:2, :2] = 7, 9
    (row,) = text_rows(Reader(), 3, original, recon, None)
    assert row == TextRow(3, (0, 0, 2, 2), "7", "7", "9"), "what nobody reads in the original is no text"
    (row,) = text_rows(Reader(), 3, original, recon, lambda number: [((2, 0, 4, 2), f"no {number}")])
    assert row == TextRow(3, (2, 0, 4, 2), "no 3", "", "")
    assert text_rows(Reader(), 3, original, recon, lambda number: []) == []


def test_lists_of_texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [
        {"file": "/a/1.jpg", "texts": [{"box": [1, 2, 3, 4], "says": "Hi"}, {"box": [0, 0, 1, 1], "says": " ### "}]},
        {"file": "b.jpg", "texts": [{"box": [[5, 5], [1, 6], [2, 9]], "says": "you"}]},
        {"file": "a/1.jpg", "texts": [{"box": [3, 4, 1, 2], "says": "too"}], "licence": "unknown keys do not matter"},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert listed_texts(path) == {
        "a/1.jpg": [((1, 2, 3, 4), "Hi"), ((1, 2, 3, 4), "too")],
        "b.jpg": [((1, 5, 5, 9), "you")],
    }


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        '{"file": "a"}',
        '{"file": "a", "texts": [{"box": [1, 2, 3], "says": "x"}]}',
        '{"file": "a", "texts": [{"box": [1, 2, 1, 4], "says": "x"}]}',
        '{"file": "a", "texts": [{"box": [1, 2, NaN, 4], "says": "x"}]}',
        '{"file": "a", "texts": [{"box": [1, 2, 3, 4], "says": 5}]}',
        '{"file": 3, "texts": [{"box": [1, 2, 3, 4], "says": "x"}]}',
    ],
)
def test_mistakes_in_lists(line, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"file": "a.jpg", "texts": [{"box": [0, 0, 2, 2], "says": "ok"}]}\n' + line)
    with pytest.raises(UserError, match="line 2: expected"):
        listed_texts(path)


def test_lists_that_are_none(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, said in (("empty", "lists no texts"), ("binary", "cannot be read"), ("missing", "cannot be read")):
        with pytest.raises(UserError, match=said):
            listed_texts(tmp_path / name)
    with pytest.raises(ValueError):
        bounds([[1, 2]])
