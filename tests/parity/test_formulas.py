"""Settings that no recording holds, against the published formulas written out here in numpy or plain torch.

tests/parity/README.md lists, option by option, which values are recorded and which are checked here or elsewhere.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from core.schema import Duration, OptimizerConfig, ScheduleConfig
from core.specs import Discriminator, Progress, Recon
from core.train.optim import Schedule
from tests.parity.recorded_draws import RecordedDraws
from tokenizer.adapters import ADAPTERS
from tokenizer.losses import diffaug
from tokenizer.losses.objective import Objective
from tokenizer.multiscale.imagefolder import ImageFolder, Semantic
from tokenizer.multiscale.quantizer import MultiScaleQuantizer
from tokenizer.vq.dar import DAR

TRUNK = {"width": 32, "layers": 1, "heads": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- RecTok -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epoch", [0, 39, 40, 100, 420, 799.5, 800, 900])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_decay_between_two_epochs(shape, epoch):
    """--ditdh_sched: constant, then linear or half a cosine from epoch 40 to 800, then the minimum."""
    per_epoch = 1000
    schedule = Schedule.from_config(
        OptimizerConfig(lr=2e-4),
        ScheduleConfig(shape, Duration("0ep"), 2e-5, Duration("40ep"), Duration("800ep")),
        global_batch=1,
        images_per_epoch=per_epoch,
        total_images=1000 * per_epoch,
    )
    part = min(1.0, max(0.0, (epoch - 40) / 760))
    left = 0.5 * (1 + math.cos(math.pi * part)) if shape == "cosine" else 1 - part
    assert schedule(round(epoch * per_epoch)) == pytest.approx(2e-5 + (2e-4 - 2e-5) * left, rel=1e-9)


@pytest.mark.parametrize(
    "kind, distance",
    [
        ("cosine", lambda p, t: 1 - (p * t).sum(-1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(t, axis=-1)),
        ("l2", lambda p, t: ((p - t) ** 2).mean(-1)),
        ("l1", lambda p, t: np.abs(p - t).mean(-1)),
    ],
)
@pytest.mark.parametrize("hidden", [0, 3])
def test_semantic_loss_at_masked_tokens_is_that_of_gathered_ones(kind, distance, hidden):
    """--sem_target reconstruction gathers (B, masked, D) first; nothing masked gives 0 and a gradient of 0."""
    prediction, target = torch.randn(2, 8, 5, requires_grad=True), torch.randn(2, 8, 5)
    places = torch.stack([torch.randperm(8)[:hidden] for _ in range(2)])
    masked = torch.zeros(2, 8, dtype=torch.bool).scatter(1, places, True)
    objective = Objective(
        weights={"semantic": 1.0, "reconstruction": 0.0}, semantic_loss=kind, semantic_target="masked"
    )
    images = torch.zeros(2, 3, 4, 4)
    loss = objective.generator_loss(
        images, Recon(images, {}, {"t": prediction}, masked=masked), {"t": target}, None, Progress(0, 1, 1, 0)
    ).total
    loss.backward()
    gathered = [x.detach().gather(1, places[..., None].expand(-1, -1, 5)).numpy() for x in (prediction, target)]
    assert loss.item() == pytest.approx(distance(*gathered).mean() if hidden else 0.0, abs=1e-6)
    assert bool(prediction.grad.any()) == bool(hidden) and not prediction.grad[~masked].any()


# -- FQGAN ------------------------------------------------------------------------------------------------------------
class Judge(Discriminator):
    def forward(self, images, draws=None):
        return images.mean((1, 2, 3))


@pytest.mark.parametrize("kind", ["mse", "l1"])
@pytest.mark.parametrize("step", [1, 2])
def test_weighted_reconstruction_and_adaptive_weight(kind, step):
    """w rec + d clamp(|d(w rec)/dL| / (|d adv/dL| + 1e-4)) adv, L the last layer; the discriminator counts from step 2."""
    layer = torch.randn(3, 4, requires_grad=True)
    features, images = torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5)
    paint = lambda weight: F.conv2d(features, weight[..., None, None])
    objective = Objective(
        weights={"reconstruction": 3.0, "gan": 0.5},
        reconstruction=kind,
        pixels="signed",
        gan_start="2step",
        adaptive_weight=True,
        across_ranks=False,
    )
    found = objective.generator_loss(
        images, Recon(paint(layer), {}, last_layer=layer), {}, Judge(), Progress(step, 10, 10, step)
    )
    found.total.backward()

    ours = layer.detach().clone().requires_grad_()
    error = paint(ours) - images
    supervised = 3.0 * (error.abs() if kind == "l1" else error.square()).mean()
    adversarial = -Judge()(paint(ours)).mean()
    first, second = (torch.autograd.grad(x, ours, retain_graph=True)[0] for x in (supervised, adversarial))
    weight = 0.5 * (first.norm() / (second.norm() + 1e-4)).clamp(0, 1e4) * (step >= 2)
    torch.testing.assert_close(found.total.detach(), (supervised + weight * adversarial).detach())
    torch.testing.assert_close(layer.grad, first + weight * second)
    torch.testing.assert_close(found.logs["gan_weight"], weight)


# -- D-AR -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("groups, length, window", [(4, 16, 4), (4, 16, 8), (8, 32, 4), (8, 256, 32)])
@pytest.mark.parametrize("steps", [3, 4, 6, 8, 20])
def test_windows_of_any_number_of_steps(groups, length, window, steps):
    """start = min(floor(g N), N - Q) with g = floor(u G + 0.5) / G at u = i / S."""
    tokenizer = DAR(
        image_size=32,
        patch_size=8,
        encoder_width=32,
        encoder_layers=0,
        condition_width=32,
        condition_layers=0,
        length=length,
        groups=groups,
        window=window,
        steps=max(steps, groups),
        vocab=8,
        head_dim=16,
        decoder={"width": 32, "depth": 1, "patch_size": 4},
    )
    for i in range(steps):
        g = np.floor(i / steps * groups + 0.5) / groups
        assert tokenizer.window_start(i, steps) == min(int(np.floor(g * length + 1e-9)), length - window)


def dar(**settings) -> DAR:
    tokenizer = DAR(
        **{
            "image_size": 32,
            "patch_size": 8,
            "encoder_width": 32,
            "encoder_layers": 1,
            "condition_width": 32,
            "condition_layers": 1,
            "length": 16,
            "groups": 4,
            "steps": 4,
            "vocab": 16,
            "head_dim": 16,
            "decoder": {"width": 32, "depth": 1, "patch_size": 4, "data_std": 0.5, "time_shift": 3.0},
            **settings,
        }
    )
    for p in tokenizer.parameters():  # gates and heads start at zero
        torch.nn.init.normal_(p, std=0.1)
    return tokenizer


def test_flow_of_any_scale_and_shift():
    """t = u / (u + s (1 - u)); x_t = t d x + (1 - t) n; loss mean((v - (d x - n))^2) / d^2; picture (x_t + (1 - t) v) / d;
    a perceptual loss by time weighs 2 t."""
    tokenizer = dar(perceptual_by_time=True)
    x, u, n = torch.rand(3, 3, 32, 32) * 2 - 1, torch.tensor([0.1, 0.5, 0.9]), torch.randn(3, 3, 32, 32)
    recon = tokenizer(x, RecordedDraws({"time": u, "noise": n, "usage": torch.rand(3, 16)}))
    t = u / (u + 3 * (1 - u))
    torch.testing.assert_close(recon.details["t"], t)
    torch.testing.assert_close(recon.perceptual_weights, 2 * t)
    t, v = t.view(-1, 1, 1, 1), recon.details["velocity"]
    assert v.abs().mean() > 1e-3
    torch.testing.assert_close(recon.terms["flow"], (v - (0.5 * x - n)).square().mean() / 0.25)
    torch.testing.assert_close(recon.images, (t * 0.5 * x + (1 - t) * n + (1 - t) * v) / 0.5)


def test_continuous_tokens_are_unit_vectors():
    """vq_enable false: no code terms; query_low_rank false: full-width query table and no layer behind it."""
    tokenizer = dar(quantize=False, low_rank_queries=False)
    assert tokenizer.query_embedding.weight.shape[1] == 32 and not any(
        "query_linear" in n for n, _ in tokenizer.named_parameters()
    )
    x = torch.rand(2, 3, 32, 32)
    recon = tokenizer(x, RecordedDraws({"time": torch.tensor([0.2, 0.6]), "noise": torch.randn(2, 3, 32, 32)}))
    assert set(recon.terms) == {"flow"}
    official = ADAPTERS["dar"].restore(tokenizer)
    assert not any(name.startswith("quantize.") for name in official)  # a file of it holds no codebook
    ADAPTERS["dar"].load(dar(quantize=False, low_rank_queries=False), official)
    unit = tokenizer._project(x)
    unit = unit / unit.norm(dim=-1, keepdim=True)
    start = torch.tensor([4, 8])  # floor(0.2 4 + 0.5) = 1, floor(0.6 4 + 0.5) = 2, times N / G = 4
    window = torch.stack([c[s : s + 4] for c, s in zip(tokenizer.conditions(unit), start)])
    torch.testing.assert_close(recon.details["window"], window, atol=1e-5, rtol=1e-4)


def test_output_size_is_a_bicubic_resize():
    codes, draws = torch.randint(0, 16, (1, 16, 1)), RecordedDraws({"noise": torch.randn(1, 3, 32, 32)})
    tokenizer = dar().eval()
    whole = tokenizer.decode(codes, draws)
    tokenizer.output_size = 24
    expected = F.interpolate(whole, size=(24, 24), mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(tokenizer.decode(codes, draws), expected)


# -- discriminators ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, real, false",
    [
        ("hinge", lambda x: np.maximum(0, 1 - x), lambda x: np.maximum(0, 1 + x)),
        ("vanilla", lambda x: np.log1p(np.exp(-x)), lambda x: np.log1p(np.exp(x))),
    ],
)
@pytest.mark.parametrize(
    "mine, generator", [("hinge", lambda x: -x), ("non_saturating", lambda x: np.log1p(np.exp(-x)))]
)
def test_adversarial_losses(kind, real, false, mine, generator):
    """D: half of both means; G: -D or softplus(-D)."""
    x, y = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    objective = Objective(
        weights={"gan": 2.0, "reconstruction": 0.0}, pixels="signed", gan_loss=mine, discriminator_loss=kind
    )
    judged = [Judge()(p).numpy() for p in (x, y)]
    loss = objective.discriminator_loss(x, y, Judge(), Progress(1, 10, 10, 1)).total
    assert loss.item() == pytest.approx(0.5 * (real(judged[0]).mean() + false(judged[1]).mean()), rel=1e-5)
    loss = objective.generator_loss(x, Recon(y, {}), {}, Judge(), Progress(1, 10, 10, 1)).total
    assert loss.item() == pytest.approx(2.0 * generator(judged[1]).mean(), rel=1e-4, abs=1e-6)


# -- ImageFolder ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [30, 51, 64])
def test_cutout_of_even_and_odd_sides(size):
    """c = round(0.2 size); centre floor(u (size + 1 - c % 2)); box from centre - c // 2, clipped, set to 0."""
    images, u = torch.rand(4, 3, size, size) + 1, torch.tensor([[0.0, 0.4, 0.77, 0.999], [0.999, 0.1, 0.5, 0.0]])
    found, c = diffaug.cut_out(images.clone(), *u, 0.2), round(0.2 * size)
    for image, cut, row, column in zip(images, found, *u.tolist()):
        expected = image.clone()
        top, left = (math.floor(x * (size + 1 - c % 2)) - c // 2 for x in (row, column))
        expected[:, max(0, top) : max(0, top + c), max(0, left) : max(0, left + c)] = 0
        assert torch.equal(cut, expected)


@pytest.mark.parametrize("epoch", [0, 40, 199, 200, 350])
def test_contrast_grows_with_the_epoch(epoch):
    """clip_norm: (epoch % 200) / 200 * (100 - s0) + s0, and 100 from epoch 200 on."""
    factor = Semantic({"dinov2_patch16": 8}, scale=5.0, normalise=True).factor(Progress(epoch, 1000, 1, 0))
    assert factor == pytest.approx(100 if epoch >= 200 else epoch / 200 * 95 + 5)


@pytest.mark.parametrize("scales, branches", [([3], 2), ([1, 2, 3], 1), ([1, 2, 3], 2)])
def test_dropped_pictures_take_no_part_in_the_contrast(scales, branches):
    """Also where there is one scale, or one branch: InfoNCE of the others, both ways, features as they are."""
    tokenizer = ImageFolder(
        image_size=32,
        patch_size=8,
        encoder=TRUNK,
        decoder=TRUNK,
        latent_grid=3,
        scales=scales,
        branches=branches,
        vocab=16,
        code_dim=4,
        start_drop=1,
        codebook_drop=0.5,
        semantic={"teachers": {"dinov2_patch16": 32}},
        drop_path=0.0,
    )
    images, seen = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randn(4, 1, 32)
    draws = RecordedDraws(
        {"scales kept": torch.tensor([0.99] * 4), "quantizer dropout": torch.tensor([0.1, 0.9, 0.8, 0.7])}
    )
    recon = tokenizer(images, draws, {"dinov2_patch16": seen})
    u = tokenizer.quant_conv(seen[:, 0, :, None, None]).flatten(1)[1:]
    v = recon.details["quantized"].features[1:, -1].mean((2, 3))
    logits = u @ v.t()
    own = torch.arange(3)
    torch.testing.assert_close(
        recon.terms["contrast"], 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own))
    )


def test_usage_moves_slowly_from_the_hundredth_row_on():
    """The first row is the hits, the next are 0.9 old + 0.1 hits, from number 100 on 0.99 and 0.01; threshold 0.08."""
    quantizer, expected = MultiScaleQuantizer(6, 4, (1, 2), 1), np.zeros((2, 6))
    for step in range(60):  # two rows a step
        codes = torch.randint(0, 6, (3, 5, 1))
        quantizer._count(codes)
        for scale, part in enumerate((codes[:, :1], codes[:, 1:])):
            hits, number = np.bincount(part.flatten().numpy(), minlength=6), 2 * step + scale
            weight = 1.0 if number == 0 else 0.1 if number < 100 else 0.01
            expected[scale] = (1 - weight) * expected[scale] + weight * hits
    np.testing.assert_allclose(quantizer.quantizes[0].ema_vocab_hit_SV.numpy(), expected, rtol=1e-5)
    share = 100 * (expected >= 3 * 2 * 2 / 6 * 0.08).mean(1)
    np.testing.assert_allclose(quantizer.usage(3)[0].numpy(), share)
