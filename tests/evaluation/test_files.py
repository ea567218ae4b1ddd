"""What an evaluation reads and writes: pictures, statistics, labels, and work that is shared and continued."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch

from core.arrays import NpzFile, read_npy
from core.dist import World
from core.errors import UserError
from evaluation import protocols, references
from evaluation.distances import frechet_from_moments
from evaluation.pictures import ArrayPictures, NpzPictures, NpzWriter, PngWriter
from evaluation.references import Facts, Statistics
from evaluation.work import Work

ONE = World(0, 1, 0, torch.device("cpu"))


def pictures(count: int = 7, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
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


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------
def moments(width: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.randn(40, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return features.mean(0), torch.cov(features.T)


@pytest.mark.parametrize("name", ["ref.npz", "ref.safetensors"])
def test_statistics_round_trip(tmp_path, name):
    made = Statistics(
        {"pool": moments(), "spatial": moments(3, 1)}, Facts("generation", "inception", "tf1", 32, 40), name
    )
    references.save(tmp_path / name, made)
    read = references.load(tmp_path / name)
    assert read.facts == made.facts and read.pictures is None
    for tap, pair in made.moments.items():
        torch.testing.assert_close(read.moments[tap][0], pair[0], rtol=1e-7 if name.endswith("npz") else 0, atol=0)
        assert torch.equal(read.moments[tap][1], pair[1])
    read.check(purpose="generation", network="inception", preprocess="tf1", image_size=32)
    for change, message in (
        ({"purpose": "reconstruction"}, "training set"),
        ({"network": "lite0"}, "feature network"),
        ({"preprocess": "pytorch_fid"}, "input"),
        ({"image_size": 64}, "32 px, these have 64 px"),
    ):
        with pytest.raises(UserError, match=message):
            read.check(
                **({"purpose": "generation", "network": "inception", "preprocess": "tf1", "image_size": 32} | change)
            )
    with pytest.raises(UserError, match="5 dimensions there and 2048"):
        read.moment("pool", 2048)


def test_statistics_of_others(tmp_path):
    mean, covariance = (t.numpy() for t in moments())
    np.savez(tmp_path / "pytorch_fid.npz", mu=mean, sigma=covariance.astype(np.float32))
    torch.save({"mu": torch.from_numpy(mean).float(), "sigma": torch.from_numpy(covariance)}, tmp_path / "tf.pt")
    np.savez(
        tmp_path / "VIRTUAL_imagenet256_labeled.npz",
        mu=mean,
        sigma=covariance,
        mu_s=mean,
        sigma_s=covariance,
        mu_clip=mean,
        arr_0=pictures(),
    )
    for name in ("pytorch_fid.npz", "tf.pt"):
        read = references.load(tmp_path / name)
        assert [t.dtype for t in read.moments["pool"]] == [torch.float64] * 2 and read.facts == Facts()
    virtual = references.load(tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    assert (
        set(virtual.moments) == {"pool", "spatial"} and len(virtual.pictures) == 7 and virtual.facts.count == 1_281_167
    )
    with pytest.raises(UserError, match="reference for generation"):
        virtual.check(purpose="reconstruction", network="inception", preprocess="tf1", image_size=256)


def test_statistics_that_originals_assert(tmp_path):
    """torch-fidelity compares the types of both sides; its own come from float32 features."""
    made = Statistics({"pool": moments()}, Facts(), "x")
    for dtype, expected in (("torch-fidelity", "f8"), ("float32", "f4"), ("float64", "f8")):
        references.save(tmp_path / f"{dtype}.npz", made, dtype=dtype)
        with np.load(tmp_path / f"{dtype}.npz") as file:
            assert file["mu"].dtype == ("f8" if dtype == "float64" else "f4") and file["sigma"].dtype == expected
            held = {name: file[name] for name in ("mu", "sigma")}
        if dtype == "torch-fidelity":
            metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
            theirs = metric_fid.fid_features_to_statistics(torch.randn(40, 5))
            value = metric_fid.fid_statistics_to_metric(theirs, held, verbose=False)["frechet_inception_distance"]
            ours = frechet_from_moments(*(torch.from_numpy(theirs[k]) for k in ("mu", "sigma")), *moments())
            assert value == pytest.approx(ours, rel=1e-5)


def test_caches_of_torch_fidelity(tmp_path):
    """Statistics, as arrays (written with numpy 1 and 2) or tensors, and features; the name tells the network."""
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(3))
    mean, covariance = features.numpy().mean(0), np.cov(features.numpy().T)
    stem = "imagenet-inception-v3-compat"
    torch.save({"mu": mean, "sigma": covariance}, tmp_path / f"{stem}-stat-fid-2048.pt")
    torch.save(
        {"mu": torch.from_numpy(mean), "sigma": torch.from_numpy(covariance)},
        tmp_path / f"{stem}-stat-fid-64.pt",
        _use_new_zipfile_serialization=False,
    )
    torch.save(features, tmp_path / f"{stem}-features-2048.pt")
    torch.save(features, tmp_path / "x-dinov2-vit-s-14-features-dinov2.pt")
    old = (tmp_path / f"{stem}-stat-fid-2048.pt").read_bytes()
    assert b"numpy._core" in old or b"numpy.core" in old
    for path in sorted(tmp_path.iterdir()):
        read = references.load(path)
        np.testing.assert_allclose(read.moments["pool"][0].numpy(), mean, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(read.moments["pool"][1].numpy(), covariance, rtol=1e-5, atol=1e-7)
        assert read.facts.count == (40 if "features" in path.name else None)
        check = dict(purpose="generation", preprocess="tf1", image_size=64)
        if "dinov2" in path.name:
            with pytest.raises(UserError, match='made with the feature network "dinov2-vit-s-14"'):
                read.check(network="inception", **check)
        else:
            read.check(network="inception", **check)
    torch.save(torch.arange(5), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"nor features of pictures; it holds torch.int64 \(5,\)"):
        references.load(tmp_path / "x.pt")
    (tmp_path / "x.npz").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="git lfs pull"):
        references.load(tmp_path / "x.npz")


def test_statistics_that_are_none(tmp_path):
    mean, covariance = (t.numpy() for t in moments())
    path = tmp_path / "bad.npz"
    for arrays, message in (
        ({"mu": mean}, "sigma should be 2-dimensional"),
        ({"mu": mean, "sigma": covariance[:3]}, "sigma is"),
        ({"mu": mean * np.nan, "sigma": covariance}, "not finite"),
        ({"mu": mean.astype(str), "sigma": covariance}, "of floats, found <U32"),
        ({"mu": mean, "sigma": covariance + np.triu(np.ones((5, 5)))}, "not symmetric"),
        ({"mu": mean, "sigma": covariance - 1.1 * np.eye(5)}, "negative eigenvalues"),
        ({"mu": mean, "sigma": -np.eye(5)}, "negative eigenvalues"),
        ({"x": mean}, "neither statistics"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=message):
            references.load(path)
    with pytest.raises(UserError, match="run_make_reference"):
        references.load(tmp_path / "absent.npz")


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8", "g"])
@pytest.mark.parametrize("count", [40, 9])
def test_rounded_statistics_of_any_type_are_taken(tmp_path, dtype, count):
    """Also of fewer pictures than dimensions, whose covariance has zeros that rounding makes negative."""
    features = np.random.default_rng(0).normal(size=(count, 12)) * np.geomspace(1e-3, 10, 12)
    np.savez(tmp_path / "x.npz", mu=features.mean(0).astype(dtype), sigma=np.cov(features.T).astype(dtype))
    mean, covariance = references.load(tmp_path / "x.npz").moments["pool"]
    assert mean.dtype == covariance.dtype == torch.float64
    np.testing.assert_allclose(covariance.numpy(), np.cov(features.T), rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Labels, protocols
# ---------------------------------------------------------------------------------------------------------------------
def test_labels(tmp_path):
    assert protocols.make_labels("balanced", 7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    drawn = protocols.make_labels("random", 30_000, 10, seed=4)
    assert torch.equal(drawn[:100], protocols.make_labels("random", 100, 10, seed=4))  # of (seed, i), not of the count
    assert torch.bincount(drawn).min() > 2800 and not torch.equal(
        drawn[:100], protocols.make_labels("random", 100, 10, seed=5)
    )
    assert protocols.make_labels("val", 2, 3, val=[2, 1, 0]).tolist() == [2, 1]
    (tmp_path / "labels.txt").write_text("a/b.png 2\n1\n\n0\n")
    np.save(tmp_path / "labels.npy", np.array([1, 2, 0]))
    assert protocols.make_labels(str(tmp_path / "labels.txt"), 3, 3).tolist() == [2, 1, 0]
    assert protocols.make_labels(str(tmp_path / "labels.npy"), 2, 3).tolist() == [1, 2]
    for kind, count, classes, message in (
        ("val", 1, 3, "eval.val_url"),
        ("balenced", 1, 3, "neither"),
        (str(tmp_path / "labels.txt"), 9, 3, "has 3 labels"),
        (str(tmp_path / "labels.npy"), 3, 2, "classes 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            protocols.make_labels(kind, count, classes)


def test_protocols_are_complete():
    from core.images import to_uint8

    image = torch.zeros(1, 3, 2, 2)
    for name in protocols.PROTOCOLS:
        for purpose in ("generation", "reconstruction"):
            p = protocols.get(name, purpose)
            for rounding in (p.rounding, p.reconstruction_rounding, p.original_rounding):
                assert rounding is None or to_uint8(image, rounding).dtype == torch.uint8
            assert p.labels in protocols.LABEL_KINDS and p.preprocess in ("tf1", "pytorch_fid")
    with pytest.raises(UserError, match='mean "rectok"'):
        protocols.get("rectoc")


# ---------------------------------------------------------------------------------------------------------------------
# Work
# ---------------------------------------------------------------------------------------------------------------------
def compute(indices: range) -> dict[str, torch.Tensor]:
    x = torch.arange(indices.start, indices.stop)
    return {"square": (x * x).float(), "sum/even": torch.tensor([int((x % 2 == 0).sum())])}


class Killed(BaseException):
    """Not an error that anything may catch."""


@pytest.mark.parametrize("kept", [True, False])
def test_work(tmp_path, kept):
    work = Work(23, ONE, tmp_path / "work" if kept else None, {"seed": 1}, chunk=5)
    work.compute(compute)
    result = work.gather()
    assert torch.equal(result["square"], torch.arange(23).float() ** 2) and result["sum/even"].item() == 12


def test_work_goes_on_where_it_was_killed(tmp_path):
    calls: list[int] = []

    def counted(indices: range, limit: int) -> dict[str, torch.Tensor]:
        if len(calls) == limit:
            raise Killed
        calls.append(indices.start)
        return compute(indices)

    for limit in (2, 3, 5):
        with pytest.raises(Killed):
            Work(23, ONE, tmp_path / "work", {"seed": 1}, chunk=4).compute(lambda indices: counted(indices, limit))
    (tmp_path / "work" / "chunk_000001.safetensors").write_bytes(b"torn")  # by a broken disk: done again
    work = Work(23, ONE, tmp_path / "work", {"seed": 1}, chunk=9)  # keeps the chunks it began with
    work.compute(lambda indices: counted(indices, 99))
    assert calls == [0, 4, 8, 12, 16, 4, 20]
    assert torch.equal(work.gather()["square"], torch.arange(23).float() ** 2)
    with pytest.raises(UserError, match="seed was 1, now 2"):
        Work(23, ONE, tmp_path / "work", {"seed": 2})
    work.forget()
    assert not (tmp_path / "work").exists()


def test_work_that_an_earlier_version_began_goes_on(tmp_path):
    """The folder as it lies on users' disks, to the letter."""
    from safetensors.torch import save_file

    (tmp_path / "job.json").write_text('{\n  "chunk": 4,\n  "count": 10,\n  "seed": 1\n}\n')
    began = {"square": torch.tensor([16.0, 25, 36, 49]), "sum/even": torch.tensor([2]), "index": torch.arange(4, 8)}
    save_file(began, tmp_path / "chunk_000001.safetensors")
    work, calls = Work(10, ONE, tmp_path, {"seed": 1}), []
    work.compute(lambda indices: calls.append(indices) or compute(indices))
    assert calls == [range(4), range(8, 10)]
    result = work.gather()
    assert torch.equal(result["square"], torch.arange(10).float() ** 2) and result["sum/even"].item() == 5


def test_work_refuses_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        Work(4, ONE).compute(lambda indices: {"x": torch.full((4,), torch.nan)})
    with pytest.raises(UserError, match="nothing to evaluate"):
        Work(0, ONE)
    work = Work(8, ONE, tmp_path / "work", {}, chunk=4)
    work.compute(compute)
    work.path(1).write_bytes(work.path(0).read_bytes())
    with pytest.raises(UserError, match="each once"):
        work.gather()
    assert json.loads((tmp_path / "work" / "job.json").read_text()) == {"chunk": 4, "count": 8}
