"""ImageFolder: quantiser, tokenizer, training runs, released files and mistakes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from core.errors import UserError
from core.nn.vit import VIT_SIZES, VisionTransformer, ViTSize
from core.rng import Draws
from core.specs import Codes
from core.train.run import read_metrics
from core.train.trainer import Trainer
from run import estimate
from run import translate as original_words
from run.load import load_config
from run.train import hint_for_small_sets
from scripts import evaluate_generator
from tests.conftest import ROOT
from tests.tools import torture
from tokenizer.adapters.imagefolder import ADAPTER
from tokenizer.losses.diffaug import DiffAugment, cut_out, translate
from tokenizer.losses.dino_discriminator import LocalBatchNorm, SpectralConv1d
from tokenizer.multiscale.imagefolder import ImageFolder, Semantic
from tokenizer.multiscale.quantizer import MultiScaleQuantizer, phi_index
from tokenizer.teachers import DINOv2ClassTeacher

TOY = str(ROOT / "configs" / "toy" / "imagefolder_tokenizer.yaml")
TOY_VAR = str(ROOT / "configs" / "toy" / "imagefolder_var.yaml")
TRUNK = {"width": 32, "layers": 2, "heads": 2}


def build(**settings) -> ImageFolder:
    torch.manual_seed(0)
    common = {
        "image_size": 32,
        "patch_size": 8,
        "encoder": TRUNK,
        "decoder": TRUNK,
        "latent_grid": 3,
        "scales": [1, 2, 3],
        "vocab": 16,
        "code_dim": 4,
        "start_drop": 1,
    }
    return ImageFolder(**{**common, **settings})


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


# -- quantiser --------------------------------------------------------------------------------------------------------
def test_released_scales_share_four_convolutions():
    assert [phi_index(s, 10, 4) for s in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [phi_index(s, 4, 4) for s in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "settings",
    [{}, {"shared_phi": 1}, {"shared_phi": 0}, {"cosine": False}, {"binary": True}, {"branches": 3}, {"branches": 1}],
)
def test_codes_give_back_the_map(settings):
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(16, 4, (1, 2, 3), **{"branches": 2, "normalise": "binary" in settings, **settings})
    features = torch.randn(2, quantizer.branches, 4, 3, 3)
    found = quantizer(features)
    assert torch.equal(found.codes, quantizer.encode(features))
    torch.testing.assert_close(quantizer.partial_maps(found.codes)[-1], found.features)
    torch.testing.assert_close(quantizer.partial_maps(found.codes[:, :5])[-1], found.partial[1])  # the first two scales
    assert quantizer.embed(found.codes).shape == (2, 14, quantizer.branches, 4)


def test_branches_do_not_see_each_other():
    """A quantiser of two branches is two quantisers of one."""
    torch.manual_seed(0)
    both = MultiScaleQuantizer(16, 4, (1, 2, 3), 2)
    features = torch.randn(2, 2, 4, 3, 3)
    for branch in range(2):
        alone = MultiScaleQuantizer(16, 4, (1, 2, 3), 1)
        alone.quantizes[0].load_state_dict(both.quantizes[branch].state_dict())
        assert torch.equal(alone.encode(features[:, branch, None])[..., 0], both.encode(features)[..., branch])


def test_dropped_scales_leave_map_and_losses():
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(16, 4, (1, 2, 3), 2)
    features = torch.randn(2, 2, 4, 3, 3)
    found = quantizer(features, kept=torch.tensor([1, 3]))
    whole = quantizer(features)
    torch.testing.assert_close(found.features[0], whole.partial[0][0])
    torch.testing.assert_close(found.features[1], whole.features[1])
    errors = [(maps - features).square().flatten(1).mean(1) for maps in whole.partial]
    expected = (errors[0].mean() + errors[1][1] + errors[2][1]) / 3  # at scales 1 and 2 only the second picture counts
    torch.testing.assert_close(found.codebook_loss, expected)


def test_usage_counts_codes():
    quantizer = MultiScaleQuantizer(4, 4, (1, 2), 1, binary=False)
    with torch.no_grad():
        quantizer.quantizes[0].embedding.weight.copy_(torch.eye(4))
    features = torch.eye(4).view(4, 1, 4, 1, 1).expand(4, 1, 4, 2, 2)
    quantizer(features, update_usage=True)
    assert quantizer.quantizes[0].ema_vocab_hit_SV[0].tolist() == [1, 1, 1, 1]  # the first row as it is
    assert quantizer.usage(4)[0].tolist() == [100.0, 100.0]


# -- tokenizer --------------------------------------------------------------------------------------------------------
def test_one_scale_gives_an_ordinary_sequence():
    tokenizer = build(scales=[3], quantizer="plain").eval()
    assert tokenizer.spec == Codes(9, 2, 16, 4, (3, 3))
    codes = tokenizer.encode(pictures())
    assert codes.shape == (2, 9, 2) and tokenizer.decode(codes).shape == (2, 3, 32, 32)
    torch.testing.assert_close(tokenizer.embed(codes).norm(dim=-1), torch.ones(2, 9, 2))


def test_with_one_scale_dropped_pictures_leave_the_contrast_alone():
    tokenizer = build(scales=[3], codebook_drop=0.5, drop_path=0.0, semantic={"teachers": {"t": 32}}).train()
    images, draws = pictures(8), Draws(0, torch.arange(8))
    whole = draws.uniform("quantizer dropout") >= 0.5
    assert 1 < whole.sum() < 7 and tokenizer.quantizer.phi_weights() == []

    def contrast(changed):
        features = torch.randn(8, 1, 32, generator=torch.Generator().manual_seed(3))
        features[changed] += 1.0
        return tokenizer(images, draws, {"t": features}).terms["contrast"].item()

    plain = contrast(torch.zeros(8, dtype=torch.bool))
    assert contrast(~whole) == plain and contrast(whole) != plain


def test_flattened_codes_suit_other_generators():
    spec = build().spec
    assert spec.flatten().length == 14 and spec.flatten().branches == 2


def test_features_for_probing():
    found = build().eval().probe_features(pictures())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "last": (2, 9, 4),
        "all": (2, 9, 8),
        "pre": (2, 9, 4),
    }


@pytest.mark.parametrize("method", ["lora", "frozen"])
def test_tuning_leaves_the_trunk_alone(method):
    """Adapters start as nothing; only they, the last norm and what lies outside the trunk are trained."""
    full, tuned = build().eval(), build(enc_tuning=method, lora_rank=2, lora_alpha=2.0).eval()
    torch.testing.assert_close(tuned.encoder(pictures()), full.encoder(pictures()))
    trained = {n.removeprefix("encoder.model.") for n, p in tuned.named_parameters() if p.requires_grad}
    inside = {n for n in trained if n.startswith(("blocks", "norm", "cls_token", "pos_embed", "patch_embed"))}
    wanted = {f"blocks.{b}.mlp.{fc}.lora_{m}" for b in range(2) for fc in ("fc1", "fc2") for m in "AB"}
    assert inside == (wanted | {"norm.weight", "norm.bias"} if method == "lora" else set())
    assert {"encoder.latent_tokens", "encoder.lvl_embed.weight", "quant_conv.weight"} <= trained


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"branches": 1},
        {"branches": 3, "shared_phi": 1},
        {"shared_phi": 0},
        {"scales": [3], "quantizer": "plain"},
        {"enc_tuning": "lora", "lora_rank": 2},
        {"quantizer": "binary"},
        {"dec_tuning": "lora"},
    ],
)
def test_files_go_out_and_come_back(settings):
    """Our model -> official names -> a model with other weights: all tensors equal."""
    model = build(**settings)
    official = ADAPTER.restore(model)
    other = build(**settings)
    for parameter in other.parameters():
        parameter.data.add_(1)
    ADAPTER.load(other, official)
    skipped = ("updates",)
    for name, value in model.state_dict().items():
        assert name.endswith(skipped) or torch.equal(other.state_dict()[name], value), name
    again = ADAPTER.restore(other)
    assert again.keys() == official.keys() and all(torch.equal(again[n], official[n]) for n in official)


def test_convolutions_reach_over_the_seams_of_patches():
    """A changed token changes its own patch only, as published, or two more pixels on each side."""
    for channels, reach in ((0, 0), (4, 2)):
        model = build(pixel_channels=channels)
        tokens = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(2))
        changed = tokens.clone()
        changed[0, 5] += 1.0  # rows and columns 8 to 15
        rows, columns = (model.decoder.to_pixel(tokens) != model.decoder.to_pixel(changed))[0].any(0).nonzero().T
        assert (int(rows.min()), int(rows.max())) == (int(columns.min()), int(columns.max())) == (8 - reach, 15 + reach)
        assert model.decoder.to_pixel.last_weight.shape[0] == (3 if channels else 192)
    with pytest.raises(UserError, match="pixel_channels=4 cannot be exported"):
        ADAPTER.restore(model)


def test_adapters_start_from_a_file_without_and_merge_into_a_model_without():
    whole = build().eval()
    adapted = build(enc_tuning="lora", dec_tuning="lora", lora_rank=2, lora_alpha=2.0).eval()
    for parameter in adapted.encoder.model.norm.parameters():
        parameter.data.add_(1)
    ADAPTER.load(adapted, ADAPTER.restore(whole))
    codes = whole.encode(pictures())
    assert torch.equal(adapted.encode(pictures()), codes)
    torch.testing.assert_close(adapted.decode(codes), whole.decode(codes))
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    ADAPTER.load(whole, ADAPTER.restore(adapted))
    torch.testing.assert_close(whole.decode(codes), adapted.decode(codes), atol=1e-5, rtol=1e-5)
    stronger = build(enc_tuning="lora", dec_tuning="lora", lora_rank=2, lora_alpha=6.0).eval()
    with torch.no_grad():
        for name, value in stronger.state_dict().items():
            value.copy_(adapted.state_dict()[name] if not name.endswith(".scaling") else value)
    whole.load_state_dict(ADAPTER.fit(stronger.state_dict(), whole))  # our own checkpoints know their factor
    torch.testing.assert_close(whole.decode(codes), stronger.decode(codes), atol=1e-5, rtol=1e-5)


def test_semantic_branches_and_their_teacher():
    assert Semantic({"t": 4}, "all").chosen(3) == [0, 1, 2] and Semantic({"t": 4}, [1]).chosen(3) == [1]
    with pytest.raises(UserError, match="semantic.branches"):
        Semantic({"t": 4}, [3]).chosen(3)
    tokenizer = build(semantic={"teachers": {"t": 32}, "branches": "all"}).train()
    with pytest.raises(UserError, match='teacher "t", which is not configured'):
        tokenizer(pictures(), Draws(0, torch.arange(2)))
    recon = tokenizer(pictures(), Draws(0, torch.arange(2)), {"t": torch.randn(2, 5, 32)})
    assert set(recon.terms) == {"codebook", "commitment", "contrast"}
    recon.terms["contrast"].backward()
    assert tokenizer.quant_conv.weight.grad is not None


def test_trunk_is_the_transformer_of_timm():
    """Our DINOv2 with timm's weights gives timm's features."""
    timm = pytest.importorskip("timm")
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, init_values=0.3, num_classes=0
    ).eval()
    ours = VisionTransformer(ViTSize(**TRUNK), 4, 8)
    ours.load_state_dict({n: v for n, v in theirs.state_dict().items() if not n.startswith("fc_norm")})
    with torch.no_grad():
        torch.testing.assert_close(ours(pictures()), theirs.forward_features(pictures()), atol=1e-5, rtol=1e-5)


# -- discriminator side -----------------------------------------------------------------------------------------------
def test_shift_and_hole_stay_in_the_picture():
    images = torch.ones(4, 3, 16, 16)
    u = torch.tensor([0.0, 0.5, 0.75, 0.999])
    moved = translate(images, u, u)
    assert moved[0, 0, :2].sum() == 0 and moved[0, 0, 2:, 2:].min() == 1  # by -2
    assert torch.equal(moved[1], images[1])
    holes = cut_out(images, u, u, 0.25)
    assert ((holes == 0).sum((1, 2, 3)) <= 3 * 16).all() and (holes[1] == 0).sum() == 3 * 16
    assert (cut_out(images, u, u, 3 / 16) == 0).sum((1, 2, 3))[1] == 27  # an odd box


def test_blur_ends_with_the_start_of_the_discriminator():
    from core.schema import Duration
    from core.specs import Progress

    now = Progress(800, 8000, 8000, 100, 8)
    assert DiffAugment().blur_amount(-1, now) == 1 and DiffAugment().blur_amount(0, now) == 0
    assert DiffAugment(fade=Duration("100step")).blur_amount(200, now) == pytest.approx(0.75)
    assert DiffAugment(fade=Duration("never")).blur_amount(-1, now) == 0


def test_groups_of_eight_are_normalised_apart():
    x = torch.randn(16, 4, 5)
    x[8:] += 100
    out = LocalBatchNorm(4)(x)
    torch.testing.assert_close(out[:8], F.batch_norm(x[:8], None, None, training=True, eps=1e-6))
    assert out[8:].mean().abs() < 1e-4


def test_spectral_norm_bounds_the_weight():
    torch.manual_seed(0)
    conv = SpectralConv1d(6, 4, 1).eval()
    with torch.no_grad():
        conv.weight_orig.mul_(7)
    sigma = torch.linalg.svdvals(conv.weight_orig.flatten(1))[0]
    x = torch.randn(2, 6, 3)
    torch.testing.assert_close(conv(x), F.conv1d(x, conv.weight_orig / sigma, conv.bias), atol=1e-3, rtol=1e-3)


# -- runs -------------------------------------------------------------------------------------------------------------
SHORT = ["objective.gan_start=3step", "train.duration=8step"]
DINO = [
    "discriminator.name=dino",
    "discriminator.size={width: 24, layers: 2, heads: 3}",
    "discriminator.depths=[0, 1]",
    "discriminator.kernel=3",
    "discriminator.pretrained=false",
    "objective.gan_start=3step",
    "train.duration=6step",
]


@pytest.fixture
def run_toy(train_main, tmp_path):
    def call(name: str, *overrides: str):
        code, _, err = train_main(
            TOY, f"work_dir={tmp_path}", f"name={name}", "train.device=cpu", "train.checkpoint_every=1step", *overrides
        )
        return code, tmp_path / name, err

    return call


def stop_at(monkeypatch, step: int) -> None:
    import os
    import signal

    original = Trainer.train_step

    def train_step(self, batch):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("discriminator", ["patchgan", "dino"])
def test_a_stopped_run_ends_with_the_same_bits(monkeypatch, run_toy, discriminator):
    """Usage statistics, LeCAM's means and the power iterations included."""
    settings = SHORT if discriminator == "patchgan" else DINO
    code, reference, err = run_toy("reference", *settings)
    assert code == 0, err
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert run_toy("stopped", *settings)[0] == 75
    code, run, _ = run_toy("stopped", *settings)
    assert code == 0
    assert not torture.differences(torture.read_result(reference), torture.read_result(run))


def test_two_ranks_give_the_run_of_one(tmp_path):
    """Quantiser dropout, InfoNCE, adaptive weight, LeCAM and augmentation do not depend on the rank layout."""
    arena = torture.Arena(TOY, tmp_path, ["train.device=cpu", "train.log_every=1step", *SHORT, "train.duration=5step"])
    assert arena.run("one") == 0
    assert arena.run_ranks("two", 2) == [0, 0], arena.tail("two")
    records = [torture.read_metrics(tmp_path / name) for name in ("one", "two")]
    assert torture.worst_difference(*records) <= 1


def test_var_trains_on_the_codes_and_resumes(monkeypatch, train_main, run_toy, tmp_path):
    assert run_toy("tokenizer", *SHORT, "train.duration=2step")[0] == 0
    common = [
        f"work_dir={tmp_path}",
        "train.device=cpu",
        f"tokenizer.weights={tmp_path / 'tokenizer'}",
        "train.duration=10step",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.cache_latents=true",
        "train.preview_every=never",
    ]
    assert train_main(TOY_VAR, *common, "name=reference")[0] == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 6)  # in the middle of progressive training
        assert train_main(TOY_VAR, *common, "name=stopped")[0] == 75
    assert train_main(TOY_VAR, *common, "name=stopped")[0] == 0
    results = [torture.read_result(tmp_path / name) for name in ("reference", "stopped")]
    assert not torture.differences(*results)
    assert (
        evaluate_generator.main([str(tmp_path / "stopped"), "eval.num_images=12", "--out", str(tmp_path / "eval")]) == 0
    )
    scores = json.loads((tmp_path / "eval" / "metrics.json").read_text())["metrics"]
    assert next(value["value"] for name, value in scores.items() if name.startswith("fd_lite0")) > 0


def test_trunks_without_released_weights_start_with_positions_that_differ():
    """Neighbours are alike and far patches are not, so that latent tokens find theirs; released weights replace it all."""
    trunk = build().encoder.model
    rows = F.normalize(trunk.pos_embed.detach()[0, 1:], dim=-1)
    nearest = (rows @ rows.T - 2 * torch.eye(len(rows))).argmax(-1)
    apart = torch.stack((nearest // trunk.grid, nearest % trunk.grid)) - torch.stack(
        (torch.arange(len(rows)) // trunk.grid, torch.arange(len(rows)) % trunk.grid)
    )
    assert (apart.abs().sum(0) == 1).all() and all((block.ls1.gamma == 1).all() for block in trunk.blocks)


def test_a_small_set_gets_advice(run_toy, tmp_path):
    """Only what the run does not do yet; none for large sets."""
    for index, label in enumerate("aabb"):
        folder = tmp_path / "pictures" / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (60 * index, 9, 9)).save(folder / f"{index}.png")
    settings = (
        f"data.url=folder://{tmp_path / 'pictures'}",
        "data.val_url=null",
        "data.flip=false",
        "train.duration=1step",
        "train.schedule.warmup=0step",
        "objective.gan_start=1step",
        "train.global_batch=4",
    )
    assert run_toy("small", *settings, "train.preview_every=never")[0] == 0
    log = (tmp_path / "small" / "log.txt").read_text()
    assert "4 pictures are few" in log and "train.init_from" in log and "enc_tuning=lora" in log and "data.flip" in log
    config = load_config(str(TOY), [*settings, "train.init_from=x", "tokenizer.enc_tuning=lora"])
    hint = hint_for_small_sets(config, 49_999)
    assert "49,999 pictures" in hint and "data.flip" in hint and not re.search("lora|init_from|global_batch", hint)
    assert hint_for_small_sets(config, 50_000) is None


def test_the_best_checkpoint_is_kept(run_toy):
    """The largest PSNR of online evaluation, as larger is better; also when newer checkpoints push older ones out."""
    code, run, err = run_toy(
        "best",
        "objective.gan_start=never",
        "train.duration=4step",
        "train.eval_every=1step",
        "train.keep_best=psn",
        "train.keep_checkpoints=1",
        "train.optimizer.lr=1e-2",
        "train.schedule.warmup=0step",
        "eval.num_images=8",
    )
    assert code == 0, err
    found = {r["step"]: r["eval/psnr"] for r in read_metrics(run / "metrics.jsonl") if "eval/psnr" in r}
    step = max(found, key=found.get)
    pinned = json.loads((run / "checkpoints" / "best.json").read_text())
    assert pinned == {"step": step, "metric": "psnr", "value": found[step]}
    assert {int(p.name[5:]) for p in (run / "checkpoints").glob("step_*")} == {step, 4}
    assert (run / "checkpoints" / "best").resolve().name == f"step_{step:08d}"
    line = next(line for line in (run / "log.txt").read_text().splitlines() if "evaluation at step 4" in line)
    record = [r for r in read_metrics(run / "metrics.jsonl") if "eval/psnr" in r][-1]
    scales = [name for name in record if re.search(r"_scale\d$", name)]
    assert scales and "_scale" not in line and line.endswith(f"({len(scales)} of single scales in metrics.jsonl)")


# -- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"scales": [1, 2]},
            r"scales \[1, 2\] end at 2 but the latent grid is 3x3: end them with 3, or set latent_grid: 2",
        ),
        ({"scales": [1, 3, 2, 3]}, "do not shrink"),
        ({"scales": []}, "must be whole numbers"),
        ({"branches": 3, "latent_width": 8}, "3 branches do not divide latent_width 8: use a multiple of 3"),
        ({"branches": 0}, "at least 1"),
        ({"enc_tuning": "lora", "lora_rank": 0}, "lora_rank is 0.*frozen"),
        ({"enc_tuning": "lore"}, 'enc_tuning "lore" is not known. Did you mean "lora"'),
        ({"quantizer": "plain"}, "the plain quantizer has one scale"),
        ({"quantizer": "binary", "vocab": 15}, "2\\^4 = 16 codes, not 15"),
        ({"pixel_channels": -1}, "pixel_channels is -1: 0 paints patches as published"),
        ({"start_drop": 4}, "there are 3 scales: use 1 to 3"),
        ({"pretrained": True}, "is no published DINOv2: use one of small, base, large, giant, name a file"),
        ({"encoder": "vit_base_patch14_reg4_dinov2.lvd142m"}, "register tokens are not supported"),
    ],
)
def test_mistakes_are_told_in_words(settings, words):
    with pytest.raises(UserError, match=words):
        build(**settings)


def test_a_teacher_that_cannot_be_loaded(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match="could not get the weights of DINOv2.*pretrained: false"):
        DINOv2ClassTeacher(64, 16, "small", weights=str(broken))
    state = VisionTransformer(VIT_SIZES["small"], 4, 16).state_dict()
    state = {name: torch.zeros(2) if name.startswith("blocks.") else tensor for name, tensor in state.items()}
    save_file(state, broken)
    with pytest.raises(UserError, match=r"and \d\d+ lines more") as answer:  # a shape of every tensor, otherwise
        DINOv2ClassTeacher(64, 16, "small", weights=str(broken))
    assert len(str(answer.value)) < 900


# -- words of the original --------------------------------------------------------------------------------------------
def test_a_config_of_the_original(tmp_path):
    theirs = tmp_path / "tokenizer.yaml"
    theirs.write_text("""data_path: ImageNet2012/train
val_data_path: ImageNet2012/val
global_batch_size: 512
lr: 3.0e-5
codebook_size: 8192
product_quant: 3
codebook_drop: 0.1
semantic_guide: none
enc_tuning_method: lora
disc_type: patchgan
vq_ckpt: ckpt_best.pt
cloud_save_path: output/exp-xx
half_sem: true
v_patch_nums: [1, 2, 4]
""")
    config = load_config(*original_words.translate(str(theirs), ["codebook_drop=0.2"]))
    tokenizer = config.tokenizer
    assert (config.work_dir, config.name, config.train.init_from) == ("output", "exp-xx", "ckpt_best.pt")
    assert (tokenizer["vocab"], tokenizer["branches"], tokenizer["codebook_drop"], tokenizer["scales"]) == (
        8192,
        3,
        0.2,
        [1, 2, 4],
    )
    assert tokenizer["enc_tuning"] == "lora" and tokenizer["semantic"] is None and not config.teachers
    assert config.train.optimizer.lr == pytest.approx(1.2e-4) and config.discriminator["name"] == "patchgan"
    theirs.write_text("codebook_size: 4096\ncodebook_embed_dim: 12\nlfq: true\n")
    assert load_config(str(theirs), []).tokenizer["quantizer"] == "binary"
    theirs.write_text("codebook_size: 4096\ndisc_type: samdisc\nlfq: true\n")
    with pytest.raises(
        UserError, match="disc_type: samdisc: it is not supported; known are dinodisc, patchgan, stylegan"
    ):
        original_words.translate(str(theirs), [])


def test_flags_of_the_original_are_answered():
    answer = original_words.explain(["--bs=768", "--alng=1e-4", "--codebook_size", "4096", "--sem_half", "True"])
    for words in ("train.global_batch=768", "generator.gamma_init=1e-4", "tokenizer.vocab=4096", "had no effect"):
        assert words in answer


@pytest.mark.parametrize("name", ["ms_pq2_4096", "ablation_1"])
def test_cost_of_the_recipes(name):
    """They build, and take a step, without memory and without weights."""
    _tokenizer, costs = estimate.costs(load_config(str(ROOT / "configs" / "imagefolder" / f"{name}.yaml"), []))
    assert [cost.name for cost in costs] == ["tokenizer", "discriminator"] and costs[0].parameters > 170e6
