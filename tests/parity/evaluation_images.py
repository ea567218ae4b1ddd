"""Evaluation fixtures about pictures: Inception, its resize, LPIPS, PSNR, SSIM, uint8 conversions, the centre crop."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from core.images import to_uint8, to_unit_range
from core.nn.lpips import LPIPS
from data.transforms import center_crop, to_tensor
from evaluation.images import psnr, ssim
from evaluation.networks import DIMS, Inception, InceptionV3, resize_tf1
from tests.parity import Case, Tolerance, kind
from tests.parity.fields import Known, notes, only, reads

WORDS = notes("a formula in words", "recipe keys lin_file_md5 normalise") | notes(
    "what recorded it", "pillow skimage torchmetrics"
)


def rows_last(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C)."""
    return images.permute(0, 2, 3, 1)


def channels_first(images: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W)."""
    return images.permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Networks with weights from a recipe
# ---------------------------------------------------------------------------------------------------------------------
def inception_recipe(seed: int) -> dict[str, Tensor]:
    """The weights that the fixture describes in words."""
    rng, weights = np.random.RandomState(seed), {}
    for name, tensor in InceptionV3().state_dict().items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros_like(tensor)
            continue
        z = rng.standard_normal(tensor.numel()).reshape(tensor.shape)
        if name.endswith("running_var"):
            z = abs(1 + 0.1 * z)
        elif name.endswith("bn.weight"):
            z = 1 + 0.1 * z
        elif z.ndim == 4:
            z = z * np.sqrt(2 / np.prod(z.shape[1:]))
        else:
            z = z * (0.05 if z.ndim == 2 else 0.1)
        weights[name] = torch.from_numpy(z.astype(np.float32))
    return weights


@kind(
    "evaluation",
    "inception",
    reads("seed") | WORDS,
    lambda case, name: Tolerance(1e-9 if name.startswith("check/") else 1e-4, 0.0),
)
def inception(case: Case) -> dict[str, Tensor]:
    weights = inception_recipe(case.config["seed"])
    net = Inception(weights, taps=tuple(DIMS))
    found = net(channels_first(case.inputs["images_uint8_nhwc"]))
    result = {f"pool_{tap}": found[tap] for tap in ("64", "192", "768")} | {"pool_2048": found["pool"]}
    result |= {"logits_unbiased": found["logits"], "logits": found["logits"] + net.net.fc.bias}
    result["spatial_2023_hwc"] = found["spatial"]
    first = next(iter(weights.values()))
    return result | {
        "check/first_weight_8": first.flatten()[:8],
        "check/fc_weight_8": weights["fc.weight"].flatten()[:8],
        "check/abs_sum": sum(w.double().abs().sum() for w in weights.values()),
    }


def lpips_from_recipe(case: Case) -> LPIPS:
    net, rng = LPIPS("vgg16", pretrained=False), np.random.RandomState(case.config["seed"])
    for layer in net.backbone:
        if isinstance(layer, nn.Conv2d):
            for tensor, scale in ((layer.weight, np.sqrt(2 / layer.weight[0].numel())), (layer.bias, 0.05)):
                z = rng.standard_normal(tensor.numel()).reshape(tensor.shape)
                tensor.data.copy_(torch.from_numpy((z * scale).astype(np.float32)))
    for index, head in enumerate(net.heads):
        head.weight.data.copy_(case.inputs[f"lin/lin{index}.model.1.weight"])
    return net


@kind(
    "evaluation",
    "lpips",
    reads("seed") | WORDS,
    lambda case, name: Tolerance(1e-9 if name.startswith("check/") else 1e-4, 0.0),
)
def lpips(case: Case) -> dict[str, Tensor]:
    net = lpips_from_recipe(case)
    a, b = to_unit_range(case.inputs["a_pm1"]), to_unit_range(case.inputs["b_pm1"])
    result = {"lpips_pm1": net(a, b), "lpips_if_fed_01": net(to_unit_range(a), to_unit_range(b))}
    x = net.normalise(a * 2 - 1)
    names = iter(("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"))
    for index, layer in enumerate(net.backbone):
        x = layer(x)
        if index in net.taps:
            result[f"feat_mean/{next(names)}"] = x.mean((1, 2, 3))
    return result | {"check/slice1_8": net.backbone[0].weight.flatten()[:8]}


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------
@kind(
    "evaluation",
    "resize",
    only(align_corners=False, half_pixel_centers=False) | WORDS,
    lambda case, name: Tolerance(1e-6 if name.endswith(("sum", "sumsq")) else 0.0, 2e-6),
)
def resize(case: Case) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, image in case.inputs.items():
        name = name.removesuffix("/image_nhwc")
        geometry = case.outputs[f"{name}/size_and_stride"]  # recorded beside the outputs, but it is what was asked for
        height, width, stride = geometry.tolist()
        full = rows_last((resize_tf1(channels_first(image).float(), height, width) - 128.0) / 128.0)
        result[f"{name}/size_and_stride"] = geometry
        result[f"{name}/resized_normalised_nhwc"] = full[:, ::stride, ::stride]
        result |= {f"{name}/sum": full.double().sum(), f"{name}/sumsq": full.double().square().sum()}
    return result


def exactly(case: Case, name: str) -> Tolerance:
    return Tolerance(0.0, 0.0, off_by_one=0.0)


@kind("evaluation", "uint8", Known(), exactly)
def uint8(case: Case) -> dict[str, Tensor]:
    y = (case.inputs["levels"].float() / 255.0 - 0.5) / 0.5
    truncated = to_uint8(y, "truncate")
    return {
        "pm1": y,
        "dar_gt": truncated,
        "half_255_trunc": truncated,
        "half_255_round": to_uint8(y, "nearest"),
        "pm1_128_trunc": to_uint8(y, "plus128"),
    }


def image_tolerance(case: Case, name: str) -> Tolerance:
    return Tolerance(0.0, 1e-4 if "psnr" in name else 1e-5, off_by_one=0.0)


@kind("evaluation", "image_metrics", WORDS, image_tolerance)
def image_metrics(case: Case) -> dict[str, Tensor]:
    image, recon = case.inputs["image_pm1"], case.inputs["recon_pm1"]
    truncated, plus128 = rows_last(to_uint8(recon, "truncate")), rows_last(to_uint8(recon, "plus128"))
    result = {f"{name}_uint8": truncated for name in ("rectok", "rear", "imagefolder_gen")}
    result |= {"llamagen_uint8": plus128, "round_uint8": rows_last(to_uint8(recon, "nearest"))}
    result |= {f"{name}_uint8": rows_last(to_uint8(image, "truncate")) for name in ("dar_gt", "gt_rear")}
    result["imagefolder_gt_uint8"] = rows_last(to_uint8(image, "plus128"))
    original, floats = to_unit_range(image), to_unit_range(recon, clamp=True)
    as_file = channels_first(plus128).float() / 255.0
    result["rectok_psnr"] = psnr(original, floats).float()
    result["llamagen_psnr"] = psnr(original, as_file)
    for name, variant in (
        ("llamagen_ssim", "ssim_llamagen"),
        ("skimage_ssim_range1", "ssim"),
        ("skimage_ssim_gauss", "ssim_gauss"),
    ):
        result[name] = ssim(original, as_file, variant)
    return result | {"torchmetrics_ssim_gauss11": ssim(original, floats, "ssim_torchmetrics").float()}


@kind("evaluation", "center_crop", WORDS, lambda case, name: Tolerance(0.0, 0.0, off_by_one=1e-2))
def centre_crop(case: Case) -> dict[str, Tensor]:
    """Exact with the Pillow that recorded it; other builds may differ by a level."""
    result = {}
    for name in (n.removesuffix("/image") for n in case.inputs if n.endswith("/image")):
        image = Image.fromarray(case.inputs[f"{name}/image"].numpy())
        result[f"{name}/crop"] = to_tensor(center_crop(image, int(case.inputs[f"{name}/size"]))).permute(1, 2, 0)
    return result
