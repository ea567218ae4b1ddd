"""Frechet distance, PSNR, SSIM, classifier and neighbours against independent computations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from core.errors import UserError
from core.nn.lpips import LPIPS
from evaluation import protocols, toy
from evaluation.distances import Moments, frechet_distance, frechet_from_moments
from evaluation.images import SSIM_VARIANTS, interval_of, lpips_metric, mean_of, picture_metrics, psnr, ssim


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(Moments.of(a), Moments.of(b))


# ---------------------------------------------------------------------------------------------------------------------
# Frechet
# ---------------------------------------------------------------------------------------------------------------------
def test_frechet_equals_scipy_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = Moments.of(normal(300, 12) @ normal(12, 12, seed=1)), Moments.of(normal(200, 12, seed=2) + 0.5)
    root = linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    want = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(want), rel=1e-9)


def test_frechet_of_diagonal_gaussians_is_analytic():
    s1, s2 = torch.tensor([1.0, 4.0, 9.0, 0.0]), torch.tensor([4.0, 1.0, 16.0, 25.0])
    m1, m2 = torch.zeros(4), torch.tensor([1.0, 2.0, 0.0, 0.0])
    want = (m1 - m2).square().sum() + (s1.sqrt() - s2.sqrt()).square().sum()
    assert frechet_from_moments(m1, s1.diag(), m2, s2.diag()) == pytest.approx(float(want), rel=1e-12)


def test_moments_in_parts_equals_whole():
    x = normal(101, 7) * 3 + 1000  # a mean far from zero would cost digits in plain sums of squares
    whole = Moments.of(x)
    first, second = Moments(7), Moments(7)
    for part in x[:60].split(13):
        first.update(part)
    for part in x[60:].split(20):
        second.update(part)
    first.merge(Moments(7)).merge(second)
    assert first.count == 101
    torch.testing.assert_close(first.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(first.covariance, torch.cov(x.T), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole.covariance, torch.cov(x.T), rtol=1e-10, atol=1e-10)


def test_frechet_with_fewer_pictures_than_dimensions():
    a, b = normal(20, 64), normal(25, 64, seed=1) + 0.1
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    # from the features themselves the trace is a nuclear norm: no covariance, no rank problem
    cross = torch.linalg.svdvals(centred_a @ centred_b.T).sum() / (19 * 24) ** 0.5
    want = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * cross
    assert distance(a, b) == pytest.approx(float(want), rel=1e-11)
    assert abs(distance(a, a)) < 1e-9


def test_frechet_tells_what_is_wrong():
    with pytest.raises(UserError, match="at least 2"):
        distance(normal(1, 4), normal(5, 4))
    with pytest.raises(UserError, match="same tap"):
        distance(normal(5, 4), normal(5, 6))


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction
# ---------------------------------------------------------------------------------------------------------------------
def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """One channel, window by window."""
    axis = np.arange(11) - 5
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return float(np.mean(values))


def test_ssim_equals_slow_computation():
    a = torch.rand(2, 3, 16, 19, generator=torch.Generator().manual_seed(0))
    b = (a + 0.1 * normal(2, 3, 16, 19, seed=1).float()).clamp(0, 1)
    x, y = a.double().numpy(), b.double().numpy()
    want = [np.mean([slow_ssim(x[i, c], y[i, c]) for c in range(3)]) for i in range(2)]
    np.testing.assert_allclose(ssim(a, b, "ssim_gauss").numpy(), want, atol=2e-6)
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("variant", SSIM_VARIANTS)
def test_ssim_variants_know_identical_and_different_pictures(variant):
    a = torch.rand(2, 3, 16, 19, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(a, a, variant), torch.ones(2, dtype=torch.float64))
    assert (ssim(a, 1 - a, variant) < 0.2).all()


def test_uniform_ssim_equals_slow_computation():
    """scikit-image's: 7 x 7 windows inside the picture, covariances over 48."""
    a = torch.rand(1, 3, 12, 14, generator=torch.Generator().manual_seed(0))
    b = (a + 0.1 * normal(1, 3, 12, 14, seed=1).float()).clamp(0, 1)
    for variant, data_range in (("ssim", 1.0), ("ssim_llamagen", 2.0)):
        c1, c2, values = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2, []
        for p, q in zip(
            a[0].double().unfold(1, 7, 1).unfold(2, 7, 1).reshape(-1, 49),
            b[0].double().unfold(1, 7, 1).unfold(2, 7, 1).reshape(-1, 49),
        ):
            mp, mq, cov = p.mean(), q.mean(), torch.cov(torch.stack((p, q)))
            values.append(
                (2 * mp * mq + c1) * (2 * cov[0, 1] + c2) / ((mp**2 + mq**2 + c1) * (cov[0, 0] + cov[1, 1] + c2))
            )
        assert float(ssim(a, b, variant)) == pytest.approx(float(torch.stack(values).mean()), abs=2e-6)


@pytest.mark.slow
def test_lpips_equals_the_lpips_package():
    """Its network with our random backbone, its own linear layers."""
    lpips = pytest.importorskip("lpips")
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=True, verbose=False).eval()
    ours = LPIPS("vgg16", pretrained=False)
    layers = [layer for number in range(1, 6) for layer in getattr(theirs.net, f"slice{number}")]
    for mine, other in zip(ours.backbone, layers, strict=True):
        mine.load_state_dict(other.state_dict())
    for mine, other in zip(ours.heads, theirs.lins):
        mine.weight.data.copy_(other.model[-1].weight)
    a, b = (torch.rand(2, 3, 40, 36, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    with torch.no_grad():
        want = theirs(a * 2 - 1, b * 2 - 1).flatten()
    name, metric = lpips_metric(ours)
    values = metric(a, b).double()
    torch.testing.assert_close(values.float(), want, rtol=1e-4, atol=0)
    assert mean_of(name, values)["lpips_vgg"] == pytest.approx(float(want.mean()), rel=1e-4)


def test_identical_pictures_are_counted_and_nan_is_refused():
    a = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    values = psnr(a, torch.stack((a[0], a[1] * 0.9, a[2])))
    assert mean_of("psnr", values)["psnr_clipped"] == 2 and set(mean_of("ssim", values)) == {"ssim"}
    low, high = interval_of(values, replicates=50)
    assert low <= mean_of("psnr", values)["psnr"] <= high <= 100
    with pytest.raises(UserError, match="NaN"):
        mean_of("psnr", torch.cat((values, psnr(a, a * float("nan")))))


def test_psnr_known_values():
    a = torch.zeros(3, 3, 12, 12)
    b = torch.stack((a[0] + 0.1, a[0] + 0.01, a[0]))
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0, 100.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_metrics_of_a_protocol():
    """What it names, picture by picture, whatever the batch; a network that is not here leaves its metric out."""
    a = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    b = (a + 0.2 * normal(5, 3, 12, 12).float()).clamp(0, 1)
    protocol = replace(
        protocols.get("adm", "reconstruction"), reconstruction=("psnr", "ssim"), ssim=("ssim", "ssim_gauss")
    )
    metrics, left_out = picture_metrics(protocol, torch.device("cpu"))
    assert list(metrics) == ["psnr", "ssim", "ssim_gauss"] and not left_out
    for metric in metrics.values():
        torch.testing.assert_close(torch.cat((metric(a[:2], b[:2]), metric(a[2:], b[2:]))), metric(a, b))
    with pytest.raises(UserError, match="at least 11"):
        ssim(a[..., :8, :8], a[..., :8, :8], "ssim_gauss")
    with pytest.raises(UserError, match='unknown SSIM "sim"'):
        ssim(a, a, "sim")


# ---------------------------------------------------------------------------------------------------------------------
# Classifier and neighbours
# ---------------------------------------------------------------------------------------------------------------------
def blobs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(60) % 3
    centres = 4 * torch.eye(3, 8, dtype=torch.float64)
    x = centres[labels] + normal(60, 8, seed=seed)
    x[:, 7] = 5.0  # a feature without variance
    return x.float(), labels


def test_classifier_separates_blobs_deterministically():
    (x, labels), (other, other_labels) = blobs(0), blobs(1)
    model, again = toy.fit(x, labels, 3), toy.fit(x, labels, 3)
    assert torch.equal(model.weight, again.weight) and torch.equal(model.bias, again.bias)
    counts = toy.confusion(model.predict(other), other_labels, 3)
    assert toy.accuracy(counts) > 0.95 and int(counts.sum()) == 60
    assert bool(torch.isfinite(model.scale).all()) and bool((model.scale > 0).all())


def test_confusion_by_hand():
    counts = toy.confusion(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 1]), 3)
    assert counts.tolist() == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
    assert toy.accuracy(counts) == 0.5
    assert toy.class_accuracies(counts) == [1 / 3, 1.0, None]


def test_classifier_tells_what_is_wrong():
    x, labels = blobs(0)
    with pytest.raises(UserError, match="there are 2 classes"):
        toy.fit(x, labels, 2)
    with pytest.raises(UserError, match="one label per picture"):
        toy.fit(x, labels[:-1], 3)


def test_neighbours_equal_brute_force_for_any_block():
    queries, references = normal(9, 6).float(), normal(31, 6, seed=1).float()
    references[20] = references[3] * 2  # equal by cosine: the first must win
    queries[0] = references[3]
    similarity = torch.nn.functional.cosine_similarity(queries[:, None], references[None], dim=2)
    for block in (4, 31, 1000):
        index, value = toy.nearest_neighbours(queries, references, block)
        torch.testing.assert_close(value, similarity.max(1).values, atol=1e-6, rtol=0)
        assert index[1:].tolist() == similarity.argmax(1)[1:].tolist()
        assert index[0] == 3 and value[0] == pytest.approx(1.0)
