"""MaskGIT-VQGAN, VQGAN+ and TiTok where no fixture looks: legacy TiTok, look-up-free VQGAN+, files, training."""

from __future__ import annotations

import json

import pytest
import torch

from core.errors import UserError
from core.specs import Codes, Tokenizer
from core.weights.layouts import check_layout
from run.load import DISCRIMINATORS, OBJECTIVES, TOKENIZERS, load_config
from tests.conftest import ROOT
from tests.parity import fixture_folder
from tests.tools import torture
from tokenizer.adapters import ADAPTERS
from tokenizer.losses.discriminators import Blur, BlurDiscriminator
from tokenizer.losses.perceptual import Perceptual
from tokenizer.vq.maskgit import MaskGITVQGAN, VQGANPlus
from tokenizer.vq.titok import TiTok

TOY = str(ROOT / "configs" / "toy" / "vqgan_plus_tokenizer.yaml")
CONV = {"image_size": 32, "channels": 8, "channel_mult": [1, 2, 2], "res_blocks": 1, "groups": 4}
NANO = {"width": 64, "layers": 1, "heads": 1}
VIT = {"image_size": 32, "patch_size": 16, "encoder": NANO, "decoder": NANO, "latents": 5, "vocab": 20, "code_dim": 4}
PROXY = {"vocab": 12, "code_dim": 6, "channels": 8, "channel_mult": [1, 1, 1, 1, 2], "res_blocks": 1, "groups": 4}

BUILDERS = {
    "maskgit": ("maskgit_vqgan", lambda: MaskGITVQGAN(**CONV, vocab=20, code_dim=6, usage_window=64)),
    "plus": (
        "vqgan_plus",
        lambda: VQGANPlus(**CONV, decoder_res_blocks=2, vocab=20, code_dim=6, normalise=True, entropy_loss=True),
    ),
    "plus pooled": ("vqgan_plus", lambda: VQGANPlus(**CONV, halving="pool", vocab=20, code_dim=6)),
    "plus look-up-free": (
        "vqgan_plus",
        lambda: VQGANPlus(**CONV, quantizer="lookup_free", code_dim=5, entropy_loss=True),
    ),
    "titok": ("titok", lambda: TiTok(**VIT)),
    "titok legacy": ("titok", lambda: TiTok(**VIT, legacy=True, normalise=True, proxy=PROXY)),
    "titok legacy codes": ("titok", lambda: TiTok(**VIT, legacy=True, normalise=True, proxy=False)),
}


def build(kind: str):
    torch.manual_seed(0)
    name, make = BUILDERS[kind]
    return ADAPTERS[name], make()


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if kind != "titok legacy codes"])
def test_encode_embed_decode_and_train(kind):
    tokenizer, x = build(kind)[1], images()
    assert isinstance(tokenizer, Tokenizer) and isinstance(tokenizer.spec, Codes) and tokenizer.spec.branches == 1
    codes = tokenizer.encode(x)
    assert codes.shape == (2, tokenizer.spec.length, 1) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < tokenizer.spec.vocab
    assert torch.equal(tokenizer.from_stored(tokenizer.precompute(x).to(torch.int32)), codes)
    assert tokenizer.embed(codes).shape == (*codes.shape, tokenizer.spec.dim)
    recon = tokenizer(x, None)
    torch.testing.assert_close(recon.images, tokenizer.decode(codes), rtol=1e-4, atol=1e-4)
    assert tuple(recon.terms) == tokenizer.term_names and recon.images.shape == x.shape
    (recon.images.square().mean() + sum(recon.terms.values())).backward()
    assert all(p.grad is not None for p in tokenizer.parameters()) and recon.last_layer.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["maskgit", "plus"])
@pytest.mark.parametrize("size", [(8, 24), (40, 16)])
def test_convolutional_decoders_take_any_map_of_codes(kind, size):
    """A map (B, h, w, 1) of another shape than the trained one: rows of the codebook through the decoder."""
    tokenizer = build(kind)[1]
    codes = torch.randint(0, 20, (2, size[0] // 4, size[1] // 4, 1), generator=torch.Generator().manual_seed(2))
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (2, 3, *size)
    rows = tokenizer.quantizer.embedding.weight
    rows = (torch.nn.functional.normalize(rows, dim=-1) if kind == "plus" else rows)[codes[..., 0]]
    torch.testing.assert_close(decoded, tokenizer.decoder(rows.permute(0, 3, 1, 2)) * 2 - 1)
    square = torch.randint(0, 20, (2, 64, 1), generator=torch.Generator().manual_seed(2))
    assert torch.equal(tokenizer.decode(square), tokenizer.decode(square.view(2, 8, 8, 1)))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_titok_has_two_patch_sizes_and_unit_vectors_by_choice(legacy, normalise):
    proxy = {**PROXY, "channel_mult": [1, 1, 1, 2]} if legacy else None
    torch.manual_seed(0)
    tokenizer = TiTok(**VIT, decoder_patch_size=8, legacy=legacy, normalise=normalise, proxy=proxy)
    assert tokenizer.encoder.positional_embedding.shape[0] == 1 + (32 // 16) ** 2
    assert tokenizer.decoder.positional_embedding.shape[0] == 1 + (32 // 8) ** 2
    if not legacy:
        assert tokenizer.decoder.ffn[0].weight.shape[0] == 3 * 8**2
    codes = tokenizer.encode(images())
    assert tokenizer.decode(codes).shape == (2, 3, 32, 32)
    z, table = tokenizer.vectors(images()), tokenizer.quantizer.embedding.weight
    if normalise:
        z, table = (torch.nn.functional.normalize(x, dim=-1) for x in (z, table))
    assert torch.equal(codes[..., 0], torch.cdist(z, table.expand(2, -1, -1)).argmin(-1))
    torch.testing.assert_close(tokenizer.embed(codes)[:, :, 0], table[codes[..., 0]])


@pytest.mark.parametrize("kind", BUILDERS)
def test_export_and_back_bit_for_bit(kind):
    adapter, tokenizer = build(kind)
    state = {name: tensor.clone() for name, tensor in adapter.restore(tokenizer).items()}
    with pytest.raises(UserError, match="these weights do not tell .*; give tokenizer"):
        adapter.describe(state)
    told = {
        "groups": 4,
        "normalise": kind == "plus" or "legacy" in kind,
        "encoder": NANO,
        "decoder": NANO,
        "proxy": {"groups": 4},
    }
    settings = adapter.describe(state, told) | ({} if "titok" in kind else {"image_size": 32})
    again = adapter.build(**settings)
    adapter.load(again, state)
    x = images()
    assert torch.equal(again.encode(x), tokenizer.encode(x))
    back = adapter.restore(again)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert not any("codebook_used" in name for name in state)


FILES = {
    "maskgit_vqgan": ["maskgit-vqgan-imagenet-f16-256"],
    "vqgan_plus": ["vqgan_plus_12bit"],
    "titok": [f"tokenizer_titok_{size}" for size in ("l32", "b64", "s128", "bl64_vq8k", "bl128_vq8k", "sl256_vq8k")],
}


@pytest.mark.parametrize("name, file", [(name, file) for name, files in FILES.items() for file in files])
def test_recorded_layouts(name, file):
    path = fixture_folder().parent / "checkpoints" / f"{file}.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    layout = json.loads(path.read_text())
    assert check_layout(ADAPTERS[name], layout) == []
    with torch.device("meta"):
        recorded = {n: torch.empty(shape) for n, (shape, _) in layout["tensors"].items()}
        model = ADAPTERS[name].build(**ADAPTERS[name].describe(recorded))
    assert sum(p.numel() for p in model.parameters()) == layout["parameters"]


def test_pictures_are_in_the_unit_range_inside():
    tokenizer = build("maskgit")[1]
    z = tokenizer.encoder(torch.full((1, 3, 32, 32), 0.75))
    torch.testing.assert_close(tokenizer.vectors(torch.full((1, 3, 32, 32), 0.5)), z.flatten(2).transpose(1, 2))
    codes = torch.zeros(1, 64, 1, dtype=torch.int64)
    maps = tokenizer.embed(codes)[:, :, 0].transpose(1, 2).unflatten(2, (8, 8))
    torch.testing.assert_close(tokenizer.decode(codes), tokenizer.decoder(maps) * 2 - 1)


def test_legacy_titok_mixes_tokens_and_paints_with_the_proxy():
    tokenizer, x = build("titok legacy")[1], images()
    encoder, width, count = tokenizer.encoder, NANO["width"], VIT["latents"]
    seen = {}
    encoder.conv_out.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    hook = encoder.ln_post.register_forward_hook(lambda module, given, out: seen.update(tokens=out[:, -count:]))
    z = tokenizer.vectors(x)
    hook.remove()
    assert torch.equal(seen["x"], seen["tokens"].reshape(2, width, count, 1))
    torch.testing.assert_close(z[0, 3], encoder.conv_out(seen["x"])[0, :, 3, 0])
    logits = tokenizer.decoder(z)
    assert logits.shape == (2, PROXY["vocab"], 2, 2)
    expected = torch.einsum("bvhw,vd->bdhw", logits.softmax(1), tokenizer.pixel_codebook.weight)
    torch.testing.assert_close(tokenizer.paint(z), tokenizer.pixel_decoder(expected) * 2 - 1)
    with pytest.raises(UserError, match="proxy: false"):
        build("titok legacy codes")[1].paint(z)


def test_unshuffle_has_colour_fastest():
    tokenizer = build("titok")[1]
    tokenizer.conv_out = torch.nn.Identity()
    tokenizer.decoder = torch.nn.Identity()
    values = torch.zeros(1, 768, 2, 2)
    values[0, (3 * 16 + 5) * 3 + 2, 1, 0] = 1.0  # row 3, column 5, blue of the patch at the lower left
    painted = (tokenizer.paint(values) + 1) / 2
    assert painted.nonzero().tolist() == [[0, 2, 16 + 3, 5]]


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: VQGANPlus(**{**CONV, "image_size": 30}), "multiple of 4"),
        (lambda: VQGANPlus(**CONV, halving="max"), "halving"),
        (lambda: VQGANPlus(**CONV, quantizer="look-up"), 'Did you mean "lookup"'),
        (lambda: TiTok(**{**VIT, "encoder": "bass"}), 'Did you mean "base"'),
        (lambda: TiTok(**VIT, legacy=True, proxy={"codes": 3}), "proxy.codes: unknown key"),
    ],
)
def test_settings_are_checked(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_blur_halves_without_moving_the_mean():
    x = torch.rand(1, 2, 8, 8)
    assert Blur(stride=2)(x).shape == (1, 2, 4, 4)
    torch.testing.assert_close(Blur(stride=2)(x), Blur()(x)[:, :, ::2, ::2])
    torch.testing.assert_close(Blur()(torch.ones(1, 2, 5, 5)), torch.ones(1, 2, 5, 5))
    assert BlurDiscriminator(channels=4, stages=3, groups=4)(torch.rand(2, 3, 32, 32)).shape == (2, 1, 4, 4)


def test_resnet_logits_are_a_perceptual_part():
    loss = Perceptual({"resnet50": {"layers": [1, 1, 1, 1], "classes": 5, "pretrained": False}})
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)
    assert loss(a, a) == 0 and loss(a, b) > 0
    loss(a, b).backward()
    assert b.grad.abs().sum() > 0 and not any(p.requires_grad for p in loss.parameters())


# -- runs -------------------------------------------------------------------------------------------------------------
def test_two_ranks(tmp_path):
    arena = torture.Arena(TOY, tmp_path, [*torture.PERIODS, "train.duration=4step", "objective.gan_start=1step"])
    score = torture.compare_layouts(arena, [torture.LAYOUTS[0]])
    assert score.full, str(score)


@pytest.mark.parametrize("name", ["vqgan_plus", "maskgit_vqgan"])
def test_recipes_build(name):
    config = load_config(str(ROOT / "configs" / "rear" / f"{name}_tokenizer.yaml"), [])
    with torch.device("meta"):
        tokenizer = TOKENIZERS.build(config.tokenizer)
        DISCRIMINATORS.build(config.discriminator)
    perceptual = {"resnet50": {"pretrained": False, "layers": [1, 1, 1, 1]}}
    objective = OBJECTIVES.build({**config.objective, "perceptual": perceptual})
    objective.check_terms(tokenizer.term_names, False, True)
