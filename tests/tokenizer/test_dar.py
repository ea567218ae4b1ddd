"""D-AR where no fixture looks: streaming, prefixes, other sizes, mistakes."""

from __future__ import annotations

import pytest
import torch

from core.errors import UserError
from core.rng import Draws
from core.specs import Codes, Guidance, Tokenizer
from generator.ar.gpt import GPT
from tokenizer.adapters import ADAPTERS
from tokenizer.vq.dar import DAR, dispersed_places

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "encoder_width": 32,
    "encoder_layers": 1,
    "condition_width": 32,
    "condition_layers": 2,
    "length": 16,
    "groups": 4,
    "steps": 4,
    "vocab": 32,
    "head_dim": 16,
    "usage_window": 64,
    "decoder": {"width": 32, "depth": 2, "patch_size": 4, "feature_layer": 1, "feature_hidden": 24},
}


def small(**changes) -> DAR:
    torch.manual_seed(0)
    tokenizer = DAR(**{**SMALL, **changes}).eval()
    for p in tokenizer.parameters():  # nothing starts at zero, so that every path counts
        torch.nn.init.normal_(p, std=0.05)
    return tokenizer


def draws(batch: int) -> Draws:
    return Draws(3, torch.arange(batch))


@pytest.mark.parametrize("window, steps", [(None, 4), (8, 4), (4, 6)])
def test_streaming_is_decoding(window, steps):
    """Pictures that come while codes arrive one at a time are those of decoding the whole sequence, stopped early."""
    tokenizer = small(window=window, steps=steps)
    codes = torch.randint(0, 32, (2, 16, 1), generator=torch.Generator().manual_seed(1))
    whole = tokenizer.previews(codes, draws(2))
    stream = tokenizer.stream(2, draws(2))
    pictures, arrivals = [], []
    for i in range(16):
        for picture in stream.feed(codes[:, i : i + 1]):
            pictures.append(picture)
            arrivals.append(i + 1)
    assert len(pictures) == len(whole) == steps
    assert arrivals == [tokenizer.window_start(i, steps) + tokenizer.window for i in range(steps)]
    for i, (ours, theirs) in enumerate(zip(pictures, whole)):
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert torch.equal(theirs, tokenizer.decode(codes, draws(2), clip=i + 1))
    assert torch.equal(tokenizer.decode(codes, draws(2)), whole[-1])
    assert not torch.allclose(whole[0], whole[-1], atol=1e-3)


def test_the_network_runs_once_per_step():
    tokenizer, calls = small(), []
    tokenizer.diff_decoder.net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    tokenizer.previews(torch.zeros(1, 16, 1, dtype=torch.int64), draws(1))
    assert len(calls) == tokenizer.steps


def test_a_prefix_of_codes_is_a_picture():
    tokenizer = small()
    codes = torch.randint(0, 32, (2, 16, 1), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        tokenizer.decode(codes[:, :8], draws(2)), tokenizer.decode(codes, draws(2), clip=2), atol=1e-6
    )
    with pytest.raises(UserError, match="3 codes are too few .* needs 4"):
        tokenizer.decode(codes[:, :3], draws(2))
    with pytest.raises(UserError, match="17 codes were given, the tokenizer has 16"):
        tokenizer.decode(torch.zeros(1, 17, 1, dtype=torch.int64), draws(1))


def test_it_is_a_tokenizer_of_one_sequence():
    tokenizer = small()
    assert isinstance(tokenizer, Tokenizer) and tokenizer.spec == Codes(16, 1, 32, 8)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 16, 1) and codes.dtype == torch.int64
    assert torch.equal(tokenizer.from_stored(tokenizer.precompute(images).to(torch.int32)), codes)
    assert tokenizer.embed(codes).shape == (2, 16, 1, 8)
    assert tokenizer.encode(torch.rand(1, 3, 16, 48)).shape == (1, 16, 1)  # any multiple of the patch size
    wide = tokenizer.decode(codes, draws(2), size=(16, 48))
    assert wide.shape == (2, 3, 16, 48)
    # without draws every picture starts from the same noise, whatever else is in the batch
    assert torch.allclose(tokenizer.decode(codes)[1:], tokenizer.decode(codes[1:]), atol=1e-6)


def test_later_codes_do_not_change_earlier_conditions():
    tokenizer = small()
    a = torch.randint(0, 32, (1, 16, 1), generator=torch.Generator().manual_seed(1))
    b = a.clone()
    b[:, 9:] = (b[:, 9:] + 1) % 32
    one, two = (tokenizer.conditions(tokenizer.embed(codes)[:, :, 0]) for codes in (a, b))
    assert torch.allclose(one[:, :9], two[:, :9], atol=1e-6) and not torch.allclose(one[:, 9:], two[:, 9:], atol=1e-4)


def test_gates_that_start_open_tell_pictures_apart():
    """With the published start every picture has the same codes; `gate_init` and `init_std` are for short trainings."""
    pictures = draws(8).normal("pictures", (3, 32, 32)).clamp(-1, 1)

    def distinct(**start: float) -> int:
        torch.manual_seed(0)
        return len(DAR(**{**SMALL, **start}).eval().encode(pictures).flatten(1).unique(dim=0))

    assert distinct() == 1
    assert distinct(gate_init=1.0, init_std=0.1) > 4


def test_training_forward_has_gradients_everywhere():
    tokenizer = small(semantic={"teachers": {"dinov2": 12}}, image_size=64, decoder={**SMALL["decoder"]}).train()
    recon = tokenizer(torch.rand(4, 3, 64, 64) * 2 - 1, draws(4))
    total = sum(recon.terms.values()) + recon.images.square().mean() + recon.predictions["dinov2"].square().mean()
    total.backward()
    without = [n for n, p in tokenizer.named_parameters() if p.grad is None]
    assert not without, without
    assert recon.predictions["dinov2"].shape == (4, 256, 12)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"groups": 0}, "groups 0 must lie between 1 and length 16"),
        ({"steps": 3}, "steps 3 is less than groups 4"),
        ({"window": 17}, r"window 17 .* between 1 and length 16"),
        ({"length": 2000, "groups": 8}, "length 2000 exceeds the 1024 rows"),
        ({"encoder_width": 40}, "encoder_width 40 must be a multiple of head_dim 16"),
        ({"decoder": {"widht": 32}}, "decoder.widht: unknown key.*width"),
        ({"decoder": {**SMALL["decoder"], "modulated_output": True}}, "needs own_time: false"),
        ({"semantic": {"teachers": {"a": 4, "b": 4}}}, "one teacher, not with 2"),
        ({"image_size": 36}, "patch_size 8 does not divide image_size 36"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


def test_official_file_and_back():
    """Fused here, separate there; bit for bit both ways."""
    tokenizer = small(semantic={"teachers": {"dinov2": 12}})
    official = ADAPTERS["dar"].restore(tokenizer)
    assert "encoder_layers.0.attention.q.weight" in official and not any("qkv" in name for name in official)
    again = small(semantic={"teachers": {"dinov2": 12}})
    ADAPTERS["dar"].load(again, {name: value.clone() for name, value in official.items()})
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    settings = ADAPTERS["dar"].describe(official, {"length": 16, "groups": 4})
    assert settings["vocab"] == 32 and settings["decoder"]["depth"] == 2 and settings["head_dim"] == 16


# -- the language model -----------------------------------------------------------------------------------------------
def test_convolutions_after_the_patches_see_over_their_seams():
    """A patch paints its own pixels, as published, or reaches two further; convolutions see the noisy pixels, too."""
    plain = {**SMALL["decoder"]}
    for channels, reach in ((0, 0), (4, 2)):
        tokenizer = small(decoder={**plain, "pixel_channels": channels})
        core, painted = tokenizer.diff_decoder.net, []
        hook = core.conv_out.register_forward_hook(lambda _, __, out: painted.append(out))
        noisy = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        arguments = core.embed_time(torch.tensor([0.5])), torch.zeros(1, 4, 32)
        before = core(noisy, *arguments)[0]
        hook.remove()
        core.conv_out.register_forward_hook(lambda _, __, out: painted[0].index_add(2, torch.tensor([3]), ones(out)))
        rows = (core(noisy, *arguments)[0] != before)[0].any(0).any(1).nonzero()
        assert (int(rows.min()), int(rows.max())) == (12 - reach, 15 + reach)
        assert core.last_layer.weight.shape[0] == (3 if channels else 48)
    with pytest.raises(UserError, match="pixel_channels=4 cannot be exported"):
        ADAPTERS["dar"].restore(tokenizer)
    with pytest.raises(UserError, match="goes with the plain output layer"):
        small(decoder={**plain, "pixel_channels": 4, "own_time": False, "modulated_output": True})


def test_convolutions_paint_the_picture_near_noise():
    """Where they paint nothing the velocity is the noise, negated: the picture that this aims at is t times the noisy one."""
    core = small(decoder={**SMALL["decoder"], "pixel_channels": 4}).diff_decoder.net
    torch.nn.init.zeros_(core.last_layer.weight)
    torch.nn.init.zeros_(core.last_layer.bias)
    noisy = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    velocity = core(noisy, core.embed_time(torch.tensor([0.25])), torch.zeros(1, 4, 32))[0]
    torch.testing.assert_close(noisy + 0.75 * velocity, 0.25 * noisy)


PLACED = {"places": True, "decoder": {**SMALL["decoder"], "patch_size": 8}}


def test_places_are_spread_over_the_picture_by_every_prefix():
    assert dispersed_places(4)[:4].tolist() == [0, 10, 2, 8]  # rows 0, 2, 0, 2 and columns 0, 2, 2, 0
    places = dispersed_places(8)
    assert sorted(places.tolist()) == list(range(64))
    for count, side in ((4, 2), (16, 4)):  # a coarser grid
        cells = {(place // 8 * side // 8, place % 8 * side // 8) for place in places[:count].tolist()}
        assert len(cells) == count
    with pytest.raises(UserError, match="power of two, not 6"):
        dispersed_places(6)


def test_a_code_with_a_place_knows_its_patch_and_tells_the_decoder_where():
    tokenizer = small(**PLACED)
    tokenizer.encoder_layers = torch.nn.ModuleList()  # nor do other layers mix what the patches say
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    changed = images.clone()
    changed[:, :, 8:16, 16:24] *= -1  # patch (1, 2) of 4 x 4
    differ = (tokenizer._project(images) != tokenizer._project(changed)).any(-1)
    assert differ.nonzero()[:, 1].tolist() == [int((dispersed_places(4) == 6).nonzero())] * 2

    core = tokenizer.diff_decoder.net
    core.blocks = torch.nn.ModuleList()
    noisy, conditions = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32)
    time, places = core.embed_time(torch.tensor([0.5])), torch.tensor([[3, 9, 12]])
    moved = conditions.clone()
    moved[:, 1] *= -1
    difference = core(noisy, time, conditions, places)[0] != core(noisy, time, moved, places)[0]
    assert difference.any(1).any(0).nonzero().float().mean(0).tolist() == [19.5, 11.5]  # the middle of patch 9


def test_places_decode_in_windows_and_refuse_what_does_not_fit():
    tokenizer = small(**PLACED)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    assert tokenizer(images, draws(2)).images.shape == images.shape
    codes = tokenizer.encode(images)
    stages = tokenizer.previews(codes, draws(2))
    assert torch.equal(stages[-1], tokenizer.decode(codes, draws(2)))
    torch.testing.assert_close(stages[0], tokenizer.decode(codes[:, :4], draws(2)))
    for call in (lambda: tokenizer.encode(images[:, :, :16]), lambda: tokenizer.decode(codes, size=(64, 32))):
        with pytest.raises(UserError, match="have places in pictures of 32x32 pixels, not of (16x32|64x32)"):
            call()
    with pytest.raises(UserError, match="length 16 instead of 8"):
        small(**{**PLACED, "length": 8})
    with pytest.raises(UserError, match="decoder.patch_size 8 instead of 4"):
        small(**{**PLACED, "decoder": {**SMALL["decoder"], "patch_size": 4}})
    with pytest.raises(UserError, match="places=true cannot be exported"):
        ADAPTERS["dar"].restore(tokenizer)


def test_solver_and_rows_of_the_tables():
    codes = torch.randint(0, 32, (2, 16, 1), generator=torch.Generator().manual_seed(1))
    published, euler = small(), small(solver="euler")
    assert not torch.equal(published.decode(codes, draws(2)), euler.decode(codes, draws(2)))
    assert torch.equal(published.decode(codes, draws(2), method="euler"), euler.decode(codes, draws(2)))
    short = small(table_rows=16)
    assert short.query_embedding.num_embeddings == short.decoder_embedding.num_embeddings == 16
    with pytest.raises(UserError, match="table_rows=16 cannot be exported"):
        ADAPTERS["dar"].restore(short)
    with pytest.raises(UserError, match="length 16 exceeds the 15 rows"):
        small(table_rows=15)


def ones(maps: torch.Tensor) -> torch.Tensor:
    """(B, C, 1, W) to add to a row of patches."""
    return torch.ones_like(maps[:, :, :1])


def language_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(size={"width": 32, "layers": 2, "heads": 2, "hidden": 48}, length=16, vocab=32, num_classes=5).eval()
    torch.nn.init.normal_(model.output_1.weight, std=0.3)
    return model


@pytest.mark.parametrize("cached", [True, False])
def test_prefix_and_shared_layout(cached):
    model, labels = language_model(), torch.tensor([0, 1, 2])
    free = model.sample(labels, draws(3), Guidance(2.0), cached=cached)
    prefix = torch.randint(0, 32, (3, 5, 1), generator=torch.Generator().manual_seed(2))
    begun = model.sample(labels, draws(3), Guidance(2.0), prefix=prefix, cached=cached)
    assert torch.equal(begun[:, :5], prefix) and not torch.equal(begun[:, 5:], free[:, 5:])
    # a sequence that is begun with its own codes goes on as it did
    assert torch.equal(model.sample(labels, draws(3), Guidance(2.0), prefix=free[:, :7], cached=cached), free)
    shared = model.sample(labels, draws(3), Guidance(2.0), shared=6, cached=cached)
    assert torch.equal(shared[:, :6], shared[:1, :6].expand(3, -1, -1)) and len(shared[:, 6:].unique(dim=0)) == 3
    assert torch.equal(shared, model.sample(labels, draws(3), Guidance(2.0), shared=6, cached=not cached))
    with pytest.raises(UserError, match="cannot begin sequences of 16 positions"):
        model.sample(labels, draws(3), prefix=torch.zeros(3, 17, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="17 shared positions in a sequence of 16"):
        model.sample(labels, draws(3), shared=17)


def test_codes_are_reported_as_they_come():
    model, seen = language_model(), []
    codes = model.sample(torch.tensor([0, 1]), draws(2), on_codes=lambda c: seen.append(c.clone()))
    assert [c.shape[1] for c in seen] == list(range(1, 17)) and all(
        torch.equal(c, codes[:, : c.shape[1]]) for c in seen
    )


def test_codes_are_reported_in_the_precision_of_the_caller():
    """The decoder that takes them runs under the same autocast as without a generator."""
    seen: list[bool] = []
    with torch.autocast("cpu", torch.bfloat16):
        language_model().sample(
            torch.tensor([0, 1]), draws(2), on_codes=lambda _: seen.append(torch.is_autocast_enabled("cpu"))
        )
    assert len(seen) == 16 and all(seen)
