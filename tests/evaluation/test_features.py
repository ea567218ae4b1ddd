"""Metrics of feature sets against slow or foreign computations: scores, discrepancies, manifolds, codes, intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import UserError
from core.rng import Draws
from evaluation import intervals
from evaluation.distances import (
    FORMS,
    Moments,
    frechet_distance,
    frechet_from_moments,
    inception_score,
    inception_score_adm,
    kid,
    manifold_radii,
    precision_recall,
    squared_mmd,
    uneven_chunks,
)
from evaluation.images import Codebooks, Perturbation
from evaluation.protocols import few_pictures, metric_name


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Against torch-fidelity's library
# ---------------------------------------------------------------------------------------------------------------------
def test_equals_torch_fidelity():
    """The same features through its private functions and through ours."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    a, b = normal(400, 24).abs() * 0.5, normal(370, 24, seed=1).abs() * 0.6
    theirs = metric_fid.fid_statistics_to_metric(*map(metric_fid.fid_features_to_statistics, (a, b)), False)
    ours = frechet_distance(Moments.of(a), Moments.of(b))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=2e-6, abs=1e-5)  # its means are float32
    statistics = [metric_fid.fid_features_to_statistics(side.double()) for side in (a, b)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-10)

    logits = normal(403, 30, seed=2) * 3
    theirs = metric_isc.isc_features_to_metric(logits)
    theirs = tuple(theirs[f"inception_score_{name}"] for name in ("mean", "std"))
    assert inception_score(logits) == pytest.approx(theirs, rel=1e-12)

    theirs = metric_kid.kid_features_to_metric(a, b, kid_subsets=7, kid_subset_size=90, verbose=False)
    ours = kid(a, b, subsets=7, size=90)
    assert ours == pytest.approx(tuple(theirs[f"kernel_inception_distance_{n}"] for n in ("mean", "std")), abs=1e-6)

    theirs = metric_prc.prc_features_to_metric(b, a, prc_neighborhood=3, prc_batch_size=1000, verbose=False)
    found = precision_recall(real=a, generated=b)
    assert found.precision == pytest.approx(float(theirs["precision"]), abs=1.5 / len(b))
    assert found.recall == pytest.approx(float(theirs["recall"]), abs=1.5 / len(a))


# ---------------------------------------------------------------------------------------------------------------------
# Frechet
# ---------------------------------------------------------------------------------------------------------------------
def test_frechet_of_badly_conditioned_covariances():
    """Variances over twelve orders of magnitude: roots of eigenvalues would lose digits, which has to be noticed."""
    basis = torch.linalg.qr(normal(60, 60).double()).Q
    a = normal(200, 60, seed=1).double() * torch.logspace(0, -6, 60, dtype=torch.float64) @ basis.T
    b = normal(200, 60, seed=2).double() * torch.logspace(0, -6, 60, dtype=torch.float64) @ basis.T
    x, y = a - a.mean(0), b - b.mean(0)
    cross = np.linalg.svd((x @ y.T).numpy(), compute_uv=False).sum() / 199
    want = float((a.mean(0) - b.mean(0)).square().sum() + (x.square().sum() + y.square().sum()) / 199 - 2 * cross)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("counts", [(30, 30), (30, 100), (100, 100)])
def test_frechet_equals_singular_values_of_the_features(counts):
    """The cross term is the nuclear norm of an N x M matrix, whatever the ranks of the covariances."""
    a, b = normal(counts[0], 40).double(), normal(counts[1], 40, seed=1).double() + 0.1
    x, y = ((side - side.mean(0)) / (len(side) - 1) ** 0.5 for side in (a, b))
    cross = torch.linalg.svdvals(x @ y.T).sum()
    want = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(float(want), rel=1e-10)


def test_features_that_are_not_finite_are_refused():
    good, bad = normal(20, 6), normal(20, 6)
    bad[3, 2] = math.nan
    for measure in (
        lambda: frechet_distance(Moments.of(good), Moments.of(bad)),
        lambda: inception_score(bad),
        lambda: inception_score_adm(bad),
        lambda: kid(good, bad, 2, 10),
        lambda: precision_recall(real=good, generated=bad),
        lambda: FORMS["single"](bad),
    ):
        with pytest.raises(UserError, match="NaN or infinity"):
            measure()


def test_too_few_pictures_are_named():
    one, some = normal(1, 6), normal(5, 6)
    cases = (
        (lambda: frechet_distance(Moments.of(one), Moments.of(some)), "at least 2 pictures"),
        (lambda: Moments(6).mean, "before any picture"),
        (lambda: inception_score(some), "at least 10 pictures, got 5"),
        (lambda: kid(some, some), "subsets of 1000"),
        (lambda: manifold_radii(some, k=5), "more than 5 pictures, got 5"),
        (lambda: precision_recall(real=some, generated=normal(5, 7)), "same tap"),
        (lambda: intervals.at_infinity(lambda rows: 0.0, 5), "at least 20 pictures"),
    )
    for measure, message in cases:
        with pytest.raises(UserError, match=message):
            measure()


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------
def test_inception_score_forms():
    logits = normal(23, 7) * 2
    p = logits.double().softmax(1).numpy()

    def by_hand(rows):
        return math.exp(np.mean(np.sum(rows * (np.log(rows) - np.log(rows.mean(0))), axis=1)))

    chunks = [by_hand(p[:10]), by_hand(p[10:20]), by_hand(p[20:])]
    assert inception_score_adm(logits, 10)[0] == pytest.approx(np.mean(chunks))
    assert FORMS["single"](logits) == pytest.approx((by_hand(p), 0.0))
    certain = torch.full((20, 4), -1e4).scatter(1, torch.arange(20)[:, None] % 4, 1e4)  # float32 softmax: 0 log 0
    assert inception_score_adm(certain)[0] == pytest.approx(4.0, rel=1e-12)
    assert FORMS["single"](certain)[0] == pytest.approx(4.0, rel=1e-12)


def test_sorted_labels_are_noticed():
    assert "sorted" in uneven_chunks(torch.arange(10).repeat_interleave(100), chunk=200)
    assert uneven_chunks(torch.arange(1000) % 10, chunk=200) == ""


def test_squared_mmd_by_hand():
    x, y = normal(5, 3).double(), normal(4, 3, seed=1).double()

    def k(u, v):
        return float((u @ v / 3 + 1) ** 3)

    want = (
        sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
        + sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
        - 2 * sum(k(u, v) for u in x for v in y) / 20
    )
    assert float(squared_mmd(x, y)) == pytest.approx(want)


@pytest.mark.parametrize("mode", ["exact", "adm_fp16"])
def test_precision_recall_equals_brute_force_for_any_block(mode):
    real, generated = normal(57, 8), normal(43, 8, seed=1) * 0.7
    whole = torch.cdist(real.double(), real.double()).square()
    radii = whole.sort(1).values[:, 3]
    across = torch.cdist(real.double(), generated.double()).square()
    own = torch.cdist(generated.double(), generated.double()).square().sort(1).values[:, 3]
    inside = ((across <= radii[:, None]).any(0), (across <= own).any(1))
    want = tuple(float(points.double().mean()) for points in inside)
    tight = mode == "exact"
    for block in (7, 20, None):
        torch.testing.assert_close(
            manifold_radii(real, 3, mode, block).double(),
            radii,
            rtol=1e-9 if tight else 5e-3,
            atol=1e-12 if tight else 0,
        )
        found = precision_recall(real=real, generated=generated, mode=mode, block=block)
        assert (found.precision, found.recall) == pytest.approx(want, abs=0 if tight else 2 / 43)


def test_points_on_a_rim_are_inside_whatever_rounding_says():
    """Repeated pictures have balls of radius 0; a lattice has its neighbours on the rims."""
    repeated = (normal(50, 333, seed=3) * 20).repeat_interleave(5, 0)
    for count in (5, 35, 190, 245):
        found = precision_recall(real=repeated, generated=repeated[:count].flip(0))
        assert (found.precision, found.recall) == (1.0, count / 250)
    steps = torch.arange(12.0)[:, None] * torch.full((1, 64), 0.1) + 7
    found = precision_recall(real=steps[2:6], generated=steps[:10])  # the last ball ends at step 8
    assert (found.precision, found.recall) == (9 / 10, 1.0)


def test_half_precision_falls_back_and_warns():
    real, generated = normal(20, 8) * 30, normal(20, 8, seed=1) * 30  # squared norms near 7,200: finite in half
    assert precision_recall(real=real, generated=generated, mode="adm_fp16").note == ""
    overflowing = real * 100
    exact, half = (manifold_radii(overflowing, 3, mode).double() for mode in ("exact", "adm_fp16"))
    torch.testing.assert_close(half, exact, rtol=1e-5, atol=0)  # recomputed in float32
    assert "half precision overflows" in precision_recall(real=overflowing, generated=generated, mode="adm_fp16").note


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


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("mode", ["exact", "adm_fp16"])
def test_precision_and_recall_never_hold_all_distances(mode):
    """The largest tensor is a block of distances, however many pictures there are."""
    found = {}
    for count in (300, 600, 1200):
        real, generated = normal(count, 5), normal(count + 40, 5) + 0.1
        with Largest() as largest:
            found[count] = precision_recall(real=real, generated=generated, mode=mode, block=100), largest.elements
        # the k + 1 nearest so far stand beside a block
        assert largest.elements <= max(100 * (100 + 4), 5 * (count + 40))
        assert found[count][0] == precision_recall(real=real, generated=generated, mode=mode, block=5000)


def test_precision_and_recall_cut_into_blocks_by_themselves():
    points = normal(4400, 2)
    with Largest() as largest:
        precision_recall(real=points, generated=points)
    assert largest.elements <= 4096 * (4096 + 4) < 4400 * 4400


# ---------------------------------------------------------------------------------------------------------------------
# Intervals and names
# ---------------------------------------------------------------------------------------------------------------------
def test_extrapolation_removes_the_bias():
    """Two samples of one Gaussian: the distance at infinity is 0, at N it is not."""
    features = normal(2000, 8).double()
    mean, covariance = torch.zeros(8), torch.eye(8)

    def measure(rows):
        part = Moments.of(features[rows])
        return frechet_from_moments(part.mean, part.covariance, mean, covariance)

    found = intervals.at_infinity(measure, 2000)
    assert measure(torch.arange(200)) > 0.05
    assert abs(found.value) < 0.02 and found.slope > 0 and 0 < found.error < 0.02
    line = intervals.at_infinity(lambda rows: 3.0 + 40.0 / len(rows), 500)
    assert (line.value, line.slope, line.error) == pytest.approx((3.0, 40.0, 0.0), abs=1e-9)


def test_bootstrap_intervals_hold_what_they_should():
    values = normal(400).double() + 5
    low, high = intervals.bootstrap_percentile(lambda rows: float(values[rows].mean()), 400)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)
    features = normal(150, 4)

    def measure(rows):
        part = Moments.of(features[rows])
        return frechet_from_moments(part.mean, part.covariance, torch.zeros(4), torch.eye(4))

    value = measure(torch.arange(150))
    low, high = intervals.bootstrap_normal(measure, value, 150, replicates=20)
    assert low < value < high and (low + high) / 2 == pytest.approx(value)


def test_names_carry_protocol_and_count():
    assert metric_name("fid", 50_000) == "fid_50k" and metric_name("fid", 49_999) == "fid_49999"
    assert metric_name("is", 5000, "torch_fidelity") == "is_torch_fidelity_5k"
    assert metric_name("fd_lite0_block4", 270) == "fd_lite0_block4_270"
    assert "full rank" in few_pictures(100, 2048) and "equal numbers" in few_pictures(10_000, 2048)
    assert few_pictures(50_000, 2048) == ""


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_moments_of_shards_merge_to_the_whole(shards):
    """Gathered batch by batch, stored and restored, merged: what chunks of a reference go through."""
    features = normal(90, 6) * 3 + 50
    whole, merged = Moments.of(features), Moments(6)
    for i, shard in enumerate(features.tensor_split(shards)):
        gathered = Moments(6)
        for part in shard.split(7 + i):
            gathered.update(part)
        merged.merge(Moments.restored({key: tensor.clone() for key, tensor in gathered.state().items()}))
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["exact", "adm_fp16"])
def test_precision_and_recall_within_a_trainings_autocast(mode):
    real, generated = normal(40, 64), normal(30, 64) + 0.1
    alone = precision_recall(real=real, generated=generated, mode=mode)
    with torch.autocast("cpu", torch.bfloat16):
        assert precision_recall(real=real, generated=generated, mode=mode) == alone
