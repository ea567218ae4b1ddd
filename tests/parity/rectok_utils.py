"""RecTok's utilities: preprocessing, pixel values, schedules, averages and the arithmetic of FID and IS."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor, nn

from core.images import to_model_range, to_uint8
from core.nn.embed import resize_positions
from core.schema import Duration, OptimizerConfig, ScheduleConfig
from core.train.ema import Ema
from core.train.optim import Schedule
from data.loader import part
from data.transforms import Transform
from evaluation.distances import Moments, frechet_distance, inception_score
from evaluation.images import psnr
from tests.parity import Case, kind
from tests.parity.fields import reads

IMAGES_PER_EPOCH = 1_281_167 - 1_281_167 % 1000  # any size in which fractions of an epoch are whole pictures


def schedule(recipe: dict) -> Schedule:
    """The official settings as ours."""
    shape = recipe.get("ditdh_sched", False)
    for name in ("lr_sched", "warmup_epochs", "warmup_start_epoch", "warmup_end_epoch"):
        recipe.get(name)  # one or the other pair counts
    if shape and shape != "none":  # constant, then a decay between two epochs; its warm-up is only the wait before it
        shape = recipe["lr_sched"] if shape is True else shape
        ours = ScheduleConfig(
            shape,
            Duration("0ep"),
            recipe["min_lr"],
            Duration(f"{recipe['warmup_start_epoch']}ep"),
            Duration(f"{recipe['warmup_end_epoch']}ep"),
        )
    else:
        ours = ScheduleConfig(recipe["lr_sched"], Duration(f"{recipe['warmup_epochs']}ep"), recipe["min_lr"])
    return Schedule.from_config(
        OptimizerConfig(lr=recipe["lr"]),
        ours,
        global_batch=1,
        images_per_epoch=IMAGES_PER_EPOCH,
        total_images=recipe["epochs"] * IMAGES_PER_EPOCH,
    )


def average(first: Tensor, weights: Tensor, decay: float) -> Tensor:
    """An EMA that starts at `first` and follows `weights`."""
    network = nn.Linear(1, 1, bias=False)
    network.weight = nn.Parameter(first.clone())
    ema = Ema(network, [decay])
    for weight in weights:
        network.weight.data.copy_(weight)
        ema.update()
    return ema.state(decay)["weight"]


@kind(
    "rectok",
    "utils",
    reads(
        "img_size ranks ema_decay new_len lr.*.ditdh_sched lr.*.lr lr.*.min_lr lr.*.warmup_epochs lr.*.epochs lr.*.lr_sched"
        " lr.*.warmup_start_epoch lr.*.warmup_end_epoch"
    ),
)
def utils(case: Case) -> dict[str, Tensor]:
    inputs, config = case.inputs, case.config
    result: dict[str, Tensor] = {}
    transform = Transform(image_size=config["img_size"], crop="center", flip=False)
    for name in (n for n in inputs if n.startswith("img_")):
        pixels = transform.apply_view(Image.fromarray(inputs[name].numpy()), 0)
        result[f"pre_{name}"] = to_model_range(pixels)
    result["psnr"] = psnr(inputs["a"], inputs["b"]).float()
    result["uint8"] = to_uint8(inputs["b"] * 2 - 1).permute(0, 2, 3, 1)
    # Recorded of a bf16 picture in [0, 1]. bf16 cannot hold most of those values in [-1, 1], so fp32 carries them there.
    result["uint8_bf16"] = to_uint8(inputs["b"].bfloat16().float() * 2 - 1).permute(0, 2, 3, 1)
    for name, recipe in config["lr"].items():
        curve = schedule(recipe)
        epochs = inputs[f"epochs_{name}"].tolist()
        result[f"lr_{name}"] = torch.tensor([curve(round(e * IMAGES_PER_EPOCH)) for e in epochs], dtype=torch.float64)
    for i, (count, world, rank) in enumerate(config["ranks"]):
        mine = part(count, rank, world)
        result[f"rank_range_{i}"] = torch.tensor([mine.start, mine.stop])
    result["ema_weight"] = average(inputs["ema_w0"], inputs["ema_w"], config["ema_decay"])
    side = round(config["new_len"] ** 0.5)
    result["pos_embed_resized"] = resize_positions(inputs["pos_embed"], (side, side))
    first, second = Moments.of(inputs["fid_f1"]), Moments.of(inputs["fid_f2"])
    result["fid_mu1"], result["fid_sigma1"] = first.mean.float(), first.covariance
    result["fid"] = torch.tensor(frechet_distance(first, second), dtype=torch.float64)
    mean, std = inception_score(inputs["isc_logits"])
    result["isc_mean"], result["isc_std"] = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
    return result
