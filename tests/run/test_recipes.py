"""Published recipes as they are written: the tokenizer named by its weights alone, costs that fit the stated hardware."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

RECIPES = sorted(
    p.relative_to(ROOT).as_posix()
    for p in (ROOT / "configs").glob("*/*.yaml")
    if p.parent.name not in ("toy", "quickstart", "tiny")
)
REAR = [p for p in RECIPES if Path(p).name.startswith(("rear_", "rar_"))]


@pytest.fixture(scope="module")
def maskgit_file(tmp_path_factory) -> Path:
    """A small MaskGIT-VQGAN as the released one is stored: a bare state dict that says nothing about picture sizes."""
    from tokenizer import TOKENIZERS
    from tokenizer.adapters import ADAPTERS

    torch.manual_seed(0)
    network = TOKENIZERS.build(
        {"name": "maskgit_vqgan", "channels": 32, "channel_mult": [1] * 5, "res_blocks": 1, "vocab": 64, "code_dim": 8}
    )
    path = tmp_path_factory.mktemp("weights") / "maskgit-vqgan-imagenet-f16-256.bin"
    torch.save(ADAPTERS["maskgit_vqgan"].restore(network), path)
    return path


@pytest.mark.parametrize("recipe", [r for r in REAR if "vqplus" not in r])  # which states what its own file does not
def test_rear_recipes_start_from_a_tokenizer_file(recipe, maskgit_file, build_trainer):
    """The size of pictures comes from the tokenizer that was built; the recipe names a file and nothing else."""
    trainer = build_trainer(
        recipe,
        f"tokenizer.weights={maskgit_file}",
        "generator.size={width: 16, layers: 19, heads: 2, hidden: 16}",
        "data.url=synthetic://?size=256&classes=4&count=8",
        "data.val_url=null",
        "data.workers=0",
        "train.duration=1step",
        "train.global_batch=1",
        "train.precision=fp32",
        "train.compile=false",
    )
    assert trainer.task.tokenizer.image_size == 256 and trainer.task.tokenizer.spec.length == 256
    if recipe.endswith("rear_b.yaml"):
        assert trainer.fit() == 0


def test_tokens_alone_are_enough(maskgit_file, build_trainer, tmp_path):
    """The recommended way of reAR's README: stored codes, and nothing of ImageNet on disk."""
    from core.errors import UserError
    from run.check import check_inputs
    from run.load import load_config
    from scripts import pretokenize

    made = tmp_path / "tokens"
    common = [f"tokenizer.weights={maskgit_file}", "data.workers=0", "data.crop=center", "train.precision=fp32"]
    assert (
        pretokenize.main(
            [
                "configs/rear/rar_b.yaml",
                "--out",
                str(made),
                *common,
                "train.device=cpu",
                "data.url=synthetic://?size=256&classes=4&count=4",
            ]
        )
        == 0
    )
    trainer = build_trainer(
        "configs/rear/rar_b.yaml",
        *common,
        f"data.url=tokens://{made}",
        "train.global_batch=2",
        "generator.size={width: 16, layers: 1, heads: 2, hidden: 16}",
        "train.duration=1step",
        "train.compile=false",
    )
    assert trainer.config.data.val_url == "folder://data/imagenet/val"  # as the recipe has it, and not there
    assert trainer.fit() == 0
    with pytest.raises(UserError, match=r"It is there for train.eval_every: give data.val_url=URL"):
        check_inputs(
            load_config(
                "configs/rear/rar_b.yaml",
                [*common, f"data.url=tokens://{made}", "train.eval_every=1step", "train.device=cpu"],
            )
        )


def test_previews_do_without_validation_pictures(build_trainer):
    """A tokenizer that is not evaluated shows training pictures; one that is says what is missing."""
    from core.errors import UserError

    words = ["configs/toy/rectok_tokenizer.yaml", "data.val_url=folder://not/here"]
    assert build_trainer(*words).task.preview_images is not None
    with pytest.raises(UserError, match=r"folder://not/here cannot be opened.*or train.eval_every=never"):
        build_trainer(*words, "train.eval_every=1step")
