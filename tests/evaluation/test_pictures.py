"""Sets of pictures, and what writes them."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from core.arrays import NpzFile, read_npy
from core.errors import UserError
from data.sources import SyntheticSource
from evaluation import pictures as pictures_module
from evaluation import references
from evaluation.distances import Moments
from evaluation.pairs import reordered
from evaluation.pictures import (
    ArrayPictures,
    NpzPictures,
    NpzWriter,
    PngWriter,
    SourcePictures,
    first_pictures,
    open_any,
)
from tests.evaluation.conftest import ONE, SmallInception


def pictures(count: int = 7, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Sets
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["stored", "compressed", "fortran", "version 3"])
def test_npz_pictures(tmp_path, how):
    array, path = pictures(), tmp_path / "samples.npz"
    if how == "compressed":
        np.savez_compressed(path, arr_0=array)
    elif how == "version 3":
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
            np.lib.format.write_array(member, array, version=(3, 0))
    else:
        np.savez(path, labels=np.arange(7), arr_0=np.asfortranarray(array) if how == "fortran" else array)
    read = NpzPictures(path)
    assert len(read) == 7 and read.size == (8, 8)
    assert torch.equal(read.read(2, 5), torch.from_numpy(array[2:5]).permute(0, 3, 1, 2))
    assert isinstance(read.pictures, np.memmap) == (how in ("stored", "version 3"))
    assert torch.equal(read.read(0, 7), ArrayPictures(torch.from_numpy(array).permute(0, 3, 1, 2)).read(0, 7))


def test_pictures_that_are_none(tmp_path):
    path = tmp_path / "bad.npz"
    for arrays, message in (
        ({"x": pictures()}, "arr_0"),
        ({"arr_0": pictures() / 255.0}, "uint8"),
        ({"arr_0": pictures()[..., 0]}, "N x H x W x 3"),
        ({"arr_0": pictures(0)}, "no pictures"),
        ({"arr_0": np.array([{}], dtype=object)}, "run code"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=message):
            NpzPictures(path)
    np.savez(path, arr_0=pictures(50))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match="not a whole .npz"):
        NpzPictures(path)
    with pytest.raises(UserError, match="no such file"):
        NpzPictures(tmp_path / "absent.npz")


def header(descr: str, shape: tuple, data: bytes = b"") -> bytes:
    """A .npy file whose header says whatever we like."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


@pytest.mark.parametrize(
    "content",
    [
        header("|u1", (-1, 4, 4, 3)),
        header("|u1", (1 << 62, 4, 4, 3)),
        header("<f8", (10**6, 10**6)),
        header("|O", (3,), b"x" * 24),
        header("|u1", (2, 4, 4, 3), b"x" * 95),
        b"\x93NUMPY\x09\x00abc",
        b"",
        b"{" * 300,
        header("[('a',", (2,)),
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_hostile_arrays_are_one_sentence(tmp_path, content, compression):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", content)
    (tmp_path / "bad.npy").write_bytes(content)
    with NpzFile(path) as file:
        for read in (file.load, file.map, lambda name: read_npy(tmp_path / "bad.npy")):
            with pytest.raises(UserError, match="not a whole .np|run code"):
                read("arr_0")
    with pytest.raises(UserError, match="bad.npz"):
        NpzPictures(path)


def test_an_array_that_unpacks_to_more_than_deflate_can_hold(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header("|u1", (1, 1, 1, 3), b"abc"))
    content = (tmp_path / "x.npz").read_bytes()
    size = len(header("|u1", (1, 1, 1, 3), b"abc"))
    (tmp_path / "x.npz").write_bytes(content.replace(size.to_bytes(4, "little"), (1 << 30).to_bytes(4, "little")))
    with NpzFile(tmp_path / "x.npz") as file, pytest.raises(UserError, match="claims 1073741824 bytes"):
        file.load("arr_0")


def test_classes_of_pictures(tmp_path):
    """Of class folders, in whatever order the pictures are taken, and of arr_1, where ADM's programs write them."""
    images = pictures(4)
    for i, image in enumerate(images):
        (tmp_path / "set" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "set" / f"class{i % 2}" / f"{i}.png")
    folder = open_any(str(tmp_path / "set"))
    assert folder.labels().tolist() == [0, 0, 1, 1]
    assert reordered(folder, [2, 0, 3, 1]).labels().tolist() == [1, 0, 1, 0]
    assert first_pictures(folder, 3).labels().tolist() == [0, 0, 1]
    assert open_any(str(tmp_path / "set" / "class0")).labels() is None and ArrayPictures(images).labels() is None
    for name, beside, expected in (
        ("labels", np.array([3, 1, 2, 0]), [3, 1, 2, 0]),
        ("short", np.array([3, 1]), None),
        ("floats", np.zeros(4), None),
    ):
        np.savez(tmp_path / f"{name}.npz", images, beside)
        found = open_any(str(tmp_path / f"{name}.npz")).labels()
        assert (None if found is None else found.tolist()) == expected
    np.savez(tmp_path / "first.npz", images.transpose(0, 3, 1, 2))
    with pytest.raises(UserError, match=r"4 x 3 x 8 x 8. Its channels come first"):
        open_any(str(tmp_path / "first.npz"))
    np.savez(tmp_path / "many.npz", **{f"w{i:02d}": np.zeros(1) for i in range(30)})
    with pytest.raises(UserError, match="w06, w07 and 22 more"):
        open_any(str(tmp_path / "many.npz"))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_pictures_read_ahead_are_the_ones_asked_for(workers, monkeypatch):
    """Pieces of unequal lengths, one out of order: the same pictures and moments, whoever decodes them."""
    source = SyntheticSource(size=12, count=61)
    rows = [i * 7 % 61 for i in range(50)]
    pictures = SourcePictures(source, 8, workers, rows)
    ranges = [range(0, 9), range(9, 11), range(30, 39), range(11, 30), range(39, 40), range(40, 50)]
    pictures.expect(ranges)
    for wanted in [*ranges[:3], range(2, 5), *ranges[3:], range(0, 50)]:
        images, labels = pictures.labelled(wanted.start, wanted.stop)
        assert labels.tolist() == [rows[i] % 4 for i in wanted]
        assert all(
            torch.equal(a, pictures.transform.apply_view(source[rows[i]].image, 0))
            for a, i in zip(images, wanted, strict=True)
        )
    monkeypatch.setattr(pictures_module, "READ", 7)  # 50 = 7 x 7 + 1
    made = references.make_statistics(pictures, SmallInception(), ONE, 4)
    whole = Moments.of(SmallInception()(pictures.read(0, 50))["pool"])
    assert made.facts.count == 50
    # features are fp32, and their sums' order hangs on the size of a batch
    torch.testing.assert_close(made.moments["pool"], (whole.mean, whole.covariance), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", [range(3), (2, 0, 1)])
def test_npz_writer(tmp_path, order):
    images = torch.from_numpy(pictures(9)).permute(0, 3, 1, 2)
    path = tmp_path / "out.npz"
    for i in order:  # each part by another process, in any order
        with NpzWriter(path, 9, (8, 8)) as writer:
            assert writer.has(range(3)) == (i != order[0])
            writer.write(3 * i, images[3 * i : 3 * i + 3])
    writer = NpzWriter(path, 9, (8, 8))
    writer.finish()
    assert np.array_equal(np.load(path)["arr_0"], pictures(9)) and [p.name for p in tmp_path.iterdir()] == ["out.npz"]


def test_png_writer(tmp_path):
    from PIL import Image

    images = torch.from_numpy(pictures(5)).permute(0, 3, 1, 2)
    with PngWriter(tmp_path / "png", threads=3) as writer:
        writer.write(10, images)
        writer.flush()
        assert writer.has(range(10, 15)) and not writer.has(range(9, 12))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / "000012.png")), pictures(5)[2])
