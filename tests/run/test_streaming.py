"""Pictures while their codes are being made, and pictures that begin alike: sample.py --preview and --layout, D-AR."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from scripts import reconstruct, sample
from tests.conftest import finished_run, toy


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A run of the toy tokenizer; do not change it."""
    return finished_run(tmp_path_factory, toy("dar_tokenizer"))


@pytest.fixture(scope="module")
def generator(tmp_path_factory, tokenizer):
    """A run of the toy generator; do not change it."""
    return finished_run(tmp_path_factory, toy("dar_generator"), f"tokenizer.weights={tokenizer}")


@pytest.fixture
def draw(capsys, generator, tmp_path):
    """draw(name, *arguments) -> (folder of sample.py's pictures, what it printed)."""

    def call(name, *arguments):
        assert (
            sample.main([str(generator), "--labels", "0-3", "--out", str(tmp_path / name), *map(str, arguments)]) == 0
        )
        return tmp_path / name, capsys.readouterr().out

    return call


def pixels(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("0*.png")) if "stages" not in p.name}


def test_previews_beside_the_same_pictures(draw):
    plain, _ = draw("plain", "--num", 5, "--batch", 5)
    shown, out = draw("shown", "--num", 5, "--batch", 5, "--preview", "gif")
    assert all((a == b).all() for a, b in zip(pixels(plain).values(), pixels(shown).values(), strict=True))
    ((line, share),) = re.findall(
        r"^5 pictures from number 0 on, seconds to each stage: (.*); the first after (\d+) % of "
        "the time$",
        out,
        re.M,
    )
    seconds = [float(word) for word in line.split()]
    assert len(seconds) == 4 and seconds == sorted(seconds) and 0 < int(share) < 100
    for name, final in pixels(shown).items():
        strip = np.asarray(Image.open(shown / name.replace(".png", "_stages.png")))
        assert strip.shape == (36, 4 * 34 + 2, 3) and (strip[2:34, 3 * 34 + 2 : -2] == final).all()
        for suffix in (".webp", ".gif"):
            with Image.open(shown / name.replace(".png", suffix)) as film:
                assert film.n_frames == 4
    assert Image.open(shown / "stages.png").height == 5 * 36
    (shown / "000001_1.webp").unlink()  # what is missing is made again, what is there stays
    assert "(1 new" in draw("shown", "--num", 5, "--preview")[1] and (shown / "000001_1.webp").is_file()
    assert "(0 new" in draw("shown", "--num", 5)[1]


def test_layout_of_a_picture_or_of_the_first_sample(draw, tokenizer, monkeypatch):
    import torch

    from core.images import to_model_range
    from data.transforms import to_tensor
    from run.load import read_tokenizer
    from tokenizer.vq.dar import DAR

    decode, codes = DAR.decode, []
    monkeypatch.setattr(
        DAR, "decode", lambda self, latents, *a, **k: codes.append(latents) or decode(self, latents, *a, **k)
    )

    def sampled(*arguments):
        codes.clear()
        folder, _ = draw(*arguments)
        return folder, torch.cat(codes)

    free_folder, free = sampled("free", "--num", 4)
    for batch in (2, 4):  # followed across batches
        _, shared = sampled(f"shared_{batch}", "--num", 4, "--batch", batch, "sample.shared=8")
        assert (shared[:, :8] == free[:1, :8]).all() and torch.equal(shared[0], free[0])
        assert len(shared.unique(dim=0)) == 4

    reference = free_folder / "000002_2.png"
    _, layout = sampled("layout", "--num", 3, "--layout", reference, "--layout-groups", 3)
    net = read_tokenizer({"weights": str(tokenizer)}).module
    wanted = net.encode(to_model_range(to_tensor(Image.open(reference).convert("RGB"))[None]))
    assert (layout[:, :12] == wanted[:, :12]).all() and len(layout.unique(dim=0)) == 3
    with pytest.raises(UserError, match="pictures of other settings .*layout_fingerprint"):
        draw("layout", "--num", 3, "--layout", reference, "--layout-groups", 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--layout", "PICTURE", "--layout-groups", 9],
            "--layout-groups 9: this tokenizer has 4 groups of codes; give 1 to 4",
        ),
        (["--layout", "PICTURE", "sample.shared=4"], "give one of them"),
        (["--layout", "nowhere.png"], "nowhere.png"),
        (["sample.shared=17"], "sample.shared=17: a picture has 16 codes"),
    ],
)
def test_prefixes_that_do_not_fit(draw, tmp_path, arguments, message):
    Image.new("L", (50, 40)).save(tmp_path / "reference.png")  # of another size and mode
    with pytest.raises(UserError, match=message):
        draw("x", *[str(tmp_path / "reference.png") if a == "PICTURE" else a for a in arguments])
    assert not list((tmp_path / "x").glob("*.png"))


def test_previews_of_who_has_none(generator_run, tokenizer_run, tmp_path):
    with pytest.raises(UserError, match="RecTok needs all codes for its first picture"):
        sample.main([str(generator_run), "--labels", "0", "--out", str(tmp_path), "--preview"])
    with pytest.raises(UserError, match="cannot continue codes"):
        sample.main([str(generator_run), "--labels", "0", "--out", str(tmp_path), "--layout", "x.png"])
    with pytest.raises(UserError, match="RecTok decodes all of its latents at once"):
        reconstruct.main(["--weights", str(tokenizer_run), "--url", "embedded://emoji64", "--stages"])


def test_what_each_group_of_codes_adds(tokenizer, tmp_path, capsys):
    """The seed's sample_tokenizer.py."""
    arguments = ["--weights", str(tokenizer), "--url", "embedded://emoji64", "--num", "2"]
    for name, extra in (("plain", []), ("stages", ["--stages"])):
        assert reconstruct.main([*arguments, "--out", str(tmp_path / name), *extra]) == 0
    plain = sorted((tmp_path / "plain").glob("0*_psnr*.png"))
    assert [p.read_bytes() for p in plain] == [(tmp_path / "stages" / p.name).read_bytes() for p in plain]
    for panel in plain:  # original | reconstruction | difference
        strip = np.asarray(Image.open(tmp_path / "stages" / re.sub("psnr.*", "stages.png", panel.name)))
        columns = [strip[2:34, i * 34 + 2 : i * 34 + 34] for i in range(5)]
        row = np.asarray(Image.open(panel))
        assert (columns[4] == row[:, :32]).all() and (columns[3] == row[:, 34:66]).all()
    assert "what each part of the codes adds" in capsys.readouterr().out


def test_old_flags_of_sampling(generator, tmp_path):
    with pytest.raises(UserError, match=r"--cfg-scale 1.2,8.0 is written sample.scale=1.2,8.0; --top-p 1 is written"):
        sample.main([str(generator), "--labels", "0", "--out", str(tmp_path), "--cfg-scale", "1.2,8.0", "--top-p", "1"])
