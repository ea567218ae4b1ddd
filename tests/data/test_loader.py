"""The order of batches is a function of (seed, position): workers, ranks, micro-batches and restarts do not matter."""

import errno
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.rng import permutation
from core.specs import Batch, DataSource, Sample
from data.decode import UnreadablePicture
from data.loader import Loader, ordered_batches, part, split
from data.sources import open_source
from data.transforms import Transform
from tests.conftest import ROOT
from tests.counting import calls

SOURCE = open_source("synthetic://?size=16&classes=3&count=22")
RANDOM = Transform(8, crop="random", flip=True)


class Damaged(DataSource):
    """A source in which the pictures with indices `bad` cannot be read."""

    num_classes, class_names = 4, ["a", "b", "c", "d"]

    def __init__(self, count: int, bad: set[int]):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise UnreadablePicture(f"k{index}", "it is torn")
        return Sample(Image.new("RGB", (8, 8), (index, 0, 0)), index % 4, f"k{index}")

    def fingerprint(self):
        return f"damaged {self.count}"


def take(loader, count, images_seen=0):
    return list(itertools.islice(loader.batches(images_seen), count))


def equal(a, b):
    same = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("labels", "positions", "images"))
    return same and a.replaced == b.replaced


def join(batches):
    return [torch.cat([getattr(b, name) for b in batches]) for name in ("labels", "positions", "images")]


def test_order_and_epochs():
    """22 pictures in batches of 8: batches straddle epochs, each epoch is a permutation of its own."""
    batches, others = (take(Loader(Damaged(22, set()), Transform(8), seed, 8), 11) for seed in (5, 6))
    seen, other = (torch.cat([b.images[:, 0, 0, 0] for b in run]).tolist() for run in (batches, others))
    for epoch in range(4):
        assert seen[epoch * 22 : epoch * 22 + 22] == permutation(22, 5, epoch).tolist()
    assert torch.cat([b.positions for b in batches]).tolist() == list(range(88))
    assert seen[:22] != seen[22:44] and seen != other


def test_augmentation_changes_from_epoch_to_epoch():
    batch = take(Loader(open_source("synthetic://?size=16&count=1"), RANDOM, seed=0, global_batch=16), 1)[0]
    assert len({image.numpy().tobytes() for image in batch.images}) > 8


def test_batch_larger_than_the_set():
    batch = take(Loader(Damaged(3, set()), Transform(8), seed=0, global_batch=8), 1)[0]
    assert sorted(batch.images[:3, 0, 0, 0].tolist()) == sorted(batch.images[3:6, 0, 0, 0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("source", [SOURCE, Damaged(22, {3, 4, 9, 21})], ids=["whole", "damaged"])
def test_workers(source, monkeypatch, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})  # one core, of which torch would warn
    expected = take(Loader(source, RANDOM, seed=1, global_batch=8), 7)
    for workers in (1, 3):
        loader = Loader(source, RANDOM, seed=1, global_batch=8, workers=workers)
        assert all(equal(a, b) for a, b in zip(expected, take(loader, 7), strict=True))
    assert not multiprocessing.active_children() and not [w for w in recwarn if "worker" in str(w.message)]


def test_spawned_workers():
    source = open_source("synthetic://?size=16&classes=3&count=22")
    source.start_method = "spawn"  # as sources say whose connections do not survive a fork
    loader = Loader(source, RANDOM, seed=1, global_batch=8, workers=1)
    assert equal(take(loader, 1)[0], take(Loader(SOURCE, RANDOM, seed=1, global_batch=8), 1)[0])


def test_ranks_and_micro_batches():
    whole = take(Loader(SOURCE, RANDOM, seed=1, global_batch=8), 6)
    for world, micro in ((2, 1), (4, 1), (2, 2), (1, 4)):
        ranks = [take(Loader(SOURCE, RANDOM, 1, 8, rank, world), 6) for rank in range(world)]
        for step in range(6):
            parts = [m for rank in ranks for m in split(rank[step], micro)]
            assert len(parts) == world * micro
            assert all(torch.equal(a, b) for a, b in zip(join(parts), join([whole[step]])))


def test_resume_anywhere():
    whole = take(Loader(SOURCE, RANDOM, seed=1, global_batch=8), 9)
    for step in range(9):
        for workers in (0, 1) if step in (0, 5) else (0,):
            loader = Loader(SOURCE, RANDOM, seed=1, global_batch=8, workers=workers)
            assert all(equal(a, b) for a, b in zip(whole[step:], take(loader, 9 - step, step * 8), strict=True))
    odd = take(Loader(SOURCE, RANDOM, seed=1, global_batch=4), 2, images_seen=3)  # another batch size, an odd place
    assert torch.equal(torch.cat([b.images for b in odd]), torch.cat([b.images for b in whole[:2]])[3:11])


def test_a_long_run_resumes_at_once():
    """As much work as at the start: nothing of what was seen before is gone through."""
    counts = []
    for seen in (0, 8 * 10**12):
        with calls() as made:
            batch = take(Loader(SOURCE, RANDOM, seed=1, global_batch=8), 1, images_seen=seen)[0]
        assert batch.positions[0] == seen
        counts.append(made.count)
    assert counts[1] < 2 * counts[0]


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    take(Loader(SOURCE, RANDOM, seed=1, global_batch=8, workers=1), 1)
    assert torch.equal(state, torch.get_rng_state())


def test_replaced_pictures():
    source = Damaged(10, {3, 4, 9})
    loader = Loader(source, Transform(8), seed=2, global_batch=10)
    batch = take(loader, 1)[0]
    stands_for = {3: 5, 4: 5, 9: 0}
    order = permutation(10, 2, 0).tolist()
    assert batch.images[:, 0, 0, 0].tolist() == [stands_for.get(i, i) for i in order]
    assert batch.labels.tolist() == [stands_for.get(i, i) % 4 for i in order]
    assert sorted(batch.replaced) == ["k3", "k4", "k9"] and len(loader.replaced) == 3
    assert loader.replaced.reasons["k3"] == "it is torn"


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_pictures_that_end_the_run(workers):
    with pytest.raises(UserError, match="^k1 cannot be read \\(it is torn\\)\\. Repair"):
        take(Loader(Damaged(2, {1}), Transform(8), 0, 2, on_corrupt="raise", workers=workers), 1)
    with pytest.raises(UserError, match="^100 pictures in a row"):
        take(Loader(Damaged(300, set(range(300))), Transform(8), 0, 2, workers=workers), 1)


def test_names_of_replaced_pictures_are_limited():
    loader = Loader(Damaged(60, set(range(0, 60, 2))), Transform(8), 0, 60)
    take(loader, 2)
    assert len(loader.replaced) == 30  # in two epochs, each counted once
    assert loader.replaced.names().count("it is torn") == 20 and loader.replaced.names().endswith("; ...")


def test_signals_do_not_kill_workers():
    loader = Loader(SOURCE, RANDOM, seed=1, global_batch=8, workers=2)
    batches = loader.batches()
    next(batches)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    expected = take(Loader(SOURCE, RANDOM, seed=1, global_batch=8), 12)
    assert all(equal(a, b) for a, b in zip(expected[1:], batches))
    batches.close()
    assert not multiprocessing.active_children()


LOSES_A_WORKER = """
import multiprocessing, os, sys
from core import cli
from data.loader import Loader
from data.sources import open_source
from data.transforms import Transform

def main(_):
    source = open_source("synthetic://?size=16&classes=3&count=22")
    batches = Loader(source, Transform(8), seed=1, global_batch=8, workers=1).batches()
    next(batches)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, int(sys.argv[1]))
    for _ in batches:
        pass

cli.run(main)
"""


@pytest.mark.parametrize(("number", "advice"), [(signal.SIGKILL, "memory"), (signal.SIGBUS, "/dev/shm")])
def test_a_killed_worker_is_one_sentence(number, advice):
    """In a process of its own: torch's handler raises wherever the main thread is, which may be in the test runner."""
    command = [sys.executable, "-c", LOSES_A_WORKER, str(int(number))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(f"was ended by the system.*{advice}.* most likely ran out.*workers", done.stderr), done.stderr


@pytest.mark.parametrize("broken", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_the_pipe_of_a_killed_worker_breaks_first(monkeypatch, broken):
    """Before torch's handler says who was ended, reading from the dead process may fail by itself."""

    def reported(_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")

    def read(self, entries):
        raise broken

    loader = Loader(SOURCE, RANDOM, seed=1, global_batch=8)
    monkeypatch.setattr(type(loader._reader), "__getitems__", read)
    monkeypatch.setattr(time, "sleep", reported)
    with pytest.raises(UserError, match="ended by the system .Bus error.*/dev/shm"):
        next(loader.batches())
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(type(broken)):
        next(loader.batches())


def test_shared_memory_that_is_too_small(monkeypatch):
    """Workers would wait for ever, or die of SIGBUS: refused before any is started."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 * 3 * 8 * 8 * 2 * 2))
    next(Loader(SOURCE, Transform(8), seed=1, global_batch=8, workers=2).batches())
    next(Loader(SOURCE, Transform(8), seed=1, global_batch=16, workers=0).batches())
    sentence = "7.5 KiB free, and 2 decoding processes hand over .* take 12.0 KiB. Set workers=1 .*--shm-size"
    with pytest.raises(UserError, match=sentence):
        next(Loader(SOURCE, Transform(8), seed=1, global_batch=16, workers=2).batches())
    assert not multiprocessing.active_children()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 decoding processes on each of 2 ranks"):
        next(Loader(SOURCE, Transform(8), seed=1, global_batch=8, workers=2).batches())


def test_too_many_open_files_are_no_broken_pictures(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    source = open_source(f"folder://{tmp_path}")

    def refuse(_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="a.png cannot be read: too many files are open. Raise the limit"):
        next(Loader(source, Transform(8), seed=1, global_batch=1).batches())


def test_unclosed_loader_does_not_hang_at_exit():
    import subprocess
    import sys

    program = (
        "from data import *; s = open_source('synthetic://?size=8&count=9');"
        "b = Loader(s, Transform(8), 0, 4, workers=2).batches(); next(b); print('done')"
    )
    root = str(ROOT)
    result = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=600, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "done\n") and "Traceback" not in result.stderr


def test_ordered_batches():
    batches = list(ordered_batches(Damaged(10, set()), Transform(8), 4))
    assert [len(b) for b in batches] == [4, 4, 2]
    assert torch.cat([b.images[:, 0, 0, 0] for b in batches]).tolist() == list(range(10))
    ranks = [
        b for rank in range(3) for b in ordered_batches(Damaged(10, set()), Transform(8), 2, rank, 3, workers=rank)
    ]
    assert all(torch.equal(a, b) for a, b in zip(join(ranks), join(batches)))
    views = next(ordered_batches(SOURCE, Transform(8, flip=True), 2, all_views=True))
    assert views.positions.tolist() == [0, 0, 1, 1] and torch.equal(views.images[0].flip(-1), views.images[1])
    with pytest.raises(UserError, match="k2"):
        list(ordered_batches(Damaged(4, {2}), Transform(8), 2))
    assert next(iter(ordered_batches(Damaged(4, {2}), Transform(8), 4, on_corrupt="replace"))).replaced == {
        "k2": "it is torn"
    }


def test_pinned_batches(monkeypatch):
    """DataLoader pins a batch by this method, when there is a GPU."""
    import torch.utils.data._utils.pin_memory as pinning

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    ones = torch.ones(2)
    batch = Batch(ones, 2 * ones, images=3 * ones, features={"x": 4 * ones}, replaced={"k": "torn"})
    pinned = pinning.pin_memory(batch)
    assert [t[0].item() for t in (pinned.labels, pinned.positions, pinned.images, pinned.features["x"])] == [2, 3, 4, 5]
    assert pinned.stored is None and pinned.replaced == {"k": "torn"}


def test_part():
    for count, world in ((10, 3), (1, 4), (8, 8), (0, 2)):
        assert [i for rank in range(world) for i in part(count, rank, world)] == list(range(count))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"global_batch": 6, "world": 4}, "multiple of 4"),
        ({"global_batch": 0}, "multiple"),
        ({"workers": -1}, "0 or more"),
        ({"on_corrupt": "skip"}, "unknown on_corrupt"),
        ({"source": None}, "neither"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        Loader(**{"source": SOURCE, "transform": RANDOM, "seed": 0, "global_batch": 8, **options})
    with pytest.raises(UserError, match="equal micro"):
        split(take(Loader(SOURCE, RANDOM, 0, 8), 1)[0], 3)


def test_no_shared_memory_in_a_worker(monkeypatch):
    """Said by the worker; the thread that hands batches over would drop it, and the main process wait for ever."""

    def refused(_):
        raise RuntimeError("unable to resize file </torch_1> to the right size: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refused)
    with pytest.raises(UserError, match="got no shared memory for a batch .unable to resize.*Set workers=0"):
        take(Loader(Damaged(10, set()), Transform(8), 0, 2, workers=1), 1)
    assert len(take(Loader(Damaged(10, set()), Transform(8), 0, 2), 1)) == 1
