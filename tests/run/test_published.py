"""The numbers of configs/ against the published recipes, which are stated here again: batch, length, rates, decay, clipping,
averages, loss weights, guidance. A rate is compared at steps of the run, not by the name of its schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from core.train.optim import Schedule, make_adamw
from run.load import load_config
from tokenizer.losses.dino_discriminator import DinoDiscriminator

IMAGES = 1281167


@dataclass
class Recipe:
    """`rates`: share of the run, or "N step" -> learning rate."""

    batch: int
    length: str
    betas: tuple[float, float]
    decay: float
    clip: float
    ema: list[float]
    rates: dict
    weights: dict = field(default_factory=dict)
    sample: dict = field(default_factory=dict)


RECTOK = {"reconstruction": 1.0, "perceptual": 1.0, "gan": 0.1}
FQGAN = {
    "reconstruction": 1.0,
    "perceptual": 1.0,
    "codebook": 1.0,
    "commitment": 0.25,
    "entropy": 0.03,
    "disentangle": 0.1,
    "semantic": 0.5,
    "gan": 0.5,
    "discriminator": 0.5,
}


def flat(lr: float) -> dict:
    return dict.fromkeys((0, 0.5, 0.99), lr)


def rear(lr: float, scale: float, power: float, temperature: float = 1.0) -> Recipe:
    rates = {0: 0.0, 0.125: lr / 2, 0.25: lr, 0.625: (lr + 1e-5) / 2, 1.0: 1e-5}
    sample = {"scale": scale, "power": power, "temperature": temperature, "schedule": "cosine"}
    return Recipe(2048, "250000step", (0.9, 0.96), 0.03, 1.0, [], rates, {}, sample)


def dit(length: str) -> Recipe:
    rates = {"40ep": 2e-4, "800ep": 2e-5, "420ep": 1.1e-4} if length == "800ep" else flat(2e-4)
    return Recipe(1024, length, (0.9, 0.95), 0.0, 1.0, [0.9995], rates, {}, {"scale": 1.0, "steps": 50})


def plus(**weights: float) -> Recipe:
    weights = {"reconstruction": 4.0, "perceptual": 0.1, "gan": 0.02, **weights}
    rates = {0: 0.0, "5000step": 1e-4, 1.0: 0.0}
    return Recipe(256, "1350000step", (0.9, 0.999), 1e-4, 1.0, [0.999], rates, weights)


FAR = Recipe(256, "300ep", (0.9, 0.95), 0.05, 1.0, [], flat(1e-4), {}, {"scale": 2.0, "temperature": 1.0})
FAR.sample |= {"top_k": 0, "top_p": 1.0}
DUAL = Recipe(256, "40ep", (0.9, 0.95), 0.0, 1.0, [], flat(2e-4), FQGAN)
# both teachers' terms count half; ours is the mean over teachers
TRIPLE = Recipe(256, "40ep", (0.9, 0.95), 0.0, 1.0, [], flat(2e-4), {**FQGAN, "semantic": 1.0})
GPT = Recipe(1024, "360000step", (0.9, 0.95), 0.05, 1.0, [0.9999], {0: 1e-4, "300000step": 1e-4})
GPT.rates |= {"330000step": 5.5e-5, "360000step": 1e-5}
IMAGEFOLDER = Recipe(
    1024,
    "200ep",
    (0.9, 0.95),
    0.0,
    0.0,
    [0.9999],
    {"0ep": 1e-5, "1ep": 2.4e-4, "100ep": 1.45e-4, "199ep": 5e-5},
    {
        "reconstruction": 1.0,
        "perceptual": 1.0,
        "codebook": 1.0,
        "commitment": 0.25,
        "contrast": 0.1,
        "gan": 0.5,
        "discriminator": 0.5,
    },
)
RECIPES = {
    "rectok/tokenizer": Recipe(
        1024,
        "200ep",
        (0.9, 0.95),
        1e-4,
        3.0,
        [0.999],
        {0: 0.0, "25ep": 2e-4, "50ep": 4e-4, "125ep": 2e-4, 1.0: 0.0},
        {**RECTOK, "kl": 1e-6, "semantic": 1.0},
    ),
    "rectok/decoder_finetune": Recipe(
        1024,
        "100ep",
        (0.9, 0.95),
        1e-4,
        3.0,
        [0.999],
        {0: 0.0, "5ep": 2e-4, 0.525: 1e-4, 1.0: 0.0},
        {**RECTOK, "kl": 0.0, "semantic": 0.0},
    ),
    "rectok/ditdh_xl": dit("800ep"),
    "rectok/ditdh_s": dit("30ep"),
    "fqgan/dual_ds16": DUAL,
    "fqgan/dual_ds8": DUAL,
    "fqgan/triple_ds16": TRIPLE,
    "fqgan/triple_ds8": TRIPLE,
    **{f"fqgan/far_{size}_{kind}": FAR for size in "bl" for kind in ("dual", "triple")},
    "rear/rear_s": rear(4e-4, 22.0, 2.75),
    "rear/rear_b": rear(4e-4, 15.0, 2.5),
    "rear/rear_l": rear(4e-4, 15.0, 2.5),
    "rear/rear_vqplus": rear(1e-4, 15.0, 2.5),
    "rear/rar_b": rear(4e-4, 16.0, 2.75),
    "rear/rar_l": rear(4e-4, 15.5, 2.5, 1.02),
    "rear/rar_xl": rear(4e-4, 6.9, 1.5, 1.02),
    "rear/rar_xxl": rear(4e-4, 8.0, 1.2, 1.02),
    "rear/vqgan_plus_tokenizer": plus(codebook=1.0, commitment=0.25),
    "rear/maskgit_vqgan_tokenizer": plus(codebook=0.25, commitment=1.0),  # the reverse, as its official code has it
    "dar/tokenizer": Recipe(
        512,
        "300000step",
        (0.9, 0.95),
        0.0,
        1.0,
        [0.999],
        {0: 0.0, "250step": 1e-4, "500step": 2e-4, 0.99: 2e-4},
        {"flow": 1.0, "codebook": 1.0, "commitment": 0.25, "perceptual": 0.5, "semantic": 0.5, "reconstruction": 0.0},
    ),
    "dar/ar_l": GPT,
    "dar/ar_xl": GPT,
    **{f"imagefolder/ms_pq2_{vocab}": IMAGEFOLDER for vocab in (4096, 8192, 16384)},
    "imagefolder/var_d17": Recipe(
        768,
        "350ep",
        (0.9, 0.95),
        0.05,
        2.0,
        [],
        {0: 1.2e-6, "7ep": 2.4e-4, "24ep": 2.4e-4, 1.0: 2.4e-6},
        {},
        {"scale": 4.25, "start": 1.0, "schedule": "linear", "top_k": 750, "top_p": 0.95},
    ),
}


def rate(config, optimizer, schedule, at) -> float:
    batch = config.train.global_batch
    epoch = IMAGES // batch * batch
    total = config.train.duration.images(epoch, batch)
    rates = Schedule.from_config(optimizer, schedule, global_batch=batch, images_per_epoch=epoch, total_images=total)
    if isinstance(at, str):
        return rates(type(config.train.duration)(at).images(epoch, batch))
    return rates(int(at * total) // batch * batch)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_published_numbers(name):
    config, wanted = load_config(f"configs/{name}.yaml", []), RECIPES[name]
    train = config.train
    assert (train.global_batch, str(train.duration), train.ema) == (wanted.batch, wanted.length, wanted.ema)
    optimizer = train.optimizer
    assert (tuple(optimizer.betas), optimizer.weight_decay) == (wanted.betas, wanted.decay)
    assert (optimizer.grad_clip, optimizer.eps, optimizer.weight_decay_end) == (wanted.clip, 1e-8, None)
    for at, lr in wanted.rates.items():
        assert rate(config, optimizer, train.schedule, at) == pytest.approx(lr, rel=2e-3, abs=1e-9), at
    assert {key: config.objective["weights"].get(key, 0.0) for key in wanted.weights} == wanted.weights
    assert {key: getattr(config.sample, key) for key in wanted.sample} == wanted.sample


def test_the_published_ends_of_imagefolders_discriminator():
    """Nothing for 56 epochs, then four of warm-up and a cosine of its own; everything is decayed."""
    config = load_config("configs/imagefolder/ms_pq2_4096.yaml", [])
    recipe = config.train.discriminator
    rates = {"56ep": 1e-5, "57ep": 2.075e-4, "58ep": 4.05e-4, "59ep": 6.025e-4, "60ep": 7.986e-4, "199ep": 5.009e-5}
    for at, lr in rates.items():
        assert rate(config, recipe.optimizer, recipe.schedule, at) == pytest.approx(lr, rel=1e-3), at
    assert recipe.optimizer.weight_decay == 5e-4 and config.objective["lecam"] == 0.001
    tiny = {"width": 24, "layers": 1, "heads": 3}
    judge = DinoDiscriminator(size=tiny, depths=[0], kernel=3, pretrained=False)
    (group,) = make_adamw(judge, recipe.optimizer).param_groups
    assert group["weight_decay"] == 5e-4 and len(group["names"]) == len(dict(judge.named_parameters()))
    assert config.objective["adaptive_weight"] and str(config.objective["gan_start"]) == "56ep"


@pytest.mark.parametrize(
    "name, gate, value",
    [
        ("rectok/tokenizer", "gan_start_epoch", 100.0),
        ("rectok/decoder_finetune", "gan_start_epoch", 0.0),
        ("fqgan/dual_ds16", "gan_start", "19999step"),
        ("rear/vqgan_plus_tokenizer", "gan_start", "20000step"),
    ],
)
def test_discriminators_begin_when_published(name, gate, value):
    assert str(load_config(f"configs/{name}.yaml", []).objective[gate]) == str(value)


@pytest.mark.parametrize("name", ["fqgan/dual_ds16", "imagefolder/ablation_6"])
def test_patchgans_begin_as_pix2pix_does(name):
    """RecTok's keeps the defaults of PyTorch."""
    assert load_config(f"configs/{name}.yaml", []).discriminator == {"name": "patchgan", "init": "normal"}
    assert "init" not in load_config("configs/rectok/tokenizer.yaml", []).discriminator


@pytest.mark.parametrize("name, order", [("rear_s", 15), ("rear_b", 18), ("rear_l", 18)])
def test_rears_noise_and_layers(name, order):
    settings = load_config(f"configs/rear/{name}.yaml", []).generator
    rear = {"noise": "switch", "anneal": [0.0, 0.75], "encode_layer": 0, "decode_layer": order, "weight": 1.0}
    assert {key: settings["rear"][key] for key in rear} == rear and settings["rear"]["projection"] == 2048
    assert load_config("configs/rear/rar_b.yaml", []).generator["permute"] == [0.5, 0.75]
