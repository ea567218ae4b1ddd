"""Downloads and reconstructions from the command line, at toy size and without a network."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.weights import hub, released
from run.reconstruct import panel
from scripts import download, reconstruct
from tests.fake_hub import serving


@pytest.fixture
def run(capsys):
    def call(program, *arguments: object) -> tuple[int, str]:
        code = program.main([str(a) for a in arguments])
        return code, capsys.readouterr().out

    return call


# -- downloads ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def remote(monkeypatch, tmp_path):
    """Stands in for the hub: remote["owner/repo/file"] = bytes."""
    monkeypatch.chdir(tmp_path)
    for variable in ("TESSERA_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with serving() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.address)
        yield fake.files


@pytest.fixture
def small(monkeypatch):
    """The table with sizes that fit into a test."""
    from dataclasses import replace

    whole = released.table()
    monkeypatch.setattr(
        download, "table", lambda: [replace(f, bytes=4 if f.bytes else None, at_least=3) for f in whole]
    )


def test_every_released_file_is_in_the_table():
    files = released.table()
    assert len({f.name for f in files}) == len(files)
    assert {"rectok", "fqgan", "rear", "dar", "imagefolder", "evaluation", "auxiliary"} == {f.system for f in files}
    for file in files:
        assert bool(file.repo) != bool(file.url) and file.to in ("pretrained_models", "data/fid_stats", "data/tokens")
        assert file.bytes or file.at_least > 0
        assert file.reference.startswith(("hf://", "https://"))


def test_a_system_is_fetched_checked_and_kept(remote, small, run, tmp_path):
    remote["fun-research/TiTok/maskgit-vqgan-imagenet-f16-256.bin"] = b"four"
    for size in "SBL":
        remote[f"qyoo/reAR/reAR-{size}.safetensors"] = b"enough"
    remote["yucornetto/RAR/rar_b.bin"] = remote["yucornetto/RAR/rar_l.bin"] = b"five."  # not what is published
    with pytest.raises(UserError, match="2 of 6 files could not be had"):
        download.main(["rear"])
    assert hub.resolve("maskgit-vqgan-imagenet-f16-256.bin").read_bytes() == b"four"
    assert not (tmp_path / "pretrained_models" / "rar_b.bin").exists()
    remote.clear()
    assert "here     pretrained_models/reAR-S.safetensors" in run(download, "reAR-S.safetensors")[1]
    (tmp_path / "pretrained_models" / "reAR-S.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1"):
        download.main(["reAR-S.safetensors"])


def test_statistics_go_where_evaluation_looks(remote, small, run, tmp_path):
    remote["QingyuShi/RecTok/data/fid_stats/adm_in256_stats.npz"] = b"stats"
    assert "fetched  data/fid_stats/adm_in256_stats.npz" in run(download, "adm_in256_stats.npz")[1]
    assert (tmp_path / "data" / "fid_stats" / "adm_in256_stats.npz").read_bytes() == b"stats"


def test_what_cannot_be_fetched_is_explained(remote, run, monkeypatch, capsys):
    with pytest.raises(UserError, match='neither a system nor a released file. Did you mean "rectok"'):
        download.main(["rektok"])
    with pytest.raises(UserError, match="name a system"):
        download.main([])
    code, out = run(download, "rectok", "--dry-run")
    assert code == 0 and "would fetch  hf://QingyuShi/RecTok/RecTok.pth -> pretrained_models/RecTok.pth" in out
    assert "offline_models" not in out and "offline_models" in run(download, "rectok", "--all", "--dry-run")[1]
    assert "optional" in run(download, "--list", "rear")[1]
    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    with pytest.raises(UserError):
        download.main(["RecTok.pth"])
    said = capsys.readouterr().out
    assert (
        "downloads are switched off" in said
        and "/QingyuShi/RecTok/resolve/main/RecTok.pth and copy it to pretrained_models/RecTok.pth" in said
    )


# -- reconstructions ----------------------------------------------------------------------------------------------------
def test_pictures_of_any_kind(tokenizer_run, tmp_path, run):
    pictures = []
    for mode, size in (("RGB", (40, 60)), ("L", (33, 20)), ("RGBA", (64, 64)), ("CMYK", (32, 32)), ("I;16", (50, 41))):
        pictures.append(tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode in ('CMYK', 'I;16') else 'png'}")
        Image.new(mode, size).save(pictures[-1])
    out = tmp_path / "panels"
    code, said = run(
        reconstruct,
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
