"""Reference statistics: ours, those of others, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.errors import UserError
from evaluation import references
from evaluation.distances import frechet_from_moments
from evaluation.pictures import ArrayPictures
from evaluation.references import Facts, Statistics
from tests.evaluation.conftest import ONE, SmallInception


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
        arr_0=np.arange(7 * 8 * 8 * 3).reshape(7, 8, 8, 3).astype(np.uint8),
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


def test_width_counts_as_height_does(tmp_path):
    wide = ArrayPictures(np.zeros((3, 32, 48, 3), dtype=np.uint8))
    reference = references.make_statistics(wide, SmallInception(), ONE, 4, facts=Facts("generation"))
    assert reference.facts.image_size == [32, 48]
    references.save(tmp_path / "wide.npz", reference)
    read = references.load(tmp_path / "wide.npz")
    check = dict(purpose="generation", network="inception", preprocess="tf1")
    read.check(**check, image_size=references.side_of(wide))
    with pytest.raises(UserError, match="describes pictures of 32 x 48 px, these have 32 px"):
        read.check(**check, image_size=32)
