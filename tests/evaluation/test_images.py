"""PSNR, SSIM and LPIPS against independent computations; codes by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from core.errors import UserError
from core.nn.lpips import LPIPS
from core.rng import Draws
from evaluation import protocols
from evaluation.images import (
    SSIM_VARIANTS,
    Codebooks,
    Perturbation,
    interval_of,
    lpips_metric,
    mean_of,
    picture_metrics,
    psnr,
    ssim,
)


def normal64(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
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
    b = (a + 0.1 * normal64(2, 3, 16, 19, seed=1).float()).clamp(0, 1)
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
    b = (a + 0.1 * normal64(1, 3, 12, 14, seed=1).float()).clamp(0, 1)
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
    b = (a + 0.2 * normal64(5, 3, 12, 12).float()).clamp(0, 1)
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
# Codes
# ---------------------------------------------------------------------------------------------------------------------
def usage(codebooks: Codebooks, codes: torch.Tensor) -> dict[str, float]:
    return codebooks.usage(codebooks.count(codes))


def test_codebook_usage_per_branch_and_scale():
    codes = torch.tensor([[[0, 1], [0, 2], [1, 3]], [[0, 1], [1, 2], [1, 3]]])  # (2, 3, 2), scales of 1 and 2 tokens
    both = Codebooks(4, branches=2, scales=(1, 2), names=("semantic", "detail"))
    measured = usage(both, codes)
    assert measured["codebook_usage_semantic"] == 0.5 and measured["codebook_usage_detail"] == 0.75
    assert measured["codebook_usage_semantic_scale0"] == 0.25 and measured["codebook_perplexity_semantic_scale0"] == 1.0
    assert measured["codebook_entropy_bits_detail_scale1"] == pytest.approx(1.0, abs=1e-6)
    assert measured["codebook_perplexity_detail_scale1"] == pytest.approx(2.0)
    assert set(usage(Codebooks(4), codes[..., :1])) == {
        "codebook_usage",
        "codebook_entropy_bits",
        "codebook_perplexity",
    }
    with pytest.raises(UserError, match="A code is 3, but the codebook has 3"):
        Codebooks(3, branches=2).count(codes)
    with pytest.raises(UserError, match="2 branches expected"):
        Codebooks(4, branches=2).count(codes[..., 0])
    assert torch.equal(both.count(codes), both.count(codes[:1]) + both.count(codes[1:]))  # chunks add


def test_perturbed_codes_are_near_and_belong_to_the_picture():
    codes = torch.stack((torch.arange(64).view(8, 8), torch.arange(64).view(8, 8).flip(1)), -1) % 16  # (8, 8, 2)
    codebooks = torch.stack((torch.arange(16.0), 100 - torch.arange(16.0)), 1)[..., None]  # (16, 2, 1)
    positions, near = torch.arange(8), Perturbation(1.0, 1.0, 3)
    noisy = near(codes, codebooks, Draws(0, positions))
    assert (noisy - codes).abs().max() <= 2 and (noisy != codes).float().mean() > 0.4
    assert (noisy - codes)[..., 0].ne((noisy - codes)[..., 1]).any()  # branches have noise of their own
    assert torch.equal(Perturbation(1.0, 0.0, 3)(codes, codebooks, Draws(0, positions)), codes)
    assert torch.equal(Perturbation(1.0, 1.0, 1)(codes, codebooks, Draws(0, positions)), codes)
    part = near(codes[3:5], codebooks, Draws(0, positions[3:5]))
    assert torch.equal(part, noisy[3:5])
    few = Perturbation(0.5, 0.25, 16)(codes[:1].expand(400, -1, -1), codebooks, Draws(0, torch.arange(400)))
    touched = (few != codes[:1]).flatten(1).float().mean(1)
    assert (touched > 0).float().mean() == pytest.approx(0.25, abs=0.06)  # a share beta of the pictures
    assert touched[touched > 0].mean() == pytest.approx(0.5 * 15 / 16, abs=0.04)  # alpha, less the code itself
    with pytest.raises(UserError, match="delta = 17 nearest codes of a codebook with 16"):
        Perturbation(1.0, 1.0, 17)(codes, codebooks, Draws(0, positions))


@pytest.mark.parametrize("text", ["0.5", "0.5,0.1", "a,b,c", "1.5,0.1,3", "0.5,-1,3", "0.5,0.1,0", "0.5,0.1,2.5"])
def test_perturbations_that_mean_nothing(text):
    with pytest.raises(UserError, match="--perturb " + text):
        Perturbation.parse(text)
