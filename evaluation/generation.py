"""Everything measured about a set of generated pictures, against the same measurements of real held-out ones.

A number alone says little at a few hundred pictures, so each comes with what real pictures that were not trained on
score: the Frechet distance between real sets is its floor, the classifier's accuracy on real pictures its ceiling.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from core.errors import UserError
from evaluation.classifier import Agreement, LinearClassifier
from evaluation.distances import Moments, frechet_distance
from evaluation.neighbours import nearest_neighbours
from evaluation.networks import FeatureNet
from evaluation.reference import Features, Reference, extract


def evaluate_samples(
    samples: Iterable[tuple[Tensor, Tensor]] | Features,
    net: FeatureNet,
    train: Reference,
    val: Reference | None = None,
    classifier: LinearClassifier | None = None,
    class_names: list[str] | None = None,
    tap: str = "block4",
) -> dict[str, Any]:
    """Metrics by name; `metrics_json.describe` says what each means.

    Args:
        samples: batches of (images (B, 3, H, W) uint8, labels asked for (B,)), or their features from `extract`.
        net: the network; `train` and `val` must be of the same one.
        train: real pictures the generator was trained on.
        val: real pictures it has not seen; without them there is no floor and no ceiling.
        classifier: fitted on `train`'s "penultimate" features; without it no accuracies.
    """
    for reference in (train, val):
        if reference is not None and reference.net != net.name:
            raise UserError(f"Reference features are from network '{reference.net}', samples use '{net.name}'.")
    features = samples if isinstance(samples, Features) else extract(net, samples)
    name = net.distance_name(tap)
    real = Moments.of(train.taps[tap])
    result: dict[str, Any] = {name: frechet_distance(Moments.of(features.taps[tap]), real)}
    if val is not None:
        result[f"real_{name}"] = frechet_distance(Moments.of(val.taps[tap]), real)
    result["neighbour_similarity"] = _mean_similarity(features, train)
    if val is not None:
        result["real_neighbour_similarity"] = _mean_similarity(val, train)
    if classifier is not None:
        result |= _accuracies(features, val, classifier, class_names)
    result |= {"num_samples": len(features), "num_train": len(train), "num_val": len(val) if val is not None else 0}
    return result | {"reference_fingerprint": train.fingerprint, "warning": small_sample_warning(features, val, tap)}


def _mean_similarity(features: Features, train: Reference) -> float:
    return float(nearest_neighbours(features.taps["penultimate"], train.taps["penultimate"])[1].mean())


def _accuracies(
    features: Features, val: Reference | None, classifier: LinearClassifier, class_names: list[str] | None
) -> dict[str, Any]:
    names = class_names or [str(i) for i in range(classifier.num_classes)]
    agreement = _agreement(features, classifier)
    result: dict[str, Any] = {"class_accuracy": agreement.accuracy}
    if val is not None:
        result["real_class_accuracy"] = _agreement(val, classifier).accuracy
    result["accuracy_by_class"] = dict(zip(names, agreement.per_class))
    return result | {"confusion": agreement.confusion.tolist()}


def _agreement(features: Features, classifier: LinearClassifier) -> Agreement:
    return Agreement.of(classifier.predict(features.taps["penultimate"]), features.labels, classifier.num_classes)


def small_sample_warning(features: Features, val: Reference | None, tap: str) -> str:
    """A sentence to print beside the distance, or "" when there are pictures enough."""
    count, dim = len(features), features.taps[tap].shape[1]
    if count >= 50 * dim:
        return ""
    text = f"Frechet distance of {count} pictures in {dim} dimensions is biased upwards: compare equal counts only."
    if val is not None and len(val) != count:
        text += f" The floor of real pictures is measured with {len(val)}; {count} real ones would score otherwise."
    return text
