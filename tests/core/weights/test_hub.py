"""References to files, hostile and broken weight files, fingerprints. Nothing here needs a network."""

import argparse
import builtins
import collections
import datetime
import enum
import functools
import http.server
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from core.errors import UserError
from core.train.checkpoint import CheckpointStore
from core.weights import hub
from core.weights.pickles import Inert, plain, tensors_in
from tests.conftest import ROOT
from tests.counting import calls


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TESSERA_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)


# -- references -------------------------------------------------------------------------------------------------------
def test_paths_and_bare_names(tmp_path):
    (tmp_path / "pretrained_models").mkdir()
    (tmp_path / "pretrained_models" / "vae.safetensors").write_bytes(b"1")
    (tmp_path / "weights.pt").write_bytes(b"2")
    assert hub.resolve("vae.safetensors").read_bytes() == b"1"
    assert hub.resolve("weights.pt").read_bytes() == hub.resolve(str(tmp_path / "weights.pt")).read_bytes() == b"2"
    with pytest.raises(UserError, match='neither here nor in pretrained_models/. Did you mean "vae.safetensors"'):
        hub.resolve("vea.safetensor")
    with pytest.raises(UserError, match='no such file or folder. Did you mean "weights.pt"'):
        hub.resolve(f"{tmp_path}/weight.pt")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").touch()
    with pytest.raises(UserError) as told:  # nothing is like it, and what is no file of weights is none of its business
        hub.resolve("zzzz.bin")
    assert ".git" not in str(told.value) and "README" not in str(told.value)
    (tmp_path / "pretrained_models" / "tiny" / "rectok").mkdir(parents=True)
    with pytest.raises(UserError, match='tiny/rectk: no such file or folder. Did you mean "rectok"'):
        hub.resolve("tiny/rectk")
    with pytest.raises(UserError, match="last folder that exists is .*pretrained_models"):
        hub.resolve("pretrained_models/a/b/c.pt")
    with pytest.raises(UserError, match="unknown kind of address"):
        hub.resolve("s3://bucket/file")


def test_run_and_checkpoint_folders(tmp_path):
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for step in (1, 2):
        store.save(step, {"model": {"w": torch.ones(2)}}, {}, wait=True)
    newest = store.folder / "step_00000002"
    for reference in ("run", "run/checkpoints", "run/checkpoints/latest", "run/checkpoints/step_00000002"):
        assert hub.resolve(str(tmp_path / reference)) == newest
    assert hub.resolve("run/checkpoints/step_00000001").name == "step_00000001"
    (newest / "model.safetensors").write_bytes(b"half")
    leftover = store.folder / ".tmp-step_00000003-999999999"
    leftover.mkdir()
    assert hub.resolve("run").name == "step_00000001" and leftover.exists()  # a visitor does not tidy up
    with pytest.raises(UserError, match="damaged checkpoint.*model.safetensors: 4 bytes instead"):
        hub.resolve("run/checkpoints/step_00000002")
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(
        UserError, match="without checkpoints: it is empty. Name a run, a checkpoint or a file of weights"
    ):
        hub.resolve("plain")
    for made, advice in (
        ("deep/er/b.pth", r"; name one file in it: deep/er/b.pth\.$"),  # only folders in it
        ("run_1/checkpoints/x", r"; name one run in it: run_1\.$"),
        ("two/b.pt", r"; name one run in it: run_1\.$"),
    ):
        (plain / made).parent.mkdir(parents=True, exist_ok=True)
        (plain / made).touch()
        with pytest.raises(UserError, match=f"without checkpoints{advice}"):
            hub.resolve("plain")


# Files of a folder, the one that stands for it.
FOLDERS = {
    "accelerate": (["model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"], "model.safetensors"),
    "unwrapped": (["model.safetensors", "unwrapped_model/pytorch_model.bin"], "unwrapped_model/pytorch_model.bin"),
    "averaged": (["unwrapped_model/pytorch_model.bin", "ema_model/pytorch_model.bin"], "ema_model/pytorch_model.bin"),
    "newest": (
        ["checkpoint-900/pytorch_model.bin", "checkpoint-1000/pytorch_model.bin"],
        "checkpoint-1000/pytorch_model.bin",
    ),
    "finished": (["checkpoint-900/pytorch_model.bin", "pytorch_model.bin"], "pytorch_model.bin"),
    "both formats": (["pytorch_model.bin", "model.safetensors", "config.json"], "model.safetensors"),
    "fsdp": (["consolidated.pth", "optimizer.00000-of-00002.pth", "optimizer.00001-of-00002.pth"], "consolidated.pth"),
    "sharded": (
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
        "model.safetensors.index.json",
    ),
    "alone": (["any_name.pt", "optimizer.pt", "log.txt"], "any_name.pt"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_other_programs(tmp_path, capsys, kind):
    hub._taken.cache_clear()
    names, wanted = FOLDERS[kind]
    for name in names:
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).touch()
    for _ in range(2):
        assert hub.resolve("f") == hub.Path("f") / wanted
    said = capsys.readouterr().err
    assert said.count("taking") == 1 and said.startswith(f"f: taking {wanted} (")  # once, from where the user named
    (tmp_path / "g").mkdir()
    for name in ("a.pt", "b.pth"):
        (tmp_path / "g" / name).touch()
    with pytest.raises(UserError, match="name one file in it: a.pt, b.pth"):
        hub.resolve("g")


def test_shards_and_settings_beside_them(tmp_path):
    parts = {"a": {"x": torch.ones(2)}, "b": {"y": torch.zeros(3)}}
    for name, state in parts.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    (tmp_path / "config.json").write_text(json.dumps({"model": {"use_l2_norm": True}}))
    loaded = hub.load_tensors(index)
    assert loaded["x"].sum() == 2 and len(loaded["y"]) == 3 and loaded["config"] == {"model": {"use_l2_norm": True}}
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "z": "b.safetensors"}}))
    with pytest.raises(UserError, match="1 tensors are in none of its files: z"):
        hub.load_tensors(index)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match="b.safetensors is missing beside it"):
        hub.load_tensors(index)
    for crafted in ({"weight_map": {"x": "../a.safetensors"}}, {"weight_map": 1}, []):
        index.write_text(json.dumps(crafted))
        with pytest.raises(UserError, match="not an index"):
            hub.load_tensors(index)


@pytest.mark.parametrize("variable", ["TESSERA_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_looks_in_the_cache_only(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    where = "pretrained_models/owner/repo/folder/x.pt"
    link = "https://huggingface.co/owner/repo/resolve/main/folder/x.pt"
    with pytest.raises(UserError, match=f"download {link} and copy it to {where}"):
        hub.resolve("hf://owner/repo/folder/x.pt")
    with pytest.raises(UserError, match="switched off.*pretrained_models/example.org/x.pt"):
        hub.resolve("https://example.org/x.pt?download=1")
    (tmp_path / where).parent.mkdir(parents=True)
    (tmp_path / where).write_bytes(b"1")
    assert str(hub.resolve("hf://owner/repo/folder/x.pt")) == where


@pytest.mark.parametrize(
    "reference",
    [
        "hf://owner",
        "hf://owner/repo",
        "hf://owner/repo/../../x",
        "https://host",
        "https://host/a/../../x",
        "http://host/x",
    ],
)
def test_malformed_addresses(reference):
    with pytest.raises(UserError):
        hub.resolve(reference)


class Handler(http.server.BaseHTTPRequestHandler):
    body = bytes(range(256)) * 9000

    def do_GET(self):
        if "missing" in self.path:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[: 1000 if "half" in self.path else None])
        return None

    def log_message(self, *_):
        pass


def test_web_downloads_are_whole_or_absent(tmp_path):
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        path = hub._from_web(f"{address}/a/x.bin?download=1")
        assert path.read_bytes() == Handler.body and path.name == "x.bin"
        for name, message in (("half.bin", "broke after 1000 of 2304000"), ("missing.bin", "404")):
            with pytest.raises(UserError, match=message):
                hub._from_web(f"{address}/a/{name}")
        assert [p.name for p in path.parent.iterdir()] == ["x.bin"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert hub._from_web(f"{address}/a/x.bin?download=1") == path  # kept: no network needed
    with pytest.raises(UserError, match="could not be downloaded"):
        hub._from_web(f"{address}/a/z.bin")


# -- loading ----------------------------------------------------------------------------------------------------------
def test_loads_what_torch_and_safetensors_write(tmp_path):
    state = {"a": torch.randn(3), "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "x.safetensors")
    order = collections.OrderedDict(c=state["a"])
    nested = {"model": state, "steps": 4, "args": argparse.Namespace(lr=0.1), "order": order}
    torch.save(nested, tmp_path / "x.pt")
    torch.save(nested, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert all(torch.equal(hub.load_tensors(tmp_path / "x.safetensors")[k], v) for k, v in state.items())
    for name in ("x.pt", "old.pth"):
        loaded = hub.load_tensors(tmp_path / name)
        assert all(torch.equal(loaded["model"][k], v) for k, v in state.items())
        assert plain(loaded["args"]) == {"lr": 0.1} and torch.equal(loaded["order"]["c"], state["a"])
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list"):
        hub.load_tensors(tmp_path / "list.pt")
    for missing in ("no.pt", "no.safetensors", "."):
        with pytest.raises(UserError):
            hub.load_tensors(tmp_path / missing)


class Level(enum.Enum):
    HIGH = 3


class Config(collections.UserDict):
    """Like the configuration that D-AR's trainer stores."""

    def __init__(self, content):
        self._data = content

    data = property(lambda self: self._data)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_objects(marker: str) -> dict[str, object]:
    touch = f"touch '{marker}'"
    write = f"open({marker!r}, 'w').close()"
    return {
        "os.system": Call(os.system, touch),
        "popen": Call(os.popen, touch),
        "subprocess": Call(subprocess.check_call, ["touch", marker]),
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "open": Call(open, marker, "w"),
        "io.open": Call(io.open, marker, "w"),
        "import": Call(__import__, "antigravity"),
        "getattr": Call(getattr, builtins.str, "format"),
        "torch.load": Call(torch.load, marker),
        "torch.save": Call(torch.save, 1, marker),
        "hub.load": Call(torch.hub.load, marker, "x"),
        "mkdir": Call(os.mkdir, marker),
        "thread": Call(threading.Thread, None, os.system, "t", (touch,)),
        "partial": Call(__import__("functools").partial, os.system, touch),
        "in a dict": {"model": {"w": torch.ones(2), "evil": Call(os.system, touch)}},
        "in a namespace": argparse.Namespace(evil=Call(os.system, touch)),
        "as a key": {Call(os.system, touch): 1},
        "in a set": [Call(exec, write), {1}],
    }


def raw_pickles(marker: str) -> dict[str, bytes]:
    command = f"touch '{marker}'".encode()
    return {
        "global reduce": b'cos\nsystem\n(S"' + command + b'"\ntR.',
        "inst": b'(S"' + command + b'"\nios\nsystem\n.',
        "obj": b'(cos\nsystem\nS"' + command + b'"\no.',
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R.",
        "extension": b"\x80\x02\x82\x01.",
        "build": b"\x80\x02ccollections\nOrderedDict\n)Rcos\nsystem\nb.",
        "persistent": b"\x80\x02cos\nsystem\nQ.",
        "deep": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        "never stops": b"\x80\x02" + b"]",
        "laughs": b"\x80\x02]q\x00"
        + b"".join(b"](" + bytes([ord("h"), n]) * 1 + b"h" + bytes([n]) + b"eq" + bytes([n + 1]) for n in range(60))
        + b".",
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_pickles_never_run(tmp_path):
    marker, tried = str(tmp_path / "marker"), 0
    path = tmp_path / "evil.pt"

    pickle.loads(raw_pickles(marker)["global reduce"])  # the trap works
    os.unlink(marker)

    def harmless():
        with calls(most=2_000_000):
            try:
                loaded = hub.load_tensors(path)
            except UserError as error:
                assert str(error).startswith(f"{path}: ")
            else:
                plain(loaded), list(tensors_in(loaded))
        assert not os.path.exists(marker)
        return 1

    for evil in hostile_objects(marker).values():
        for content in (evil, {"args": evil, "model": {}}):
            torch.save(content, path)
            tried += harmless()
            torch.save(content, path, _use_new_zipfile_serialization=False)
            tried += harmless()
            path.write_bytes(pickle.dumps(content, protocol=4))
            tried += harmless()
    for data in raw_pickles(marker).values():
        # Alone, and as an entry of a dictionary, which is what files are.
        for content in (data, b"\x80\x02}X\x04\x00\x00\x00args" + data.removeprefix(b"\x80\x02")[:-1] + b"s."):
            path.write_bytes(content)
            tried += harmless()
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("evil/data.pkl", content)
                archive.writestr("evil/version", "3")
            tried += harmless()
    assert tried == 6 * len(hostile_objects(marker)) + 4 * len(raw_pickles(marker))


def test_objects_beside_the_tensors_are_data(tmp_path):
    """What trainers store: read by what it says, made by nobody."""
    marker = tmp_path / "marker"
    beside = {
        "args": argparse.Namespace(lr=1e-4, model="GPT-L", out=pathlib.PurePosixPath("/tmp/a b")),
        "call": Call(os.system, f"touch {marker}"),
        "when": datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC),
        "level": Level.HIGH,
        "bound": functools.partial(int, base=2),
        "table": collections.defaultdict(list, a=[1]),
        "order": collections.OrderedDict(b=2),
        "set": {3},
        "size": torch.Size([4]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "path": pathlib.PosixPath("/data/x"),
        "word": "a bytearray of builtins.eval",
        "array": np.arange(6.0).reshape(2, 3).T,
        "number": np.float32(1.5),
        "count": np.int64(7),
        "names": np.array(["a"]),
        "parts": collections.deque([1, 2]),
        "z": 1 + 2j,
        "raw": bytearray(b"xy"),
        "config": Config({"model": {"dim": 3}}),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "eight": torch.ones(2).to(torch.float8_e4m3fn),
    }
    writers = (
        torch.save,
        lambda c, p: torch.save(c, p, _use_new_zipfile_serialization=False),
        lambda c, p: p.write_bytes(pickle.dumps(c, 2)),
        lambda c, p: p.write_bytes(pickle.dumps(c, 5)),
    )
    for write in writers:
        write({"model": {"w": torch.arange(6.0).reshape(2, 3).T}, **beside}, tmp_path / "x.pt")
        loaded = hub.load_tensors(tmp_path / "x.pt")
        told = plain(loaded)
        assert not marker.exists() and torch.equal(loaded["model"]["w"], torch.arange(6.0).reshape(2, 3).T)
        assert told["args"] == {"lr": 1e-4, "model": "GPT-L", "out": "/tmp/a b"} and told["config"] == {
            "model": {"dim": 3}
        }
        assert (told["level"], told["table"], told["order"], told["set"]) == (3, {"a": [1]}, {"b": 2}, [3])
        assert (told["size"], told["dtype"], told["device"], told["path"]) == ([4], "torch.bfloat16", "cpu", "/data/x")
        assert (
            told["word"] == beside["word"] and told["parts"] == [1, 2] and told["z"] == 1 + 2j and told["raw"] == b"xy"
        )
        assert np.array_equal(told["array"], beside["array"]) and (told["number"], told["count"]) == (1.5, 7)
        assert told["parameter"].tolist() == [1, 1] and told["eight"].dtype == torch.float8_e4m3fn
        assert loaded["call"].kind == "posix.system" and loaded["bound"].kind == "functools.partial"
        assert loaded["when"].kind == "datetime.datetime"


def test_inflating_archives_are_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"w": torch.zeros(100)}, tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as small, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in small.infolist():
            bomb.writestr(entry.filename, small.read(entry))
        bomb.writestr("small/data/9", bytes(50_000_000))
    with pytest.raises(UserError, match="compressed archive"):
        hub.load_tensors(path)
    torch.save({"w": torch.zeros(1).expand(10**12)}, path)
    with pytest.raises(UserError, match="claims more than the file holds"):
        hub.load_tensors(path)
    for function in (bytearray, torch.FloatTensor, torch.FloatStorage, torch.zeros, np.zeros, bytes, range):
        torch.save({"w": Call(function, 10**12)}, path)
        assert isinstance(hub.load_tensors(path)["w"], Inert)  # nobody made it
    claims = torch.save({"w": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False) or path.read_bytes()
    for old, new in (
        (b"M\xe8\x03", b"M\xff\xff"),
        (b"\xe8\x03\0\0\0\0\0\0", b"\xe8\x03\0\0\0\0\0\x7f"),
        (b"\xe8\x03\0\0\0\0\0\0", b"\xff" * 8),
    ):
        assert old in claims
        path.write_bytes(claims.replace(old, new))
        with pytest.raises(UserError, match="than the file holds|whole PyTorch file"):
            hub.load_tensors(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_half_and_garbage_files(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    state = {"a": torch.randn(1000), "b": torch.randn(10)}
    torch.save(state, path) if suffix == "pt" else save_file(state, path)
    whole = path.read_bytes()
    cuts = [whole[:n] for n in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1)]
    garbage = [os.urandom(5000), b"\x80" * 100, b"<!DOCTYPE html>no such page", b"version https://git-lfs.github.com"]
    for data in cuts + garbage:
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"x.{suffix}: "):
            hub.load_tensors(path)
    for data, what in (
        (b"\n<!DOCTYPE html><p>Sign in", "a web page"),
        (b"<html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git-LFS pointer"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"x.{suffix}: {what}"):
            hub.load_tensors(path)


def test_crafted_safetensors_are_refused_with_little_work(tmp_path):
    path = tmp_path / "x.safetensors"

    def file(header, body=b"\0" * 16, length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + body

    def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
        return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}

    crafted = [
        file(entry(), length=2**63),
        file(entry(), length=2**40),
        file(entry(), length=99_000_000),
        file(b"[" * 100_000),
        file(b'{"a":' * 50_000),
        file(b"\xff\xfe{}"),
        file(b"null"),
        file({"w": {"dtype": "F32"}}),
        file(entry(shape=(2**62,))),
        file(entry(shape=(2**40, 2**40))),
        file(entry(shape=(-4,))),
        file(entry(dtype="F99")),
        file(entry(dtype="BF16")),
        file(entry(), body=b""),
        file(entry(offsets=(0, 2**50))),
        file(entry(offsets=(16, 0))),
        file(entry(offsets=(8, 24))),
        file(entry() | {"v": entry()["w"]}),
    ]
    for data in crafted:
        path.write_bytes(data)
        with pytest.raises(UserError, match="x.safetensors: not a whole safetensors file"), calls(most=10_000):
            hub.load_tensors(path)


# -- fingerprints -----------------------------------------------------------------------------------------------------
def test_fingerprint_sees_everything_but_order():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0, dtype=torch.bfloat16), "c": torch.empty(0)}
    reference = hub.fingerprint(state)
    assert len(reference) == 16 and hub.fingerprint(dict(reversed(state.items()))) == reference
    assert hub.fingerprint({**state, "a": state["a"].T.contiguous().T}) == reference
    changed = [
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "a": state["a"].view(torch.int32)},
        {**state, "a": state["a"] + 1e-6},
        {**state, "b": state["b"].half()},
        {k.upper(): v for k, v in state.items()},
        {"a": state["a"]},
        {**state, "a": state["a"].T},
    ]
    assert len({hub.fingerprint(s) for s in changed} | {reference}) == len(changed) + 1


def test_heavy_libraries_are_imported_late():
    code = "import sys, core.weights.hub; print([m for m in ('huggingface_hub', 'safetensors') if m in sys.modules])"
    root = str(ROOT)
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "[]"
