"""Published recipes as they are written: the tokenizer named by its weights alone, costs that fit the stated hardware."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

RECIPES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").glob("*/*.yaml")
                 if p.parent.name not in ("toy", "quickstart"))
REAR = [p for p in RECIPES if Path(p).name.startswith(("rear_", "rar_"))]


@pytest.fixture(scope="module")
def maskgit_file(tmp_path_factory) -> Path:
    """A small MaskGIT-VQGAN as the released one is stored: a bare state dict that says nothing about picture sizes."""
    from tokenizer import TOKENIZERS
    from tokenizer.adapters import ADAPTERS

    torch.manual_seed(0)
    network = TOKENIZERS.build({"name": "maskgit_vqgan", "channels": 32, "channel_mult": [1] * 5, "res_blocks": 1,
                                "vocab": 64, "code_dim": 8})
    path = tmp_path_factory.mktemp("weights") / "maskgit-vqgan-imagenet-f16-256.bin"
    torch.save(ADAPTERS["maskgit_vqgan"].to_official(network), path)
    return path


@pytest.mark.parametrize("recipe", REAR)
def test_rear_recipes_start_from_a_tokenizer_file(recipe, maskgit_file, build_trainer):
    """The size of pictures comes from the tokenizer that was built; the recipe names a file and nothing else."""
    trainer = build_trainer(
        recipe, f"tokenizer.weights={maskgit_file}", "generator.size={width: 16, layers: 19, heads: 2, hidden: 16}",
        "data.url=synthetic://?size=256&classes=4&count=8", "data.val_url=null", "data.workers=0",
        "train.duration=1step", "train.global_batch=1", "train.precision=fp32", "train.compile=false")
    assert trainer.task.tokenizer.image_size == 256 and trainer.task.tokenizer.spec.length == 256
    if recipe.endswith("rear_b.yaml"):
        assert trainer.fit() == 0
