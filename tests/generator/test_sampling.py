"""Where guidance and filters begin and end, generator by generator, against formulas written out here."""

from __future__ import annotations

import math

import pytest
import torch

from core.errors import UserError
from core.rng import Draws
from core.schema import linear_scales
from core.specs import NO_CODE, Guidance
from generator.ar.far import FAR
from generator.ar.gpt import GPT
from generator.ar.llama import run_blocks
from generator.ar.rar import RAR
from generator.dit.dit_dh import DiTDH
from generator.guidance import scales
from generator.sampling import draw_latents, filter_logits
from generator.var.var import VAR
from tokenizer.multiscale.imagefolder import ImageFolder

TRUNK = {"width": 32, "layers": 1, "heads": 2}
LABELS = torch.tensor([1, 0, 2])
CODES = {"vocab": 20, "num_classes": 4}


def var() -> VAR:
    model = VAR(depth=2, width=32, heads=2, scales=[1, 2, 3], branches=2, code_dim=6, drop_path=0.0, **CODES)
    model.bind(
        ImageFolder(
            image_size=32,
            patch_size=8,
            encoder=TRUNK,
            decoder=TRUNK,
            latent_grid=3,
            scales=[1, 2, 3],
            branches=2,
            vocab=20,
            code_dim=6,
            start_drop=1,
        ).eval()
    )
    return model


CODE_GENERATORS = {
    "far": lambda: FAR(size={**TRUNK, "head_layers": 1, "hidden": 48}, length=9, grid=[3, 3], branches=2, **CODES),
    "gpt": lambda: GPT(size=TRUNK, length=9, **CODES),
    "rar": lambda: RAR(size={**TRUNK, "hidden": 48}, length=9, code_dim=6, **CODES),
    "var": var,
}


def awake(name: str):
    torch.manual_seed(0)
    model = CODE_GENERATORS[name]()
    for p in model.parameters():  # fresh heads and gates give zeros
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def sampled(model, guidance: Guidance = Guidance(), **options) -> torch.Tensor:
    return model.sample(LABELS, Draws(1, torch.arange(3)), guidance, **options)


# -- filters ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CODE_GENERATORS)
def test_zero_switches_a_filter_off(name):
    """top_k 0 keeps every code, and so do top_p 0 and 1; also for one codebook of several."""
    model = awake(name)
    plain = sampled(model, temperature=1.5)
    assert plain.unique().numel() > 5  # greedy choices would be fewer
    for filters in ({"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.0}, {"top_k": 0, "top_p": 0.0}):
        assert torch.equal(sampled(model, temperature=1.5, **filters), plain), filters
    assert not torch.equal(sampled(model, temperature=1.5, top_k=1), plain)
    assert not torch.equal(sampled(model, temperature=1.5, top_p=0.01), plain)
    if plain.shape[-1] == 2:
        assert torch.equal(sampled(model, temperature=1.5, top_k=[0, 0], top_p=[0.0, 1.0]), plain)
        narrow = sampled(model, temperature=[1.5, 1.5], top_k=[1, 0], top_p=[0.0, 0.0])
        assert torch.equal(narrow[..., 0], sampled(model, temperature=[1.5, 1.5], top_k=[1, 0])[..., 0])
        assert not torch.equal(narrow, plain)


@pytest.mark.parametrize("top_k, top_p, kept", [(0, 0.0, 4), (2, 0.0, 2), (0, 1.0, 4), (3, 0.55, 2), (0, 0.45, 1)])
def test_filters_by_hand(top_k, top_p, kept):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert filter_logits(logits, top_k, top_p).isfinite().tolist() == [i < kept for i in range(4)]


# -- guidance ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["far", "gpt"])
def test_llamagen_samplers_guide_above_one_only(name):
    model = awake(name)
    plain = sampled(model)
    for scale in (0.0, 0.5, 1.0):
        assert torch.equal(sampled(model, Guidance(scale)), plain)
    assert not torch.equal(sampled(model, Guidance(3.0)), plain)


def test_a_codebook_of_far_without_guidance_beside_one_with():
    table = scales(Guidance((3.0, 0.5)), 4, 2)
    assert torch.equal(table, torch.tensor([[3.0, 1.0]]).expand(4, 2))


def test_rar_mixes_below_one():
    """w_k = 1 + (g - 1) (1 - cos(pi (k / N)^p)) / 2 for every g but 0."""
    model, trace = awake("rar"), []
    sampled(model, Guidance(0.25, schedule="cosine", power=2.0), trace=trace, temperature=0)
    codes = sampled(model, Guidance(0.25, schedule="cosine", power=2.0), temperature=0)[..., 0]
    with torch.no_grad():
        x, condition = model.slots(codes.repeat(2, 1), torch.cat((LABELS, torch.full_like(LABELS, 4))))
        logits = model.logits(run_blocks(model.blocks, x, condition)[:, 1:], condition[:, 1:])
    c, u = logits.chunk(2)
    for k, (guided, _) in enumerate(trace):
        w = 1 + (0.25 - 1) * (1 - math.cos(math.pi * (k / 9) ** 2)) / 2
        torch.testing.assert_close(guided, u[:, k] + w * (c[:, k] - u[:, k]), atol=2e-5, rtol=1e-4)
    plain = sampled(model)
    assert torch.equal(sampled(model, Guidance(0.0, schedule="cosine")), plain)
    assert torch.equal(sampled(model, Guidance(1.0, schedule="cosine")), plain)
    assert not torch.equal(sampled(model, Guidance(0.25, schedule="constant")), plain)


@pytest.mark.parametrize("cfg", [0.5, -0.5, 3.25])
def test_var_mixes_with_any_scale(cfg):
    """(1 + t) c - t u with t = cfg s / (S - 1); our scale is 1 + cfg."""
    model, seen = awake("var"), []

    def pick(scale, logits):
        seen.append(logits)
        return logits.argmax(-1)

    codes, _ = model.generate(LABELS, Guidance(1 + cfg, schedule="linear"), pick)
    with torch.no_grad():
        inputs = model.ops.scale_inputs(codes)
        c, u = model.logits(inputs, LABELS), model.logits(inputs, torch.full_like(LABELS, 4))
    t = cfg * torch.arange(3).repeat_interleave(torch.tensor([1, 4, 9])).view(1, -1, 1, 1) / 2
    torch.testing.assert_close(torch.cat(seen, 1), (1 + t) * c - t * u, atol=1e-4, rtol=1e-4)


def test_dit_guides_above_one_only():
    torch.manual_seed(0)
    model = DiTDH(
        size={
            "trunk_width": 32,
            "trunk_depth": 1,
            "trunk_heads": 2,
            "head_width": 48,
            "head_depth": 1,
            "head_heads": 2,
        },
        channels=4,
        grid=4,
        num_classes=4,
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.eval()
    plain = sampled(model, steps=4)
    assert torch.equal(sampled(model, Guidance(0.5), steps=4), plain)
    assert not torch.equal(sampled(model, Guidance(1.5), steps=4), plain)


@pytest.mark.parametrize(
    "text, first, last", [("1.2,8.0", 1.2, 8.0), ("1.0,3.0", 1.001, 3.0), ("1,1", 1.0, 1.0), ("0.5,3", 0.5, 3.0)]
)
def test_linear_scales_of_dar(text, first, last):
    """linspace(a, b, N), a of 1 being 1.001 where guidance grows from there."""
    assert linear_scales(text) == (first, last)
    table = scales(Guidance(last, schedule="linear", start=first), 8)[:, 0]
    torch.testing.assert_close(table, torch.linspace(first, last, 8) if (first, last) != (1, 1) else torch.ones(8))


# -- logits that are not finite ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["cached", "anew", "greedy", "top_k", "top_p"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", CODE_GENERATORS)
def test_logits_that_are_not_finite_are_told_once_a_batch(name, value, how):
    """One class has them; the samples of the others are what they would be without."""
    if how == "anew" and name == "var":
        return
    options = {
        "anew": {"cached": False},
        "greedy": {"temperature": 0.0},
        "top_k": {"top_k": 3},
        "top_p": {"top_p": 0.5},
    }
    options = options.get(how, {})
    model = awake(name)
    whole = sampled(model, Guidance(2.0), **options)
    classes = {"rar": lambda: model.embeddings.weight[21:], "var": lambda: model.class_emb.embedding_table.weight}
    with torch.no_grad():
        classes.get(name, lambda: model.cls_embedding.embedding_table.weight)()[0].fill_(value)  # LABELS[1]
    broken = sampled(model, Guidance(2.0), **options)
    assert (broken[1] == NO_CODE).all() and torch.equal(broken[[0, 2]], whole[[0, 2]])
    with pytest.raises(UserError, match="logits of a code are NaN or infinite in 1 of 3 samples"):
        draw_latents(model, LABELS, Draws(1, torch.arange(3)), Guidance(2.0), **options)
    again = model.sample(LABELS[[0, 2]].repeat(2)[:3], Draws(1, torch.arange(3)), Guidance(2.0), **options)
    assert (again != NO_CODE).all()  # the next batch starts afresh


@pytest.mark.parametrize("name", CODE_GENERATORS)
def test_a_head_that_overflows_once_is_found(name):
    """Nothing of it enters the cache, so only its own step can tell."""
    model = awake(name)
    head = {"rar": "lm_head", "var": "head"}.get(name) or next(
        n for n, _ in model.named_modules() if n.startswith("output")
    )
    calls = []

    def overflow(module, inputs, output):
        calls.append(1)
        return output * torch.inf if len(calls) == 2 else output

    model.get_submodule(head).register_forward_hook(overflow)
    with pytest.raises(UserError, match="in 3 of 3 samples"):
        draw_latents(model, LABELS, Draws(1, torch.arange(3)), Guidance())


def test_latents_that_are_not_finite_name_the_network():
    trunk = {"width": 32, "depth": 1, "heads": 2}
    model = DiTDH(
        size={f"{part}_{name}": n for part in ("trunk", "head") for name, n in trunk.items()}, channels=8, grid=4
    )
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="DiTDH: the latents after the last step are NaN or infinite in 3 of 3 samples"):
        draw_latents(model.eval(), LABELS, Draws(1, torch.arange(3)), Guidance(), steps=2)
