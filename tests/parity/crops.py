"""Crops and pixel values of FQGAN, reAR and D-AR: one set of functions for all of them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.images import to_model_range, to_uint8
from data.transforms import Transform, adm_resize, random_crop
from tests.parity import Case, kind
from tests.parity.fields import FieldError, notes, reads
from tests.parity.fqgan_tokenizer import SURE, TOKENIZER, build_tokenizer
from tokenizer.adapters.fqgan import ADAPTER

SCALE = (0.8, 1.0)
VERSIONS = notes("what recorded it", "pillow torchvision")


def picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.numpy())


def hwc(image: Image.Image | Tensor) -> Tensor:
    return torch.from_numpy(np.array(image)) if isinstance(image, Image.Image) else image.permute(1, 2, 0)


def center(image: Image.Image, size: int) -> Tensor:
    return Transform(size).apply_view(image, 0)


def ten(image: Image.Image, size: int, crop_range: float = 1.1) -> Tensor:
    """(10, 3, size, size) uint8"""
    transform = Transform(size, crop="ten", crop_range=crop_range)
    return torch.stack([transform.apply_view(image, view) for view in range(10)])


def numbers(image: Image.Image, size: int, draws: Tensor) -> tuple[float, float, float]:
    """The numbers in [0, 1) that stand for recorded draws: short side, top and left edge."""
    short_side, top, left = draws.tolist()
    low, high = math.ceil(size / SCALE[1]), math.ceil(size / SCALE[0])
    width, height = adm_resize(image, short_side).size

    def middle(value: int, low: int, high: int) -> float:
        return (value - low + 0.5) / (high - low + 1)

    return middle(short_side, low, high), middle(top, 0, height - size), middle(left, 0, width - size)


def random(image: Image.Image, size: int, draws: Tensor) -> Tensor:
    return hwc(random_crop(image, size, numbers(image, size, draws), SCALE))


@kind("fqgan", "preprocess", VERSIONS | reads("image_size crop_range ten_crop_source_size"))
def fqgan_preprocess(case: Case) -> dict[str, Tensor]:
    size, image = case.config["image_size"], picture(case.inputs["image_uint8"])
    if case.config.get("ten_crop_source_size", int(size * case.config["crop_range"])) != int(
        size * case.config["crop_range"]
    ):
        raise FieldError("ten crops come from a picture of int(image_size crop_range)")
    crop = center(image, size)
    return {
        "center_crop": hwc(crop),
        "center_crop_tensor": to_model_range(crop),
        "random_crop": random(image, size, case.inputs["random_crop_draws"]),
        "ten_crop": ten(image, size, case.config["crop_range"]).permute(0, 2, 3, 1),
        "to_uint8": to_uint8(case.inputs["values"], "plus128"),
    }


@kind("fqgan", "extract_codes", TOKENIZER | reads("crop_range"))
@torch.no_grad()
def fqgan_extract_codes(case: Case) -> dict[str, Tensor]:
    """From a picture to the codes of its ten crops, as they are stored."""
    tokenizer = build_tokenizer(dataclasses.replace(case, weights={}))  # the fixture has no decoder
    given = {name: tensor.float() for name, tensor in case.weights.items()}
    ADAPTER.load(tokenizer.eval(), {**ADAPTER.restore(tokenizer), **given})
    images = to_model_range(ten(picture(case.inputs["image_uint8"]), tokenizer.image_size, case.config["crop_range"]))
    codes, vectors, result = tokenizer.precompute(images), tokenizer.vectors(images), {}
    for k, name in enumerate(tokenizer.names):
        margin, recorded = case.outputs[f"index_margin_{name}"], case.outputs[name]
        distances = tokenizer.quantizers[name].distances(vectors[name])
        result[f"index_margin_{name}"] = distances.topk(2, largest=False).values.diff(dim=-1).view_as(margin)
        result[name] = torch.where(margin > SURE, codes[..., k].view_as(recorded), recorded)
    return result


@kind("dar", "image_ops", VERSIONS | notes("the draws name them", "sizes").below("options"))
def dar_image_ops(case: Case) -> dict[str, Tensor]:
    floats = case.inputs["float_img"]
    result = {"to_uint8_sample": to_uint8(floats, "plus128"), "to_uint8_gt": to_uint8(floats).permute(0, 2, 3, 1)}
    for name in (n for n in case.inputs if n.startswith("draws_")):
        stem, size = name.removeprefix("draws_").rsplit("_", 1)
        image, size = picture(case.inputs[stem]), int(size)
        result[f"{stem}_center{size}"] = hwc(center(image, size))
        result[f"{stem}_random{size}"] = random(image, size, case.inputs[name])
    return result


@kind("rear", "pre", VERSIONS | reads("img_size"))
def rear_preprocess(case: Case) -> dict[str, Tensor]:
    size, result = case.config["img_size"], {}
    plain = Transform(size, crop="resize_center")
    for name, pixels in case.inputs.items():
        image = picture(pixels)
        result[f"{name}/adm_center_crop"] = hwc(center(image, size))
        result[f"{name}/ten_crop"] = ten(image, size) / 255
        result[f"{name}/wds_eval_transform"] = plain.apply_view(image, 0) / 255
    return result
