"""Hugging Face datasets and remote shards: from folders and from a local web server, killed and resumed."""

from __future__ import annotations

import functools
import http.server
import itertools
import json
import os
import tarfile
import threading

import pytest
from PIL import Image

from core.errors import UserError
from data.loader import Loader
from data.shards import CUT, RemoteShards
from data.sources import open_source
from data.transforms import Transform
from evaluation.pictures import SourcePictures, open_any
from run.load import load_config
from run.train import train
from tests.conftest import TOY_TOKENIZER
from tests.data.test_sources import png, write_tar

datasets = pytest.importorskip("datasets")
PLAIN = Transform(8)
MODES = ("RGB", "L", "P", "RGBA", "CMYK", "I;16")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Conversions of the library go into a folder of the test."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("hf"))
    yield
    datasets.config.HF_DATASETS_CACHE = before


def pictures(count: int) -> list[Image.Image]:
    """One grey level per picture, in every mode that a data set may hold."""
    made = []
    for i in range(count):
        grey = Image.new("L", (10, 9), 10 * i)
        mode = MODES[i % len(MODES)]
        made.append(
            Image.new("I;16", (10, 9), 2570 * i)
            if mode == "I;16"
            else grey.convert(mode)
            if mode == "P"
            else grey.convert("RGB").convert(mode)
        )
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """12 pictures of 3 named classes, written by save_to_disk with splits."""
    folder = tmp_path_factory.mktemp("data") / "saved"
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "img": datasets.Image(),
            "kind": datasets.ClassLabel(names=["cat", "dog", "elk"]),
        }
    )
    rows = {
        "text": ["x"] * 12,
        "img": [p.convert("RGB") if p.mode == "CMYK" else p for p in pictures(12)],
        "kind": [i % 3 for i in range(12)],
    }
    train = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict({"train": train, "val": train.select(range(4))}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def parquet(saved, tmp_path_factory):
    """The same pictures as two parquet files, as the hub holds them."""
    folder = tmp_path_factory.mktemp("data") / "parquet"
    train = datasets.load_from_disk(str(saved))["train"]
    for i in range(2):
        train.shard(2, i).to_parquet(folder / f"train-0000{i}-of-00002.parquet")
    return folder


def greys(batch) -> list[int]:
    return batch.images[:, 0, 4, 4].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Random access
# ---------------------------------------------------------------------------------------------------------------------
def test_saved_dataset(saved):
    source = open_source(f"datasets://{saved}", "train")
    assert (len(source), source.class_names, source[4].label) == (12, ["cat", "dog", "elk"], 1)
    assert all(source[i].image.mode == "RGB" and source[i].image.getpixel((0, 0)) == (10 * i,) * 3 for i in range(12))
    assert len(open_source(f"datasets://{saved}?split=val")) == 4
    assert (
        source.fingerprint()
        == open_source(f"datasets://{saved}", "train").fingerprint()
        != open_source(f"datasets://{saved}?label=none").fingerprint()
    )
    loader = functools.partial(Loader, source, PLAIN, 0, 4)
    whole = [greys(b) for b in itertools.islice(loader().batches(), 6)]
    assert [greys(b) for b in itertools.islice(loader(workers=2).batches(8), 4)] == whole[2:]
    assert sorted(key for part in whole[:3] for key in part) == [10 * i for i in range(12)]


def test_files_of_the_hub(parquet):
    source = open_source(f"datasets://{parquet}", "train")
    assert len(source) == 12 and source.num_classes == 3 and source[5].image.getpixel((0, 0)) == (50, 50, 50)
    assert open_source(f"datasets://{parquet}?label=none").num_classes == 1
    assert open_source(f"datasets://{parquet}?label=text").class_names == ["x"]
    with pytest.raises(UserError, match=r"holds no pictures.* \.parquet files are read by datasets://.*/parquet"):
        open_source(f"folder://{parquet}")


def test_validation_stands_for_val(saved, tmp_path):
    """As nearly every set on the hub calls it: of parquet files, streamed or not, and of save_to_disk."""
    both = datasets.load_from_disk(str(saved))
    both["train"].to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    both["val"].to_parquet(tmp_path / "set" / "validation-00000-of-00001.parquet")
    datasets.DatasetDict({"train": both["train"], "validation": both["val"]}).save_to_disk(tmp_path / "again")
    for url in (f"datasets://{tmp_path}/set", f"datasets://{tmp_path}/again"):
        assert (len(open_source(url, "train")), len(open_source(url, "val"))) == (12, 4)
    streamed = open_source(f"datasets://{tmp_path}/set?streaming=1&samples=4&label=none", "val")
    assert len(list(streamed.shard(0))) == 4
    with pytest.raises(UserError, match=r'Unknown split "vol".*\[.train., .validation.\]\. Check the name'):
        open_source(f"datasets://{tmp_path}/set", "vol")


@pytest.mark.parametrize(
    "query, message",
    [
        ("?column=imh", 'no column "imh". Did you mean "img"'),
        ("?split=vol", 'no split "vol". Did you mean "val"'),
        ("?streaming=yes", "streaming=yes must be 0 or 1"),
        ("?samples=3", "samples is for streaming=1"),
        ("?colum=x", 'no option "colum". Did you mean "column"'),
        ("/nothing", "datasets://.*nothing, split train: "),
    ],
)
def test_mistakes(saved, query, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        open_source(f"datasets://{saved}{query}")


def test_missing_library(saved, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets: pip install datasets"):
        open_source(f"datasets://{saved}")
    assert open_source("synthetic://?count=2")[0]


UNSTEADY = ("images_per_second", "peak_memory_gib", "mfu", "seconds")  # of the machine, not of the run


def test_training_from_a_dataset_is_exact(saved, tmp_path, capsys):
    def trained(name, duration):
        config = load_config(
            TOY_TOKENIZER,
            [
                f"data.url=datasets://{saved}",
                f"work_dir={tmp_path}",
                f"name={name}",
                f"train.duration={duration}step",
                "train.device=cpu",
                "train.global_batch=4",
                "train.checkpoint_every=2step",
                "train.preview_every=never",
            ],
        )
        assert train(config) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in UNSTEADY} for line in lines]

    whole = trained("a", 4)
    trained("b", 2)
    assert trained("b", 4) == whole
    assert "order and resume are exact" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------------------------------
def test_streamed_dataset(parquet):
    """Every picture once a pass on one reader; ranks and workers share them; a copy starts elsewhere."""
    source = open_source(f"datasets://{parquet}?streaming=1&samples=6", "train")
    assert (len(source), source.class_names) == (6, ["cat", "dog", "elk"])
    for readers in (1, 2, 3):  # by file, by file, by picture
        source.start_at(0, 0, 0, readers)
        counts = {1: [12], 2: [6, 6], 3: [4, 4, 4]}[readers]
        shares = [list(itertools.islice(source.records(reader, readers), counts[reader])) for reader in range(readers)]
        assert len({data for share in shares for data, _, _ in share}) == 12
    for workers in (0, 1):
        for batch in itertools.islice(Loader(source, PLAIN, 0, 4, workers=workers).batches(), 6):
            assert all(g // 10 % 3 == c for g, c in zip(greys(batch), batch.labels.tolist()))


@pytest.fixture
def web(tmp_path):
    """A web server of four shards with three pictures each, and its address."""
    for shard in range(4):
        members = {}
        for i in range(3 * shard, 3 * shard + 3):
            members |= {f"{i:03}.jpg": png((10 * i,) * 3), f"{i:03}.cls": str(i % 3).encode(), f"{i:03}.json": b"{}"}
        write_tar(tmp_path / f"s-{shard:02}.tar", members)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        broken: set[str] = set()

        def log_message(self, *_):
            pass

        def copyfile(self, source, outputfile):
            if self.path in self.broken:  # once: half a file
                self.broken.discard(self.path)
                outputfile.write(source.read(2048))
            else:
                super().copyfile(source, outputfile)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Quiet
    server.shutdown()


def test_remote_shards(web, tmp_path, monkeypatch):
    address, handler = web
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"wds://{address}/s-{{00..03}}.tar?samples=12&num_classes=3"
    source = open_source(url)
    handler.broken.add("/s-02.tar")  # taken up again where it broke
    for world, workers in ((1, 0), (2, 0), (8, 0), (2, 2)):
        for rank in range(world):
            for batch in itertools.islice(Loader(source, PLAIN, 0, 8, rank, world, workers=workers).batches(), 4):
                assert all(g // 10 % 3 == c for g, c in zip(greys(batch), batch.labels.tolist()))
    resumed = next(Loader(source, PLAIN, 0, 2).batches(6))  # half of the pass: two shards are over
    assert resumed.positions.tolist() == [6, 7]
    assert open_source(f"wds://{address}/s-00.tar?samples=3").class_names == ["unlabelled"]


def test_cut_remote_shards(web, tmp_path, monkeypatch):
    """Read once more, as the connection may have broken; then the file is so, and a line says it."""
    address, handler = web
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    asked, get = [], handler.do_GET
    monkeypatch.setattr(handler, "do_GET", lambda self: (asked.append(self.path), get(self))[1])
    with tarfile.open(tmp_path / "s-00.tar") as tar:
        (end,) = (member.offset for member in tar if member.name == "002.jpg")
    os.truncate(tmp_path / "s-00.tar", end)
    source = open_source(f"wds://{address}/s-{{00..01}}.tar?samples=5")
    assert [record[2].rpartition(" ")[2] for record in source.shard(0)] == ["000", "001"]
    assert asked.count("/s-00.tar") == 2
    assert source._unread[0] == {CUT: (1, f"{address}/s-00.tar")} | source._unread[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_remote_shards_hold_besides(web, tmp_path, monkeypatch, workers):
    """Counted once a shard, however often, by whomever and in how many attempts it is read."""
    address, handler = web
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for shard in range(2):
        members = {"a.txt": b"caption", "a.jpg": png(), "a.json": b'{"text": "x"}', "b.avif": b"", "c.json": b"{}"}
        write_tar(tmp_path / f"t-{shard}.tar", members)
    handler.broken.add("/t-1.tar")
    told = []
    source = open_source(f"wds://{address}/t-{{0..1}}.tar?samples=2")
    loader = Loader(source, PLAIN, 0, 2, workers=workers, tell=told.append)
    list(itertools.islice(loader.batches(), 6))
    assert set(loader.left_out()) == {
        "2 .txt (a.txt, ...)",
        "2 label(s), as there is one class (num_classes=N or classes=FILE for more) (a.json, ...)",
        "2 .avif (b.avif, ...)",
        "2 .json without a picture (c.json, ...)",
    }
    assert len(told) == 4 and "not read: .txt (a.txt); counted at the end" in told


def test_one_pass_of_a_stream_is_whole(web, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = open_source(f"wds://{web[0]}/s-{{00..03}}.tar?samples=12&num_classes=3")
    for readers in (1, 2, 3, 7):
        source.start_at(0, 0, 0, readers)
        keys = []
        for reader in range(readers):
            share = [12] if readers == 1 else [3 * len(range(reader, 4, readers)) if readers <= 4 else None]
            stream = source.records(reader, readers)
            keys += [r[2] for r in itertools.islice(stream, share[0] or len(range(reader or readers, 13, readers)))]
        assert len(set(keys)) == len(keys) == 12


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.jpg": png(), "b.jpg": png(), "b.cls": b"0"}, "x.tar: a has no label"),
        ({"a.cls": b"1", "b.jpg": png(), "b.cls": b"0"}, "x.tar: a has a label but no picture"),
        ({"a.jpg": png(), "a.cls": b"7"}, "x.tar: a has label 7, 3 classes are known"),
        ({"a.seg.png": b"", "a.jpg": png(), "a.json": b'{"label": 7}'}, "x.tar: a has label 7, 3 classes are known"),
        ({"a.0.jpg": png(), "a.1.jpg": png(), "a.cls": b"0"}, "two pictures have one key, a.0.jpg and a.1.jpg"),
        ({"a.jpg": png(), "a.cls": b"x"}, "x.tar: a.cls holds 'x'"),
        ({"a.txt": b"words"}, "no pictures in its shards"),
    ],
)
def test_bad_remote_shards(web, tmp_path, members, message, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=message):
        open_source(f"wds://{web[0]}/x.tar?samples=4&num_classes=3")[0]


def test_mistakes_of_streams(web, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for url, message in (
        ("wds://s3://b/x.tar?samples=1", "s3:// cannot be streamed; http://, https:// and hf:// can"),
        (f"wds://{web[0]}/x.tar", r"Add \?samples=N"),
        (f"wds://{tmp_path}/s-00.tar?samples=3", "samples is for streams"),
        (f"wds://{web[0]}/s-00.tar?samples=0", "samples=0 must be a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(url)
    with pytest.raises(UserError, match="gone.tar cannot be read .HTTPError"):
        open_source(f"wds://{web[0]}/gone.tar?samples=3")[0]
    from data.cache import build

    with pytest.raises(UserError, match="streamed pictures have no fixed order"):
        build(tmp_path / "c", open_source(f"wds://{web[0]}/s-00.tar?samples=3"), PLAIN, lambda x: {"x": x}, "f")
    with pytest.raises(UserError, match="no number measured on them could be had again"):
        SourcePictures(open_source(f"wds://{web[0]}/s-00.tar?samples=3"), 32)
    with pytest.raises(UserError, match="no number measured on them could be had again"):
        open_any(f"wds://{web[0]}/s-00.tar?samples=3")


def test_training_from_a_stream_says_that_it_is_not_exact(web, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for steps in (2, 4):  # stopped and continued
        config = load_config(
            TOY_TOKENIZER,
            [
                f"data.url=wds://{web[0]}/s-{{00..03}}.tar?samples=12",
                f"work_dir={tmp_path}",
                f"train.duration={steps}step",
                "train.device=cpu",
                "train.global_batch=4",
                "train.checkpoint_every=2step",
            ],
        )
        assert train(config) == 0
    out = capsys.readouterr().out
    assert "data is streamed: the order depends on the number of processes" in out and "continuing from" in out


def test_hub_pattern(monkeypatch):
    """Every shard of a pattern is listed; nothing is sent to a shell or put on a command line."""
    import huggingface_hub

    class Hub:
        def ls(self, folder, detail):
            return [f"{folder}/train-{i}.tar" for i in (2, 0, 1)] + [f"{folder}/README.md"]

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Hub)
    source = open_source("wds://hf://datasets/me/set/train-*.tar?samples=5")
    assert isinstance(source, RemoteShards) and source.urls == [f"hf://datasets/me/set/train-{i}.tar" for i in range(3)]
    with pytest.raises(UserError, match="matches no file"):
        open_source("wds://hf://datasets/me/set/val-*.tar?samples=5")
    assert len(source) == 5
