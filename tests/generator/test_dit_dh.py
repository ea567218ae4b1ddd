"""RecTok and DiT^DH where no fixture looks: other schedules, initialisation, precision, adapters, sizes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from core.errors import UserError
from core.rng import Draws
from core.specs import Codes, Continuous, Generator, Guidance, Tokenizer
from core.weights.layouts import check_layout
from generator import GENERATORS
from generator.adapters import ADAPTERS as GENERATOR_ADAPTERS
from generator.dit import flow
from generator.dit.dit_dh import DiTDH
from generator.dit.flow import euler
from generator.guidance import guide
from tests.parity import fixture_folder
from tests.parity.recorded_draws import RecordedDraws
from tokenizer import TOKENIZERS
from tokenizer.adapters import ADAPTERS as TOKENIZER_ADAPTERS
from tokenizer.continuous.rectok import RecTok
from tokenizer.continuous.stats import StatsAccumulator, load_stats, save_stats

NANO = {"width": 48, "layers": 2, "heads": 4}
TOKENIZER = TOKENIZER_ADAPTERS["rectok"]
GENERATOR = GENERATOR_ADAPTERS["dit_dh"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rectok(**settings) -> RecTok:
    return RecTok(**{"image_size": 64, "channels": 8, "encoder": NANO, "decoder": NANO, **settings})


def semantic(**settings) -> dict:
    return {"teachers": {"dinov3": 20}, "size": {"width": 24, "layers": 1, "heads": 2}, **settings}


def dit(wake: bool = True, **settings) -> DiTDH:
    size = {"trunk_width": 48, "trunk_depth": 2, "trunk_heads": 4, "head_width": 64, "head_depth": 1, "head_heads": 2}
    model = DiTDH(**{"size": size, "channels": 8, "grid": 4, "num_classes": 10, **settings})
    if wake:  # a fresh model gives zeros
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
    return model


def draws(*positions: int, seed: int = 0) -> Draws:
    return Draws(seed, torch.tensor(positions))


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64) * 2 - 1


# -- tokenizer --------------------------------------------------------------------------------------------------------
def test_protocols_and_registries():
    tokenizer = TOKENIZERS.build({"name": "rectok", "encoder": NANO, "decoder": NANO, "channels": 8}, image_size=64)
    assert isinstance(tokenizer, Tokenizer) and tokenizer.spec == Continuous((4, 4), 8)
    assert isinstance(
        GENERATORS.build(
            {
                "name": "dit_dh",
                "channels": 8,
                "grid": 4,
                "size": dict(trunk_width=48, trunk_depth=1, trunk_heads=4, head_width=64, head_heads=2),
            }
        ),
        Generator,
    )


@pytest.mark.parametrize("schedule", ["shift", "lognorm", "uniform"])
def test_noise_by_hand(schedule):
    tokenizer = rectok(noise_schedule=schedule, gamma=0.7, mask_ratio=0.0)
    value, eps, noise = torch.tensor([0.3, 0.9]), torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    recon = tokenizer(images(), RecordedDraws({"posterior": eps, "time": value, "noise": noise}))
    s = math.sqrt(16 * 8 / 4096)  # below 1, and applied all the same
    t = {"shift": s * value / (1 + (s - 1) * value), "lognorm": torch.sigmoid(value), "uniform": value}[schedule]
    posterior = recon.details["posterior"]
    z = posterior.mean + posterior.std * eps
    t = t.view(2, 1, 1)
    torch.testing.assert_close(recon.details["latents"], (1 - t) * z + 0.7 * t * noise)
    assert recon.masked is None


def test_mask():
    x, d = images(3), draws(0, 1, 2)
    recon = rectok(mask_ratio=0.3, mask_ratio_type="fix")(x, d)
    assert recon.masked.shape == (3, 16) and (recon.masked.sum(1) == 16 - math.ceil(16 * 0.7)).all()
    kept, restore = recon.details["kept"], recon.details["restore"]
    assert not recon.masked.gather(1, kept).any()
    shuffled_positions = torch.cat((kept, restore.argsort(1)[:, kept.shape[1] :]), 1)
    assert torch.equal(shuffled_positions.gather(1, restore), torch.arange(16).expand(3, 16))
    never = rectok(mask_ratio=0.4, mask_ratio_min=-1e9)(x, d)  # always drawn negative: shuffled, nothing hidden
    assert not never.masked.any() and never.details["kept"].shape == (3, 16)


def test_hidden_patches_do_not_reach_the_latent():
    tokenizer, x, d = rectok(mask_ratio=0.5, mask_ratio_type="fix", gamma=0.0), images(1), draws(7)
    recon = tokenizer(x, d)
    changed = x.clone()
    for token in recon.masked[0].nonzero().flatten().tolist():
        row, column = divmod(token, 4)
        changed[:, :, row * 16 : (row + 1) * 16, column * 16 : (column + 1) * 16] = 0.5
    torch.testing.assert_close(tokenizer(changed, d).images, recon.images)


def test_semantic_decoders():
    x, d = images(), draws(0, 1)
    tokenizer = rectok(semantic=semantic(teachers={"dinov3": 20, "dinov2": 12}, input="clean"))
    recon = tokenizer(x, d)
    assert {name: p.shape for name, p in recon.predictions.items()} == {"dinov3": (2, 16, 20), "dinov2": (2, 16, 12)}
    assert not torch.equal(recon.details["semantic_input"], recon.details["latents"])
    mlp = rectok(semantic=semantic(decoder="mlp"), mask_ratio=0.0)
    assert mlp(x, d).predictions["dinov3"].shape == (2, 16, 20)
    assert {n: tuple(p.shape) for n, p in mlp.named_parameters() if n.startswith("sem_")} == {
        "sem_decoders.dinov3.mlp.0.weight": (32, 8),
        "sem_decoders.dinov3.mlp.0.bias": (32,),
        "sem_decoders.dinov3.mlp.2.weight": (20, 32),
        "sem_decoders.dinov3.mlp.2.bias": (20,),
    }  # the official names
    w0, b0, w2, b2 = mlp.sem_decoders["dinov3"].parameters()
    hidden = mlp(x, d).details["latents"] @ w0.T + b0
    expected = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)) @ w2.T + b2
    torch.testing.assert_close(mlp(x, d).predictions["dinov3"], expected)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"encoder": "bas"}, '"base"'),
        ({"encoder": {"width": 8}}, "heads"),
        ({"noise_schedule": "shif"}, '"shift"'),
        ({"mask_ratio_type": "fixed"}, '"fix"'),
        ({"image_size": 60}, "patch_size"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"semantic": {"teachers": {"a": 3}, "sise": 1}}, '"size"'),
        ({"semantic": semantic(input="cleen")}, '"clean"'),
        ({"semantic": semantic(decoder="mlp")}, "mask_ratio: 0"),
        ({"encoder": {"width": 12, "layers": 1, "heads": 2}}, "divisible by 4"),
        ({"decoder": {"width": 16, "layers": 1, "heads": 3}}, "divide"),
    ],
)
def test_wrong_settings_are_explained(settings, named):
    with pytest.raises(UserError, match=named):
        rectok(**settings)


def test_stored_moments_give_what_encode_gives():
    tokenizer, x = rectok().eval(), images()
    tokenizer.set_latent_stats(torch.randn(8), torch.rand(8) + 0.5)
    moments = tokenizer.precompute(x)
    for d in (None, draws(3, 4)):
        assert torch.equal(tokenizer.from_stored(moments, d), tokenizer.encode(x, d))
    assert tokenizer.encode(x).shape == (2, 8, 4, 4)
    with pytest.raises(UserError, match="3 values for 8 channels"):
        tokenizer.set_latent_stats(torch.zeros(3), torch.ones(3))
    tokenizer.set_latent_stats(0.5, 2.0)
    assert (tokenizer.latent_std == 2).all() and "latent_std" not in tokenizer.state_dict()
    with pytest.raises(UserError, match="std cannot normalise"):
        tokenizer.set_latent_stats(0.5, 0.0)


def test_stage_two_trains_the_decoder_on_samples():
    tokenizer = rectok(train_decoder_only=True, gamma=0.0, mask_ratio=0.0)
    trained = {name: p for name, p in tokenizer.named_parameters() if p.requires_grad}
    assert all(name.startswith("decoder.") for name in trained) and "decoder.mask_token" not in trained
    x = images()
    a, b = tokenizer(x, draws(0, 1)), tokenizer(x, draws(2, 3))
    assert not torch.equal(a.images, b.images)
    a.images.square().mean().backward()
    assert all(p.grad is not None for p in trained.values())


def test_every_parameter_gets_a_gradient_even_when_nothing_is_hidden():
    tokenizer = rectok(semantic=semantic(), mask_ratio_min=-1e9)
    recon = tokenizer(images(), draws(0, 1))
    (recon.images.mean() + recon.terms["kl"] + recon.predictions["dinov3"].mean()).backward()
    assert all(p.grad is not None for p in tokenizer.parameters())


def test_weight_decay_spares_embeddings_and_vectors():
    tokenizer = rectok(semantic=semantic())
    decayed = {name for name, _ in tokenizer.named_parameters()} - tokenizer.no_weight_decay()
    kinds = {name.split(".", 3)[-1] if "transformer" in name else name for name in decayed}
    kinds = {kind.removeprefix("0.").removeprefix("1.").removeprefix("transformer.0.") for kind in kinds}
    assert kinds == {
        "attn.qkv.weight",
        "attn.proj.weight",
        "mlp.w12.weight",
        "mlp.w3.weight",
        "encoder.latent_head.weight",
        "decoder.ffn.1.weight",
        "decoder.conv_out.weight",
        "sem_decoders.dinov3.out.weight",
    }


def test_tokenizer_initialisation():
    tokenizer = rectok(
        channels=64,
        encoder={"width": 192, "layers": 1, "heads": 4},
        semantic=semantic(size={"width": 96, "layers": 1, "heads": 4}),
    )
    encoder, decoder, guess = tokenizer.encoder, tokenizer.decoder, tokenizer.sem_decoders["dinov3"]
    for layer in (encoder.transformer[0].attn.qkv, encoder.patch_embed[0], encoder.latent_head, decoder.decoder_embed):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1) and not layer.bias.any()
    assert encoder.positional_embedding.std().item() == pytest.approx(192**-0.5, rel=0.1)
    assert decoder.mask_token.std().item() == pytest.approx(48**-0.5, rel=0.4)
    bound = 96**-0.5  # PyTorch's own: uniform
    assert guess.transformer[0].attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    assert guess.transformer[0].attn.qkv.bias.any() and not guess.mask_embedding.any()


def test_tokenizer_under_bf16():
    tokenizer, x = rectok(semantic=semantic()), images()
    with torch.autocast("cpu", torch.bfloat16):
        recon = tokenizer(x, draws(0, 1))
    assert recon.terms["kl"].dtype == recon.details["latents"].dtype == torch.float32
    guess = recon.predictions["dinov3"].float()
    total = recon.images.float().square().mean() + recon.terms["kl"] + guess.square().mean()
    total.backward()
    assert total.isfinite() and all(p.grad.isfinite().all() for p in tokenizer.parameters())


def test_tokenizer_samples_are_independent_of_their_batch():
    tokenizer, x = rectok(semantic=semantic()).eval(), images(3)
    whole, alone = tokenizer(x, draws(5, 6, 7)), tokenizer(x[1:2], draws(6))
    torch.testing.assert_close(whole.images[1:2], alone.images)
    torch.testing.assert_close(whole.predictions["dinov3"][1:2], alone.predictions["dinov3"])
    assert torch.equal(whole.masked[1:2], alone.masked)
    assert not torch.equal(whole.images[1:2], tokenizer(x[1:2], draws(8)).images)


def test_qk_norm():
    tokenizer = rectok(qk_norm=True)
    assert "encoder.transformer.0.attn.q_norm.weight" in tokenizer.state_dict()
    block = tokenizer.encoder.transformer[0].attn
    x = torch.randn(1, 16, 48)
    before = block(x)
    with torch.no_grad():
        block.qkv.weight[:96] *= 10  # queries and keys: the norm takes it back
    torch.testing.assert_close(block(x), before, atol=1e-4, rtol=1e-3)


# -- statistics -------------------------------------------------------------------------------------------------------
def test_statistics_merge_and_file(tmp_path):
    moments = torch.randn(5, 16, 6) * 3 + 2
    whole, a, b = (StatsAccumulator(3) for _ in range(3))
    whole.update(moments)
    a.update(moments[:3])
    b.update(moments[3:])
    a.merge(b)
    stats = a.compute()
    torch.testing.assert_close(stats.channel_std, whole.compute().channel_std)
    torch.testing.assert_close(stats.mean, moments[..., :3].mean((0, 1)))
    torch.testing.assert_close(stats.single_std, moments[..., :3].std(correction=0))
    save_stats(tmp_path / "s.safetensors", stats, "abc")
    written = (tmp_path / "s.safetensors").read_bytes()
    assert written[8:].startswith(b'{"__metadata__":{"fingerprint":"abc","format":')  # the same bytes each time
    assert int.from_bytes(written[:8], "little") % 8 == 0
    again = load_stats(tmp_path / "s.safetensors", "abc")
    assert torch.equal(again.std, stats.std) and again.images == 5
    with pytest.raises(UserError, match="abc.*xyz"):
        load_stats(tmp_path / "s.safetensors", "xyz")
    save_file({"a": torch.zeros(1)}, tmp_path / "s.safetensors", {"format": "tessera latent statistics"})
    with pytest.raises(UserError, match="its header or its tensors are not those of latent statistics"):
        load_stats(tmp_path / "s.safetensors")
    (tmp_path / "s.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a readable"):
        load_stats(tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="no image"):
        StatsAccumulator(3).compute()


# -- generator --------------------------------------------------------------------------------------------------------
def test_time_by_hand():
    u = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(flow.training_time(u, 0.5), u) and torch.equal(flow.training_time(u, 1.0), u)
    torch.testing.assert_close(flow.training_time(u, 2.0), torch.tensor([1.0, 0.6, 0.0]))
    # Below 1 the sampler shifts, but does not flip.
    torch.testing.assert_close(flow.sampling_times(3, 0.5), torch.tensor([0.0, 1 / 3, 1.0]))
    grid = flow.sampling_times(150, math.sqrt(8))
    torch.testing.assert_close(grid[:3], torch.tensor([0.0, 0.002383, 0.004787]), atol=1e-6, rtol=0)
    assert len(grid) == 150 and grid[-2].item() == pytest.approx(0.981247, abs=1e-6) and grid[-1] == 1


def test_training_with_a_small_latent_does_not_shift_time():
    model = dit()
    assert model.time_shift < 1
    x1, noise, u = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), torch.tensor([0.2, 0.8])
    xt, t, target = model.training_point(x1, RecordedDraws({"noise": noise, "time": u}))
    assert torch.equal(t, u)
    torch.testing.assert_close(xt[0], 0.2 * x1[0] + 0.8 * noise[0])
    torch.testing.assert_close(target, x1 - noise)


def test_euler_follows_a_line_exactly():
    states = []
    end = euler(lambda x, t: torch.full_like(x, 3.0), torch.zeros(2), torch.tensor([0.0, 0.1, 1.0]), states)
    torch.testing.assert_close(end, torch.full((2,), 3.0))
    assert len(states) == 3


def test_guidance_interval_is_inclusive_and_per_sample():
    v, worse = torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    t = torch.tensor([0.3, 0.8, 0.29, 0.81])
    assert guide(v, worse, t, Guidance(2.0, interval=(0.3, 0.8))).flatten().tolist() == [2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cfg", "auto"])
def test_sampling_guides_step_by_step_like_sample_by_sample(kind):
    model, labels, d = dit().eval(), torch.tensor([1, 2]), draws(0, 1)
    guidance = Guidance(1.7, kind, (0.3, 0.8), dit().eval())
    field = model.field(labels, guidance)
    times = flow.sampling_times(5, model.time_shift)
    with torch.no_grad():
        expected = euler(lambda x, t: field(x, torch.full((2,), t)), d.normal("noise", (8, 4, 4)), times)
    sampled = model.sample(labels, d, guidance, steps=5)
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sampled, model.sample(labels, d, steps=5))


def test_sampling_is_independent_of_the_batch():
    model = dit().eval()
    guidance = Guidance(1.5)
    whole = model.sample(torch.tensor([1, 2, 3]), draws(10, 11, 12), guidance, steps=4)
    alone = model.sample(torch.tensor([2]), draws(11), guidance, steps=4)
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.equal(model.sample(torch.tensor([2]), draws(12), guidance, steps=4), alone)


def test_sampling_refuses_nonsense():
    model = dit()
    cases = (Guidance(2.0, "cgf"), 5, '"cfg"'), (Guidance(2.0, "auto"), 5, "weaker"), (Guidance(), 1, "2 steps")
    for guidance, steps, named in cases:
        with pytest.raises(UserError, match=named):
            model.sample(torch.tensor([1]), draws(0), guidance, steps=steps)


def test_generator_initialisation():
    model = dit(wake=False)
    x, t, y = torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([1, 2])
    assert not model.velocity(x, t, y).any()
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.15)
    limit = math.sqrt(6 / (8 + 48))
    assert model.s_embedder.proj.weight.abs().max().item() == pytest.approx(limit, rel=0.05)
    assert not model.s_embedder.proj.bias.any() and model.blocks[0].attn.qkv.bias.any()
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"pos_embed", "t_embedder.W"}


def test_generator_under_bf16():
    model = dit()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 8, 4, 4), torch.tensor([1, 2]), draws(0, 1))
        sampled = model.eval().sample(torch.tensor([1, 2]), draws(0, 1), Guidance(1.5), steps=3)
    loss.total.backward()
    assert loss.total.dtype == torch.float32 and loss.total.isfinite() and not loss.logs["flow"].requires_grad
    assert sampled.dtype == torch.float32 and sampled.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_label_drop():
    model = dit(label_drop=0.25)
    dropped = model.drop_labels(torch.tensor([3, 4]), RecordedDraws({"label_drop": torch.tensor([0.2, 0.25])}))
    assert dropped.tolist() == [10, 4]


def test_generator_says_what_does_not_fit():
    model = dit()
    assert model.fits(Continuous((4, 4), 8)) == []
    assert len(model.fits(Continuous((8, 8), 16))) == 2
    assert "continuous" in model.fits(Codes(16, 1, 32, 8))[0]
    with pytest.raises(UserError, match='"xl"'):
        DiTDH(size="xxl")
    with pytest.raises(UserError, match='"trunk_width"'):
        DiTDH(size={"trunk_wide": 3, "trunk_depth": 1, "trunk_heads": 1})


# -- both -------------------------------------------------------------------------------------------------------------
def test_forward_passes_are_one_graph():
    """No host synchronisation and no Python that torch.compile cannot see."""
    torch._dynamo.reset()

    def compile(function):
        return torch.compile(function, backend="eager", fullgraph=True)

    tokenizer, model = rectok(semantic=semantic()), dit()
    kept = torch.rand(2, 16).argsort(1)
    restore = kept.argsort(1)
    moments = compile(tokenizer.encoder)(images(), kept[:, :12])
    latents = moments[..., :8]
    torch.testing.assert_close(compile(tokenizer.decoder)(latents, restore), tokenizer.decoder(latents, restore))
    compile(tokenizer.sem_decoders["dinov3"])(latents, restore)
    x, t, y = torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([1, 2])
    torch.testing.assert_close(compile(model.velocity)(x, t, y), model.velocity(x, t, y))
    torch._dynamo.reset()


def count(module: torch.nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def test_published_parameter_counts():
    with torch.device("meta"):
        tokenizer = RecTok(semantic={"teachers": {"dinov3": 1024}})
        sizes = {name: DiTDH(size=name) for name in ("s", "b", "l", "xl")}
    assert count(tokenizer.encoder) + count(tokenizer.decoder) == 171_970_900
    assert count(tokenizer.sem_decoders) == 1_606_336
    assert count(sizes["xl"]) == 835_316_436 and count(sizes["xl"], trainable=True) == 835_021_268
    assert count(sizes["s"]) == 193_587_924
    assert [round(count(sizes[name]) / 1e6, 1) for name in "bl"] == [291.2, 618.5]
    assert math.isclose(tokenizer.time_shift, math.sqrt(8)) and math.isclose(sizes["xl"].time_shift, math.sqrt(8))


@pytest.mark.parametrize(
    "name, adapter",
    [
        ("RecTok", TOKENIZER),
        ("RecTok_decft", TOKENIZER),
        ("ditdhs_epoch_0029", GENERATOR),
        ("ditdhxl_epoch_0079", GENERATOR),
        ("ditdhxl_epoch_0599", GENERATOR),
    ],
)
def test_released_files_have_our_layout(name, adapter):
    path = fixture_folder().parent / "checkpoints" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no layouts of released files in {path.parent}")
    layout = json.loads(path.read_text())
    assert check_layout(adapter, layout) == []
    layout["tensors"].pop("decoder.conv_out.bias" if adapter is TOKENIZER else "blocks.3.attn.qkv.bias")
    assert "missing 1" in check_layout(adapter, layout)[0]


def test_tokenizer_adapter_round_trip():
    source, target = rectok(semantic=semantic()), rectok(semantic=semantic())
    official = TOKENIZER.restore(source)
    TOKENIZER.load(target, official)
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))
    assert set(TOKENIZER.restore(target)) == set(official)

    old = {name.replace("sem_decoders", "aux_decoders"): t for name, t in official.items()}
    old["aux_foundation_models.dinov3.embeddings.cls_token"] = torch.zeros(1)
    fresh = rectok(semantic=semantic())
    TOKENIZER.load(fresh, {"model": old, "epoch": 3})
    assert torch.equal(fresh.sem_decoders["dinov3"].out.weight, source.sem_decoders["dinov3"].out.weight)
    TOKENIZER.load(rectok(), official)  # no semantic decoder wanted


def test_adapters_choose_between_ema_and_raw():
    raw, ema, model = dit(), dit(), dit()
    container = {"model": GENERATOR.restore(raw), "model_ema": dict(ema.named_parameters()), "epoch": 79}
    assert "enc_feat_rope.freqs_cos" in container["model"]
    for use_ema, wanted in ((True, ema), (False, raw)):
        GENERATOR.load(model, container, use_ema=use_ema)
        assert torch.equal(model.t_embedder.W, wanted.t_embedder.W)
        assert torch.equal(model.blocks[0].attn.qkv.weight, wanted.blocks[0].attn.qkv.weight)
    assert not model.pos_embed.requires_grad and model.blocks[0].attn.qkv.weight.requires_grad
    described = DiTDH(**GENERATOR.describe(container))  # the number of heads comes from the RoPE tables
    assert [b.attn.heads for b in described.blocks] == [4, 4, 2] and described.num_classes == 10


def test_adapters_name_what_does_not_fit():
    official = dict(TOKENIZER.restore(rectok()))
    official["decoder.extra"] = official.pop("decoder.conv_out.bias")
    official["encoder.latent_head.bias"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"decoder\.conv_out\.bias.*decoder\.extra.*latent_head\.bias is \[3\]"):
        TOKENIZER.load(rectok(), official)
    with pytest.raises(UserError, match="blocks.1.mlp.w3.weight"):
        incomplete = GENERATOR.restore(dit())
        del incomplete["blocks.1.mlp.w3.weight"]
        GENERATOR.load(dit(), incomplete)
    for adapter in (TOKENIZER, GENERATOR):
        with pytest.raises(UserError, match="not the weights"):
            adapter.describe({"something": torch.zeros(1)})
    with pytest.raises(UserError, match="no weights found"):
        TOKENIZER.load(rectok(), {"epoch": 3})
    with pytest.raises(UserError, match="heads"):
        TOKENIZER.describe(TOKENIZER.restore(rectok()))


def test_positions_are_resized_to_another_grid():
    small, large = rectok(), rectok(image_size=128)
    TOKENIZER.load(large, TOKENIZER.restore(small))
    assert large.encoder.positional_embedding.shape == (1, 64, 48)
    corner = large.encoder.positional_embedding.view(8, 8, 48)[:2, :2].mean((0, 1))
    assert torch.nn.functional.cosine_similarity(corner, small.encoder.positional_embedding[0, 0], dim=0) > 0.8


def test_loading_onto_the_meta_device():
    source = dit()
    with torch.device("meta"):
        model = dit(wake=False)
    GENERATOR.load(model, GENERATOR.restore(source))
    x, t, y = torch.randn(1, 8, 4, 4), torch.rand(1), torch.tensor([1])
    assert torch.equal(model.velocity(x, t, y), source.velocity(x, t, y)) and not model.t_embedder.W.requires_grad


def test_head_as_wide_as_the_trunk_needs_no_projection():
    size = {"trunk_width": 48, "trunk_depth": 1, "trunk_heads": 4, "head_width": 48, "head_depth": 2, "head_heads": 2}
    model = dit(size=size)
    assert not any(name.startswith("s_projector") for name in model.state_dict())
    assert model.velocity(torch.randn(1, 8, 4, 4), torch.rand(1), torch.tensor([1])).shape == (1, 8, 4, 4)
    assert GENERATOR.describe(GENERATOR.restore(model))["size"] == size


def test_guidance_tables():
    """Scales by step and codebook: constant, linear to the full scale, RAR's cosine, ones outside the interval."""
    from generator.guidance import guide_logits, scales

    assert scales(Guidance(3.0), 4).tolist() == [[3.0]] * 4
    assert scales(Guidance((3.0, 0.5)), 2, branches=2).tolist() == [[3.0, 1.0]] * 2  # up to 1 is none
    assert scales(Guidance((3.0, 0.5)).mixing(), 2, branches=2).tolist() == [[3.0, 0.5]] * 2
    assert scales(Guidance(8.0, schedule="linear", start=2.0), 3).flatten().tolist() == [2.0, 5.0, 8.0]
    assert scales(Guidance(9.0, schedule="linear", start=1.0, interval=(0.5, 1.0)), 4)[:2].tolist() == [[1.0], [1.0]]
    cosine = scales(Guidance(16.0, schedule="cosine", power=2.75), 256).flatten()
    assert cosine[0] == 1.0 and (cosine.diff() >= 0).all() and 15.9 < cosine[-1] < 16.0
    assert scales(Guidance(1.0), 3).unique().tolist() == [1.0]
    with pytest.raises(UserError, match="2 numbers but the tokenizer has 3"):
        scales(Guidance((3.0, 2.0)), 4, branches=3)
    conditional, unconditional = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    assert guide_logits(conditional, unconditional, torch.tensor(3.0)).tolist() == [[4.0, 0.0]]
