"""Parts that autoregressive generators share: attention options, KV cache, rotary tables, dropout, logit sampling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from core.errors import UserError
from core.nn import attention as attention_module
from core.nn.attention import Attention, CrossAttention
from core.nn.dropout import drop_path, dropout, keyed_path_factors
from core.nn.kvcache import KVCache
from core.nn.rope import apply_rope, axial_rope, line_rope, with_class_row
from core.rng import Draws
from generator.guidance import per_branch
from generator.sampling import choose, filter_logits, probabilities


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def keys(*positions: int) -> torch.Tensor:
    return Draws(0, torch.tensor(positions)).keys("dropout")


# -- attention --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "qk_norm, bias, kv_heads", list(itertools.product(["none", "rms", "layer", "l2"], [True, False, "qv"], [4, 2, 1]))
)
def test_cached_attention_is_attention(qk_norm, bias, kv_heads):
    """Position by position, in chunks, with a slice or with a static mask: the same as all positions at once."""
    layer = Attention(32, 4, qk_norm, bias=bias, kv_heads=kv_heads, causal=True)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, rope = torch.randn(2, 7, 32), line_rope(8, 7)
    whole = layer(x, rope)
    for static, chunks in itertools.product((False, True), ([1] * 7, [3, 1, 3], [7])):
        cache = KVCache(1, 2, kv_heads, 7, 8, static=static)
        for attempt in range(2):  # the second time over the remains of the first
            start, parts = 0, []
            for count in chunks:
                cache.seek(start)
                (stored,) = cache.open(count)
                parts.append(layer(x[:, start : start + count], cache.rope(rope), stored))
                start += count
            assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5), (static, chunks, attempt)


def test_grouped_queries_share_keys():
    layer = Attention(32, 4, kv_heads=2, causal=True)
    x = torch.randn(2, 5, 32)
    q, k, v = layer._heads(x)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = layer.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 5, 32))
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_l2_attention_caps_its_temperature():
    layer = Attention(16, 2, "l2")
    torch.nn.init.constant_(layer.scale_mul, 50.0)
    q, k, _ = layer._heads(torch.randn(1, 3, 16))
    assert torch.allclose(q.norm(dim=-1), torch.tensor(100.0)) and torch.allclose(k.norm(dim=-1), torch.tensor(1.0))


def test_a_cache_sees_whole_blocks_if_asked():
    layer = Attention(16, 2)
    x = torch.randn(1, 6, 16)
    cache = KVCache(1, 1, 2, 6, 8)
    cache.seek(0)
    layer(x[:, :2], cache=cache.open(2, causal=False)[0])
    cache.seek(2)
    block = layer(x[:, 2:], cache=cache.open(4, causal=False)[0])
    assert torch.allclose(block, layer(x)[:, 2:], atol=1e-6)


def test_a_full_cache_says_so():
    cache = KVCache(1, 1, 1, 4, 8)
    cache.seek(3)
    with pytest.raises(ValueError, match="length 4"):
        cache.open(2)


def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(UserError, match="3 heads"):
        Attention(32, 3)
    with pytest.raises(UserError, match="3 key/value heads"):
        Attention(32, 4, kv_heads=3)


def test_attention_dropout_is_unbiased_and_keyed():
    layer = Attention(16, 2, causal=True, dropout=0.5, kv_heads=1)
    x = torch.randn(1, 6, 16).expand(400, -1, -1)
    out = layer(x, keys=keys(*range(400)))
    assert not torch.equal(out[0], out[1])
    assert (out.mean(0) - layer(x[:1])[0]).abs().max() < 0.1
    assert torch.allclose(layer(x[5:6], keys=keys(5))[0], out[5], atol=1e-6)


# -- rotary tables ----------------------------------------------------------------------------------------------------
def test_rotary_scores_depend_on_distance():
    cos, sin = line_rope(8, 10)
    q, k = torch.randn(2, 1, 1, 1, 8)
    scores = [(apply_rope(q, (cos[i], sin[i])) * apply_rope(k, (cos[i + 3], sin[i + 3]))).sum() for i in range(6)]
    assert torch.allclose(torch.stack(scores), scores[0], atol=1e-5)


def test_class_row_has_no_keys():
    cos, sin = with_class_row(axial_rope(8, (2, 3)))
    assert cos.shape == (7, 8) and not apply_rope(torch.randn(1, 1, 1, 8), (cos[:1], sin[:1])).any()
    assert torch.equal(cos[1], torch.ones(8)) and not sin[1].any()


# -- dropout ----------------------------------------------------------------------------------------------------------
def test_dropout_is_a_function_of_the_sample():
    x = torch.ones(3, 10, 7)
    whole = dropout(x, 0.3, keys(4, 5, 6), salt=1)
    assert torch.equal(whole[1:2], dropout(x[:1], 0.3, keys(5), salt=1))
    assert not torch.equal(whole, dropout(x, 0.3, keys(4, 5, 6), salt=2))
    assert torch.equal(dropout(x, 0.3, None, salt=1), x)
    rows = dropout(torch.ones(6, 35), 0.3, keys(4, 5, 6), salt=1)  # two rows per sample
    assert torch.equal(rows.view(3, 10, 7), whole)


def test_dropout_rate_and_scale():
    x = torch.ones(8, 100_000)
    out = dropout(x, 0.1, keys(*range(8)), salt=0)
    assert abs((out == 0).double().mean().item() - 0.1) < 2e-3
    assert abs(out.mean().item() - 1) < 2e-3
    paths = drop_path(torch.ones(4000, 3), keyed_path_factors(keys(*range(4000)), 0.25, 0, 4000))
    assert abs((paths[:, 0] == 0).double().mean().item() - 0.25) < 0.03 and (paths == paths[:, :1]).all()


# -- from logits to codes ---------------------------------------------------------------------------------------------
def reference_filter(row: list[float], top_k: int, top_p: float) -> set[int]:
    """Which codes survive, straight from the definition."""
    order = sorted(range(len(row)), key=lambda i: -row[i])
    if top_k:
        order = [i for i in order if row[i] >= row[order[min(top_k, len(row)) - 1]]]
    if top_p in (0, 1):
        return set(order)
    total, before, kept = sum(math.exp(row[i]) for i in order), 0.0, set()
    for i in order:
        if kept and before > top_p:
            break
        kept.add(i)
        before += math.exp(row[i]) / total
    return kept


@pytest.mark.parametrize(
    "top_k, top_p", [(0, 1.0), (1, 1.0), (5, 1.0), (99, 1.0), (0, 0.5), (0, 0.0), (7, 0.6), (30, 0.9)]
)
def test_filters(top_k, top_p):
    logits = torch.randn(40, 30) * 2
    kept = filter_logits(logits, top_k, top_p) > -torch.inf
    for row, mask in zip(logits.double().tolist(), kept):
        assert set(mask.nonzero()[:, 0].tolist()) == reference_filter(row, top_k, top_p)


def test_ties_with_the_kth_stay():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    assert (filter_logits(logits, top_k=2) > -torch.inf).tolist() == [[True, True, True, True, False]]
    assert (filter_logits(logits, top_k=2, top_p=0.99) > -torch.inf).sum() == 4
    assert (filter_logits(logits, top_k=2, top_p=0.5) > -torch.inf).sum() == 1


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert probabilities(logits, temperature=0).tolist() == [[0.0, 1.0, 0.0]]
    assert choose(probabilities(logits, temperature=0), torch.tensor([2.0**-25])).item() == 1


def test_choices_follow_the_probabilities():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3]).expand(20_000, 4)
    codes = choose(p, Draws(0, torch.arange(20_000)).categorical("codes"))
    share = torch.bincount(codes, minlength=4) / 20_000
    assert torch.allclose(share, p[0], atol=0.01) and share[1] == 0
    exponential = -torch.log1p(-torch.rand(20_000, 4))
    assert torch.allclose(torch.bincount(choose(p, exponential), minlength=4) / 20_000, p[0], atol=0.01)


def test_the_ends_of_the_noise_stay_inside():
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    assert choose(p, torch.tensor([2.0**-25], dtype=torch.float64)).item() == 1
    assert choose(p, torch.tensor([1 - 2.0**-25], dtype=torch.float64)).item() == 2


def test_settings_per_codebook():
    assert per_branch(3, 2, "top_k") == [3, 3] and per_branch([1, 2], 2, "top_k") == [1, 2]
    with pytest.raises(UserError, match="sample.top_k has 3 numbers"):
        per_branch([1, 2, 3], 2, "top_k")


@pytest.mark.parametrize("by_name", [set(), {"cpu"}], ids=["CPU", "GPU"])
def test_a_prefix_sees_itself_and_the_rest_sees_it_in_order(monkeypatch, by_name):
    monkeypatch.setattr(attention_module, "CAUSAL_BY_NAME", by_name)
    torch.manual_seed(0)
    attention, x = Attention(64, 4, "layer"), torch.randn(2, 10, 64)
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    mask[:6, :6] = True
    assert torch.allclose(attention(x, prefix=6), attention(x, mask=mask), atol=1e-6)


def test_cross_attention_reads_the_context_alone():
    torch.manual_seed(0)
    attention, x, context = CrossAttention(64, 4, "layer"), torch.randn(2, 5, 64), torch.randn(2, 3, 64)
    whole = attention(x, context)
    assert torch.allclose(attention(x[:, 2:4], context), whole[:, 2:4], atol=1e-6)  # queries do not see one another
    assert torch.allclose(attention(x, context.flip(1)), whole, atol=1e-6)  # nor do keys have places
