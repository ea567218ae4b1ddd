"""Caches: what goes in comes out, for the same pictures only, whole or not at all, on any number of ranks."""

import errno
import itertools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.cache
from core import lock
from core.chunks import ALONE
from core.errors import UserError
from core.files import explain_os_errors
from data.cache import Builder, FeatureCache, Pass, Plan, build
from data.loader import Loader
from data.sources import open_source
from data.transforms import Transform
from tests.data.test_loader import Damaged
from tests.ranks import in_threads

SOURCE = open_source("synthetic://?size=8&classes=3&count=11")
TRANSFORM = Transform(8, flip=True)


def producer(images):
    flat = images.flatten(1).float() / 255
    return {"mean": flat[:, :6].reshape(-1, 2, 3), "code": images[:, 0, 0].long() * 200}


def make(path, chunk=4, batch=4, world=ALONE, progress=None, **options):
    return build(
        path,
        how=Pass(world, batch, progress=progress, chunk=chunk),
        **{
            "source": SOURCE,
            "transform": TRANSFORM,
            "producer": producer,
            "fingerprint": "p1",
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
    with pytest.raises(UserError, match="an unfinished build of something else .producer was 'p1', now 'p2'."):
        make(tmp_path / "c", fingerprint="p2")
    rest = []
    cache = make(tmp_path / "c", producer=lambda images: rest.append(len(images)) or producer(images))
    assert rest == [6]  # the last three pictures, two views each
    assert cache.content == whole.content and sorted(os.listdir(tmp_path)) == ["c", "whole"]
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path, monkeypatch):
    whole, write_rows = make(tmp_path / "whole"), data.cache.write_rows

    def full(path, start, rows):
        with explain_os_errors(path):
            if start == 8 and path.name == "mean.npy":
                raise OSError(errno.ENOSPC, "No space left on device")
        write_rows(path, start, rows)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="mean.npy: the disk is full. Free some space"):
        patch.setattr("data.cache.write_rows", full)
        make(tmp_path / "c")
    rest = []
    cache = make(tmp_path / "c", producer=lambda images: rest.append(len(images)) or producer(images))
    assert rest == [6] and cache.content == whole.content


def rows(cache, span):
    """Those that a builder takes, from a finished cache."""
    part = slice(span.start, span.stop)
    return {name: cache.rows(name)[part] for name in cache.arrays}, cache.rows("labels")[part]


def test_killed_build_of_two_ranks_is_finished_by_three(tmp_path):
    """Killed without any chance to tidy up: only what had been recorded counts."""
    whole = make(tmp_path / "whole", chunk=2)
    plan = Plan(11, 2, SOURCE.fingerprint(), TRANSFORM.describe(), "p1", chunk=2)
    builders = in_threads(2, lambda world: Builder(tmp_path / "c", plan, world))
    for builder, chunks in zip(builders, ([0, 2], [1])):
        for chunk in chunks:
            builder.write(builder.indices(chunk).start, *rows(whole, builder.indices(chunk)))
        builder.flush()
    builders[1].write(6, *rows(whole, range(6, 7)))  # half a chunk
    counts = [0, 0, 0]

    def go_on(world):
        def counting(images):
            counts[world.rank] += len(images)
            return producer(images)

        make(tmp_path / "c", chunk=2, world=world, producer=counting)

    in_threads(3, go_on)
    assert counts == [4, 4, 2]  # pictures 6, 7 | 8, 9 | 10, two views each
    assert FeatureCache(tmp_path / "c").content == whole.content


def test_caches_of_earlier_versions_are_used_and_continued(tmp_path):
    """As they lie on users' disks since format 2, to the letter; an unfinished one too."""
    plan = (
        '{"chunk": 4, "facts": {}, "format": 2, "producer": "p1", "samples": 11, '
        '"source": "41a19b7e864879a53f0da09235d48904", '
        '"transform": {"crop": "center", "flip": true, "image_size": 8}, "views": 2}'
    )
    arrays = '{"code": {"dtype": "uint16", "shape": [8]}, "mean": {"dtype": "float32", "shape": [2, 3]}}'
    finished = {**json.loads(plan), "arrays": json.loads(arrays), "content": "b716d37fcfe447f07e6025e5693adb5e"}
    whole = make(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "description.json").read_text()) == finished
    assert sorted(os.listdir(tmp_path / "whole")) == sorted(
        ["description.json", "chunks.npy", "labels.npy", "code.npy", "mean.npy"]
    )
    begun = tmp_path / ".c.building"
    begun.mkdir()
    (begun / "plan.json").write_text(plan)
    (begun / "arrays.json").write_text(arrays)
    (begun / "owner").write_text(f"{os.uname().nodename} 4194304")
    for name, done in (("chunks", 2), ("labels", 8), ("code", 8), ("mean", 8)):
        array = np.load(tmp_path / "whole" / f"{name}.npy")
        array[done:] = 0
        np.save(begun / f"{name}.npy", array)
    rest = []
    cache = make(tmp_path / "c", producer=lambda images: rest.append(len(images)) or producer(images))
    assert rest == [6] and cache.content == whole.content and sorted(os.listdir(tmp_path)) == ["c", "whole"]


def test_build_that_died_before_it_had_a_plan(tmp_path):
    stale = tmp_path / ".c.building"
    stale.mkdir()
    (stale / "mean.npy").write_text("half")
    owner = {"host": os.uname().nodename, "process": 1, "started": lock._started(1)}
    (stale / ".owner").write_text(json.dumps(owner))
    with pytest.raises(UserError, match=r"c.building is in use by process 1 on"):  # it is alive, and not ours
        make(tmp_path / "c")
    (stale / ".owner").write_text(json.dumps({**owner, "process": 4194304}))  # above the largest process number
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
    for size in (2, 3, 16):
        in_threads(size, lambda world: make(tmp_path / str(world.size), world=world))
        for name in os.listdir(tmp_path / "one"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / str(size) / name).read_bytes()


def test_a_picture_that_was_replaced_is_noticed(tmp_path):
    """By its size, in a cache that is there and in one that is unfinished; those made before say nothing of sizes."""
    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    for number in range(11):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / f"{number}.png")
    calls = []

    def failing(images):
        calls.append(len(images))
        if len(calls) == 3:
            raise RuntimeError
        return producer(images)

    def again(name, **options):
        return make(tmp_path / name, source=open_source(f"folder://{folder.parent}"), **options)

    again("c")
    with pytest.raises(RuntimeError):
        again("begun", producer=failing)
    Image.new("RGB", (9, 9)).save(folder / "3.png")
    with pytest.raises(UserError, match="c was made from something else: the pictures, of which some have other sizes"):
        again("c")
    with pytest.raises(UserError, match="holds an unfinished build of pictures with other sizes"):
        again("begun")
    for record in (tmp_path / "c" / data.cache.DESCRIPTION, tmp_path / ".begun.building" / "plan.json"):
        told = json.loads(record.read_text())
        record.write_text(json.dumps({key: value for key, value in told.items() if key != "sizes"}))
    assert len(again("c")) == len(again("begun")) == 11


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


@pytest.mark.parametrize("name", ["description.json", "latents.npy"])
def test_a_cache_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, name):
    """It may be whole: building it again would take hours and not help."""
    make(tmp_path / "c")
    FeatureCache(tmp_path / "c")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(*((Path, "read_text", refuse) if name.endswith("json") else (np, "load", refuse)))
    with pytest.raises(UserError, match="/c.*: permission denied. Choose a folder you may use, or ask its owner"):
        FeatureCache(tmp_path / "c")
