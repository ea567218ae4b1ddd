"""--dry-run: counts agree with the published ones, and nothing but the config is needed."""

import pytest
import torch
from torch import nn

import assemble
import estimate
from core.estimate import measure


def costs(path: str, *overrides: str):
    return {c.name: c for c in estimate.costs(assemble.load_config(path, list(overrides)))[1]}


def test_published_sizes_and_flops():
    """Figures of the RecTok spec: 172 M + semantic decoder, 835 M; 46.3 GFLOPs to decode, 321.4 for DiT^DH-XL."""
    tokenizer = costs("configs/rectok/tokenizer.yaml", "tokenizer.mask_ratio=0")["tokenizer"]
    assert tokenizer.parameters == 171_970_900 + 1_606_336
    assert tokenizer.forward_flops == pytest.approx((46.3 + 46.3 + 0.94) * 1e9, rel=0.01)
    generator = costs("configs/rectok/ditdh_xl.yaml", "tokenizer.name=rectok")["generator"]
    assert generator.parameters == 835_316_436 and generator.trainable == 835_021_268
    assert generator.forward_flops == pytest.approx(321.4e9, rel=0.005)


def test_activation_memory_is_what_autograd_keeps():
    """One linear layer and a ReLU keep their inputs: (4 + 8) floats per image."""
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    cost = measure("n", network, lambda net: net(torch.zeros(2, 4)), images=2)
    assert cost.activation_bytes == 4 * (4 + 8)
    assert cost.forward_flops == 2 * 4 * 8
    assert cost.training_bytes(10, num_ema=1, half=False) == 4 * 40 + 4 * 40 * 4 + 10 * 48


def test_dry_run_prints_and_creates_nothing(tmp_path, capsys, monkeypatch):
    import train

    assert train.main(["configs/toy/rectok_tokenizer.yaml", f"work_dir={tmp_path}/runs", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "parameters" in printed and "FLOPs" in printed and "20 steps" in printed
    assert not (tmp_path / "runs").exists()
