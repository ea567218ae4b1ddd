"""FQGAN's tokenizer where no fixture looks: other K, other sizes, its files, its losses, its runs."""

from __future__ import annotations

import json

import pytest
import torch

from core.errors import UserError
from core.rng import Draws
from core.schema import Duration
from core.specs import Codes, Progress, Recon, Tokenizer
from core.weights.layouts import check_layout
from run.load import OBJECTIVES, TOKENIZERS, build_teachers, load_config
from tests.conftest import ROOT
from tests.parity import fixture_folder
from tests.tools import torture
from tokenizer.adapters.fqgan import ADAPTER
from tokenizer.class_tokens import ClassToken, nearest_pixels, timm_from_transformers
from tokenizer.losses.contrastive import info_nce
from tokenizer.losses.discriminators import PatchGAN, StyleGANDiscriminator
from tokenizer.losses.objective import Objective
from tokenizer.vq.fqgan import FQGAN

TOY = str(ROOT / "configs" / "toy" / "fqgan_tokenizer.yaml")
NANO = {
    "image_size": 32,
    "size": [1, 1, 2],
    "channels": 8,
    "res_blocks": 1,
    "z_channels": 8,
    "groups": 4,
    "vocab": 20,
    "code_dim": 4,
    "adapter_layers": 1,
    "adapter_heads": 2,
    "usage_window": 256,
}
SEMANTIC = {
    2: {"teachers": {"clip": 12}, "branches": {"clip": "sem"}},
    3: {"teachers": {"clip": 12, "dinov2_class": 8}, "branches": {"clip": "sem_high", "dinov2_class": "sem_mid"}},
}


def fqgan(branches: int = 2, semantic: bool = False, **settings) -> FQGAN:
    torch.manual_seed(0)
    heads = {**SEMANTIC[branches], "layers": 1, "heads": 2} if semantic else None
    return FQGAN(**{**NANO, "branches": branches, "semantic": heads, **settings})


def images(count: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def at(step: int) -> Progress:
    return Progress(images_seen=8 * step, total_images=800, images_per_epoch=80, step=step)


# ---------------------------------------------------------------------------------------------------------------------
# Any number of sub-codebooks
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "branches, names",
    [(1, ("vis",)), (2, ("vis", "sem")), (3, ("vis", "sem_mid", "sem_high")), (4, ("vis", "sem_1", "sem_2", "sem_3"))],
)
def test_any_number_of_branches(branches, names):
    tokenizer, x = fqgan(branches), images()
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.spec == Codes(64, branches, 20, 4, (8, 8), names) and tokenizer.names == names
    codes = tokenizer.encode(x)
    assert codes.shape == (2, 64, branches) and codes.dtype == torch.int64 and codes.max() < 20
    rows = tokenizer.embed(codes)
    assert rows.shape == (2, 64, branches, 4) and rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 64, branches))
    assert torch.equal(tokenizer.from_stored(tokenizer.precompute(x).to(torch.int16)), codes)
    assert tokenizer.decode(codes).shape == x.shape
    recon = tokenizer(x, Draws(0, torch.arange(2)))
    torch.testing.assert_close(recon.images, tokenizer.decode(codes), atol=1e-5, rtol=1e-4)
    assert tuple(recon.terms) == tokenizer.term_names
    assert set(tokenizer.term_names) == {
        "codebook",
        "commitment",
        "entropy",
        *(["disentangle"] if branches > 1 else []),
    }
    assert all(f"usage/{name}" in recon.logs for name in names)


def test_terms_are_sums_over_branches_and_disentangling_spares_the_tables():
    tokenizer = fqgan(3)
    recon = tokenizer(images(), None)
    for term in ("codebook", "commitment", "entropy"):
        torch.testing.assert_close(recon.terms[term].detach(), sum(recon.logs[f"{term}/{n}"] for n in tokenizer.names))
    recon.terms["disentangle"].backward()
    assert all(q.embedding.weight.grad is None for q in tokenizer.quantizers.values())
    assert all(conv.weight.grad.abs().sum() > 0 for conv in tokenizer.quant_convs.values())


def test_teachers_reach_the_encoder():
    tokenizer = fqgan(3, semantic=True)
    recon = tokenizer(images(), None)
    assert {n: p.shape for n, p in recon.predictions.items()} == {"clip": (2, 1, 12), "dinov2_class": (2, 1, 8)}
    recon.predictions["clip"].square().sum().backward()
    assert tokenizer.heads["sem_high"].conv_out.weight.grad.abs().sum() > 0
    assert tokenizer.heads["vis"].conv_out.weight.grad is None and tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
    assert tokenizer.quantizers["sem_high"].embedding.weight.grad is None


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"size": "vq-16"}, 'Did you mean "vq16"'),
        ({"image_size": 30}, "multiple of 4"),
        ({"branches": 0}, "branches"),
        ({"decoder_mult": [1, 1]}, "levels"),
        ({"groups": 3}, "in 3 groups"),
        ({"semantic": {"teachers": {"clip": 8}}}, "which sub-codebook predicts teacher clip"),
        ({"semantic": {"teachers": {"clip": 8}, "branches": {"clip": "sem_mid"}}}, 'no sub-codebook "sem_mid"'),
    ],
)
def test_settings_are_checked(settings, says):
    with pytest.raises(UserError, match=says):
        FQGAN(**{**NANO, **settings})


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def official(tokenizer: FQGAN) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in ADAPTER.restore(tokenizer).items()}


@pytest.mark.parametrize("branches", [2, 3])
def test_export_and_back_bit_for_bit(branches):
    tokenizer = fqgan(branches, semantic=True)
    tokenizer.train()(images(), None)  # puts something into the rings
    state = official(tokenizer)
    with pytest.raises(UserError, match="give tokenizer.groups=..."):
        ADAPTER.describe({"model": state})
    settings = {**ADAPTER.describe({"model": state}, {"groups": 4}), "adapter_heads": 2}
    settings["semantic"]["heads"] = 2
    again = FQGAN(**settings)
    ADAPTER.load(again, {"model": state, "args": None})
    ours, theirs = again.state_dict(), tokenizer.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    back = ADAPTER.restore(again)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["dual_ds16", "triple_ds16", "dual_ds8", "triple_ds8"])
def test_recorded_layouts(name):
    path = fixture_folder().parent / "checkpoints" / f"fqgan_{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    layout = json.loads(path.read_text())
    assert check_layout(ADAPTER, layout) == []
    with torch.device("meta"):
        recorded = {n: torch.empty(shape) for n, (shape, _) in layout["tensors"].items()}
    settings = ADAPTER.describe({"model": recorded})
    assert settings["branches"] == {"dual": 2, "triple": 3}[name.split("_")[0]] and settings["image_size"] == 256


@pytest.mark.parametrize(
    "ours, theirs, says",
    [
        ({"branches": 2}, {"branches": 3}, "sub-codebooks sem_high, sem_mid, vis and the model vis, sem.*branches: 3"),
        ({"branches": 2, "size": [1, 1, 1, 2]}, {"branches": 2}, "stride 4 and the model 8"),
        (
            {"branches": 2, "vocab": 30},
            {"branches": 2},
            r"quantizers.vis.embedding.weight is \[20, 4\], the model has \[30, 4\]",
        ),
    ],
)
def test_other_variants_are_refused(ours, theirs, says):
    with pytest.raises(UserError, match=says):
        ADAPTER.load(fqgan(**ours), {"model": official(fqgan(**theirs))})


def test_feature_heads_alone_may_be_left_out():
    state = official(fqgan(2, semantic=True))
    ADAPTER.load(fqgan(2), {"model": state})
    extra = {**state, "feat_pred_heads.more": torch.zeros(1)}
    with pytest.raises(UserError, match="unexpected 1: feat_pred_heads.more"):
        ADAPTER.load(fqgan(2), {"model": extra})
    with pytest.raises(UserError, match="missing 1: decoder.conv_in.weight"):
        ADAPTER.load(fqgan(2), {"model": {n: t for n, t in state.items() if n != "decoder.conv_in.weight"}})


def test_positions_and_rings_are_brought_to_size():
    state = official(fqgan(2, semantic=True))
    larger = fqgan(2, semantic=True, image_size=64, usage_window=300)
    ADAPTER.load(larger, {"model": state})
    assert larger.encode(images(1, 64)).shape == (1, 256, 2)
    assert larger.quantizers["vis"].codebook_used.shape == (300,)
    assert torch.equal(
        larger.predictors["clip"].positional_embedding[0], state["feat_pred_head.positional_embedding"][0]
    )


def test_only_published_variants_have_an_official_layout():
    with pytest.raises(UserError, match="2 or 3 sub-codebooks"):
        ADAPTER.restore(fqgan(4))


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------
def test_start_in_steps_counts_both_losses():
    x, recon, judge = images(), images().flip(0).requires_grad_(), PatchGAN(ndf=4, n_layers=1)
    loss = Objective(
        weights={"gan": 0.5, "discriminator": 0.25},
        pixels="signed",
        gan_start="20step",
        discriminator_loss="vanilla",
        gan_loss="non_saturating",
    )
    closed = loss.generator_loss(x, Recon(recon), {}, judge, at(19))
    assert closed.logs["gan_weight"] == 0 and loss.discriminator_loss(x, recon, judge, at(19)).total == 0
    open_ = loss.generator_loss(x, Recon(recon), {}, judge, at(20))
    torch.testing.assert_close(open_.logs["gan"], torch.nn.functional.softplus(-judge(recon)).mean().detach())
    torch.testing.assert_close(open_.logs["reconstruction"], (recon - x).square().mean().detach())
    step = loss.discriminator_loss(x, recon, judge, at(20))
    both = torch.nn.functional.softplus(-judge(x)).mean() + torch.nn.functional.softplus(judge(recon)).mean()
    torch.testing.assert_close(step.total, 0.25 * 0.5 * both)


@pytest.mark.parametrize(
    "text, before, after", [("3ep", 29, 30), ("20step", 19, 20), ("160img", 19, 20), ("never", 99, None)]
)
def test_durations_are_reached(text, before, after):
    assert not Duration(text).reached(at(before)) and (after is None or Duration(text).reached(at(after)))


def test_adaptive_weight_by_hand():
    tokenizer, judge, x = fqgan(), PatchGAN(ndf=4, n_layers=1), images()
    weights = {
        "codebook": 0.0,
        "commitment": 0.0,
        "entropy": 0.0,
        "disentangle": 0.0,
        "gan": 0.5,
        "reconstruction": 2.0,
    }
    recon = tokenizer(x, None)
    result = Objective(weights=weights, pixels="signed", adaptive_weight=True).generator_loss(
        x, recon, {}, judge, at(0)
    )
    layer = tokenizer.decoder.conv_out.weight
    norms = [
        torch.autograd.grad(loss, layer, retain_graph=True)[0].norm()
        for loss in (2 * (recon.images - x).square().mean(), -judge(recon.images).mean())
    ]
    expected = norms[0] / (norms[1] + 1e-4)
    torch.testing.assert_close(result.logs["gan_weight"], 0.5 * expected, rtol=1e-4, atol=1e-6)
    plain = 2 * (recon.images - x).square().mean() - result.logs["gan_weight"] * judge(recon.images).mean()
    trained = list(tokenizer.encoder.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(loss, trained, retain_graph=True) for loss in (result.total, plain))):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(result.total, plain)
    with pytest.raises(UserError, match="adaptive_weight: false"):
        Objective(weights={"gan": 0.5}, adaptive_weight=True).generator_loss(x, Recon(x), {}, judge, at(0))


def features(seed: int) -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))


def test_info_nce_by_hand():
    a, b = features(0), features(1)
    s, t = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    m = (s @ t.T).exp()
    torch.testing.assert_close(info_nce(a, b), -(m.diag() / m.sum(1)).log().mean())
    assert not torch.isclose(info_nce(a, b), info_nce(b, a))
    torch.testing.assert_close(info_nce(a, b, symmetric=True), 0.5 * (info_nce(a, b) + info_nce(b, a)))
    parts = [info_nce(x, y) for x, y in zip(a.split(2), b.split(2))]
    torch.testing.assert_close(info_nce(a, b, group=2), torch.stack(parts).mean())
    assert info_nce(a[:1], b[:1]) == 0  # one picture: nothing to tell apart, and no crash


# ---------------------------------------------------------------------------------------------------------------------
# Discriminators and teachers
# ---------------------------------------------------------------------------------------------------------------------
def test_stylegan_discriminator_has_the_published_size():
    with torch.device("meta"):
        network = StyleGANDiscriminator(256)
    assert sum(p.numel() for p in network.parameters()) == 36_500_225
    assert {"blocks.7.downsample.0.f", "blocks.2.conv_res.weight", "final_linear.2.bias"} <= set(network.state_dict())
    small = StyleGANDiscriminator(16, channels=1 / 64)
    assert small(images(2, 16)).shape == (2, 1)
    with pytest.raises(UserError, match="power of two"):
        StyleGANDiscriminator(48)


def test_running_statistics_are_those_of_torch():
    judge = PatchGAN(ndf=4, n_layers=1, init="normal")
    layer, x = judge.main[3], torch.randn(3, 8, 5, 5)
    plain = torch.nn.BatchNorm2d(8)
    plain.load_state_dict(layer.state_dict())
    for _ in range(2):
        torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    kept = layer.running_var.clone()
    layer(torch.full_like(x, torch.nan))  # a step that is skipped
    assert torch.equal(kept, layer.running_var) and layer.running_mean.isfinite().all()
    layer.eval()(x)
    assert torch.equal(kept, layer.running_var)


def test_nearest_pixels_take_the_lower_neighbour():
    ramp = torch.linspace(-1, 1, 256).expand(1, 3, 256, 256)
    expected = ramp[..., torch.arange(224) * 256 // 224]
    torch.testing.assert_close(nearest_pixels(ramp, 224)[0, 0, 0], expected[0, 0, 0] * 0.5 + 0.5)


@pytest.mark.parametrize("normed", [True, False])
def test_class_tokens_come_before_or_after_the_norm(normed):
    torch.manual_seed(0)
    teacher = ClassToken("dinov2_class", "vit_small_patch14_dinov2", 56, normed, pretrained=False)
    found = teacher(images())
    assert found.shape == (2, 1, 384) and not found.requires_grad and teacher.dim == 384
    backbone = teacher.backbone
    tokens = backbone._pos_embed(backbone.patch_embed(teacher.pixels(images())))
    for block in backbone.blocks:
        tokens = block(tokens)
    if normed:
        tokens = backbone.norm(tokens)
    torch.testing.assert_close(found[:, 0], tokens[:, 0])


def as_transformers(state: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """timm's tensors under the names that the transformers library gives them, written out here once more by hand."""
    clip = family == "clip"
    top = {
        "cls_token": "vision_model.embeddings.class_embedding" if clip else "embeddings.cls_token",
        "pos_embed": "vision_model.embeddings.position_embedding.weight" if clip else "embeddings.position_embeddings",
        "patch_embed.proj": "vision_model.embeddings.patch_embedding"
        if clip
        else "embeddings.patch_embeddings.projection",
        "norm_pre": "vision_model.pre_layrnorm",
        "norm": "vision_model.post_layernorm" if clip else "layernorm",
    }
    inner = {
        "norm1": "layer_norm1" if clip else "norm1",
        "norm2": "layer_norm2" if clip else "norm2",
        "attn.proj": "self_attn.out_proj" if clip else "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    words = ("query", "key", "value")
    qkv = [f"self_attn.{p[0]}_proj" if clip else f"attention.attention.{p}" for p in words]
    found = {"text_model.final" if clip else "embeddings.mask_token": torch.zeros(1)}  # not the teacher's
    for name, tensor in state.items():
        whole, _, kind = name.rpartition(".")
        if name in ("cls_token", "pos_embed"):
            found[top[name]] = tensor[0, 0] if clip and name == "cls_token" else tensor[0] if clip else tensor
        elif not name.startswith("blocks."):
            found[f"{top[whole]}.{kind}"] = tensor
        else:
            _, index, part = whole.split(".", 2)
            layer = f"vision_model.encoder.layers.{index}" if clip else f"encoder.layer.{index}"
            if part == "attn.qkv":
                found |= {f"{layer}.{n}.{kind}": piece for n, piece in zip(qkv, tensor.chunk(3))}
            elif part.startswith("ls"):
                found[f"{layer}.layer_scale{part[2]}.lambda1"] = tensor
            else:
                found[f"{layer}.{inner[part]}.{kind}"] = tensor
    return found


@pytest.mark.parametrize(
    "family, model", [("clip", "vit_base_patch16_clip_quickgelu_224"), ("dinov2", "vit_small_patch14_dinov2")]
)
def test_teachers_read_files_of_transformers(tmp_path, family, model):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = timm.create_model(model, num_classes=0).state_dict()
    theirs = as_transformers(state, family)
    back = timm_from_transformers(theirs)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in theirs.items()}, path)
    teacher = ClassToken(family, model, 224, True, weights=str(path))
    assert torch.equal(teacher.backbone.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])
    with pytest.raises(UserError, match="is not a file of vit_tiny_patch16_224"):
        ClassToken(family, "vit_tiny_patch16_224", 224, True, weights=str(path))
    with pytest.raises(UserError, match="no file nowhere.pth"):
        ClassToken(family, model, 224, True, weights="nowhere.pth")


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
def test_two_ranks(tmp_path):
    """Two steps: later on, rounding puts a vector to another code, and from there on runs are different ones."""
    arena = torture.Arena(TOY, tmp_path, [*torture.PERIODS, "train.duration=2step"])
    score = torture.compare_layouts(arena, [torture.LAYOUTS[0]])
    assert score.full, str(score)


def test_every_recipe_builds():
    for name in ("dual_ds16", "triple_ds16", "dual_ds8", "triple_ds8"):
        config = load_config(str(ROOT / "configs" / "fqgan" / f"{name}.yaml"), [])
        settings = dict(config.tokenizer)
        with torch.device("meta"):
            teachers = build_teachers(config, settings, pretrained=False)
            tokenizer = TOKENIZERS.build(settings)
        perceptual = {"lpips": {"pretrained": False}}
        objective = OBJECTIVES.build({**config.objective, "perceptual": perceptual})
        objective.check_terms(tokenizer.term_names, bool(teachers), True)
        widths = {"dual": {"clip": 1024}, "triple": {"clip": 768, "dinov2_class": 384}}[name.split("_")[0]]
        assert tokenizer.semantic.teachers == widths
