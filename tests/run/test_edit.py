"""run/edit.py: masks of every kind, which codes are kept, and every family of generators through the whole edit."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import run
from core.errors import UserError
from core.images import to_model_range
from core.rng import Draws
from core.specs import Continuous, Guidance, Kept
from run import edit
from run.load import load_config, random_task
from run.models import GeneratorModel
from run.target import Sampler
from scripts import edit as program
from tests.conftest import toy

TOKENIZERS = {
    "far": "fqgan_tokenizer",
    "rear": "vqgan_plus_tokenizer",
    "dar_generator": "dar_tokenizer",
    "imagefolder_var": "imagefolder_tokenizer",
    "rectok_generator": "rectok_tokenizer",
}


@functools.cache
def sampler(name: str) -> Sampler:
    """A pair of configs/toy without training."""
    plain = load_config(toy(TOKENIZERS[name]), []).tokenizer
    words = [f"tokenizer.{key}={json.dumps(value)}" for key, value in plain.items() if value is not None]
    config = load_config(toy(name), ["tokenizer.weights=null", *words])
    task = random_task(config, torch.device("cpu"), num_classes=4)
    task.generator.eval(), task.tokenizer.eval()
    return Sampler(config, task, {})


def photo(width: int = 48, height: int = 32) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def square_mask(size: tuple[int, int] = (48, 32), box: tuple[int, int, int, int] = (16, 8, 28, 20)) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


# -- the whole edit ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_every_family(name):
    made, canvas = sampler(name), edit.inpainting(photo(), square_mask(), 32)
    rules, device = edit.Rules(cover=0.2), torch.device("cpu")
    first, second = (edit.edit(made, canvas, [1, 2], rules, device, seed) for seed in (0, 1))
    outside = ~canvas.masked
    for edited in (first, second):
        assert torch.equal(edited.pictures[:, :, outside], canvas.photo[None, :, outside].expand(2, -1, -1))
        assert torch.equal(edited.pictures[:, :, canvas.masked], edited.drawn[:, :, canvas.masked])
    assert {"outside_psnr", "seam", "inside"} == set(first.facts[0])
    alone = edit.edit(made, canvas, [1], rules, device, 0)
    assert (alone.drawn[0].int() - first.drawn[0].int()).abs().max() <= 1  # picture 0 whatever is beside it
    assert edit.remarks(made, canvas, first, rules) or isinstance(made.tokenizer.spec, Continuous)


@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_kept_codes_reach_the_decoder_bit_for_bit(name, monkeypatch):
    made, canvas, rules = sampler(name), edit.inpainting(photo(), square_mask(), 32), edit.Rules(cover=0.2)
    seen = []
    decode = type(made.tokenizer).decode
    monkeypatch.setattr(
        type(made.tokenizer),
        "decode",
        lambda self, latents, *draws: seen.append(latents) or decode(self, latents, *draws),
    )
    for seed in (0, 1):
        edit.edit(made, canvas, [3], rules, torch.device("cpu"), seed)
    codes = made.tokenizer.encode(canvas.photo[None] / 127.5 - 1)
    mask, _ = edit.kept_cells(made.tokenizer, canvas.masked, rules)
    assert 0 < mask.sum() < mask.numel()
    mask = mask if codes.is_floating_point() else mask[..., None]
    for latents in seen:
        assert torch.equal(torch.where(mask, latents, 0), torch.where(mask, codes, 0))
    assert not torch.equal(*seen)


@pytest.mark.parametrize("name", ["far", "rear", "rear in all orders", "dar_generator"])
@torch.no_grad()
def test_how_much_codes_heed_what_is_kept(name, monkeypatch):
    """At 0 those between are a plain sample's, at 1 those of one stream; kept ones stay; the cache changes nothing."""
    made, canvas = sampler.__wrapped__(name.split()[0]), edit.inpainting(photo(), square_mask(), 32)
    for parameter in made.generator.parameters():  # an untrained network finds all codes equally likely
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.3)
    generator, codes = made.generator, made.tokenizer.encode(to_model_range(canvas.photo[None]))
    if name.startswith("rear"):
        monkeypatch.setattr(generator, "permute", (0.0, 0.5) if name.endswith("orders") else None)
    mask, _ = edit.kept_cells(made.tokenizer, canvas.masked, edit.Rules(cover=0.2))
    labels, draws, guidance = torch.tensor([0, 2, 3]), Draws(0, torch.arange(3)), Guidance(1.5)

    def drawn(heed: float, **options) -> torch.Tensor:
        return generator.sample(labels, draws, guidance, kept=Kept(codes, mask, heed), **options)

    label_alone, both, one_stream = drawn(0.0), drawn(0.5), drawn(1.0)
    for result in (label_alone, both, one_stream):
        assert result.shape == (3, *codes.shape[1:]) and torch.equal(
            result[:, mask[0]], codes[:, mask[0]].repeat(3, 1, 1)
        )
    assert torch.equal(drawn(0.5, cached=False), both)
    assert not torch.equal(both, label_alone) and not torch.equal(both, one_stream)
    nothing = Kept(codes, torch.zeros_like(mask))
    plain = generator.sample(labels, draws, guidance, kept=nothing)
    if not name.endswith("orders"):  # there a plain sample comes in another order
        assert torch.equal(label_alone[:, ~mask[0]], plain[:, ~mask[0]])
    assert torch.equal(generator.sample(labels, draws, guidance, kept=replace(nothing, heed=0.3)), plain)


@pytest.mark.parametrize(
    ("name", "usual"), [("far", 0.3), ("rear", 0.3), ("rectok_generator", 1), ("imagefolder_var", 1)]
)
def test_what_an_edit_heeds(name, usual):
    generator, some = sampler(name).generator, torch.tensor([[True, False]])
    assert (
        edit.heed_of(generator, edit.Rules(), some) == usual
        and edit.heed_of(generator, edit.Rules(), ~some & some) == 1
    )
    if usual == 1:
        with pytest.raises(UserError, match="--heed 0.5 is for generators that draw codes one after another"):
            edit.heed_of(generator, edit.Rules(heed=0.5), some)
    else:
        assert edit.heed_of(generator, edit.Rules(heed=0.9), some) == 0.9


@pytest.mark.parametrize("name", ["rectok_generator", "imagefolder_var"])
def test_a_full_mask_is_a_plain_sample(name):
    made, canvas = sampler(name), edit.inpainting(photo(), Image.new("L", (48, 32), 255), 32)
    edited = edit.edit(made, canvas, [1, 2], edit.Rules(), torch.device("cpu"), 3)
    plain = GeneratorModel(made).sample([1, 2], seed=3, output="uint8")
    assert torch.equal(edited.pictures, plain) and edited.facts == [
        {"inside": edited.facts[0]["inside"]},
        edited.facts[1],
    ]
    assert edit.remarks(made, canvas, edited, edit.Rules())[-1].startswith("The mask covers everything")


# -- masks ------------------------------------------------------------------------------------------------------------
def test_a_cell_is_kept_if_none_of_its_pixels_is_masked():
    masked = torch.zeros(32, 32, dtype=torch.bool)
    masked[15, 16] = True  # one pixel
    far, var = sampler("far").tokenizer, sampler("imagefolder_var").tokenizer
    kept, placed = edit.kept_cells(far, masked, edit.Rules())
    rows, columns = far.spec.grid
    cell = (15 * rows // 32) * columns + 16 * columns // 32
    assert placed and (~kept[0]).nonzero().flatten().tolist() == [cell]
    assert (~edit.kept_cells(far, masked, edit.Rules(margin=1))[0]).sum() > 1  # its neighbours across cell borders
    assert not edit.kept_cells(far, masked, edit.Rules(margin=10**9))[0].any()
    assert edit.kept_cells(far, masked, edit.Rules(cover=0.5))[0].all()
    by_scale = edit.kept_cells(var, masked, edit.Rules())[0].split([side * side for side in var.spec.scales], 1)
    assert all((~part).sum() >= 1 for part in by_scale)  # every scale has the pixel somewhere
    assert not by_scale[0].any()


def test_codes_without_places_are_kept_from_the_first_on_in_whole_groups():
    tokenizer, some = sampler("dar_generator").tokenizer, torch.zeros(32, 32, dtype=torch.bool)
    some[:4] = True
    for share in (0.0, 0.3, 0.5, 1.0):
        kept, placed = edit.kept_cells(tokenizer, some, edit.Rules(first=share))
        known = int(share * tokenizer.groups) * tokenizer.spec.length // tokenizer.groups
        assert not placed and kept[0].tolist() == [i < known for i in range(tokenizer.spec.length)]
    assert not edit.kept_cells(tokenizer, torch.ones_like(some), edit.Rules())[0].any()


def test_codes_with_places_in_another_order_are_kept_by_their_places():
    tokenizer, masked = run.load_tokenizer("tiny/dar", "cpu").module, torch.zeros(32, 32, dtype=torch.bool)
    masked[:16, :16] = True
    kept, placed = edit.kept_cells(tokenizer, masked, edit.Rules())
    upper_left = {8 * row + column for row in range(4) for column in range(4)}
    assert placed and {tokenizer.spec.places[i] for i in (~kept[0]).nonzero().flatten().tolist()} == upper_left
    assert not kept[0, 0] and kept[0, 1]  # the first code is of the corner, the second of the middle


@pytest.mark.parametrize(
    ("size", "said"), [((48, 32), ""), ((96, 64), "resized"), ((24, 16), "resized"), ((32, 32), "")]
)
def test_masks_of_other_sizes(size, said):
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2 - 2, 0, size[0] // 2 + 2, size[1]))
    canvas = edit.inpainting(photo(), mask, 32)
    assert canvas.masked.shape == (32, 32) and canvas.masked[:, 16].all() and not canvas.masked[:, :8].any()
    assert (said in " ".join(canvas.notes)) and bool(canvas.notes) == bool(said)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Image.new("L", (40, 40), 255), "the mask is 40 x 40, the photo 48 x 32"),
        (Image.new("L", (48, 32)), "marks nothing: paint"),
        (square_mask(box=(0, 0, 4, 32)), "nothing of the middle"),
    ],
)
def test_masks_that_cannot_be_used(mask, said):
    with pytest.raises(UserError, match=said):
        edit.inpainting(photo(), mask, 32)


def test_photos_of_other_shapes_are_outpainted_whole():
    canvas = edit.outpainting(Image.new("RGB", (60, 30), (9, 9, 9)), 0.25, 32)
    assert (~canvas.masked).sum() == 16 * 8 and not canvas.masked[12:20, 8:24].any()
    assert (canvas.photo == 9).all()
    with pytest.raises(UserError, match="square"):
        edit.outpainting(photo(32, 32), 0, 32)
    with pytest.raises(UserError, match="below 0.5"):
        edit.outpainting(photo(), 0.5, 32)


def test_the_photo_in_its_own_size_changes_under_the_mask_alone():
    image, mask = photo(75, 50), square_mask((75, 50), (30, 10, 50, 40))
    whole = np.asarray(edit.into_photo(image, mask, torch.full((3, 32, 32), 7, dtype=torch.uint8)))
    white = np.asarray(mask) == 255
    assert (whole[white] == 7).all() and np.array_equal(whole[~white], np.asarray(image)[~white])


def test_seams_are_steps_across_the_border():
    masked = torch.zeros(4, 6, dtype=torch.bool)
    masked[:, 3:] = True
    picture = torch.zeros(3, 4, 6, dtype=torch.uint8)
    picture[:, :, 3:] = 40
    picture[:, :, 5] = 50
    facts = edit.measure(edit.Canvas(picture, masked), picture, picture)
    assert facts["seam"] == 40 and facts["outside_psnr"] == float("inf")
    assert facts["inside"] == pytest.approx(10 * 4 / (4 * 2 + 3 * 3))  # 8 pairs side by side, 9 on top of each other
    nearly = picture.clone()
    nearly[:, 0, 0] = 1
    error = 1 / 255**2 / 12
    assert edit.measure(edit.Canvas(picture, masked), nearly, picture)["outside_psnr"] == pytest.approx(
        -10 * np.log10(error)
    )


# -- the program ------------------------------------------------------------------------------------------------------
def test_program(generator_run, tmp_path, capsys):
    turned = photo(32, 48)
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its side
    turned.save(tmp_path / "photo.jpg", exif=exif, quality=100)
    square_mask().convert("RGBA").save(tmp_path / "mask.png")
    words = [str(generator_run), str(tmp_path / "photo.jpg"), "--mask", str(tmp_path / "mask.png"), "--steps", "4"]
    out = tmp_path / "x.png"
    assert program.main([*words, "--label", "ring 3, 2", "--out", str(out), "--full"]) == 0
    said = capsys.readouterr().out
    assert "48 x 32, seen as 32 x 32" in said and "latents are kept" in said and said.count("grey levels") == 2
    facts = json.loads((tmp_path / "x.json").read_text())
    assert [row["file"] for row in facts["pictures"]] == ["x_000_3.png", "x_001_2.png"] and facts["sample.steps"] == 4
    assert Image.open(tmp_path / "x_000_3_full.png").size == (48, 32)
    assert Image.open(tmp_path / "x_panel.png").size == (4 * 34 + 2, 2 * 34 + 2)
    with pytest.raises(UserError, match="is there already"):
        program.main([*words, "--label", "2", "--out", str(out)])

    model = run.load_generator(str(generator_run), device="cpu")
    asked = {"mask": tmp_path / "mask.png", "seed": 0, "steps": 4, "output": "numpy"}
    pictures = model.edit(tmp_path / "photo.jpg", "ring 3, 2", **asked)
    assert np.array_equal(pictures[1], np.asarray(Image.open(tmp_path / "x_001_2.png")))
    held = np.asarray(square_mask()) > 0
    assert np.array_equal(model.edit(tmp_path / "photo.jpg", "ring 3, 2", **asked | {"mask": held}), pictures)
    around = model.edit(photo(), 1, outpaint=0.1, num=2, steps=4)
    assert len(around) == 2 and around[0].size == (32, 32)


def test_without_a_generator_a_tiny_one_is_taken(tmp_path, capsys):
    photo(32, 32).save(tmp_path / "photo.png")
    square_mask((32, 32)).save(tmp_path / "mask.png")
    words = [str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png"), "--label", "food", "--steps", "2"]
    assert program.main([*words, "--out", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().out.startswith("no generator was named: editing with tiny/rectok")
    assert Image.open(tmp_path / "x.png").size == (64, 64)
    for words in ([], ["tiny/rear"], ["tiny/rear", "a.png", "b.png"]):
        with pytest.raises(UserError, match="name the generator and the photo"):
            program.main([*words, "sample.steps=2", "--label", "1", "--mask", "m.png"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what is to change"),
        (["--mask", "m.png", "--outpaint", "0.1"], "say what is to change"),
        (["--outpaint", "0.1", "--full"], "lies around it"),
        (["--mask", "m.png", "--out", "x.jpg"], "ends in .png"),
        (["--mask", "m.png", "--cover", "1"], "are shares"),
        (["--mask", "m.png", "--margin", "-1"], "number of pixels"),
        (["--mask", "m.png", "--num", "0"], "1 or more"),
        (["--mask", "m.png", "--num", "1001"], "at most 1,000"),
        (["--mask", "m.png", "--margin", "9" * 400], "--margin of so many digits: a number of at most 1,000,000,000"),
        (["--mask", "m.png", "--seed", str(2**63)], "--seed 9223372036854775808: a number of at most"),
        (["--mask", "m.png", "--heed", "1.5"], "--heed 1.5: give a number from 0"),
    ],
)
def test_mistakes(words, said):
    with pytest.raises(UserError, match=said):
        program.main(["nothing.safetensors", "photo.png", "--label", "1", *words])
