"""The quantisers: searches, losses, usage, and what may not change them: chunks, autocast, ranks. InfoNCE over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from core import cli
from core.errors import UserError
from core.nn.conv import AttnBlock, Downsample, ResBlock, Upsample
from core.rng import Draws
from tokenizer.losses.contrastive import info_nce
from tokenizer.vq import quantizer as module
from tokenizer.vq.quantizer import LookupFreeQuantizer, VectorQuantizer, nearest_codes


def vectors(batch=4, length=6, dim=8, seed=0):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def build(**settings):
    torch.manual_seed(1)
    quantizer = VectorQuantizer(**{"vocab": 32, "dim": 8, "entropy": True, "temperature": 0.1, **settings})
    with torch.no_grad():
        quantizer.embedding.weight.mul_(torch.rand(quantizer.vocab, 1) + 0.5)
    return quantizer


def step(quantizer, z, weight=None, autocast=False):
    """Every term, and gradients of a mix of them."""
    z = z.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = quantizer(z, weight)
    (sum(found.terms.values()) + found.values.square().mean()).backward()
    return {**found.terms, "codes": found.codes}, {n: p.grad for n, p in quantizer.named_parameters()}, z.grad


@pytest.mark.parametrize("normalise", [True, False])
def test_nearest_code_is_the_nearest(normalise):
    quantizer, z = build(normalise=normalise), vectors()
    assert torch.equal(quantizer.encode(z), torch.cdist(quantizer.prepare(z), quantizer.table()).argmin(-1))
    found = quantizer(z)
    torch.testing.assert_close(found.values, quantizer.embed(found.codes))
    assert torch.equal(quantizer.distances(z).argmin(-1), found.codes)


def test_equal_rows_give_the_first():
    assert nearest_codes(torch.zeros(3, 4), torch.ones(5, 4)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("floor", ["add", "clamp"])
def test_chunks_change_nothing(monkeypatch, floor):
    whole = step(build(floor=floor), vectors())
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 32 * 5)  # 24 positions, 5 at a time
    torch.testing.assert_close(step(build(floor=floor), vectors()), whole)


def test_autocast_changes_nothing():
    torch.testing.assert_close(step(build(), vectors(), autocast=True), step(build(), vectors()), rtol=0, atol=0)


def test_gradients_go_where_they_should():
    quantizer, z = build(entropy=False), vectors().requires_grad_()
    found = quantizer(z)
    found.values.sum().backward(retain_graph=True)
    assert quantizer.embedding.weight.grad is None and z.grad.abs().sum() > 0
    found.terms["commitment"].backward(retain_graph=True)
    assert quantizer.embedding.weight.grad is None
    z.grad = None
    found.terms["codebook"].backward()
    assert z.grad is None and quantizer.embedding.weight.grad.abs().sum() > 0
    assert quantizer.term_names == ("codebook", "commitment")


def test_weights_count_positions():
    quantizer, z = build(), vectors()
    weight = torch.zeros(4, 6)
    weight[:, :2] = 1
    part = build()(z[:, :2])
    found = quantizer(z, weight)
    for name in ("codebook", "commitment"):
        torch.testing.assert_close(found.terms[name], part.terms[name])


@pytest.mark.parametrize("count", [3, 10, 24])  # less than, as much as and more than the window
def test_usage_window_of_any_size(count):
    quantizer = build(usage_window=10)
    codes = torch.arange(count)[None]
    share = quantizer.track(codes)
    expected = list(range(max(0, count - 10), count)) if count >= 10 else [0] * (10 - count) + list(range(count))
    assert quantizer.codebook_used.tolist() == expected
    assert share.item() == pytest.approx(len(set(expected)) / 32)
    assert "codebook_used" in quantizer.state_dict() and not quantizer.codebook_used.requires_grad


def test_a_rounded_window_is_read():
    quantizer = build(usage_window=4)
    quantizer.codebook_used.copy_(torch.tensor([0.0, 1.0, 31.0, 32.0]))  # 32 codes
    assert quantizer.usage().item() == pytest.approx(3 / 32)


def test_usage_of_a_sample_is_drawn_by_position():
    def ring(seed):
        quantizer = build(usage_window=16)
        quantizer.track(torch.arange(24).view(4, 6), sample=8, draws=Draws(seed, torch.arange(4)))
        return quantizer.codebook_used

    assert torch.equal(ring(0), ring(0)) and not torch.equal(ring(0), ring(1))
    assert (ring(0)[:8] == 0).all() and ring(0)[8:].unique().numel() == 8


def test_look_up_free_codes_are_the_bits():
    quantizer = LookupFreeQuantizer(7, entropy=True)
    codes = torch.arange(128)
    signs = quantizer.embed(codes)
    assert torch.equal(quantizer.encode(signs), codes) and signs[5].tolist() == [1, -1, 1, -1, -1, -1, -1]
    assert quantizer.encode(torch.zeros(1, 7)).item() == 0  # 0 counts as -1
    assert set(quantizer(vectors(dim=7)).terms) == {"commitment", "entropy"}


def test_wrong_codes_are_refused():
    build().check_codes(torch.tensor([0, 31]))
    with pytest.raises(UserError, match="codes run from -1 to 32.*0 to 31"):
        build().check_codes(torch.tensor([-1, 32]))
    for settings in ({"temperature": 0.0}, {"floor": "max"}):
        with pytest.raises(UserError):
            build(**settings)
    with pytest.raises(UserError, match="bits"):
        LookupFreeQuantizer(40)


# Ranks of three pictures: the middle one of three pairs lies on both.
CONTRASTS = ({"symmetric": True}, {"group": 2})


def contrast(settings, share=slice(None)):
    """InfoNCE of (part of) six pictures, and its gradients."""
    a, b = (vectors(1, 6, 5, seed)[0][share].clone().requires_grad_() for seed in (2, 3))
    loss = info_nce(a, b, scale=2.0, **settings)
    loss.backward()
    return loss.detach(), torch.cat((a.grad, b.grad), dim=1)


WEIGHT = torch.rand(4, 6, generator=torch.Generator().manual_seed(5))


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    quantizer = build(usage_window=12)
    terms, gradients, own = step(quantizer, vectors().chunk(2)[rank], WEIGHT.chunk(2)[rank])
    quantizer.track(terms.pop("codes"))
    for tensor in (*terms.values(), *gradients.values()):  # what DDP does
        dist.all_reduce(tensor.detach())
        tensor.detach().div_(2)
    contrasts = []
    for settings in CONTRASTS:
        loss, gradient = contrast(settings, slice(3 * rank, 3 * rank + 3))
        dist.all_reduce(loss)
        contrasts.append((loss / 2, gradient / 2))
    torch.save((terms, gradients, own / 2, quantizer.codebook_used, contrasts), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    cli.leave(0)


def test_two_ranks_equal_one(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    quantizer = build(usage_window=12)
    terms, gradients, own = step(quantizer, vectors(), WEIGHT)
    quantizer.track(terms.pop("codes"))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in ranks:
        torch.testing.assert_close(rank[0], terms)
        torch.testing.assert_close(rank[1], gradients)
        assert torch.equal(rank[3], quantizer.codebook_used)
    torch.testing.assert_close(torch.cat([rank[2] for rank in ranks]), own)
    for i, settings in enumerate(CONTRASTS):
        loss, gradient = contrast(settings)
        assert all(torch.isclose(rank[4][i][0], loss) for rank in ranks)
        torch.testing.assert_close(torch.cat([rank[4][i][1] for rank in ranks]), gradient)


# -- convolutional blocks ---------------------------------------------------------------------------------------------
def test_branch_shortcut_drops_the_input():
    torch.manual_seed(0)
    block, x = ResBlock(8, 16, bias=False, shortcut="branch", groups=4), torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(x), block(x * 3))  # the branch normalises its input, so only a skip could tell
    plain = ResBlock(8, 16, groups=4)
    assert not torch.allclose(plain(x), plain(x * 3))
    with pytest.raises(UserError, match="32 groups"):
        ResBlock(8, 16)


def test_attention_is_softmax_over_positions():
    torch.manual_seed(0)
    block, x = AttnBlock(8, groups=4), torch.randn(2, 8, 3, 4)
    h = block.norm(x)
    q, k, v = (project(h).flatten(2) for project in (block.q, block.k, block.v))  # (B, C, HW)
    attention = torch.softmax(q.transpose(1, 2) @ k * 8**-0.5, dim=-1)  # (B, query, key)
    expected = x + block.proj_out((v @ attention.transpose(1, 2)).view_as(x))
    torch.testing.assert_close(block(x), expected)


def test_sizes_halve_and_double():
    x = torch.randn(1, 4, 6, 8)
    assert Downsample(4)(x).shape == (1, 4, 3, 4) and Upsample(4)(x).shape == (1, 4, 12, 16)
