"""What the quickstart says of its samples: classes, neighbours, all of it beside real pictures."""

from __future__ import annotations

import pytest
import torch

from core.errors import UserError
from evaluation import measure, toy
from evaluation.chunks import Work
from evaluation.networks import FeatureNet
from tests.evaluation.conftest import ColourNet, coloured


# ---------------------------------------------------------------------------------------------------------------------
# Classes and neighbours
# ---------------------------------------------------------------------------------------------------------------------
def normal64(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blobs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(60) % 3
    centres = 4 * torch.eye(3, 8, dtype=torch.float64)
    x = centres[labels] + normal64(60, 8, seed=seed)
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
    queries, references = normal64(9, 6).float(), normal64(31, 6, seed=1).float()
    references[20] = references[3] * 2  # equal by cosine: the first must win
    queries[0] = references[3]
    similarity = torch.nn.functional.cosine_similarity(queries[:, None], references[None], dim=2)
    for block in (4, 31, 1000):
        index, value = toy.nearest_neighbours(queries, references, block)
        torch.testing.assert_close(value, similarity.max(1).values, atol=1e-6, rtol=0)
        assert index[1:].tolist() == similarity.argmax(1)[1:].tolist()
        assert index[0] == 3 and value[0] == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------------------------------
def labelled(net: FeatureNet, images: torch.Tensor, labels: torch.Tensor) -> toy.Labelled:
    """Features as the quickstart takes them, on the commands' path."""
    real = {tap: torch.randn(20, width) for tap, width in net.dims.items()}
    how = measure.Evaluation(toy.FRECHET, net, measure.alone(torch.device("cpu")), 16, real=real)
    work = Work(len(images), how.world, chunk=16)
    result = how.of_samples(lambda indices: images[indices.start : indices.stop], work)
    return toy.Labelled(result.features, labels)


def test_samples_beside_real_pictures():
    net = ColourNet()
    train, val = (labelled(net, *coloured(90, seed)) for seed in (0, 1))
    model = toy.fit(train.features[toy.CLASS_TAP], train.labels, 3)

    def compare(images: torch.Tensor, labels: torch.Tensor) -> dict:
        return toy.compare(labelled(net, images, labels), train, val, net, model, ["red", "green", "blue"])

    images, labels = coloured(60, 2)
    good = compare(images, labels)
    assert good["class_accuracy"] == 1.0 and good["real_class_accuracy"] == 1.0
    assert good["accuracy_by_class"] == {"red": 1.0, "green": 1.0, "blue": 1.0}
    assert good["num_samples"] == 60 and good["num_train"] == 90 and good["num_val"] == 90
    assert torch.tensor(good["confusion"]).diagonal().tolist() == [20, 20, 20]
    assert "60 pictures in 3 dimensions is biased upwards" in good["warning"] and "measured with 90" in good["warning"]
    dark = compare(images // 2, labels.flip(0))
    assert dark["fd_colours_block4"] > 10 * good["fd_colours_block4"]
    assert dark["class_accuracy"] < 0.8
    copies = compare(*coloured(90, 0))
    assert copies["neighbour_similarity"] == pytest.approx(1.0, abs=1e-5)
    assert copies["real_neighbour_similarity"] < copies["neighbour_similarity"]
    assert abs(copies["fd_colours_block4"]) < 1e-9 < copies["real_fd_colours_block4"]
