"""Editing: kept codes and latents come out bit for bit, whatever the generator, and the rest heeds them as its order allows."""

from __future__ import annotations

import pytest
import torch

from core.errors import UserError
from core.rng import Draws
from core.specs import Guidance, Kept
from generator.ar.far import FAR
from generator.ar.gpt import GPT
from generator.ar.rar import RAR
from generator.dit.dit_dh import DiTDH
from tests.generator.test_var import var as toy_var

LABELS, GUIDANCE, VOCAB = torch.tensor([1, 3]), Guidance(2.0), 20
AR = {"vocab": VOCAB, "length": 9, "num_classes": 5}
TRUNK = {"width": 32, "layers": 2, "heads": 4}
MAKE = {
    "far": lambda: FAR(size={**TRUNK, "head_layers": 1, "hidden": 48}, grid=[3, 3], branches=2, **AR),
    "gpt": lambda: GPT(size={**TRUNK, "hidden": 48}, grid=None, **AR),
    "rar": lambda: RAR(size={**TRUNK, "hidden": 48}, permute=[0.5, 0.75], **AR),
    "rear": lambda: RAR(size={**TRUNK, "hidden": 48}, **AR),
    "var": toy_var,
    "dit_dh": lambda: DiTDH(
        size={"trunk_width": 48, "trunk_depth": 2, "trunk_heads": 4, "head_width": 48, "head_heads": 4},
        channels=4,
        grid=3,
        num_classes=5,
    ),
}


@pytest.fixture(params=MAKE)
def model(request):
    torch.manual_seed(0)
    made = MAKE[request.param]().eval()
    for p in made.parameters():
        if p.requires_grad:  # a fresh network says the same to everything
            torch.nn.init.normal_(p, std=0.3)
    return made


def draws(seed: int = 0) -> Draws:
    return Draws(seed, torch.tensor([4, 9]))


def sample(model, kept: Kept | None, seed: int = 0, labels: torch.Tensor = LABELS, **options) -> torch.Tensor:
    steps = {"steps": 6} if isinstance(model, DiTDH) else {}
    return model.sample(labels, draws(seed), GUIDANCE, kept=kept, **steps, **options)


def a_picture(model) -> torch.Tensor:
    """Latents of one picture, as a tokenizer gives them."""
    return sample(model, None, seed=77, labels=torch.tensor([2, 2]))[:1]


def mask_of(latents: torch.Tensor, *places: int) -> torch.Tensor:
    """A mask that keeps these places of one picture's latents."""
    shape = (1, 1, *latents.shape[2:]) if latents.is_floating_point() else latents.shape[:2]
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[list(places)] = True
    return mask


def at(latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Those latents (B, places, ...)."""
    if latents.is_floating_point():
        return latents.flatten(2)[:, :, mask.view(-1)].transpose(1, 2)
    return latents[:, mask[0]]


def test_what_is_kept_comes_out_bit_for_bit(model):
    picture = a_picture(model)
    mask = mask_of(picture, 0, 4, 7, 8)
    first, second = (sample(model, Kept(picture, mask), seed) for seed in (0, 1))
    for sampled in (first, second):
        assert torch.equal(at(sampled, mask), at(picture, mask).expand(2, -1, -1))
    assert not torch.equal(at(first, ~mask), at(second, ~mask))


def test_nothing_kept_is_plain_sampling_and_all_kept_is_the_picture(model):
    picture = a_picture(model)
    assert torch.equal(sample(model, Kept(picture, mask_of(picture))), sample(model, None))
    everything = torch.ones_like(mask_of(picture))
    assert torch.equal(sample(model, Kept(picture, everything)), picture.expand(2, *picture.shape[1:]))


def test_the_rest_heeds_what_is_kept(model):
    """The first code to be drawn sees a kept one at the end of the picture just where `heeds` does not deny it."""
    one, mask = a_picture(model), mask_of(a_picture(model), 8)
    sees = isinstance(model, DiTDH) or getattr(model, "permute", None) is not None
    other = one + 3.0 if one.is_floating_point() else (one + 7) % VOCAB
    front = mask_of(one, 0)

    def first(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([at(sample(model, Kept(values, mask), seed), front) for seed in range(8)])

    assert torch.equal(first(one), first(other)) != sees


def test_a_batch_with_a_mask_for_every_sample(model):
    pictures = sample(model, None, seed=77)
    masks = torch.cat((mask_of(pictures[:1], 0, 1, 5), mask_of(pictures[:1], 1, 8)))
    sampled = sample(model, Kept(pictures, masks))
    for i in range(2):
        assert torch.equal(at(sampled[i : i + 1], masks[i : i + 1]), at(pictures[i : i + 1], masks[i : i + 1]))


@pytest.mark.parametrize("model", ["far", "gpt", "rar", "rear"], indirect=True)
@pytest.mark.parametrize("static", [False, True])
def test_cached_is_uncached(model, static):
    for places in ((0, 4, 7, 8), (2, 3), (8,)):  # each batch after another with other kept codes
        picture = a_picture(model)
        kept = Kept(picture, mask_of(picture, *places))
        assert torch.equal(sample(model, kept, static=static), sample(model, kept, cached=False))


@pytest.mark.parametrize("model", ["far", "rar", "var"], indirect=True)
def test_shapes_that_do_not_fit_are_refused(model):
    picture = a_picture(model)
    with pytest.raises(UserError, match="kept codes of shape"):
        sample(model, Kept(picture[:, :-1], mask_of(picture)[:, :-1]))


@pytest.mark.parametrize("model", ["dit_dh"], indirect=True)
def test_latents_that_do_not_fit_are_refused(model):
    picture = a_picture(model)
    with pytest.raises(UserError, match="kept latents of shape"):
        sample(model, Kept(picture[:, :2], mask_of(picture)))


def test_a_prefix_is_a_way_to_keep():
    model = MAKE["far"]().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    picture = a_picture(model)
    kept = Kept(picture, mask_of(picture, 0, 1, 2, 3))
    assert torch.equal(sample(model, kept), sample(model, None, prefix=picture[:, :4]))
