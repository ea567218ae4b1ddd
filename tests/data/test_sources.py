"""Every kind of source, damaged and unusual pictures, shard indices, and the sentences users get."""

import io
import json
import os
import re
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from data.checks import remarks, require_labels
from data.decode import UnreadablePicture, decode_rgb
from data.shards import expand_braces
from data.sources import open_source
from run.data import open_train
from run.load import load_config
from tests.conftest import TOY_GENERATOR, TOY_TOKENIZER


def png(colour=(200, 10, 10), size=(8, 6), mode="RGB", format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format=format, **options)
    return buffer.getvalue()


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    for name, count in (("b_cat", 3), ("a dög", 2)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "set" / name / f"{i} x.JPEG").write_bytes(png((i, 0, 0)))
    (tmp_path / "set" / "b_cat" / "notes.md").write_text("not a picture")
    return tmp_path / "set"


# ---------------------------------------------------------------------------------------------------------------------
# Embedded and synthetic
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, train, val, classes", [("emoji64", 1724, 182, 9), ("photos256", 169, 45, 5)])
def test_embedded(name, train, val, classes):
    one, two = open_source(f"embedded://{name}"), open_source(f"embedded://{name}", split="val")
    assert (len(one), len(two), one.num_classes) == (train, val, classes)
    assert one.class_names == two.class_names and set(one.labels) == set(range(classes))
    keys = {one.key(i) for i in range(len(one))}
    assert not keys & {two.key(i) for i in range(len(two))}
    assert one[5].image.mode == "RGB" and one.fingerprint() != two.fingerprint()
    assert len(open_source(f"embedded://{name}?split=val", split="train")) == val


def test_synthetic():
    source = open_source("synthetic://?size=16&classes=3&count=7")
    assert (len(source), source.num_classes, source[4].label, source[4].image.size) == (7, 3, 1, (16, 16))
    again = open_source("synthetic://?size=16&classes=3&count=7")
    assert source[4].image.tobytes() == again[4].image.tobytes() and source.fingerprint() == again.fingerprint()
    other = open_source("synthetic://?size=16&classes=3&count=7", split="val")
    assert source[4].image.tobytes() != other[4].image.tobytes() and source.fingerprint() != other.fingerprint()


# ---------------------------------------------------------------------------------------------------------------------
# Folders and lists
# ---------------------------------------------------------------------------------------------------------------------
def test_folder(folder):
    for url in (f"folder://{folder}", str(folder)):
        source = open_source(url)
        assert [(s.key, s.label) for s in (source[i] for i in range(5))] == [
            ("a dög/0 x.JPEG", 0),
            ("a dög/1 x.JPEG", 0),
            ("b_cat/0 x.JPEG", 1),
            ("b_cat/1 x.JPEG", 1),
            ("b_cat/2 x.JPEG", 1),
        ]
        assert source.class_names == ["a dög", "b_cat"]
        with pytest.raises(IndexError):
            source[5]


def test_folder_splits_and_classes(folder):
    names = folder.parent / "names.txt"
    names.write_text("b_cat\nunused\na dög\n")
    assert [open_source(f"folder://{folder}?classes={names}")[i].label for i in (0, 4)] == [2, 0]
    assert len(open_source(f"folder://{folder.parent}", split="set")) == 5
    assert len(open_source(f"folder://{folder.parent}/{{split}}", split="set")) == 5
    folder.rename(folder.parent / "train")
    names.unlink()
    with pytest.raises(UserError, match='no split "val"'):
        open_source(f"folder://{folder.parent}", split="val")


def test_flat_folders(tmp_path):
    """Pictures without class folders have no labels; numbers in names count as numbers; sheets of samples do not count."""
    for i in (1, 2, 10):
        (tmp_path / f"{i}.png").write_bytes(png())
        (tmp_path / f"{i}.jfif").write_bytes(png())
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._1.png").write_bytes(b"")
    for url in (f"folder://{tmp_path}", str(tmp_path)):
        source = open_source(url, "val")
        assert [source[i].key for i in range(6)] == ["1.jfif", "1.png", "2.jfif", "2.png", "10.jfif", "10.png"]
        assert source.class_names == ["unlabelled"] and remarks(source) == [
            "the pictures have no labels: all of them are one class"
        ]
    before = source.fingerprint()
    (tmp_path / "2.png").write_bytes(png() + b" ")
    assert open_source(str(tmp_path)).fingerprint() != before
    for name in ("000000_7.png", "000001_12.png", "000001_12_stages.png", "000001_12.webp", "grid.png"):
        (tmp_path / name).write_bytes(png())
    assert len(open_source(str(tmp_path))) == 11
    (tmp_path / "sample.json").write_text("{}")
    assert [k.decode() for k in open_source(str(tmp_path)).packed_keys] == ["000000_7.png", "000001_12.png"]


def test_remarks_about_classes(tmp_path):
    for label, names in (
        (1, "1 of 3 classes have no picture (0); are the labels counted from 1?"),
        (0, "1 of 3 classes have no picture (1)"),
    ):
        (tmp_path / "l.txt").write_text(f"a.png {label}\na.png 2\n")
        (tmp_path / "a.png").write_bytes(png())
        assert remarks(open_source(f"list://{tmp_path}/l.txt")) == [names]
    assert remarks(open_source("synthetic://")) == []


def test_list(folder):
    file = folder.parent / "train.txt"
    file.write_bytes("\ufeffb_cat/0 x.JPEG 3\r\n\r\na dög/1 x.JPEG\t0".encode())
    source = open_source(f"list://{file}?root={folder}")
    assert [(s.key, s.label) for s in (source[0], source[1])] == [("b_cat/0 x.JPEG", 3), ("a dög/1 x.JPEG", 0)]
    assert source.num_classes == 4
    before = source.fingerprint()
    for other in ("b_cat/0 x.JPEG 3\na dög/1 x.JPEG 1", "b_cat/1 x.JPEG 3\na dög/1 x.JPEG 0"):
        file.write_text(other)
        assert open_source(f"list://{file}?root={folder}").fingerprint() != before
    file.write_text("b_cat/0 x.JPEG\n")
    source = open_source(f"list://{file}?root={folder}")
    assert (source[0].label, source.num_classes) == (0, 1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "lists no pictures"),
        ("\n \n", "lists no pictures"),
        ("/etc/passwd 0", "relative"),
        ("../x.png 0", "relative"),
        ("a/../../x.png", "relative"),
        ("a\0b.png 1", "relative"),
        ("x.png -1", "label -1"),
        ("x.png 99999999999999", "label"),
        ("x.png 1234567", "label 1234567"),
        ("x.png 0\ny.png", "line 2 has no label"),
        ("gone.png 0", "does not exist"),
        ("n" * 5000 + ".png 0", "does not exist"),
        ("b_cat/0 x.JPEG 2", "has no name"),
    ],
)
def test_hostile_lists(folder, text, message):
    (folder.parent / "l.txt").write_text(text)
    (folder.parent / "names.txt").write_text("one\ntwo\n")
    (folder / "x.png").write_bytes(png())
    with pytest.raises(UserError, match=message):
        open_source(f"list://{folder.parent}/l.txt?root={folder}&classes={folder.parent}/names.txt")


def test_missing_file_is_an_unreadable_picture(folder):
    (folder.parent / "l.txt").write_text("b_cat/0 x.JPEG 0\nb_cat/gone.JPEG 0\n")
    source = open_source(f"list://{folder.parent}/l.txt?root={folder}")
    with pytest.raises(UnreadablePicture, match="gone.JPEG: No such file"):
        source[1]


@pytest.mark.parametrize(
    "url, message",
    [
        ("fodler://x", 'unknown data source "fodler://".*folder'),
        ("folder://{tmp}/none", "no such folder"),
        ("folder://{tmp}/empty", "holds no pictures. Expected .* in it, or in one folder per class"),
        ("folder://", "nothing after"),
        ("codes.jsonl", "hold codes, not pictures. .*run_pretokenize.sh CONFIG --import codes.jsonl --out DIR"),
        ("list://{tmp}/codes.jsonl?root=x", "hold codes, not pictures"),
        ("list://{tmp}/none.txt", "no such file"),
        ("wds://{tmp}/none-{{00..01}}.tar", "no shard called"),
        ("wds://{tmp}/{{9..1}}.tar", "upwards"),
        ("wds://{tmp}/{{0..999999999}}.tar", "at most"),
        ("wds://{tmp}/{{0.." + "9" * 5000 + "}}.tar", "neither a range"),
        ("embedded://emoji65", "emoji64"),
        ("embedded://emoji64?split=vla", "val"),
        ("synthetic://?sise=3", "size"),
        ("synthetic://?size=0", "from 1"),
        ("synthetic://?count=abc", "from 1"),
        ("synthetic://x", "write synthetic"),
        ("folder://{tmp}/{{split}}", "no split"),
        ("list://{tmp}/l.txt?root={tmp}/none", "root folder"),
        ("folder://{tmp}/ok?classes={tmp}/none", "cannot be read"),
        ("folder://{tmp}/ok?classes={tmp}/l.txt", "is empty"),
    ],
)
def test_mistakes(tmp_path, url, message):
    for name in ("empty", "ok/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "l.txt").write_text("")
    with pytest.raises(UserError, match=message):
        open_source(url.format(tmp=tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------
def test_expand_braces():
    assert expand_braces("a-{08..10}-{x,y}.tar") == [
        f"a-{n}-{letter}.tar" for n in ("08", "09", "10") for letter in "xy"
    ]
    assert expand_braces("{8..10}") == ["8", "9", "10"] and expand_braces("plain") == ["plain"]


def test_shards(tmp_path):
    write_tar(
        tmp_path / "s-00.tar", {"d/k0.png": png((1, 0, 0)), "d/k0.cls": b"4\n", "d/k0.seg.png": b"", "d/k0.json": b"{}"}
    )
    write_tar(
        tmp_path / "s-01.tar",
        {"k1.cls": b"0", "k1.WEBP": png((2, 0, 0)), "n" * 150 + ".jpg": png((3, 0, 0)), "n" * 150 + ".cls.txt": b"2"},
    )
    source = open_source(f"wds://{tmp_path}/s-{{00..01}}.tar")
    samples = [source[i] for i in range(3)]
    assert [(s.key, s.label) for s in samples] == [("d/k0", 4), ("k1", 0), ("n" * 150, 2)]
    assert [s.image.getpixel((0, 0))[0] for s in samples] == [1, 2, 3]
    assert source.num_classes == 5 and source.fingerprint() == open_source(f"wds://{tmp_path}/s-*.tar").fingerprint()


def test_shard_index_is_reused_and_renewed(tmp_path, monkeypatch):
    import data.shards

    scans = []
    scan = data.shards.scan_shard
    monkeypatch.setattr(data.shards, "scan_shard", lambda path: scans.append(path) or scan(path))
    shard, index = tmp_path / "s.tar", tmp_path / "s.tar.index.npz"
    write_tar(shard, {"k.png": png((1, 0, 0)), "k.cls": b"0"})
    first = open_source(f"wds://{shard}").fingerprint()
    assert index.exists() and open_source(f"wds://{shard}").fingerprint() == first and len(scans) == 1
    write_tar(shard, {"k.png": png((1, 0, 0)), "k.cls": b"1"})
    os.utime(shard, (time.time() + 10,) * 2)
    assert open_source(f"wds://{shard}").fingerprint() != first and len(scans) == 2
    for damage in (b"", b"PK\3\4 nonsense", index.read_bytes()[:-40]):
        index.write_bytes(damage)
        assert open_source(f"wds://{shard}")[0].label == 1
    assert len(scans) == 5


@pytest.mark.parametrize("cache_works", [True, False])
def test_shard_index_elsewhere(tmp_path, monkeypatch, cache_works):
    import data.shards

    (tmp_path / "file").write_text("not a folder")
    places = [tmp_path / "file" / "x.npz", tmp_path / ("cache" if cache_works else "file") / "y" / "x.npz"]
    monkeypatch.setattr(data.shards, "_index_places", lambda path: places)
    write_tar(tmp_path / "s.tar", {"k.png": png(), "k.cls": b"0"})
    assert open_source(f"wds://{tmp_path}/s.tar")[0].label == 0
    assert places[1].exists() == cache_works


@pytest.mark.parametrize(
    "members, labels",
    [
        ({"a.png": 0, "a.json": {"label": 2}, "b.png": 0, "b.json": {"caption": "x", "cls": "1"}}, [2, 1]),
        (
            {"a.png": 0, "a.json": {"label": "tench"}, "a.cls": 3, "b.cls": 1, "b.json": {"label": 2}, "b.png": 0},
            [3, 1],
        ),
        ({"a.jpg": 0, "a.json": {"caption": "x"}, "b.png": 0, "b.json": {"label": None}, "meta.json": {"n": 2}}, None),
        ({"a.image.png": 0, "a.label.cls": 1, "b.JPEG": 0, "b.CLS": 2}, [1, 2]),
        ({"a.png": 0, "a.class_id.txt": 1}, [1]),
    ],
)
def test_labels_of_shards(tmp_path, members, labels):
    """Of a .json where there is no .cls; a .json without one, or of no picture, means nothing."""

    def content(name, value):
        text = value if isinstance(value, dict) else str(value)
        return (
            png()
            if name.lower().endswith(("png", "jpg", "jpeg"))
            else (json.dumps(text) if isinstance(text, dict) else text).encode()
        )

    write_tar(tmp_path / "s.tar", {name: content(name, value) for name, value in members.items()})
    for _ in range(2):  # scanned, then from the index
        source = open_source(str(tmp_path) if labels else f"{tmp_path}/s.tar")
        assert [source[i].label for i in range(len(source))] == (labels or [0, 0])
        assert (source.class_names == ["unlabelled"]) == (labels is None)


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.txt": b"x"}, "no pictures"),
        ({"a.cls": b"1"}, "a has a label but no picture"),
        ({"a.png": b"x", "a.jpg": b"y", "a.cls": b"0"}, "unique"),
        ({"a.png": b"x", "a.cls": b"cat"}, "ASCII digits"),
        ({"a.png": b"x", "a.json": b'{"label": true}'}, "ASCII digits"),
        ({"a.png": b"x", "a.json": b"{"}, "no JSON"),
        ({"a.png": b"x", "a.json": b'{"label": [0, 1]}'}, "ASCII digits"),
        ({"n0.1.png": b"x", "n0.2.png": b"y"}, "first dot"),
        ({"a.png": b"x", "a.json": b'{"label": "tench"}'}, "holds 'tench'"),
        ({"a.json": b'{"label": 1}'}, "no picture"),
        ({"a.png": b"x", "a.cls": b"-1"}, "ASCII digits"),
        ({"a.png": b"x", "a.cls": b"9" * 9}, "ASCII digits"),
    ],
)
def test_bad_shards(tmp_path, members, message):
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=message):
        open_source(f"wds://{tmp_path}/s.tar")


@pytest.mark.parametrize("task", [TOY_TOKENIZER, TOY_GENERATOR])
def test_a_picture_without_its_label(tmp_path, task):
    """A tokenizer does not miss it; a generator, and what else needs labels, says which one it is."""
    write_tar(tmp_path / "s0.tar", {"a.png": png(), "a.cls": b"1"})
    write_tar(tmp_path / "s1.tar", {"b.png": png(), "b.cls": b"2", "c/d.png": png()})
    config = load_config(task, [f"data.url=wds://{tmp_path}/s{{0..1}}.tar"])
    message = f"1 of 3 pictures have no label (.cls or .json), the first is c/d in {tmp_path}/s1.tar. Label all of them"
    if config.task == "tokenizer":
        source = open_train(config)
        assert len(source) == 3 and source.class_names == ["unlabelled"] and {source[i].label for i in range(3)} == {0}
        with pytest.raises(UserError, match=re.escape(message)):
            require_labels(source)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            open_train(config)
    (tmp_path / "s0.tar").unlink()
    write_tar(tmp_path / "s1.tar", {"b.png": png()})
    assert open_train(load_config(task, [f"data.url=wds://{tmp_path}/s1.tar"])).num_classes == 1


def test_torn_and_changed_shards(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.png": png(size=(300, 300), format="BMP"), "a.cls": b"0"})
    whole = (tmp_path / "s.tar").read_bytes()
    source = open_source(f"wds://{tmp_path}/s.tar")
    (tmp_path / "s.tar").write_bytes(whole[:5000])
    with pytest.raises(UnreadablePicture, match="changed after it was indexed"):
        source[0]
    for content in (whole[:5000], b"", b"hello" * 300):
        (tmp_path / "t.tar").write_bytes(content)
        with pytest.raises(UserError, match="t.tar"):
            open_source(f"wds://{tmp_path}/t.tar")


def test_shards_open_few_files_and_pickle(tmp_path, monkeypatch):
    import pickle

    monkeypatch.setattr("data.shards.MAX_OPEN_SHARDS", 2)
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", {"k.png": png((i, 0, 0))})
    source = open_source(f"wds://{tmp_path}/{{0..3}}.tar")
    source[0]
    for copy in (source, pickle.loads(pickle.dumps(source))):
        assert [copy[i].image.getpixel((0, 0))[0] for i in (3, 0, 2, 1, 3)] == [3, 0, 2, 1, 3]
        assert len(copy._files) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Unusual and damaged pictures
# ---------------------------------------------------------------------------------------------------------------------
def test_unusual_pictures():
    def pixel(data):
        image = decode_rgb(data, "k")
        assert image.mode == "RGB"
        return image.getpixel((0, 0))

    assert pixel(png((0, 255, 0, 0), mode="RGBA")) == (255, 255, 255)
    assert pixel(png((0, 255, 0, 128), mode="RGBA")) == (127, 255, 127)
    assert pixel(png((90, 0), mode="LA")) == (255, 255, 255)
    assert pixel(png(7, mode="L")) == (7, 7, 7) and pixel(png(1, mode="1")) == (255, 255, 255)
    assert pixel(png((9, 9, 9), size=(1, 1))) == (9, 9, 9)
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16)).save(buffer, format="PNG")
    assert pixel(buffer.getvalue()) == (128, 128, 128)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(buffer, format="PNG")
    assert pixel(buffer.getvalue()) == (0, 0, 0)
    red = pixel(png((0, 255, 255, 0), mode="CMYK", format="JPEG"))
    assert red[0] > 200 and max(red[1:]) < 60
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    buffer = io.BytesIO()
    palette.save(buffer, format="PNG")
    assert pixel(buffer.getvalue()) == (10, 20, 30)
    buffer = io.BytesIO()
    palette.save(buffer, format="PNG", transparency=1)
    assert pixel(buffer.getvalue()) == (255, 255, 255)
    for format in ("GIF", "WEBP"):
        frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 0, 255))]
        buffer = io.BytesIO()
        frames[0].save(buffer, format=format, save_all=True, append_images=frames[1:], lossless=True)
        assert pixel(buffer.getvalue()) == (255, 0, 0)


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(png(size=(8, 4), format="JPEG", exif=exif), "k").size == (8, 4)


def test_damaged_pictures():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        buffer = io.BytesIO()
        noise.save(buffer, format=format)
        whole = buffer.getvalue()
        for part in (0, 1, 10, len(whole) // 2):
            with pytest.raises(UnreadablePicture, match="^name: "):
                decode_rgb(whole[:part], "name")
    bomb = b"P6 60000 60000 255\n"
    strip = png(size=(1, 5000))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    unlisted = png(format="TGA")  # Pillow could read it
    for data in (bomb, strip, postscript, unlisted, b"\0" * 100):
        with pytest.raises(UnreadablePicture):
            decode_rgb(data, "name")
