"""Every published recipe starts by its own command; the whole chain of one per system (the rest: run_tests.sh --all)."""

from __future__ import annotations

import pytest

from tests.rehearsal.recipes import GENERATORS, SYSTEMS, TOKENIZERS, published
from tests.rehearsal.steps import SHORT

RECIPES = {recipe.name: recipe for recipe in published()}
RED: dict[str, str] = {}  # recipe -> why it does not start today
RED_CHAINS: dict[str, str] = {}


def marked(names, red):
    return [pytest.param(n, marks=[pytest.mark.xfail(strict=True, reason=red[n])] if n in red else []) for n in names]


def test_every_recipe_is_rehearsed():
    """A recipe of a network whose sizes nobody wrote down would be run at full size."""
    assert len(RECIPES) > 50
    for recipe in RECIPES.values():
        config = recipe.config
        assert (
            config["generator"]["name"] in GENERATORS
            if recipe.is_generator
            else config["tokenizer"]["name"] in TOKENIZERS
        )
        assert recipe.command and recipe.sizes
    assert set(SYSTEMS.values()) <= RECIPES.keys()


@pytest.mark.parametrize("name", marked(RECIPES, RED))
def test_starts(rehearsal, name):
    rehearsal.start(RECIPES[name])


@pytest.mark.parametrize("name", marked(SYSTEMS.values(), RED_CHAINS))
def test_chain(rehearsal, name):
    rehearsal.chain(RECIPES[name])


@pytest.mark.parametrize(
    "name, settings",
    [
        (
            "rectok/tokenizer",
            [
                "teachers.dinov2={size: {width: 32, layers: 1, heads: 2}}",
                "teachers.siglip={size: {width: 32, layers: 1, heads: 2}}",
            ],
        ),
        ("fqgan/dual_ds16", ["teachers.clip.weights=clip-vit-large-patch14/model.safetensors"]),
    ],
)
def test_other_teachers(rehearsal, name, settings):
    """Several at once; and CLIP from the file of the transformers library."""
    recipe = RECIPES[name]
    rehearsal.run(name, "teachers", recipe.training(*SHORT, "name=teachers_" + name.replace("/", "_"), *settings))


@pytest.mark.slow
@pytest.mark.parametrize("name", marked([n for n in RECIPES if n not in SYSTEMS.values()], {**RED, **RED_CHAINS}))
def test_chain_of_the_others(rehearsal, name):
    rehearsal.chain(RECIPES[name])


# A released file alone -> what it needs beside its published settings to be this small.
BARE = {
    "reAR-L.safetensors": "",
    "rar_xl.bin": "",
    "imagenet-var-4096.pt": "",
    "ditdhxl_epoch_0599.pth": "sample.steps=4",
    "D-AR-L-360K.pt": "generator.size.heads=1",
}


@pytest.mark.parametrize("file", BARE)
def test_a_released_file_is_measured_as_its_number_was(rehearsal, file):
    """The documented command, with nothing but the number of samples and the stand-in of Inception."""
    rehearsal.measure_bare(file, BARE[file])
