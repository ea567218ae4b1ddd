"""FID's network and the offline one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from core.errors import UserError
from core.weights.released import Released
from evaluation import networks
from evaluation.networks import DIMS, EfficientNetLite0, Inception, InceptionV3, full_precision, resize_tf1
from tests.evaluation.conftest import ColourNet, coloured
from tests.parity.evaluation_images import inception_recipe


# ---------------------------------------------------------------------------------------------------------------------
# Inception
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def weights():
    return inception_recipe(seed=5)


@pytest.fixture(scope="module")
def pictures():
    return torch.randint(0, 256, (3, 3, 40, 52), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_names_and_sizes():
    own = InceptionV3().state_dict()
    assert len(own) == 566 and sum(p.numel() for p in InceptionV3().parameters()) == 23_850_960
    assert list(own)[:6] == [
        f"Conv2d_1a_3x3.{n}"
        for n in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    ]
    assert own["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert own["Mixed_6d.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)


def test_resize_known_values():
    row = torch.tensor([0.0, 10.0, 30.0]).expand(1, 1, 2, 3)
    wider = resize_tf1(row, 2, 6)[0, 0, 0]
    assert wider.tolist() == [0, 5, 10, 20, 30, 30]  # no half pixels; the last column has nothing to its right
    assert torch.equal(resize_tf1(row, 2, 3), row)
    assert resize_tf1(torch.arange(8.0).view(1, 1, 1, 8), 1, 4)[0, 0, 0].tolist() == [0, 2, 4, 6]  # nothing is averaged


@pytest.mark.slow
def test_equals_torch_fidelity_and_ignores_the_batch(weights, pictures, tmp_path):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = tmp_path / "weights.pth"
    torch.save(weights, file)
    names = ["64", "192", "768", "2048", "logits_unbiased"]
    judge = FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=file)
    net = Inception(file, taps=tuple(DIMS))
    with torch.no_grad():
        theirs = dict(zip(names, judge(pictures)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = net(pictures)
    for tap, name in (("64", "64"), ("192", "192"), ("768", "768"), ("pool", "2048"), ("logits", "logits_unbiased")):
        torch.testing.assert_close(ours[tap], theirs[name], rtol=0, atol=1e-5 * float(theirs[name].abs().max()))
    single = net(pictures[1:2])
    for tap in DIMS:
        assert ours[tap].shape == (3, DIMS[tap]) and ours[tap].dtype == torch.float32
        torch.testing.assert_close(single[tap], ours[tap][1:2], rtol=0, atol=1e-5 * float(ours[tap].abs().max()))
    # height, width, channel: TensorFlow's order
    maps = net.net.Mixed_6d(torch.rand(1, 768, 17, 17))
    assert maps.shape == (1, 768, 17, 17)
    exact = Inception(weights, dtype=torch.float64)(pictures[:1])
    assert exact["pool"].dtype == torch.float64
    torch.testing.assert_close(exact["pool"].float(), ours["pool"][:1], rtol=0, atol=1e-5 * float(ours["pool"].max()))
    assert not torch.equal(exact["pool"].float(), ours["pool"][:1])


def test_spatial_order(weights, pictures, monkeypatch):
    """Index (h * 17 + w) * 7 + c of the first seven channels of Mixed_6d's first branch."""
    net = Inception(weights, taps=("spatial",))
    seen = {}
    net.net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: seen.update(out=out))
    spatial = net(pictures[:1])["spatial"]
    assert spatial.shape == (1, 2023)
    assert spatial[0, (4 * 17 + 9) * 7 + 3] == seen["out"][0, 3, 4, 9]


def test_pytorch_fid_input(weights, pictures):
    net = Inception(weights, taps=("64",), preprocess="pytorch_fid")
    expected = F.interpolate(pictures.float() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    torch.testing.assert_close(net.net(expected)["64"], net(pictures)["64"])
    assert net.distance_name("pool").startswith("fd_") and "pytorch_fid" in net.name


def test_only_the_published_weights_give_a_fid(weights, monkeypatch):
    net = Inception(weights)
    assert net.distance_name("pool") == "fd_inception_custom_pool"
    monkeypatch.setattr(networks, "load_inception_weights", lambda given: (weights, "6726825d" + "0" * 56))
    assert Inception().distance_name("pool") == "fid" and Inception().distance_name("spatial") == "sfid"
    assert Inception(preprocess="pytorch_fid").distance_name("pool") == "fid_pytorch_fid"
    assert Inception().distance_name("logits") == "fd_inception_logits"


def test_wrong_weights_are_refused(weights, tmp_path):
    torchvision_like = dict(weights) | {"fc.weight": torch.zeros(1000, 2048)}
    with pytest.raises(UserError, match=r"fc.weight of shape \(1000, 2048\).*not FID"):
        Inception(torchvision_like)
    missing, file = "Mixed_7a.branch3x3_1.conv.weight", tmp_path / "a.safetensors"
    save_file({name: t for name, t in weights.items() if name != missing}, file)
    with pytest.raises(UserError, match=f"no {missing}"):
        Inception(file)
    without_counters = {name: t for name, t in weights.items() if not name.endswith("num_batches_tracked")}
    assert Inception(without_counters).dims == {"pool": 2048, "spatial": 2023, "logits": 1008}
    with pytest.raises(UserError, match='no tap "pol".*"pool"'):
        Inception(weights, taps=("pol",))


def test_missing_weights_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(Released, "found", lambda self: None)
    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    with pytest.raises(
        UserError, match="switched off.*pretrained_models/weights-inception.*run_download.sh weights-inception"
    ):
        Inception()
    with pytest.raises(UserError, match="nowhere.pth"):
        Inception("nowhere.pth")
    (tmp_path / networks.WEIGHTS_FILE).write_bytes(b"damaged")
    monkeypatch.setattr(Released, "found", lambda self: tmp_path / self.name)
    with pytest.raises(UserError, match="not the published file"):
        Inception()


def test_floats_and_training_mode(weights, pictures):
    net = Inception(weights, taps=("64",)).train()
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with pytest.raises(UserError, match="uint8"):
        net(pictures.float())


def test_full_precision_restores_what_was_set():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), full_precision():
        assert conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
        raise ZeroDivisionError
    assert (conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == before


# ---------------------------------------------------------------------------------------------------------------------
# The offline network
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("timm")
    return EfficientNetLite0(input_size=64)


def test_lite0_features(lite0):
    images = coloured(3, 0)[0]
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
    images = coloured(2, 0)[0]
    plain = lite0(images)["penultimate"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lite0(images)["penultimate"], plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_on_gpu_do_without_tf32(lite0):
    images = coloured(2, 0)[0]
    want = lite0(images)
    before = torch.backends.cudnn.allow_tf32
    moved = EfficientNetLite0(input_size=64).cuda()
    for name, values in moved(images.cuda()).items():
        torch.testing.assert_close(values.cpu(), want[name], rtol=1e-4, atol=1e-4)
    assert torch.backends.cudnn.allow_tf32 == before


def test_float_pictures_are_refused():
    with pytest.raises(UserError, match="uint8"):
        ColourNet()(torch.rand(1, 3, 8, 8))
