"""Distances of feature sets against slow or foreign computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import UserError
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


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normal64(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(Moments.of(a), Moments.of(b))


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
# Moments
# ---------------------------------------------------------------------------------------------------------------------
def test_moments_in_parts_equals_whole():
    x = normal64(101, 7) * 3 + 1000  # a mean far from zero would cost digits in plain sums of squares
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


# ---------------------------------------------------------------------------------------------------------------------
# Frechet
# ---------------------------------------------------------------------------------------------------------------------
def test_frechet_equals_scipy_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = Moments.of(normal64(300, 12) @ normal64(12, 12, seed=1)), Moments.of(normal64(200, 12, seed=2) + 0.5)
    root = linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    want = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(want), rel=1e-9)


def test_frechet_of_diagonal_gaussians_is_analytic():
    s1, s2 = torch.tensor([1.0, 4.0, 9.0, 0.0]), torch.tensor([4.0, 1.0, 16.0, 25.0])
    m1, m2 = torch.zeros(4), torch.tensor([1.0, 2.0, 0.0, 0.0])
    want = (m1 - m2).square().sum() + (s1.sqrt() - s2.sqrt()).square().sum()
    assert frechet_from_moments(m1, s1.diag(), m2, s2.diag()) == pytest.approx(float(want), rel=1e-12)


def test_frechet_with_fewer_pictures_than_dimensions():
    a, b = normal64(20, 64), normal64(25, 64, seed=1) + 0.1
    centred_a, centred_b = a - a.mean(0), b - b.mean(0)
    # from the features themselves the trace is a nuclear norm: no covariance, no rank problem
    cross = torch.linalg.svdvals(centred_a @ centred_b.T).sum() / (19 * 24) ** 0.5
    want = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * cross
    assert distance(a, b) == pytest.approx(float(want), rel=1e-11)
    assert abs(distance(a, a)) < 1e-9


def test_frechet_tells_what_is_wrong():
    with pytest.raises(UserError, match="at least 2"):
        distance(normal64(1, 4), normal64(5, 4))
    with pytest.raises(UserError, match="same tap"):
        distance(normal64(5, 4), normal64(5, 6))


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


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------
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
# Inception Score, KID
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


# ---------------------------------------------------------------------------------------------------------------------
# Precision and recall
# ---------------------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("mode", ["exact", "adm_fp16"])
def test_precision_and_recall_within_a_trainings_autocast(mode):
    real, generated = normal(40, 64), normal(30, 64) + 0.1
    alone = precision_recall(real=real, generated=generated, mode=mode)
    with torch.autocast("cpu", torch.bfloat16):
        assert precision_recall(real=real, generated=generated, mode=mode) == alone
