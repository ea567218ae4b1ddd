"""Any tokenizer with any generator that fits its latents: configs/mix, the native pairs, and the pairs that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from core import promises
from core.errors import UserError
from core.rng import Draws
from core.specs import Codes, Continuous, MultiScale
from generator import GENERATORS
from run.load import check_kind, introduce, load_config
from run.train import train
from tests.conftest import ROOT
from tokenizer import TOKENIZERS
from tokenizer.views import Vectors, view

CONV = {"image_size": 16, "channels": 4, "channel_mult": [1, 1, 2], "res_blocks": 1, "groups": 2, "code_dim": 4}
TINY = {"width": 16, "layers": 1, "heads": 2}
TOKENIZERS_TO_TRY = {  # name -> arguments at toy size
    "rectok": {"image_size": 32, "channels": 8, "encoder": TINY, "decoder": TINY},
    "fqgan": {
        "image_size": 16,
        "branches": 2,
        "size": [1, 1, 1],
        "channels": 8,
        "res_blocks": 1,
        "z_channels": 8,
        "groups": 4,
        "vocab": 32,
        "code_dim": 4,
        "adapter_layers": 1,
        "adapter_heads": 2,
    },
    "maskgit_vqgan": {**CONV, "vocab": 32},
    "vqgan_plus": {**CONV, "vocab": 32},
    "fsq": {**{k: v for k, v in CONV.items() if k != "code_dim"}, "levels": [4, 4, 2]},
    "titok": {
        "image_size": 16,
        "patch_size": 8,
        "encoder": TINY,
        "decoder": TINY,
        "latents": 6,
        "vocab": 32,
        "code_dim": 4,
    },
    "dar": {
        "image_size": 32,
        "patch_size": 8,
        "encoder_width": 32,
        "encoder_layers": 1,
        "condition_width": 32,
        "condition_layers": 1,
        "length": 16,
        "groups": 4,
        "steps": 4,
        "vocab": 32,
        "head_dim": 16,
        "decoder": {"width": 32, "depth": 1, "patch_size": 8},
    },
    "imagefolder": {
        "image_size": 32,
        "patch_size": 8,
        "encoder": TINY,
        "decoder": TINY,
        "latent_grid": 3,
        "scales": [1, 2, 3],
        "branches": 2,
        "vocab": 32,
        "code_dim": 8,
    },
}
GENERATORS_TO_TRY = {
    "dit_dh": {
        "size": {
            "trunk_width": 32,
            "trunk_depth": 1,
            "trunk_heads": 2,
            "head_width": 48,
            "head_depth": 1,
            "head_heads": 2,
        }
    },
    "far": {"size": {**TINY, "head_layers": 1, "hidden": 32}},
    "gpt": {"size": {**TINY, "head_layers": 1, "hidden": 32}},
    "rar": {"size": {**TINY, "hidden": 32}, "rear": {"projection": 16, "decode_layer": 0, "encode_layer": 0}},
    "var": {"depth": 1, "width": 32, "heads": 2},
}
NATIVE = [
    ("rectok", None, "dit_dh"),
    ("fqgan", None, "far"),
    ("maskgit_vqgan", None, "rar"),
    ("dar", None, "gpt"),
    ("imagefolder", None, "var"),
]
FILES = sorted((ROOT / "configs" / "mix").glob("*.yaml"))


def pair_of(path: Path) -> tuple[str, str | None, str]:
    """(tokenizer, view, generator) of a config, without what it stands on."""
    content = yaml.safe_load(path.read_text())
    tokenizer, generator = path.stem.split("__")
    assert content["tokenizer"]["name"] == tokenizer
    return tokenizer, content["tokenizer"].get("view"), generator


PAIRS = NATIVE + [pair_of(path) for path in FILES]


def toy_tokenizer(name: str, seen_as: str | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    return view(TOKENIZERS.build({"name": name, **TOKENIZERS_TO_TRY[name]}), seen_as).eval()


def toy_generator(name: str, tokenizer: torch.nn.Module) -> torch.nn.Module:
    return GENERATORS.build({"name": name, **GENERATORS_TO_TRY[name]}, num_classes=4, **tokenizer.spec.sizes())


def test_every_registered_network_is_tried():
    assert set(TOKENIZERS_TO_TRY) == set(TOKENIZERS.entries) and set(GENERATORS_TO_TRY) == set(GENERATORS.entries)
    assert len(PAIRS) == len(set(PAIRS)) >= 12 and {t for t, _, _ in PAIRS} == set(TOKENIZERS.entries)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipes_say_what_they_are(path):
    config = load_config(str(path), [])
    assert config.name == path.stem and config.generator["name"] == pair_of(path)[2]


@pytest.mark.parametrize("tokenizer, seen_as, generator", PAIRS, ids=lambda value: str(value))
def test_a_pair_trains_and_samples(tokenizer, seen_as, generator, tmp_path):
    import yaml

    run = {
        "name": "pair",
        "task": "generator",
        "work_dir": str(tmp_path),
        "tokenizer": {"name": tokenizer, **TOKENIZERS_TO_TRY[tokenizer], "view": seen_as},
        "generator": {"name": generator, **GENERATORS_TO_TRY[generator]},
        "data": {"url": "synthetic://?size=32&classes=4&count=8", "workers": 0, "cache_dir": str(tmp_path / "cache")},
        "train": {
            "duration": "2step",
            "global_batch": 4,
            "optimizer": {"lr": 1e-3},
            "precision": "fp32",
            "device": "cpu",
            "preview_every": "2step",
            "checkpoint_every": "never",
        },
        "sample": {"scale": 1.5},
    }
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump(run))
    assert train(load_config(str(path), [])) == 0
    assert (tmp_path / "pair" / "samples" / "step_00000002.png").is_file()


@pytest.mark.parametrize("name", TOKENIZERS_TO_TRY)
def test_a_tokenizer_keeps_what_specs_promise(name):
    """Sizes, values, and that nothing but its draws decides. What each promise means is said in core/specs.py."""
    tokenizer = toy_tokenizer(name)
    size = tokenizer.image_size
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    draws = Draws(1, torch.tensor([5, 3, 8]))
    with torch.no_grad():
        if isinstance(tokenizer.spec, Continuous):
            moments = tokenizer.moments(tokenizer.precompute(images))[..., : tokenizer.spec.channels]
            tokenizer.set_latent_stats(moments.mean((0, 1)), moments.std((0, 1)).clamp_min(1e-3))
        promises.values_kept(tokenizer, images, draws)


@pytest.mark.parametrize("tokenizer, seen_as, generator", NATIVE, ids=lambda value: str(value))
def test_a_generator_keeps_what_specs_promise(tokenizer, seen_as, generator):
    made = toy_tokenizer(tokenizer, seen_as)
    model = toy_generator(generator, made).eval()
    introduce(model, made)
    for p in model.parameters():
        if p.requires_grad:  # a fresh network says the same to everything
            torch.nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        promises.samples_kept(model, made.spec, Draws(1, torch.tensor([5, 3, 8])), 4)


def test_pairs_that_do_not_fit_say_why():
    """Every combination that is not listed above is refused with a sentence, and no other."""
    listed = {(t, g) for t, v, g in PAIRS if v is None}
    refused = []
    for name in TOKENIZERS_TO_TRY:
        tokenizer = toy_tokenizer(name)
        for kind in GENERATORS_TO_TRY:
            try:
                check_kind(kind, tokenizer.spec)
                introduce(toy_generator(kind, tokenizer), tokenizer)
            except UserError as error:
                assert (name, kind) not in listed and len(str(error)) > 40, error
                refused.append((name, kind))
    assert ("rectok", "far") in refused and ("fqgan", "rar") in refused and len(refused) > 12


@pytest.mark.parametrize(
    "name, kind, hint",
    [
        ("fqgan", "dit_dh", "Set tokenizer.view=vectors"),
        ("imagefolder", "far", "Set tokenizer.view=sequence"),
        ("rectok", "var", "Choose from dit_dh"),
        ("imagefolder", "dit_dh", "Choose from var"),
    ],
)
def test_another_kind_of_latents_comes_with_advice(name, kind, hint):
    with pytest.raises(UserError, match=hint):
        check_kind(kind, toy_tokenizer(name).spec)


@pytest.mark.parametrize(
    "name, seen_as, message",
    [
        ("rectok", "vectors", "vectors is for one grid or sequence of codes"),
        ("imagefolder", "vectors", "at scales"),
        ("fqgan", "sequence", "sequence is for codes at several scales"),
        ("titok", "vectors", "6 make none"),
    ],
)
def test_views_that_make_no_sense(name, seen_as, message):
    with pytest.raises(UserError, match=message):
        toy_tokenizer(name, seen_as)


def test_vectors_are_codes():
    """Encoding gives normalised codebook rows; decoding snaps to the nearest ones and forgives small errors."""
    plain, vectors = toy_tokenizer("fqgan"), toy_tokenizer("fqgan", "vectors")
    assert isinstance(vectors, Vectors) and vectors.spec == Continuous((4, 4), 8) and isinstance(plain.spec, Codes)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = plain.encode(images)
    moments = vectors.moments(vectors.precompute(images))
    assert moments.shape == (3, 16, 16) and torch.equal(moments[..., :8], plain.embed(codes).flatten(2))
    assert not vectors.latent_stats_known  # a generator whose file lacks them is refused, not sampled with 0 and 1
    vectors.set_latent_stats(moments[..., :8].mean((0, 1)), moments[..., :8].std((0, 1)))
    assert vectors.latent_stats_known
    latents = vectors.encode(images)
    assert latents.shape == (3, 8, 4, 4) and abs(latents.std().item() - 1) < 0.05
    torch.testing.assert_close(vectors.decode(latents + 1e-4), plain.decode(codes))
    assert vectors.state_dict().keys() == plain.state_dict().keys()  # the fingerprint is that of the weights


def test_scales_in_a_row():
    plain, row = toy_tokenizer("imagefolder"), toy_tokenizer("imagefolder", "sequence")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert isinstance(plain.spec, MultiScale) and row.spec == plain.spec.flatten() and row.spec.length == 14
    codes = row.encode(images)
    assert torch.equal(codes, plain.encode(images)) and torch.equal(row.decode(codes), plain.decode(codes))
