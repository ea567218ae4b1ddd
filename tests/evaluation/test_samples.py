"""The offline feature network, and what the quickstart says of its samples."""

from __future__ import annotations

import pytest
import torch

from core.errors import UserError
from evaluation import measure, toy
from evaluation.networks import EfficientNetLite0, FeatureNet
from evaluation.work import Work


class ColourNet(FeatureNet):
    """Means and spreads of the colours: enough to tell pictures apart in microseconds."""

    name = "colours"
    dims = {"block4": 3, "penultimate": 6}

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def taps(self, pixels):
        mean, spread = pixels.mean((2, 3)) / 255, pixels.std((2, 3)) / 255
        return {"block4": mean, "penultimate": torch.cat((mean, spread), 1)}


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise whose brightest channel is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 128, (count, 3, 12, 12), generator=generator)
    images[torch.arange(count), labels] += 100
    return images.to(torch.uint8), labels


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("timm")
    return EfficientNetLite0(input_size=64)


def test_lite0_features(lite0):
    images = pictures(3, 0)[0]
    together = lite0.train()(images)
    assert together["block4"].shape == (3, 112) and together["penultimate"].shape == (3, 1280)
    assert lite0.name == "lite0_64px" and not together["block4"].requires_grad
    for name, values in lite0(images[1:2]).items():  # a picture's features do not depend on its batch
        torch.testing.assert_close(values[0], together[name][1], rtol=1e-4, atol=1e-4)


def test_lite0_penultimate_is_what_its_classifier_sees(lite0):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        want = lite0.net.forward_head(lite0.net.forward_features((pixels - 127) / 128), pre_logits=True)
        torch.testing.assert_close(lite0.taps(pixels)["penultimate"], want, rtol=1e-4, atol=1e-5)


def test_features_ignore_autocast(lite0):
    images = pictures(2, 0)[0]
    plain = lite0(images)["penultimate"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lite0(images)["penultimate"], plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_on_gpu_do_without_tf32(lite0):
    images = pictures(2, 0)[0]
    want = lite0(images)
    before = torch.backends.cudnn.allow_tf32
    moved = EfficientNetLite0(input_size=64).cuda()
    for name, values in moved(images.cuda()).items():
        torch.testing.assert_close(values.cpu(), want[name], rtol=1e-4, atol=1e-4)
    assert torch.backends.cudnn.allow_tf32 == before


def test_float_pictures_are_refused():
    with pytest.raises(UserError, match="uint8"):
        ColourNet()(torch.rand(1, 3, 8, 8))


def labelled(net: FeatureNet, images: torch.Tensor, labels: torch.Tensor) -> toy.Labelled:
    """Features as the quickstart takes them, on the commands' path."""
    real = {tap: torch.randn(20, width) for tap, width in net.dims.items()}
    how = measure.Evaluation(toy.FRECHET, net, measure.alone(torch.device("cpu")), 16, real=real)
    work = Work(len(images), how.world, chunk=16)
    result = how.of_samples(lambda indices: images[indices.start : indices.stop], work)
    return toy.Labelled(result.features, labels)


def test_samples_beside_real_pictures():
    net = ColourNet()
    train, val = (labelled(net, *pictures(90, seed)) for seed in (0, 1))
    model = toy.fit(train.features[toy.CLASS_TAP], train.labels, 3)

    def compare(images: torch.Tensor, labels: torch.Tensor) -> dict:
        return toy.compare(labelled(net, images, labels), train, val, net, model, ["red", "green", "blue"])

    images, labels = pictures(60, 2)
    good = compare(images, labels)
    assert good["class_accuracy"] == 1.0 and good["real_class_accuracy"] == 1.0
    assert good["accuracy_by_class"] == {"red": 1.0, "green": 1.0, "blue": 1.0}
    assert good["num_samples"] == 60 and good["num_train"] == 90 and good["num_val"] == 90
    assert torch.tensor(good["confusion"]).diagonal().tolist() == [20, 20, 20]
    assert "60 pictures in 3 dimensions is biased upwards" in good["warning"] and "measured with 90" in good["warning"]
    dark = compare(images // 2, labels.flip(0))
    assert dark["fd_colours_block4"] > 10 * good["fd_colours_block4"]
    assert dark["class_accuracy"] < 0.8
    copies = compare(*pictures(90, 0))
    assert copies["neighbour_similarity"] == pytest.approx(1.0, abs=1e-5)
    assert copies["real_neighbour_similarity"] < copies["neighbour_similarity"]
    assert abs(copies["fd_colours_block4"]) < 1e-9 < copies["real_fd_colours_block4"]
