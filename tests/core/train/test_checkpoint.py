"""Checkpoints: bit-equal round trips, damage, kills, full disks, tidying."""

import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from core import files
from core.errors import UserError
from core.files import read_json, sha256_file, to_json, write_json
from core.train import checkpoint as checkpoint_module
from core.train.checkpoint import Checkpoint, CheckpointStore, _Staging, find_damage

ROOT = Path(__file__).resolve().parents[3]
MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def some_tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    model = {f"w.{t}": (torch.randn(3, 4, generator=generator) * 3).to(t) for t in MODEL_DTYPES}
    model["scalar"] = torch.tensor(0.1, dtype=torch.bfloat16)
    model["empty"] = torch.empty(0, 5)
    model["transposed"] = torch.randn(4, 3, generator=generator).T
    model["special"] = torch.tensor([float("nan"), float("inf"), -0.0])
    return {"model": model, "model.ema_0.99": {"w": torch.randn(2, generator=generator)}, "nothing": {}}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    def raw(t):
        return t.contiguous().reshape(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(raw(a[k]), raw(b[k])) for k in a
    )


def run_script(body: str, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(body), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


# -- saving and loading -----------------------------------------------------------------------------------------------
def test_round_trip_is_bit_equal(tmp_path):
    tensors, state = some_tensors(), {"images_seen": 2**40, "x": 0.1 + 0.2, "words": "ü"}
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    store.save(7, tensors, state, wait=True)
    found = CheckpointStore(tmp_path).latest()
    assert (found.step, found.state) == (7, state)
    assert all(same(found.tensors(stem), group) for stem, group in tensors.items())
    assert found.files == ["model.ema_0.99.safetensors", "model.safetensors", "nothing.safetensors", "state.json"]
    with pytest.raises(UserError, match='holds no "modle". Did you mean "model"'):
        found.tensors("modle")


def test_snapshot_is_taken_before_save_returns(tmp_path):
    weight = torch.zeros(500_000)
    store = CheckpointStore(tmp_path, keep=9)
    for step in range(5):
        weight.fill_(step)
        store.save(step, {"model": {"a": weight, "tied": weight}}, {})
        weight.fill_(-1)
    store.wait()
    for step in store.steps():
        loaded = Checkpoint(tmp_path / f"step_{step:08d}").tensors("model")
        assert loaded["a"].eq(step).all() and loaded["tied"].eq(step).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_snapshot_of_gpu_tensors(tmp_path):
    weight = torch.zeros(50_000_000, device="cuda")
    view = torch.arange(12, device="cuda").reshape(3, 4).T
    store = CheckpointStore(tmp_path, keep=9)
    for step in range(3):
        weight.fill_(step)
        store.save(step, {"model": {"a": weight, "view": view, "scalar": weight[0]}}, {})
        weight.fill_(-1)
    store.wait()
    for step in store.steps():
        loaded = Checkpoint(tmp_path / f"step_{step:08d}").tensors("model")
        assert loaded["a"].eq(step).all() and loaded["scalar"] == step and torch.equal(loaded["view"], view.cpu())


def test_same_step_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path)
    for seed in (0, 1):
        store.save(5, some_tensors(seed), {"seed": seed}, wait=True)
    assert store.latest().state == {"seed": 1}
    assert same(store.latest().tensors("model"), some_tensors(1)["model"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000005"]


def test_latest_link_is_relative_and_survives_a_move(tmp_path):
    store = CheckpointStore(tmp_path / "run one" / "checkpoints")
    for step in (1, 2):
        store.save(step, some_tensors(), {}, wait=True)
    assert os.readlink(store.folder / "latest") == "step_00000002"
    (tmp_path / "run one").rename(tmp_path / "moved")
    assert Checkpoint(tmp_path / "moved" / "checkpoints" / "latest").step == 2


def test_mistakes_of_the_caller(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        CheckpointStore(tmp_path, keep=0)
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match="file name"):
        store.save(1, {"../evil": {}}, {})
    with pytest.raises(TypeError):
        store.save(1, {}, {"not json": object()})
    assert store.latest() is None


# -- damage -----------------------------------------------------------------------------------------------------------
def flip(position):
    def mutate(path):
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 0x01
        path.write_bytes(data)

    return mutate


MUTATIONS = {
    "emptied": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "first byte": flip(0.0),
    "early byte": flip(0.3),
    "middle byte": flip(0.5),
    "late byte": flip(0.9),
    "last byte": flip(1.0),
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
FILES = ("model.safetensors", "model.ema_0.99.safetensors", "nothing.safetensors", "state.json", "manifest.json")


def test_every_mutation_of_every_file_falls_back(tmp_path):
    original = tmp_path / "original"
    store = CheckpointStore(original)
    for step in (1, 2):
        store.save(step, some_tensors(step), {"images_seen": step * 64}, wait=True)
    handled = 0
    for file in FILES:
        for name, mutate in MUTATIONS.items():
            folder, messages = tmp_path / "copy", []
            shutil.copytree(original, folder, symlinks=True)
            mutate(folder / "step_00000002" / file)
            damaged = CheckpointStore(folder, log=messages.append)
            found = damaged.latest()
            assert found.step == 1 and same(found.tensors("model"), some_tensors(1)["model"]), (file, name)
            assert any(f"step_00000002/{file}: " in m for m in damaged.skipped), (file, name, damaged.skipped)
            assert any(file in m for m in messages) and os.readlink(folder / "latest") == "step_00000001"
            # The resumed run writes the step again, and all is well.
            damaged.save(2, some_tensors(2), {"images_seen": 128}, wait=True)
            assert damaged.latest().step == 2 and not damaged.skipped
            shutil.rmtree(folder)
            handled += 1
    assert handled == len(FILES) * len(MUTATIONS) == 55


def test_checkpoints_with_sha256_are_read_and_verified(tmp_path):
    """Format 1: a sha256 of each whole file."""
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, some_tensors(step), {}, wait=True)
        path = tmp_path / f"step_0000000{step}"
        manifest = read_json(path / "manifest.json")
        del manifest["piece"], manifest["sha256"]
        for name, entry in manifest["files"].items():
            del entry["xxh3"]
            entry["sha256"] = sha256_file(path / name)
        write_json(path / "manifest.json", sealed(manifest | {"format": 1}))
    assert store.latest().step == 2
    flip(0.9)(tmp_path / "step_00000002" / "model.safetensors")
    assert store.latest().step == 1 and "(sha256 differs)" in store.skipped[0]


def test_a_newer_format_is_named(tmp_path):
    CheckpointStore(tmp_path).save(1, some_tensors(), {}, wait=True)
    path = tmp_path / "step_00000001" / "manifest.json"
    write_json(path, sealed(read_json(path) | {"format": 9}))
    assert "format 9, this version reads 2. Update Tessera." in find_damage(path.parent)[0]


def sealed(manifest: dict) -> dict:
    fields = {k: v for k, v in manifest.items() if k != "sha256"}
    return fields | {"sha256": hashlib.sha256(to_json(fields).encode()).hexdigest()}


def test_contents_are_read_only_where_all_sizes_are_right(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, some_tensors(step), {}, wait=True)
    MUTATIONS["longer"](tmp_path / "step_00000002" / "nothing.safetensors")
    read = []
    monkeypatch.setattr(checkpoint_module, "digests", lambda paths, *a: read.extend(paths) or files.digests(paths, *a))
    assert store.latest().step == 1
    assert {path.parent.name for path in read} == {"step_00000001"}


def test_contents_are_read_once_until_a_file_changes(tmp_path, monkeypatch):
    CheckpointStore(tmp_path).save(1, some_tensors(), {}, wait=True)
    folder, read = tmp_path / "step_00000001", []
    inner = checkpoint_module._digests
    monkeypatch.setattr(checkpoint_module, "_digests", lambda paths, manifest: read.append(1) or inner(paths, manifest))
    assert find_damage(folder) == find_damage(folder) == [] and len(read) == 1
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    for _ in range(2):  # damage is not remembered as good
        assert "model.safetensors: contents changed" in find_damage(folder)[0]
    assert len(read) == 3


def test_staging_is_kept_and_hands_out_separate_memory():
    tensors = [
        torch.randn(3),
        torch.randn(50),
        torch.tensor(True),
        torch.empty(0, 2),
        torch.randn(7, 5).T,
        torch.randn(9),
    ]
    staging, slabs = _Staging(slab=128, pinned=False), []
    for _ in range(3):
        staging.restart()
        copies = [staging.like(t).copy_(t) for t in tensors]
        assert all(torch.equal(c, t) and c.is_contiguous() and c.data_ptr() % 4 == 0 for c, t in zip(copies, tensors))
        slabs.append([slab.data_ptr() for slab in staging.slabs])
    assert slabs[0] == slabs[1] == slabs[2] and len(slabs[0]) == 5


def test_none_valid_is_an_error_and_none_at_all_is_not(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, some_tensors(), {}, wait=True)
    (tmp_path / "step_00000001" / "state.json").unlink()
    (tmp_path / "step_00000002" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="none is whole.*step_00000002/manifest.json.*step_00000001/state.json"):
        CheckpointStore(tmp_path).latest()
    (tmp_path / "empty").mkdir()
    assert CheckpointStore(tmp_path / "empty").latest() is None


def test_folder_renamed_by_hand_is_not_believed(tmp_path):
    CheckpointStore(tmp_path).save(1, some_tensors(), {}, wait=True)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000009")
    assert "belongs to step_00000001" in find_damage(tmp_path / "step_00000009")[0]


# -- tidying ----------------------------------------------------------------------------------------------------------
def test_keeps_newest_and_milestones(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 11):
        if step == 6:  # a resumed run keeps the milestones of before
            store = CheckpointStore(tmp_path, keep=2)
            store.latest()
        store.save(step, some_tensors(), {}, wait=True, milestone=step in (4, 7))
    assert store.steps() == [4, 7, 9, 10]
    store.save(11, some_tensors(), {}, milestone=True, wait=True)
    for step in (12, 13):
        store.save(step, some_tensors(), {}, wait=True)
    assert store.steps() == [4, 7, 11, 12, 13]


def test_damaged_ones_do_not_push_good_ones_out(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, some_tensors(), {}, wait=True)
    flip(0.9)(tmp_path / "step_00000002" / "model.safetensors")
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest().step == 1
    store.save(3, some_tensors(), {}, wait=True)
    assert store.steps() == [1, 2, 3]
    store.save(4, some_tensors(), {}, wait=True)
    assert store.steps() == [3, 4]


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, some_tensors(), {}, wait=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (
        f".tmp-step_00000002-{dead.pid}",
        f".tmp-step_00000002-{os.getppid()}",
        f".tmp-step_00000003-{os.getpid()}",
        f".old-step_00000001-{dead.pid}",
    ):
        (tmp_path / name).mkdir()
    os.symlink("step_00000001", tmp_path / f".tmp-latest-{dead.pid}")
    assert CheckpointStore(tmp_path).latest(clean=False).step == 1 and len(list(tmp_path.iterdir())) == 7
    assert CheckpointStore(tmp_path).latest().step == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f".tmp-step_00000002-{os.getppid()}",
        "latest",
        "step_00000001",
    ]
    # Killed between the two renames of a replacement: the old one comes back.
    (tmp_path / "step_00000001").rename(tmp_path / f".old-step_00000001-{dead.pid}")
    assert CheckpointStore(tmp_path).latest().step == 1


# -- kills and full disks ---------------------------------------------------------------------------------------------
KILLS = 25


def test_kill_at_random_moments(tmp_path):
    """SIGKILL inside back-to-back saves: what was reported as saved is there, and what is there is whole."""
    result = run_script(
        """
        import os, random, signal, sys, time
        import torch
        from core.train.checkpoint import CheckpointStore
        folder, kills = sys.argv[1], int(sys.argv[2])
        rng, total = random.Random(0), 0
        for trial in range(kills):
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                store = CheckpointStore(folder, keep=2)
                found = store.latest()
                step = found.step if found else 0  # the first save replaces what was loaded
                os.write(writer, b"%d\\n" % step)
                while True:
                    tensors = {name: {"w": torch.full((20000,), float(step))} for name in ("model", "ema")}
                    store.save(step, tensors, {"step": step}, wait=True)
                    os.write(writer, b"%d\\n" % step)
                    step += 1
            os.close(writer)
            reported = os.read(reader, 64).split()  # it runs
            for _ in range(rng.randint(0, 3)):  # some saves, however slow the machine, and then a piece of one
                reported += os.read(reader, 64).split()
            time.sleep(rng.uniform(0.0, 0.03))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            while data := os.read(reader, 4096):
                reported += data.split()
            os.close(reader)
            reported = [int(x) for x in reported]
            store = CheckpointStore(folder, keep=2)
            found = store.latest()
            if len(reported) > 1 or reported[0] > 0:
                assert found.step in (reported[-1], reported[-1] + 1), (found.step, reported)
            assert not store.skipped, store.skipped
            if found:
                assert found.state == {"step": found.step}
                assert all(found.tensors(n)["w"].eq(found.step).all() for n in ("model", "ema"))
                assert os.readlink(folder + "/latest") == found.path.name
            assert not [n for n in os.listdir(folder) if n.startswith(".")] if os.path.isdir(folder) else True
            total += len(reported) - 1
        print("saves", total)
        """,
        str(tmp_path / "checkpoints"),
        str(KILLS),
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) >= KILLS


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    result = run_script(
        """
        import os, resource, signal, sys
        import torch
        from core.errors import UserError
        from core.train.checkpoint import CheckpointStore
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        folder = sys.argv[1]
        tensors = {n: {"w": torch.arange(c)} for n, c in (("model", 30000.0), ("ema", 20000.0), ("trainer", 10.0))}
        state = {"words": "x" * 3000}
        def limit(count):
            resource.setrlimit(resource.RLIMIT_FSIZE, (count, resource.RLIM_INFINITY))
        for wait in (True, False):
            messages = []
            store = CheckpointStore(folder, log=messages.append)
            store.save(1, tensors, state, wait=True)
            for number, count in enumerate((0, 100, 500, 2000, 2999, 3500, 50000, 79999, 81000, 119999)):
                limit(count)
                try:
                    store.save(2, tensors, state, wait=wait)
                    store.wait()
                    assert not wait
                except UserError as error:
                    assert wait and str(error) == messages[-1]
                assert len(messages) == number + 1, messages
                assert "step 2" in messages[-1] and folder + "/step_00000002" in messages[-1], messages
                assert "larger than the system allows" in messages[-1] and "untouched" in messages[-1], messages
                limit(resource.RLIM_INFINITY)
                assert sorted(os.listdir(folder)) == ["latest", "step_00000001"], os.listdir(folder)
                assert store.latest().step == 1
            store.save(2, tensors, state, wait=True)
            assert store.latest().step == 2 and store.latest().tensors("model")["w"].equal(tensors["model"]["w"])
            import shutil; shutil.rmtree(folder)
        """,
        str(tmp_path / "checkpoints"),
    )
    assert result.returncode == 0, result.stderr


def test_a_disk_that_fills_up_with_the_manifest(tmp_path, monkeypatch):
    """The last good checkpoint stays, nothing else does, and the next one is written; nor does it matter that the sentence
    about it finds no room in a log."""
    messages, raised = [], []

    def log(message: str) -> None:
        messages.append(message)
        raise UserError("log.txt: the disk is full")

    def write(path: Path, data: str) -> None:
        if path.name == "manifest.json":
            path.with_name(".manifest.json.tmp-1-1").write_text(data[:50])
            raise UserError(f"{path}: the disk is full")
        files.write_atomic(path, data)

    monkeypatch.setattr("threading.excepthook", lambda error: raised.append(error.exc_value))
    store = CheckpointStore(tmp_path, log=log)
    store.save(1, some_tensors(), {}, wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_atomic", write)
        store.save(2, some_tensors(), {})
        store.wait()
    assert len(messages) == 1 and "step 2 was not saved" in messages[0] and "the disk is full" in messages[0]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"] and store.latest().step == 1 and not raised
    store.save(3, some_tensors(), {}, wait=True)
    assert store.latest().step == 3


def test_a_checkpoint_that_was_put_elsewhere(tmp_path):
    """With a link in its place: it is read through it, and the link alone is deleted."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(1, some_tensors(), {}, wait=True)
    archive = tmp_path / "archive"
    (tmp_path / "checkpoints" / "step_00000001").rename(archive)
    (tmp_path / "checkpoints" / "step_00000001").symlink_to(archive)
    assert store.latest().step == 1
    store.save(2, some_tensors(), {}, wait=True)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step_00000002"]
    assert (archive / "manifest.json").is_file()


def test_one_that_cannot_be_deleted_is_named_where_it_lies(tmp_path, monkeypatch):
    messages: list[str] = []
    store = CheckpointStore(tmp_path, keep=1, log=messages.append)
    store.save(1, some_tensors(), {}, wait=True)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    store._remove(tmp_path / "step_00000001")
    (left,) = tmp_path.glob(".tmp-step_*")
    assert messages == [f"{left} could not be deleted (not permitted). Delete it by hand to free its space."]


def test_no_room_is_noticed_before_writing(tmp_path, monkeypatch):
    messages = []
    store = CheckpointStore(tmp_path, log=messages.append)
    store.save(1, some_tensors(), {}, wait=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1000, 990, 10))
    store.save(2, some_tensors(), {})  # returns: training goes on
    with pytest.raises(UserError, match="step 3 was not saved.*are needed and 10 bytes are free"):
        store.save(3, some_tensors(), {}, wait=True)
    assert "step 2 was not saved" in messages[0]
    monkeypatch.undo()
    store.save(3, some_tensors(), {}, wait=True)
    assert store.steps() == [1, 3]
