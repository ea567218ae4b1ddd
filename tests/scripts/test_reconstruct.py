"""scripts/reconstruct.py: panels of pictures of any kind, and what it is asked for."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from data.decode import UnreadablePicture, decode_rgb
from run.reconstruct import panel
from scripts import reconstruct


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[int, str]:
        code = reconstruct.main([str(a) for a in arguments])
        return code, capsys.readouterr().out

    return call


def test_pictures_of_any_kind(tokenizer_run, tmp_path, run):
    pictures = []
    for mode, size in (("RGB", (40, 60)), ("L", (33, 20)), ("RGBA", (64, 64)), ("CMYK", (32, 32)), ("I;16", (50, 41))):
        pictures.append(tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode in ('CMYK', 'I;16') else 'png'}")
        Image.new(mode, size).save(pictures[-1])
    out = tmp_path / "panels"
    code, said = run(
        "--weights",
        tokenizer_run,
        *pictures,
        "--out",
        out,
        "--url",
        "synthetic://?size=48&classes=4&count=8",
        "--num",
        2,
    )
    assert code == 0 and "continuous 8 channels" in said and said.count(" dB  ") == 8
    files = sorted(p.name for p in out.iterdir())
    assert len(files) == 8 and files[-1] == "grid.png"
    first = next(out.glob("000_RGB_psnr*.png"))
    assert Image.open(first).size == (3 * 32 + 4, 32)
    assert re.search(rf"{re.search(r'psnr([0-9.]+).png', first.name)[1]} dB", said)


def test_panel_shows_the_difference():
    original = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    shown = panel(original, original + 10, gain=4.0)
    assert shown.shape == (3, 2, 10)
    assert (shown[:, :, :2] == 100).all() and (shown[:, :, 4:6] == 110).all() and (shown[:, :, 8:] == 168).all()


def test_reconstruct_mistakes(tokenizer_run, tmp_path):
    with pytest.raises(UserError, match="name some pictures"):
        reconstruct.main(["--weights", str(tokenizer_run)])
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match="text.png.*Give a JPEG"):
        reconstruct.main(["--weights", str(tokenizer_run), str(tmp_path / "text.png")])
    with pytest.raises(UserError, match="no/such.png"):
        reconstruct.main(["--weights", str(tokenizer_run), "no/such.png"])


def test_reconstructions_that_are_not_finite_are_not_written(tokenizer_run, tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(
        "tokenizer.continuous.rectok.RecTok.decode", lambda self, latents, *_: torch.full((1, 3, 32, 32), torch.nan)
    )
    words = ["--weights", str(tokenizer_run), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="a picture between 0 and 0 has pixels that are not finite"):
        reconstruct.main(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, size",
    [
        ("a.avif", (60, 40)),
        ("a.webp", (60, 40)),
        ("line.png", (17, 4000)),
        ("flat.png", (1000, 3)),
        ("dot.png", (1, 1)),
    ],
)
def test_a_picture_that_was_named_may_be_of_any_kind_and_shape(tokenizer_run, tmp_path, name, size):
    """A set's pictures may not be narrower than 1:100, which is then a mistake."""
    Image.new("RGB", size, (200, 100, 0)).save(tmp_path / name)
    words = ["--weights", str(tokenizer_run), str(tmp_path / name), "--out", str(tmp_path / "out")]
    assert reconstruct.main(words) == 0
    (shown,) = (tmp_path / "out").glob(f"000_{name.partition('.')[0]}_*.png")
    with Image.open(shown) as panels:
        assert np.abs(np.asarray(panels)[16, 16].astype(int) - (200, 100, 0)).max() < 8
    if max(size) > 100 * min(size):
        with pytest.raises(UnreadablePicture, match="is too narrow .limit 1:100."):
            decode_rgb((tmp_path / name).read_bytes(), name)
    Image.new("RGB", (1, 1001)).save(tmp_path / "thread.png")
    with pytest.raises(UserError, match=r"thread.png: 1 x 1001 is too narrow \(limit 1:1000\)\.$"):
        reconstruct.main([*words[:2], str(tmp_path / "thread.png"), "--out", str(tmp_path / "more")])
