"""Crops against the recorded outputs of the official pipelines, and the determinism of Transform."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from core.errors import UserError
from core.images import to_model_range
from data.transforms import Transform, center_crop, random_crop, random_resized_crop, resize_crop, ten_crop, to_tensor

PARITY = Path(os.environ.get("TESSERA_PARITY", Path(__file__).parents[3] / "shared" / "parity"))


def fixture(name: str) -> dict[str, torch.Tensor]:
    path = PARITY / name
    if not path.is_file():
        pytest.skip(f"no parity fixture {path}: set TESSERA_PARITY")
    return load_file(path)


def picture(tensor) -> Image.Image:
    return Image.fromarray(tensor.numpy())


def same(image: Image.Image, expected: torch.Tensor) -> None:
    assert np.array_equal(np.array(image), expected.numpy())


def as_numbers(draws, image: Image.Image, size: int) -> tuple[float, float, float]:
    """Numbers in [0, 1) that stand for recorded integers (short side, top, left)."""
    short, top, left = (int(d) for d in draws)
    low, high = size, -(-size // 0.8)
    scale = short / min(image.size)
    rows, columns = round(image.height * scale) - size + 1, round(image.width * scale) - size + 1
    return (short - low + 0.5) / (high - low + 1), (top + 0.5) / rows, (left + 0.5) / columns


def test_center_crop_rectok():
    f = fixture("rectok/utils_data_lr_ema_fid.safetensors")
    for i in range(3):
        ours = to_model_range(Transform(32)(picture(f[f"inputs/img_{i}"]), (0, i)))
        torch.testing.assert_close(ours, f[f"outputs/pre_img_{i}"], rtol=0, atol=2e-7)


def test_center_crop_evaluation():
    f = fixture("evaluation/center_crop.safetensors")
    for case in "abcd":
        same(center_crop(picture(f[f"inputs/{case}/image"]), int(f[f"inputs/{case}/size"])), f[f"outputs/{case}/crop"])


def test_crops_dar():
    f = fixture("dar/image_ops.safetensors")
    for name in ("img_a", "img_b"):
        for size in (48, 64):
            image = picture(f[f"inputs/{name}"])
            numbers = as_numbers(f[f"inputs/draws_{name}_{size}"], image, size)
            same(center_crop(image, size), f[f"outputs/{name}_center{size}"])
            same(random_crop(image, size, numbers), f[f"outputs/{name}_random{size}"])


def test_crops_fqgan():
    f = fixture("fqgan/image_preprocessing.safetensors")
    image = picture(f["inputs/image_uint8"])
    same(center_crop(image, 48), f["outputs/center_crop"])
    same(random_crop(image, 48, as_numbers(f["inputs/random_crop_draws"], image, 48)), f["outputs/random_crop"])
    for view in range(10):
        same(ten_crop(image, 48, view), f["outputs/ten_crop"][view])


def test_crops_rear():
    f = fixture("rear/preprocess.safetensors")
    for i in range(3):
        image = picture(f[f"inputs/image_{i}"])
        same(center_crop(image, 32), f[f"outputs/image_{i}/adm_center_crop"])
        ten = torch.stack([Transform(32, crop="ten").apply_view(image, v) for v in range(10)])
        torch.testing.assert_close(ten / 255, f[f"outputs/image_{i}/ten_crop"], rtol=0, atol=1e-6)
        plain = to_tensor(resize_crop(image, 32, 32)) / 255
        torch.testing.assert_close(plain, f[f"outputs/image_{i}/wds_eval_transform"], rtol=0, atol=1e-6)


IMAGE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.mark.parametrize("crop", ["center", "random", "random_resized", "ten", "resize_center", "resize_random"])
@pytest.mark.parametrize("size", [(70, 50), (1, 1), (3, 90), (32, 32), (33, 300)])
def test_every_crop(crop, size):
    transform = Transform(32, crop=crop, flip=crop != "ten", short_side=36)
    image = IMAGE.resize(size)
    for position in range(4):
        out = transform(image, (7, position))
        assert out.shape == (3, 32, 32) and out.dtype == torch.uint8 and out.is_contiguous()
        assert torch.equal(out, transform(image, (7, position)))


def test_draws_depend_on_seed_and_position():
    transform = Transform(32, crop="random", flip=True)
    outs = [transform(IMAGE, key).numpy().tobytes() for key in ((0, 0), (0, 1), (1, 0), (0, 10**12))]
    assert len(set(outs)) == 4


def test_views():
    assert [Transform(8, flip=f).views for f in (False, True)] == [1, 2] and Transform(8, crop="ten").views == 10
    assert Transform(8, crop="random").views is None
    for crop in ("center", "ten", "resize_center"):
        transform, seen = Transform(16, crop=crop, flip=crop != "ten"), set()
        for position in range(100):
            view = transform.view_of((3, position))
            seen.add(view)
            assert torch.equal(transform(IMAGE, (3, position)), transform.apply_view(IMAGE, view))
        assert seen == set(range(transform.views))
    plain, mirrored = (Transform(16, flip=True).apply_view(IMAGE, v) for v in (0, 1))
    assert torch.equal(plain.flip(-1), mirrored)
    with pytest.raises(UserError, match="no fixed views"):
        Transform(8, crop="random").view_of((0, 0))


def test_random_crops_reach_every_edge():
    corner = Image.new("RGB", (40, 40))
    for low, high in ((0.0, 1 - 2**-53),):
        for crop, count in ((random_crop, 3), (random_resized_crop, 4)):
            for number in (low, high):
                assert crop(corner, 16, (number,) * count).size == (16, 16)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crop": "centre"}, "center"),
        ({"scale": [0.9, 0.1]}, "rising"),
        ({"scale": (0, 1)}, "rising"),
        ({"ratio": (2, 1)}, "rising"),
        ({"image_size": 0}, "at least 1"),
        ({"crop": "ten", "flip": True}, "mirror"),
        ({"short_side": 9}, "at least image_size"),
        ({"resample": "nearest"}, "unknown resample"),
        ({"crop_range": 0.5}, "at least 1"),
    ],
)
def test_transform_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        Transform(**{"image_size": 16, **options})
