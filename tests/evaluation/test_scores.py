"""From features to scores: what cannot be had is left out and says why."""

from __future__ import annotations

import torch

from evaluation import measure, protocols, scores
from tests.evaluation.conftest import CPU, SmallInception, real, sample


def test_what_cannot_be_measured_is_left_out_with_its_reason():
    features = SmallInception()(measure.producer(sample, torch.arange(40) % 10, 1, 8, CPU)(range(40)))
    comparison = scores.Comparison(protocols.get("torch-fidelity"), SmallInception(), features, real())
    found, left_out = scores.score(comparison)
    assert [s.name for s in found] == ["fid_40", "is_torch_fidelity_40"] and found[1].std > 0
    assert set(left_out) == {"kid", "precision", "recall"} and "arr_0" in left_out["precision"]
    comparison = scores.Comparison(
        protocols.get("pytorch-fid"), SmallInception(), features, real(), infinity=True, replicates=5
    )
    (plain, limit), _ = scores.score(comparison)
    assert (
        plain.interval[0] < plain.value < plain.interval[1] and limit.name == "fid_infinity_from_40" and limit.std > 0
    )


def test_extras_that_cannot_be_had_cost_no_number(monkeypatch):
    """They are left out with their reason; what was measured stays what it is."""
    features = SmallInception()(measure.producer(sample, torch.arange(40) % 10, 1, 8, CPU)(range(40)))
    plain, _ = scores.score(scores.Comparison(protocols.get("torch-fidelity"), SmallInception(), features, real()))
    asked = scores.Comparison(
        protocols.get("torch-fidelity"), SmallInception(), features, real(), replicates=1, infinity=True
    )
    found, left_out = scores.score(asked)
    # subsets of 4 to 9 pictures are too small for ten splits; one replicate has no spread
    assert [s.name for s in found] == ["fid_40", "fid_infinity_from_40", "is_torch_fidelity_40"]
    assert [s.value for s in plain] == [found[0].value, found[2].value] and found[0].interval is None
    assert {"interval of fid_40", "interval of is_40", "is_infinity_from_40"} <= set(left_out)
    assert "at least 10 pictures, got 4" in left_out["is_infinity_from_40"]
