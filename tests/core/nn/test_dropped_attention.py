"""Dropout of attention weights without scores: the same masks, results and gradients as with them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as flex_module

from core.nn import dropped_attention
from core.nn.attention import Attention
from core.nn.dropout import _kept, kept_at, threshold_of
from core.rng import Draws, derive


@pytest.fixture(autouse=True)
def backward_on_a_cpu(monkeypatch):
    """FlexAttention's plain operations have one; torch >= 2.9 refuses it there, since its kernel for the CPU has none."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *_: None, raising=False)
    monkeypatch.setattr(dropped_attention, "DEVICES", {"cpu"})


def keys(count: int) -> torch.Tensor:
    return Draws(3, torch.arange(count)).keys("dropout")


def test_single_elements_of_the_mask():
    whole, _ = _kept(keys(3), 7, 1001, 0.3)
    assert 0.65 < whole.float().mean() < 0.75
    single = kept_at(derive(keys(3), 7)[:, None], torch.arange(1001)[None], threshold_of(0.3))
    assert torch.equal(single, whole)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_agrees_with_scores_that_are_laid_out(causal, kv_heads):
    """A causal row whose only weight is dropped gives zero."""
    torch.manual_seed(0)
    layer = Attention(64, 4, "layer", kv_heads=kv_heads, causal=causal, dropout=0.4).train()
    x = torch.randn(3, 33, 64, requires_grad=True)
    results = []
    for devices in ({"cpu"}, set()):
        dropped_attention.DEVICES = devices
        y = layer(x, keys=keys(3))
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, layer.qkv.weight, layer.proj.weight))])
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[0][0], layer(x), atol=0.1)


def test_a_sample_does_not_depend_on_the_others():
    q, k, v = torch.randn(3, 4, 2, 20, 16)
    together = dropped_attention.attend(q, k, v, keys(4), 0.2, salt=0, causal=True)
    alone = dropped_attention.attend(q[2:3], k[2:3], v[2:3], keys(4)[2:3], 0.2, salt=0, causal=True)
    torch.testing.assert_close(together[2:3], alone)
    other = dropped_attention.attend(q, k, v, keys(4), 0.2, salt=1, causal=True)
    assert not torch.allclose(together, other, atol=0.1)


def test_a_compiler_takes_it_in_one_piece():
    torch._dynamo.reset()
    layer = Attention(32, 2, causal=True, dropout=0.1).train()
    x = torch.randn(2, 20, 32)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, keys=keys(2)), layer(x, keys=keys(2)))
