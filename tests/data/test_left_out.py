"""Nothing is left out silently: files, members and columns that are not read, pictures that are not what they seem, and
labels that mean something else than the model takes them for."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import HashStore

from core import dist
from core.errors import UserError
from core.peers import Peers
from data.cache import Pass
from data.checks import left_out, require_classes, require_labels, require_same_classes
from data.decode import UnreadablePicture, decode_rgb
from data.loader import Loader, Replaced
from data.sources import open_source
from data.tokens import build
from data.transforms import Transform
from run.check import check_inputs, data_notes
from run.load import load_config
from tests.conftest import TOY_GENERATOR, TOY_TOKENIZER
from tests.data.test_loader import Damaged, take
from tests.data.test_sources import png, write_tar
from tests.toy_codes import ToyCodes


def write(path, data: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def turned(colour=(200, 10, 10)) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(colour, size=(8, 4), format="JPEG", exif=exif)


# ---------------------------------------------------------------------------------------------------------------------
# What is not read
# ---------------------------------------------------------------------------------------------------------------------
def test_folders(tmp_path):
    for name in ("a/0.png", "a/deep/1.PNG", "b/0.jfif"):
        write(tmp_path / "set" / name, png())
    assert left_out(open_source(str(tmp_path / "set"))) is None
    for name in ("a/2.avif", "a/3.AVIF", "b/4.jp2", "b/labels", "b/.DS_Store", "b/._0.png", "labels.csv"):
        write(tmp_path / "set" / name)
    for name in ("c", "__MACOSX/a"):
        (tmp_path / "set" / name).mkdir(parents=True)
    write(tmp_path / "set" / "beside.png", png())
    write(tmp_path / "elsewhere" / "2.png", png())
    (tmp_path / "set" / "a" / "link").symlink_to(tmp_path / "elsewhere")
    source = open_source(str(tmp_path / "set"))
    assert len(source) == 3 and source.class_names == ["a", "b", "c"]
    assert left_out(source) == (
        "not read: 2 .avif (a/2.avif, ...); 1 linked folder(s) inside a class (a/link); 1 .jp2 (b/4.jp2); "
        "1 without extension (b/labels); 1 folder(s) without pictures (c); 1 folder(s) of a zip archive (__MACOSX); "
        "1 .csv (labels.csv); 1 picture(s) beside the class folders (beside.png)"
    )


def test_loose_pictures(tmp_path):
    write(tmp_path / "1.png", png())
    for name in ("2.heic", "captions.txt", "empty/notes.md"):
        write(tmp_path / name)
    assert left_out(open_source(str(tmp_path))) == (
        "not read: 1 .md (empty/notes.md); 1 folder(s) without pictures (empty); 1 .heic (2.heic); 1 .txt (captions.txt)"
    )


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "a" / "0.png", png())
    import os

    walk = os.walk

    def failing(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/deep"))
        return walk(top)

    monkeypatch.setattr("data.sources.os.walk", failing)
    with pytest.raises(UserError, match="a/deep cannot be listed: Permission denied. Check its permissions"):
        open_source(str(tmp_path))


def test_lost_shards(tmp_path):
    """A folder cannot tell that a file is missing; the numbering of the others does."""
    for number in (0, 1, 3, 6):
        write_tar(tmp_path / f"train-{number:04d}.tar", {f"{number}.png": png()})
    for url in (f"wds://{tmp_path}", f"wds://{tmp_path}/train-*.tar"):
        assert left_out(open_source(url)) == (
            f"not read: 3 shard(s) that the numbering lacks ({tmp_path}/train-0002.tar, ...)"
        )
    assert left_out(open_source(f"wds://{tmp_path}/train-{{0001,0003}}.tar")) is None
    with pytest.raises(UserError, match=r"no shard called .*train-0002.tar\. Check"):
        open_source(f"wds://{tmp_path}/train-{{0000..0003}}.tar")
    with pytest.raises(UserError, match=r"holds no pictures.* \.tar files are read by wds://"):
        open_source(f"folder://{tmp_path}")


def test_shards(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        {"a.png": png(), "a.txt": b"caption", "a.json": b'{"text": "x"}', "._a.png": b"mac", "b.png": png()},
    )
    write_tar(tmp_path / "1.tar", {"c.png": png(), "c.txt": b"", "d.avif": b"", "d.cls.bak": b"1"})
    write(tmp_path / "2.tar.gz")
    for name in ("val", ".cache", "more.tar.d"):
        (tmp_path / name).mkdir()
    for _ in range(2):  # scanned, then from the index
        source = open_source(str(tmp_path))
        assert len(source) == 3 and left_out(source) == (
            "not read: 2 .txt (a.txt, ...); 1 .json without label, cls, class, class_id or class_index (a.json); "
            "1 .avif (d.avif); 1 .bak (d.cls.bak); 1 .gz (2.tar.gz); 2 folder(s) (more.tar.d, ...)"
        )


def test_cut_shards(tmp_path):
    """Behind a member, as a writer leaves it that is killed; inside a header or in what should be one."""
    path = tmp_path / "0.tar"
    write_tar(path, {f"{i}.png": png() for i in range(3)})
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    path.write_bytes(whole[:second])
    assert len(open_source(str(tmp_path))) == 1 and left_out(open_source(str(tmp_path))) == (
        f"not read: 1 shard(s) that may have been cut, as the mark of a tar's end is missing ({path})"
    )
    for damaged in (whole[: second + 100], whole[:second] + b"x" * 512 + whole[second + 512 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"cannot be read as an uncompressed tar file .* header at byte {second:,}"):
            open_source(str(tmp_path))
    path.write_bytes(whole)
    assert len(open_source(str(tmp_path))) == 3 and left_out(open_source(str(tmp_path))) is None


def test_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "category": datasets.Value("int64"), "caption": datasets.Value("string")}
    )
    rows = {"image": [Image.new("RGB", (8, 8))] * 3, "category": [0, 1, 2], "caption": ["x"] * 3}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "s")
    assert left_out(open_source(f"datasets://{tmp_path}/s")) == "not read: the columns category, caption"
    assert left_out(open_source(f"datasets://{tmp_path}/s?label=category")) == "not read: the column caption"


@pytest.mark.parametrize("line, advice", [("p/{}.png,1", "Labels follow a space, not a comma"), ("p/{}.png", "root=")])
def test_lists_with_commas(tmp_path, line, advice):
    (tmp_path / "l.txt").write_text("\n".join(line.format(i) for i in range(3)))
    with pytest.raises(UserError, match=advice):
        open_source(f"list://{tmp_path}/l.txt")


def test_a_run_says_what_it_leaves_out(tmp_path):
    write(tmp_path / "a" / "0.png", png())
    config = load_config(TOY_TOKENIZER, [f"data.url={tmp_path}", "train.device=cpu", "data.val_url=null"])
    assert data_notes(config, check_inputs(config).data) == [f"{tmp_path}: order and resume are exact"]
    write(tmp_path / "a" / "1.avif")
    assert data_notes(config, check_inputs(config).data)[1:] == ["not read: 1 .avif (a/1.avif)"]


# ---------------------------------------------------------------------------------------------------------------------
# Orientation, and pictures that would turn black
# ---------------------------------------------------------------------------------------------------------------------
def test_orientation(tmp_path):
    """Not applied unless asked for; a run says that pictures carry it, and its data are others with it and without."""
    for i in range(3):
        write(tmp_path / "a" / f"{i}.jpg", turned() if i else png(size=(8, 4)))
    plain, upright = open_source(str(tmp_path)), open_source(str(tmp_path), upright=True)
    assert [plain[i].image.size for i in range(3)] == [(8, 4)] * 3
    assert [upright[i].image.size for i in range(3)] == [(8, 4), (4, 8), (4, 8)]
    assert "2 of 3 pictures looked at carry an EXIF orientation, which is not applied" in left_out(plain)
    assert left_out(upright).endswith("orientation, which is applied")
    assert plain.fingerprint() != upright.fingerprint() == open_source(f"folder://{tmp_path}?exif=1").fingerprint()
    assert open_source(f"folder://{tmp_path}?exif=0", upright=True)[1].image.size == (8, 4)
    with pytest.raises(UserError, match="exif=yes must be 0 or 1"):
        open_source(f"folder://{tmp_path}?exif=yes")
    config = load_config(TOY_TOKENIZER, [f"data.url={tmp_path}", "data.exif=true", "train.device=cpu"])
    assert check_inputs(config).data[1].image.size == (4, 8)


def sixteen(high: int) -> Image.Image:
    return Image.fromarray(np.linspace(0, high, 64).astype(np.uint16).reshape(8, 8))


@pytest.mark.parametrize(
    "data, reason",
    [
        (encoded(sixteen(255)), "its 16-bit values end at 255, so it would turn black"),
        (encoded(sixteen(4095)), "its 16-bit values end at 4095, so it would turn black"),
        (encoded(Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)), "TIFF"), "floating-point values"),
        (encoded(Image.fromarray(np.full((8, 8), 1 << 20, dtype=np.int32)), "TIFF"), "values from 1048576 to 1048576"),
        (encoded(Image.fromarray(np.full((8, 8), -5, dtype=np.int32)), "TIFF"), "values from -5 to -5"),
    ],
)
def test_pictures_that_would_turn_black(data, reason):
    with pytest.raises(UnreadablePicture, match=f"^k: {reason}"):
        decode_rgb(data, "k")


def test_other_16_bit_pictures_are_scaled():
    assert decode_rgb(encoded(sixteen(65535)), "k").getpixel((7, 7)) == (255, 255, 255)
    assert decode_rgb(encoded(sixteen(4096)), "k").getpixel((7, 7)) == (16, 16, 16)
    eight = Image.fromarray(np.full((8, 8), 200, dtype=np.int32))
    assert decode_rgb(encoded(eight, "TIFF"), "k").getpixel((0, 0)) == (200, 200, 200)


# ---------------------------------------------------------------------------------------------------------------------
# Unreadable pictures
# ---------------------------------------------------------------------------------------------------------------------
def test_share_of_unreadable_pictures(tmp_path):
    """A twentieth of the pictures may be missing, each counted once; more of them end the run, or the cache."""
    source = Damaged(100, set(range(0, 100, 20)))
    loader = Loader(source, Transform(8), 0, 10, max_corrupt=0.05)
    take(loader, 40)
    assert len(loader.replaced) == 5
    source.bad.add(50)
    with pytest.raises(UserError, match=r"^6 of the \d+ pictures read so far cannot be read, more than data.max_corr"):
        take(Loader(source, Transform(8), 0, 10, max_corrupt=0.05), 10)
    spec, how = ToyCodes().spec, Pass(max_corrupt=0.05)
    codes = lambda images: torch.zeros(len(images), spec.length, spec.branches, dtype=torch.int64)
    with pytest.raises(UserError, match="^6 of the 100 pictures read so far .*k0: it is torn; .*raise that setting"):
        build(tmp_path / "s", source, Transform(8, flip=True), spec, codes, "f", how=how)
    build(tmp_path / "s", source, Transform(8, flip=True), spec, codes, "f", how=Pass(max_corrupt=0.06))


def test_share_over_all_ranks(monkeypatch):
    """A picture that both ranks meet counts once, and the pictures of both make the share."""
    store = HashStore()
    peers = [Peers(store, rank, 2, 1.0) for rank in range(2)]
    ranks = [Replaced(1000, 0.05, 2) for _ in peers]

    def add(rank: int, *keys: int) -> None:
        monkeypatch.setattr(dist, "_peers", peers[rank])
        ranks[rank].add({str(key): "torn" for key in keys}, 100)

    add(0, *range(0, 30))
    add(1, *range(20, 50))
    add(0, *range(20, 50))
    assert len(ranks[0]) == len(ranks[1]) == 50
    with pytest.raises(UserError, match="^51 of the 400 pictures read so far .*data.max_corrupt=0.05"):
        add(1, 50)
    assert len(Replaced(1000, 0.05, 2, "of something else")) == 0


def test_share_of_a_large_set():
    """Judged by what was read so far, and by ten thousand pictures at least."""
    replaced = Replaced(1_000_000, 0.05)
    replaced.add({str(i): "torn" for i in range(500)}, 1000)
    with pytest.raises(UserError, match="501 of the 1,001 pictures read so far"):
        replaced.add({"500": "torn"}, 1)
    replaced.add({}, 19_000)
    replaced.add({str(i): "torn" for i in range(1000)}, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------------------------------
def listing(folder, labels) -> str:
    write(folder / "a.png", png())
    (folder / "l.txt").write_text("".join(f"a.png {label}\n" for label in labels))
    return f"list://{folder}/l.txt"


@pytest.mark.parametrize("labels, message", [
    ([0, 1, 2, 3], "has 4 classes, labels 0 to 3. Set generator.num_classes=4"),
    ([1, 2, 3], "has 4 classes, labels 0 to 3, and none is 0: they are counted from 1. Count the labels from 0"),
])  # fmt: skip
def test_more_labels_than_classes(tmp_path, labels, message):
    """Of lists, folders and shards, before a network is loaded."""
    urls = [listing(tmp_path, labels)]
    write_tar(
        tmp_path / "s.tar",
        {f"{i}.png": png() for i in range(len(labels))} | {f"{i}.cls": b"%d" % n for i, n in enumerate(labels)},
    )
    urls.append(f"wds://{tmp_path}/s.tar")
    if 0 in labels:
        for label in labels:
            write(tmp_path / "f" / str(label) / "0.png", png())
        urls.append(f"folder://{tmp_path}/f")
    for url in urls:
        config = load_config(TOY_GENERATOR, [f"data.url={url}", "generator.num_classes=3", "train.device=cpu"])
        with pytest.raises(UserError, match=message) as error:
            check_inputs(config)
        assert "generator.num_classes=3: " in str(error.value)
        require_classes(open_source(url), None, url)
        require_classes(open_source(url), 4, url)


@pytest.mark.parametrize("label", [-1, 4, 10**9])
def test_labels_of_a_token_store(tmp_path, label):
    source = open_source("synthetic://?size=8&classes=4&count=12")
    spec = ToyCodes().spec
    codes = lambda images: torch.zeros(len(images), spec.length, spec.branches, dtype=torch.int64)
    build(tmp_path / "s", source, Transform(8, flip=True), spec, codes, "f")
    config = load_config(TOY_GENERATOR, [f"data.url=tokens://{tmp_path}/s", "generator.num_classes=3"])
    with pytest.raises(UserError, match="generator.num_classes=3: tokens://.* has 4 classes"):
        check_inputs(config)
    labels = np.load(tmp_path / "s" / "labels.npy")
    labels[5] = label
    np.save(tmp_path / "s" / "labels.npy", labels)
    with pytest.raises(UserError, match=f"label {label} of picture 5 is none of the 4 classes"):
        require_labels(open_source(f"tokens://{tmp_path}/s"))


def test_names_of_train_and_val():
    numbers = [str(i) for i in range(3)]
    for names, others in ((["a", "b"], ["a", "b"]), (numbers, ["cat", "dog", "elk"]), (["cat", "dog", "elk"], numbers)):
        require_same_classes(names, others, "val")
    for names, others, message in (
        (["a", "b"], ["a", "c"], "class 1 is b in the training data and c in val"),
        (numbers, ["0", "10", "2"], "class 1 is 1 in the training data and 10 in val"),
        (["a", "b", "c"], ["a", "c"], "3 classes are trained and val has 2 .without b., so"),
        (["a", "b"], ["a", "b", "c"], "2 classes are trained and val has 3 .also c., so"),
    ):
        with pytest.raises(UserError, match=message):
            require_same_classes(names, others, "val")


def test_everything_missing_is_told_at_once(monkeypatch):
    """Training and validation pictures, weights, and what an evaluation will ask for, each with what brings it."""
    words = ["data.url=folder://no/train", "data.val_url=folder://no/val", "train.device=cpu", "eval.labels=val"]
    with pytest.raises(UserError) as error:
        check_inputs(load_config("configs/dar/ar_l.yaml", [*words, "train.eval_every=1step"]))
    first, *lines = str(error.value).splitlines()
    assert first == "dar_ar_l needs 3 things that are missing:"
    needed = ("  - tokenizer.weights=", "  - data: folder://no/train: ", "  - data: data.val_url=folder://no/val ")
    assert all(line.startswith(start) for line, start in zip(lines, needed, strict=False))
    assert all(line.startswith("  later, for evaluation: ") for line in lines[3:])
    monkeypatch.setattr("run.check.find_weights", lambda config: ({}, []))
    with pytest.raises(UserError, match=r"^folder://no/train: there is no such folder"):
        check_inputs(load_config("configs/dar/ar_l.yaml", [*words, "train.eval_every=never"]))


@pytest.mark.parametrize("others, message", [("ace", "class 1 is b .* and c in"), ("ab", "without c")])
def test_other_classes_in_val_are_found_before_a_run(tmp_path, monkeypatch, others, message):
    monkeypatch.setattr("run.check.find_weights", lambda config: ({}, []))
    monkeypatch.setattr("run.check.missing_helpers", lambda config: [])
    for split, names in (("train", "abc"), ("val", others)):
        for name in names:
            write(tmp_path / split / name / "0.png", png())
    words = [f"data.url={tmp_path}", f"data.val_url={tmp_path}", "eval.labels=val", "train.device=cpu"]
    with pytest.raises(UserError, match=message):
        check_inputs(load_config(TOY_GENERATOR, [*words, "train.eval_every=1step"]))
    check_inputs(load_config(TOY_GENERATOR, [*words, "train.eval_every=never"]))
