"""Caches: what goes in comes out, for the same pictures only, whole or not at all, on any number of ranks."""

import itertools
import json
import os
import pickle
import threading

import numpy as np
import pytest
import torch

from core.errors import UserError
from data.cache import Builder, FeatureCache, build
from data.loader import Loader
from data.sources import open_source
from data.transforms import Transform
from tests.data.test_loader import Damaged

SOURCE = open_source("synthetic://?size=8&classes=3&count=11")
TRANSFORM = Transform(8, flip=True)


def producer(images):
    flat = images.flatten(1).float() / 255
    return {"mean": flat[:, :6].reshape(-1, 2, 3), "code": images[:, 0, 0].long() * 200}


def make(path, **options):
    return build(
        path,
        **{
            "source": SOURCE,
            "transform": TRANSFORM,
            "producer": producer,
            "fingerprint": "p1",
            "batch": 4,
            "chunk": 4,
            "storage": {"code": "uint16"},
            **options,
        },
    )


def test_round_trip(tmp_path):
    done = []
    cache = make(tmp_path / "c", progress=lambda *a: done.append(a))
    assert done == [(4, 11), (8, 11), (11, 11)] and os.listdir(tmp_path) == ["c"]
    got = cache.get([10, 3, 3], [0, 1, 0])
    for row, (index, view) in enumerate([(10, 0), (3, 1), (3, 0)]):
        expected = producer(TRANSFORM.apply_view(SOURCE[index].image, view)[None])
        assert all(torch.equal(got[name][row], expected[name][0]) for name in expected)
    assert got["code"].dtype == torch.int64 and np.load(tmp_path / "c" / "code.npy").dtype == np.uint16
    assert cache.labels_of([4, 2]).tolist() == [1, 2] and len(cache) == 11
    assert torch.equal(pickle.loads(pickle.dumps(cache)).get([1], [1])["mean"], cache.get([1], [1])["mean"])
    assert len(pickle.dumps(cache)) < 5000


def test_existing_cache_is_reused(tmp_path):
    make(tmp_path / "c")
    again = make(tmp_path / "c", producer=lambda images: pytest.fail("built twice"))
    assert len(again) == 11


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": open_source("synthetic://?size=8&classes=3&count=12")}, r"pictures \(11 in the cache, 12 now\)"),
        ({"transform": Transform(8)}, r"flip \(True in the cache, False now\)"),
        ({"fingerprint": "p2"}, "p1 in the cache, p2 now"),
    ],
)
def test_mismatch_is_refused(tmp_path, options, message):
    cache = make(tmp_path / "c")
    with pytest.raises(UserError, match=message):
        make(tmp_path / "c", **options)
    if "fingerprint" not in options:
        with pytest.raises(UserError, match=message):
            Loader(
                **{"source": SOURCE, "transform": TRANSFORM, "seed": 0, "global_batch": 4, "features": cache, **options}
            )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_build_goes_on(tmp_path, error):
    """What was finished is not computed again, the result is the same; another request does not touch it."""
    whole = make(tmp_path / "whole")
    calls = []

    def failing(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise error()
        return producer(images)

    with pytest.raises(error):
        make(tmp_path / "c", producer=failing)
    assert sorted(os.listdir(tmp_path)) == [".c.building", "whole"]
    with pytest.raises(UserError, match="unfinished build of something else: producer .p1 there, p2 now"):
        make(tmp_path / "c", fingerprint="p2")
    rest = []
    cache = make(tmp_path / "c", producer=lambda images: rest.append(len(images)) or producer(images))
    assert rest == [6]  # the last three pictures, two views each
    assert cache.content == whole.content and sorted(os.listdir(tmp_path)) == ["c", "whole"]
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_killed_build_of_two_ranks_is_finished_by_three(tmp_path):
    """Killed without any chance to tidy up: only what had been recorded counts."""
    whole = make(tmp_path / "whole", chunk=2)
    builders = [
        Builder(tmp_path / "c", 11, 2, SOURCE.fingerprint(), TRANSFORM.describe(), "p1", rank=rank, world=2, chunk=2)
        for rank in range(2)
    ]
    for builder, chunks in zip(builders, (2, 1)):
        for start, stop in list(builder.spans(2))[:chunks]:
            builder.write(start, {n: whole.rows(n)[start:stop] for n in whole.arrays}, whole.rows("labels")[start:stop])
        builder.flush()
    builders[0].write(4, {n: whole.rows(n)[4:5] for n in whole.arrays}, whole.rows("labels")[4:5])  # half a chunk
    barrier, counts = threading.Barrier(3), [0, 0, 0]

    def go_on(rank):
        def counting(images):
            counts[rank] += len(images)
            return producer(images)

        make(tmp_path / "c", chunk=2, rank=rank, world=3, barrier=barrier.wait, producer=counting)

    threads = [threading.Thread(target=go_on, args=(rank,)) for rank in range(3)]
    [t.start() for t in threads]
    [t.join(600) for t in threads]
    assert counts == [4, 4, 2]  # pictures 4, 5 | 8, 9 | 10, two views each
    assert FeatureCache(tmp_path / "c").content == whole.content


def test_build_that_died_before_it_had_a_plan(tmp_path):
    stale = tmp_path / ".c.building"
    stale.mkdir()
    (stale / "mean.npy").write_text("half")
    (stale / "owner").write_text(f"{os.uname().nodename} 1")
    with pytest.raises(UserError, match="being built by process 1"):  # process 1 is alive, and not ours
        make(tmp_path / "c")
    (stale / "owner").write_text(f"{os.uname().nodename} 4194304")  # above the largest process number
    assert len(make(tmp_path / "c")) == 11 and os.listdir(tmp_path) == ["c"]


def test_verify(tmp_path):
    cache = make(tmp_path / "c")
    cache.verify()
    with open(tmp_path / "c" / "code.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(UserError, match="samples 8 to 10 are not what was written"):
        FeatureCache(tmp_path / "c").verify()


def test_ranks_write_the_same_files(tmp_path):
    make(tmp_path / "one")
    for world in (2, 3, 16):
        barrier = threading.Barrier(world)
        threads = [
            threading.Thread(
                target=make,
                args=(tmp_path / str(world),),
                kwargs={"rank": rank, "world": world, "barrier": barrier.wait},
            )
            for rank in range(world)
        ]
        [t.start() for t in threads]
        [t.join(600) for t in threads]
        for name in os.listdir(tmp_path / "one"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / str(world) / name).read_bytes()


def test_values_that_do_not_fit(tmp_path):
    for name, value, dtype in (
        ("code", 70000, "uint16"),
        ("code", -1, "uint16"),
        ("mean", 1e5, "float16"),
        ("mean", float("nan"), "float32"),
    ):
        tensor = torch.full((4, 2), value)
        with pytest.raises(UserError, match=f"{name}: values .* do not fit {dtype}"):
            make(tmp_path / "c", producer=lambda images: {name: tensor}, storage={name: dtype}, batch=2)
    assert os.listdir(tmp_path) == []


def test_transform_without_views(tmp_path):
    with pytest.raises(UserError, match="no fixed views"):
        make(tmp_path / "c", transform=Transform(8, crop="random"))


def test_damaged_caches(tmp_path):
    make(tmp_path / "c")
    with pytest.raises(UserError, match="not a complete cache"):
        FeatureCache(tmp_path / "none")
    (tmp_path / "c" / "mean.npy").write_bytes((tmp_path / "c" / "mean.npy").read_bytes()[:200])
    with pytest.raises(UserError, match="mean.npy"):
        FeatureCache(tmp_path / "c")
    for text in ("", "[]", "{}", json.dumps({"format": 99})):
        (tmp_path / "c" / "description.json").write_text(text)
        with pytest.raises(UserError, match="again"):
            FeatureCache(tmp_path / "c")


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_hands_out_features_and_stored(tmp_path, workers):
    """Features belong to the very crop in the batch, also where a picture was replaced."""
    source = Damaged(13, {2, 3, 12})
    first_row = {"producer": lambda images: {"x": images[:, :, 0].flatten(1).half()}, "source": source, "storage": None}
    features = make(tmp_path / "f", **first_row)
    with_features = Loader(source, TRANSFORM, 3, 4, features=features, workers=workers)
    with_stored = Loader(None, TRANSFORM, 3, 4, stored=features, workers=workers)
    for a, b in itertools.islice(zip(with_features.batches(4), with_stored.batches(4)), 8):
        assert a.features["x"].dtype == torch.float16
        assert torch.equal(a.features["x"], a.images[:, :, 0].flatten(1).half())
        assert torch.equal(b.stored, a.features["x"]) and b.images is None
        assert torch.equal(a.labels, b.labels) and torch.equal(a.positions, b.positions)
    assert features.source_fingerprint == source.fingerprint()


def test_features_follow_the_drawn_view(tmp_path):
    cache = make(tmp_path / "c")
    for batch in itertools.islice(Loader(SOURCE, TRANSFORM, 3, 4, features=cache).batches(), 6):
        assert torch.equal(batch.features["mean"], producer(batch.images)["mean"])
    with pytest.raises(UserError, match="single array"):
        Loader(None, TRANSFORM, 0, 4, stored=cache)
