"""FSQ: rounding, mixed-radix codes, gradients, any list of levels, training from a YAML."""

from __future__ import annotations

import itertools

import pytest
import torch

from core.errors import UserError
from core.specs import Codes, Tokenizer
from core.weights import files as weight_files
from run.load import load_config, read_tokenizer
from run.train import train
from tokenizer.vq.fsq import FSQ, FiniteScalarQuantizer

LEVELS = [[8, 5, 5, 5], [3], [2, 2, 2], [4, 3, 7]]


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_code_is_a_row_and_back(levels):
    quantizer = FiniteScalarQuantizer(levels)
    rows = quantizer.embed(torch.arange(quantizer.vocab))
    wanted = [[(i - level // 2) / (level // 2) for i in range(level)] for level in levels]
    # the first channel runs fastest
    expected = torch.tensor([row[::-1] for row in itertools.product(*wanted[::-1])])
    torch.testing.assert_close(rows, expected)
    assert len(rows.unique(dim=0)) == quantizer.vocab


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_all_codes_are_reached_and_quantising_is_nearest(levels):
    """Each channel against the formula of the paper, in float64 and channel by channel."""
    quantizer = FiniteScalarQuantizer(levels)
    z = torch.randn(20_000, len(levels), generator=torch.Generator().manual_seed(0)) * 4
    found = quantizer(z)
    for d, level in enumerate(levels):
        half, offset = (level - 1) * 0.999 / 2, 0.5 if level % 2 == 0 else 0.0
        bounded = torch.tanh(z[:, d].double() + torch.tan(torch.tensor(offset / half).double())) * half - offset
        assert set(bounded.round().long().tolist()) == set(range(-(level // 2), level - level // 2))
        torch.testing.assert_close(found.values[:, d].double(), bounded.round() / (level // 2), atol=1e-6, rtol=0)
    assert torch.equal(quantizer.embed(found.codes), found.values.detach())
    assert torch.equal(quantizer.encode(z), found.codes) and found.terms == {} == dict.fromkeys(quantizer.term_names)


def test_the_gradient_passes_the_rounding():
    quantizer = FiniteScalarQuantizer([5, 4])
    z = torch.tensor([[0.3, -0.2], [2.0, 0.1]], requires_grad=True)
    quantizer(z).values.sum().backward()
    with_graph = z.grad.clone()
    z.grad = None
    (quantizer.bound(z) / torch.tensor([2.0, 2.0])).sum().backward()
    assert torch.equal(with_graph, z.grad) and (with_graph > 0).all()


@pytest.mark.parametrize("levels", [[], [1, 5], [8] * 7, [0]])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(UserError, match="levels"):
        FiniteScalarQuantizer(levels)


def test_the_tokenizer_is_one():
    torch.manual_seed(0)
    tokenizer = FSQ(
        image_size=32, channels=8, channel_mult=[1, 2], res_blocks=1, groups=4, levels=[4, 3], usage_window=64
    )
    assert isinstance(tokenizer, Tokenizer) and tokenizer.spec == Codes(256, 1, 12, 2, (16, 16))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    recon = tokenizer(x, None)
    torch.testing.assert_close(recon.images, tokenizer.decode(tokenizer.encode(x)), rtol=1e-4, atol=1e-4)
    assert 0 < recon.logs["usage"] <= 1
    recon.images.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tokenizer.encoder.parameters())


def test_recipe_trains_and_its_run_is_read(tmp_path):
    """The published YAML at toy size; the generator's recipe names the run by its folder."""
    run = load_config(
        "configs/fsq/tokenizer.yaml",
        [
            f"work_dir={tmp_path}",
            "tokenizer.image_size=32",
            "tokenizer.channels=8",
            "tokenizer.channel_mult=[1,2]",
            "tokenizer.groups=4",
            "discriminator.channels=8",
            "discriminator.groups=4",
            "discriminator.stages=2",
            "objective.weights.perceptual=0",
            "objective.perceptual=null",
            "data.url=synthetic://?size=32&classes=4&count=8",
            "data.val_url=null",
            "data.workers=0",
            "train.global_batch=4",
            "train.duration=2step",
            "train.compile=false",
            "train.precision=fp32",
            "train.device=cpu",
            "train.eval_every=never",
            "train.checkpoint_every=1step",
            "tokenizer.usage_window=64",
        ],
    )
    assert train(run) == 0
    tokenizer = read_tokenizer({"weights": str(tmp_path / "fsq")}).module
    assert isinstance(tokenizer, FSQ) and tokenizer.spec.vocab == 1000


def test_export_to_ours_and_not_to_an_official_layout(tmp_path):
    from scripts import convert

    tokenizer = FSQ(image_size=32, channels=8, channel_mult=[1, 2], res_blocks=1, groups=4)

    settings = {"name": "fsq", "image_size": 32, "channels": 8, "channel_mult": [1, 2], "res_blocks": 1, "groups": 4}
    file = tmp_path / "fsq.safetensors"
    weight_files.save(
        file,
        weight_files.WeightFile("tokenizer", settings, weight_files.unshared(tokenizer.state_dict()), {}, {}, {}),
        False,
    )
    with pytest.raises(UserError, match='no official layout.*"fsq"'):
        convert.main([str(file), str(tmp_path / "out.pth"), "--to", "official"])
    assert convert.main([str(file), str(tmp_path / "out.safetensors")]) in (0, None)
    assert weight_files.read(tmp_path / "out.safetensors").settings == settings
