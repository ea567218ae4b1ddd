"""Protocols, labels and names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.errors import UserError
from evaluation import protocols
from evaluation.protocols import few_pictures, metric_name


def test_protocols_are_complete():
    from core.images import to_uint8

    image = torch.zeros(1, 3, 2, 2)
    for name in protocols.PROTOCOLS:
        for purpose in ("generation", "reconstruction"):
            p = protocols.get(name, purpose)
            for rounding in (p.rounding, p.reconstruction_rounding, p.original_rounding):
                assert rounding is None or to_uint8(image, rounding).dtype == torch.uint8
            assert p.labels in protocols.LABEL_KINDS and p.preprocess in ("tf1", "pytorch_fid")
    asked = protocols.get("rear", "reconstruction", "nearest")
    assert (asked.rounding, asked.reconstruction_rounding, asked.dtype) == ("nearest", "nearest", "float64")
    with pytest.raises(UserError, match='mean "rectok"'):
        protocols.get("rectoc")


def test_labels(tmp_path):
    assert protocols.make_labels("balanced", 7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    drawn = protocols.make_labels("random", 30_000, 10, seed=4)
    assert torch.equal(drawn[:100], protocols.make_labels("random", 100, 10, seed=4))  # of (seed, i), not of the count
    assert torch.bincount(drawn).min() > 2800 and not torch.equal(
        drawn[:100], protocols.make_labels("random", 100, 10, seed=5)
    )
    assert protocols.make_labels("val", 2, 3, val=[2, 1, 0]).tolist() == [2, 1]
    # validation sets are sorted by class: the first N are to show all classes, all of them are what they were
    imagenet = protocols.make_labels("val", 2000, 1000, val=[i // 50 for i in range(50_000)])
    assert torch.equal(imagenet, torch.arange(2000) % 1000)
    uneven = [protocols.make_labels("val", n, 4, val=[0, 0, 0, 2, 3, 3]).tolist() for n in (3, 6)]
    assert uneven == [[0, 2, 3], [0, 2, 3, 0, 3, 0]]
    (tmp_path / "labels.txt").write_text("a/b.png 2\n1\n\n0\n")
    np.save(tmp_path / "labels.npy", np.array([1, 2, 0]))
    assert protocols.make_labels(str(tmp_path / "labels.txt"), 3, 3).tolist() == [2, 1, 0]
    assert protocols.make_labels(str(tmp_path / "labels.npy"), 2, 3).tolist() == [1, 2]
    for kind, count, classes, message in (
        ("val", 1, 3, "Give data.val_url"),
        ("balenced", 1, 3, "neither"),
        (str(tmp_path / "labels.txt"), 9, 3, "has 3 labels"),
        (str(tmp_path / "labels.npy"), 3, 2, "classes 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            protocols.make_labels(kind, count, classes)


def test_names_carry_protocol_and_count():
    assert metric_name("fid", 50_000) == "fid_50k" and metric_name("fid", 49_999) == "fid_49999"
    assert metric_name("is", 5000, "torch_fidelity") == "is_torch_fidelity_5k"
    assert metric_name("fd_lite0_block4", 270) == "fd_lite0_block4_270"
    assert "full rank" in few_pictures(100, 2048) and "equal numbers" in few_pictures(10_000, 2048)
    assert few_pictures(50_000, 2048) == ""
