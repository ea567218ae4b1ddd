"""From features to scores: what cannot be had is left out and says why."""

from __future__ import annotations

from dataclasses import replace

import torch

from evaluation import measure, protocols, scores
from evaluation.distances import inception_score_single
from evaluation.references import Facts, Statistics
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
    # one replicate has no spread
    assert [s.name for s in found] == ["fid_40", "fid_infinity_from_40", "is_torch_fidelity_40", "is_infinity_from_40"]
    assert [s.value for s in plain] == [found[0].value, found[2].value] and found[0].interval is None
    assert {"interval of fid_40", "interval of is_40"} <= set(left_out)


def test_inception_score_of_infinitely_many_pictures():
    """Of one part, whatever the protocol's chunks: those of 5,000 and ten splits keep the bias of their own size."""
    generator, classes = torch.Generator().manual_seed(0), 300

    def logits(count: int) -> torch.Tensor:
        drawn = torch.randn(count, classes, generator=generator)
        drawn[torch.arange(count), torch.randint(classes, (count,), generator=generator)] += 12
        return drawn

    features, truth = {"pool": torch.zeros(8000, 12), "logits": logits(8000)}, inception_score_single(logits(60_000))[0]
    for name in ("adm", "torch-fidelity"):
        protocol = replace(protocols.get(name), generation=("is",))
        (plain, limit), _ = scores.score(scores.Comparison(protocol, SmallInception(), features, infinity=True))
        assert limit.name == "is_infinity_from_8k" and abs(limit.value / truth - 1) < 0.01 < abs(
            plain.value / truth - 1
        )


def test_what_is_told_of_a_reference():
    """Few pictures behind it and an unknown resize move a distance; what many samples against it give looks sure."""
    features, net = {"pool": torch.randn(40, 12)}, SmallInception()
    moments = real().moments
    for facts, words in (
        (Facts(count=5, preprocess="tf1"), "stands for 5 pictures in 12 dimensions"),
        (Facts(count=50_000), "does not say how its pictures were resized"),
        (Facts(count=50_000, preprocess="tf1"), ""),
    ):
        reference = Statistics(moments, facts, "x.npz")
        note = scores.fid(scores.Comparison(protocols.get("adm"), net, features, reference))[0].note
        assert words in note and ("x.npz" in note) == bool(words)
    few = {"pool": torch.randn(9, 12)}
    note = scores.fid(scores.Comparison(protocols.get("adm"), net, features, Statistics({}, Facts(), "y.npz"), few))[
        0
    ].note
    assert "y.npz stands for 9 pictures" in note
