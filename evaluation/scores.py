"""From features to the numbers of a protocol, each with what it was measured on and against.

`score(comparison)` walks through the metrics that the protocol lists. One that cannot be had (no reference pictures for
recall, no class logits for an Inception Score) is left out and says why; the others still come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from core.errors import UserError
from core.rng import permutation
from evaluation.distances import (
    FORMS,
    Moments,
    frechet_from_moments,
    inception_score_adm,
    inception_score_single,
    kid,
    precision_recall,
    uneven_chunks,
)
from evaluation.intervals import at_infinity, bootstrap_percentile, normal_interval, resampled
from evaluation.networks import FeatureNet
from evaluation.protocols import IS_VARIANTS, PREFIXES, Protocol, few_pictures, metric_name
from evaluation.references import Statistics

T = TypeVar("T")
# Features that a metric uses: FID's network has the first of each pair, the offline stand-in the second.
DISTANCE_TAPS = ("pool", "block4")


@dataclass(frozen=True)
class Score:
    """One number and what it means."""

    name: str  # carries the count: fid_50k
    value: float
    count: int
    protocol: str
    reference: str  # what it was compared with, "" for what needs nothing
    interval: tuple[float, float] | None = None  # 95 %
    std: float | None = None  # over splits or subsets, where the metric is defined so
    note: str = ""
    replicates: list[float] | None = None  # bootstrap values of a Frechet distance, for paired differences


@dataclass
class Comparison:
    """Two sets of features.

    Args:
        samples: features in index order, tap -> (N, D).
        reference: moments of the other side; None: taken from `real`.
        real: features of the other side's pictures, tap -> (M, D), as far as they are known. For reconstructions those
            of the originals, for samples those of the reference's pictures.
        purpose: "generation", "reconstruction", or "perturbed" for reconstructions from disturbed codes.
        labels: classes of the pictures, N or more, where they are known.
        replicates: of the bootstrap behind confidence intervals; 0: none.
        infinity: also extrapolate to infinitely many pictures.
    """

    protocol: Protocol
    net: FeatureNet
    samples: dict[str, Tensor]
    reference: Statistics | None = None
    real: dict[str, Tensor] | None = None
    purpose: str = "generation"
    device: torch.device = torch.device("cpu")
    labels: Tensor | None = None
    replicates: int = 0
    infinity: bool = False
    manifold: list[Score] | None = None  # found by the first of precision and recall
    left_out: dict[str, str] = field(default_factory=dict)  # what could not be had -> why

    def __post_init__(self):
        self.count = len(next(iter(self.samples.values())))
        self.labels = None if self.labels is None else self.labels[: self.count]
        other_side = "real pictures" if self.purpose == "generation" else "originals"
        self.against = other_side if self.reference is None else self.reference.name
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}

    def named(self, base: str, variant: str = "") -> str:
        return metric_name(PREFIXES[self.purpose] + base, self.count, variant)

    def score(self, base: str, value: float, variant: str = "", reference: str | None = None, **more) -> Score:
        against = self.against if reference is None else reference
        return Score(self.named(base, variant), float(value), self.count, self.protocol.name, against, **more)

    def unless_impossible(self, name: str, compute: Callable[[], T]) -> T | None:
        """What is beside a number must not cost the number."""
        try:
            return compute()
        except UserError as reason:
            self.left_out[name] = str(reason)
            return None

    def pictures_of(self, tap: str) -> Tensor:
        """Features of real pictures, (M, D)."""
        if not self.real or tap not in self.real:
            raise Unavailable(f"of {self.against} there are only statistics, no pictures (arr_0)")
        return self.real[tap]

    def moments(self, tap: str) -> tuple[Tensor, Tensor]:
        """Of the other side."""
        if tap not in self._moments:
            self._moments[tap] = self._find_moments(tap)
        return self._moments[tap]

    def _find_moments(self, tap: str) -> tuple[Tensor, Tensor]:
        if self.reference is not None and self.reference.moments:
            if tap not in self.reference.moments:
                raise Unavailable(
                    f"{self.reference.name} has no moments of {tap} features; it holds those of "
                    f"{', '.join(self.reference.moments)}"
                )
            return self.reference.moment(tap, self.net.dims[tap])
        gathered = Moments.of(self.pictures_of(tap).to(self.device))
        return gathered.mean, gathered.covariance

    def distance(self, tap: str, rows: Tensor | None = None) -> float:
        """Frechet distance of all samples, or of the rows given: of reconstructions with their own originals."""
        features = self.samples[tap] if rows is None else self.samples[tap][rows]
        gathered = Moments.of(features.to(self.device))
        if rows is None or self.purpose == "generation" or self.reference is not None:
            mean, covariance = self.moments(tap)
        else:
            originals = Moments.of(self.pictures_of(tap)[rows].to(self.device))
            mean, covariance = originals.mean, originals.covariance
        return frechet_from_moments(gathered.mean, gathered.covariance, mean, covariance)


class Unavailable(UserError):
    """This metric cannot be had here; the message says why."""


def _tap(comparison: Comparison, *names: str) -> str:
    for name in names:
        if name in comparison.samples:
            return name
    raise Unavailable(f'the feature network "{comparison.net.name}" has no {names[0]} features')


def _both_sides(comparison: Comparison) -> tuple[Tensor, Tensor]:
    """(real, sample) features for metrics that need pictures on both sides."""
    tap = _tap(comparison, *DISTANCE_TAPS)
    return comparison.pictures_of(tap).to(comparison.device), comparison.samples[tap].to(comparison.device)


# ---------------------------------------------------------------------------------------------------------------------
# One function per name in a protocol's list
# ---------------------------------------------------------------------------------------------------------------------
def frechet(comparison: Comparison, *taps: str) -> list[Score]:
    tap = _tap(comparison, *taps)
    if comparison.count < 2:
        raise Unavailable(f"a covariance needs at least 2 pictures, there is {comparison.count}")
    value, name = comparison.distance(tap), comparison.net.distance_name(tap)

    def measure(rows: Tensor) -> float:
        return comparison.distance(tap, rows)

    drawn = _extra(comparison, name, lambda n: resampled(measure, comparison.count, n))
    more = {} if drawn is None else {"interval": normal_interval(value, drawn), "replicates": drawn.tolist()}
    note = " ".join(
        filter(None, (few_pictures(comparison.count, comparison.net.dims[tap]), _about_reference(comparison, tap)))
    )
    return [comparison.score(name, value, note=note, **more), *_limit(comparison, name, measure)]


def _about_reference(comparison: Comparison, tap: str) -> str:
    """What to know of the other side before its distance is compared with another one; "" for nothing."""
    reference, dim, words = comparison.reference, comparison.net.dims[tap], []
    known = reference is not None and tap in reference.moments
    count = reference.facts.count if known else len(comparison.real[tap]) if comparison.real else None
    if count is not None and count < comparison.count and few_pictures(count, dim):
        words.append(
            f"{comparison.against} stands for {count} pictures in {dim} dimensions, which moves the distance as few samples "
            "do: compare it with distances from the same reference only."
        )
    if known and comparison.net.is_published and reference.facts.preprocess is None:
        words.append(
            f"{reference.name} does not say how its pictures were resized: the way of this protocol is taken for granted."
        )
    return " ".join(words)


def fid(comparison: Comparison) -> list[Score]:
    return frechet(comparison, *DISTANCE_TAPS)


def _extra(comparison: Comparison, name: str, bootstrap: Callable[[int], T]) -> T | None:
    """Interval or replicates of a metric, where they were asked for."""
    if not comparison.replicates:
        return None
    label = f"interval of {comparison.named(name)}"
    return comparison.unless_impossible(label, lambda: bootstrap(comparison.replicates))


def _limit(
    comparison: Comparison, name: str, measure: Callable[[Tensor], float], reference: str | None = None
) -> list[Score]:
    """The metric at infinitely many pictures, where that was asked for."""
    if not comparison.infinity:
        return []
    label = comparison.named(name, "infinity_from")
    limit = comparison.unless_impossible(label, lambda: at_infinity(measure, comparison.count))
    if limit is None:
        return []
    note = "extrapolated by least squares on 1/N; the deviation is its standard error"
    return [comparison.score(name, limit.value, "infinity_from", reference, std=limit.error, note=note)]


def inception_score(comparison: Comparison) -> list[Score]:
    logits = comparison.samples[_tap(comparison, "logits")]
    form, labels, note = FORMS[comparison.protocol.inception_score], comparison.labels, ""
    if comparison.protocol.shuffle:
        order = torch.from_numpy(permutation(len(logits), "inception score"))
        logits, labels = logits[order], None if labels is None else labels[order]
    if form is inception_score_adm and labels is not None:
        note = uneven_chunks(labels)
    mean, std = form(logits)
    name = _not_inception(comparison, "is")

    def measure(rows: Tensor) -> float:
        return form(logits[rows])[0]

    interval = _extra(comparison, name, lambda n: bootstrap_percentile(measure, len(logits), n))
    variant = IS_VARIANTS[comparison.protocol.inception_score]
    whole = comparison.score(name, mean, variant, "", std=std or None, interval=interval, note=note)
    # In one part: chunks of 5,000 keep their bias however many there are, ten parts have that of N / 10 pictures.
    return [whole, *_limit(comparison, name, lambda rows: inception_score_single(logits[rows])[0], "")]


def kernel_distance(comparison: Comparison) -> list[Score]:
    real, samples = _both_sides(comparison)
    mean, std = kid(samples, real)
    return [comparison.score(_not_inception(comparison, "kid"), mean, std=std)]


def manifold(comparison: Comparison) -> list[Score]:
    """Precision and recall, computed once."""
    if comparison.manifold is None:
        real, samples = _both_sides(comparison)
        mode = comparison.protocol.precision_recall
        shares = precision_recall(real=real, generated=samples, mode=mode)
        variant = "" if mode == "exact" else mode
        comparison.manifold = [
            comparison.score(_not_inception(comparison, name), share, variant, note=shares.note)
            for name, share in (("precision", shares.precision), ("recall", shares.recall))
        ]
    return comparison.manifold


def _not_inception(comparison: Comparison, name: str) -> str:
    """Names of metrics say when the features are not those of FID's network."""
    tap = _tap(comparison, *DISTANCE_TAPS)
    return name if comparison.net.distance_name(tap).startswith("fid") else f"{name}_{comparison.net.name}_{tap}"


METRICS: dict[str, Callable[[Comparison], list[Score]]] = {
    "fid": fid,
    "sfid": lambda comparison: frechet(comparison, "spatial"),
    "is": inception_score,
    "kid": kernel_distance,
    "precision": lambda comparison: manifold(comparison)[:1],
    "recall": lambda comparison: manifold(comparison)[1:],
}


def score(comparison: Comparison) -> tuple[list[Score], dict[str, str]]:
    """(scores, metric -> why it was left out) of the protocol's feature metrics."""
    protocol = comparison.protocol
    wanted = protocol.generation if comparison.purpose == "generation" else protocol.reconstruction
    scores = []
    for name in wanted:
        if name not in METRICS:  # compares pictures, not features
            continue
        try:
            scores += METRICS[name](comparison)
        except UserError as reason:
            comparison.left_out[name] = str(reason)
    return scores, comparison.left_out
