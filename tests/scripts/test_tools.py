"""Downloads, reconstructions and benchmarks from the command line, at toy size and without a network."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

from core.devices import Peak, floor_seconds, peak_of
from core.errors import UserError
from core.weights import hub, released
from run.load import make_task
from scripts import benchmark, download, reconstruct
from tests.conftest import ROOT, TOY_GENERATOR, TOY_TOKENIZER
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
    shown = reconstruct.panel(original, original + 10, gain=4.0)
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


# -- benchmarks ---------------------------------------------------------------------------------------------------------
def rows_of(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| toy")
    ]


def test_benchmark_without_weights_or_data(tmp_path, run):
    table = tmp_path / "deep" / "benchmarks.md"
    common = ("--device", "cpu", "--repeats", 1, "--warmup", 0, "--markdown", table)
    code, _ = run(benchmark, TOY_TOKENIZER, "--batch", "2,4", *common)
    assert code == 0
    run(benchmark, TOY_GENERATOR, "--tokenizer-config", TOY_TOKENIZER, "--what", "sample,train", "--batch", 2, *common)
    rows = rows_of(table.read_text())
    assert [(r[1], r[3]) for r in rows] == [
        ("train", "2"),
        ("train", "4"),
        ("encode", "2"),
        ("encode", "4"),
        ("decode", "2"),
        ("decode", "4"),
        ("sample", "2"),
        ("train", "2"),
    ]
    assert all(float(r[4]) > 0 and r[5] != "-" and r[10] == "fp32" for r in rows)
    assert rows[2][5] == rows[3][5]  # FLOPs of a picture do not depend on the batch
    assert table.read_text().count("| config |") == 1  # later rows join the table


@pytest.mark.parametrize("generator, tokenizer", [("far", "fqgan_tokenizer"), ("rear", "vqgan_plus_tokenizer")])
def test_the_cache_is_measured_against_none(run, tmp_path, generator, tokenizer):
    toy = ROOT / "configs" / "toy"
    code, out = run(
        benchmark,
        toy / f"{generator}.yaml",
        "--tokenizer-config",
        toy / f"{tokenizer}.yaml",
        "--what",
        "generate,uncached",
        "--batch",
        2,
        "--device",
        "cpu",
        "--repeats",
        1,
        "--warmup",
        0,
        "--markdown",
        tmp_path / "table.md",
    )
    assert code == 0 and re.search(r"batch 2, eager: [\d.]+ times faster with the cache", out)
    cached, anew = (float(row[5].split()[0]) for row in rows_of((tmp_path / "table.md").read_text()))  # both in M
    assert anew > 10 * cached
    with pytest.raises(UserError, match="samples in one way only"):
        run(
            benchmark,
            toy / "imagefolder_var.yaml",
            "--tokenizer-config",
            toy / "imagefolder_tokenizer.yaml",
            "--what",
            "uncached",
        )


def test_benchmark_prints_no_table_before_a_mistake(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Only the tokenizer.s sizes are needed here.*--tokenizer-config"):
        benchmark.main([TOY_GENERATOR, "--what", "sample", "--device", "cpu"])
    assert capsys.readouterr().out == ""


def test_flops_agree_with_the_estimate():
    """Guided sampling: 4 updates of 2 predictions, and one decoding; time and class are embedded once, not per update."""
    from run import estimate
    from run.load import load_config

    tokenizer_section = load_config(TOY_TOKENIZER, []).tokenizer
    config = load_config(TOY_GENERATOR, [])
    config.tokenizer = {k: v for k, v in tokenizer_section.items()}
    forward = estimate.costs(config)[1][0].forward_flops
    sample = benchmark.count(config, None, "sample", 3, False)
    decode = benchmark.count(config, None, "decode", 3, False)
    assert isinstance(sample, benchmark.Work) and isinstance(decode, benchmark.Work)
    assert (sample.flops - decode.flops) / 3 == pytest.approx(8 * forward, rel=0.1)
    assert sample.moved > decode.moved > 0


DAR, DAR_TOKENIZER, VAR, VAR_TOKENIZER = (
    str(ROOT / "configs" / "toy" / f"{name}.yaml")
    for name in ("dar_generator", "dar_tokenizer", "imagefolder_var", "imagefolder_tokenizer")
)


def numbers(module, without: tuple[str, ...] = ()) -> int:
    """Of weights, but for those whose name has one of these words."""
    return sum(p.numel() for name, p in module.named_parameters() if not any(word in name for word in without))


def counted(config, what: str, batch: int = 3):
    work = benchmark.count(config, None, what, batch)
    assert isinstance(work, benchmark.Work), work
    return work


def test_bytes_of_dar_by_hand():
    """Every step reads all weights, one row of a table, and the keys and values so far; every decoder step its network."""
    config = benchmark.read_config(DAR, [], DAR_TOKENIZER)
    task = make_task(config, None, torch.device("meta"))
    codes, width, rows = 16, 32, 6  # a guided batch of 3
    steps = numbers(task.generator, ("embedding",)) * codes
    tables = 3 * width * codes + rows * width
    cache = 2 * 2 * rows * width * sum(range(1, codes + 1))  # of two layers
    assert counted(config, "generate").moved == 4 * (steps + tables + cache)
    core = task.tokenizer.diff_decoder.net
    (_, _, four), (_, label, eight) = benchmark.variants(config, ["decode"], [4, 8])
    assert label == "decode (8 steps)"
    assert counted(eight, "decode").moved - counted(four, "decode").moved == 4 * 4 * numbers(core, ("time_embed",))
    flops = {what: counted(config, what).flops for what in ("sample", "stream", "generate", "decode")}
    assert flops["sample"] == flops["generate"] + flops["decode"] >= flops["stream"]  # previews cost nothing


def test_bytes_of_var_by_hand():
    """Every scale reads all weights but those that depend on the class alone or are folded into others once, all but the
    first the layer of its inputs, and each the tokenizer's codes and phis."""
    config = benchmark.read_config(VAR, [], VAR_TOKENIZER)
    task = make_task(config, None, torch.device("meta"))
    model, width, rows, ends = task.generator, 32, 6, (1, 5, 14)
    folded = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("q_bias", "v_bias", "scale_mul")))
    always = numbers(model, ("ada_lin", "emb.", "pos_", "lvl_embed", "word_embed", "q_bias", "v_bias", "scale_mul"))
    weights = (
        3 * always
        + 2 * numbers(model.word_embed)
        + folded
        + numbers(model.blocks, ("attn", "ffn"))
        + numbers(model.head_ada_lin)
    )
    # classes, start, places, levels (of which there are three, however many positions ask)
    tables = rows * width + model.pos_start.numel() + ends[-1] * width + 3 * width
    cache = 2 * 2 * rows * width * sum(ends)
    quantizer = 3 * numbers(task.tokenizer.quantizer)
    assert counted(config, "generate").moved == 4 * (weights + tables + cache + quantizer)


@pytest.mark.parametrize("config, tokenizer", [(DAR, DAR_TOKENIZER), (VAR, VAR_TOKENIZER)])
def test_floors_beside_samples(run, monkeypatch, tmp_path, config, tokenizer):
    monkeypatch.setattr(benchmark, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    run(
        benchmark,
        config,
        "--tokenizer-config",
        tokenizer,
        "--what",
        "generate",
        "--batch",
        3,
        "--precision",
        "bf16",
        "--device",
        "cpu",
        "--repeats",
        1,
        "--warmup",
        0,
        "--markdown",
        tmp_path / "table.md",
    )
    (row,) = rows_of((tmp_path / "table.md").read_text())
    work = counted(benchmark.read_config(config, ["train.precision=bf16"], tokenizer), "generate")
    assert row[7] == f"{3 / (work.moved / 3.35e12):.4g} (bytes)" and work.flops / 989e12 < work.moved / 3.35e12
    assert float(row[6].split()[0]) < 1 and 0 < float(row[4]) < float(row[7].split()[0])


def test_time_to_the_first_preview(run, monkeypatch, tmp_path):
    code, out = run(
        benchmark,
        DAR,
        "--tokenizer-config",
        DAR_TOKENIZER,
        "--what",
        "stream",
        "--batch",
        2,
        "--device",
        "cpu",
        "--repeats",
        3,
        "--warmup",
        0,
        "--markdown",
        tmp_path / "table.md",
    )
    share = re.search(r"stream, batch 2, eager: first preview after (\d+) % of the time", out)
    assert code == 0 and 0 < int(share[1]) < 100
    (row,) = rows_of((tmp_path / "table.md").read_text())
    assert row[1] == f"stream (first preview after {share[1]} % of the time)"
    for words, message in (
        (["--what", "stream"], "ImageFolder needs all codes"),
        (["--decode-steps", "4"], "in one pass"),
    ):
        with pytest.raises(UserError, match=message):
            run(benchmark, VAR, "--tokenizer-config", VAR_TOKENIZER, *words)


def test_autoguidance_needs_a_second_config(run):
    arguments = (
        TOY_GENERATOR,
        "--tokenizer-config",
        TOY_TOKENIZER,
        "--what",
        "sample",
        "--batch",
        1,
        "--device",
        "cpu",
        "--repeats",
        1,
        "--warmup",
        0,
        "--guide-config",
        TOY_GENERATOR,
    )
    assert run(benchmark, *arguments)[0] == 0
    with pytest.raises(UserError, match="guidance is off"):
        benchmark.main([str(a) for a in arguments] + ["sample.scale=1"])


def test_peaks_and_floors():
    assert (
        peak_of("NVIDIA H100 80GB HBM3").bandwidth == pytest.approx(3.35e12)
        and peak_of("NVIDIA H100 PCIe").flops == 756e12
    )
    assert (
        peak_of("NVIDIA A100-SXM4-80GB").bandwidth == pytest.approx(2.039e12) and peak_of("NVIDIA L40S").flops == 362e12
    )
    assert peak_of("AMD EPYC") is None
    assert floor_seconds(10, 1, Peak(5, 1)) == 2 and floor_seconds(1, 10, Peak(5, 1)) == 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--what", "trian"], 'Did you mean "train"'),
        (["--batch", "x"], "whole numbers"),
        (["--batch", "0"], "1 or more"),
    ],
)
def test_benchmark_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark.main([TOY_TOKENIZER, *arguments])


def test_a_tokenizer_known_by_absent_weights_only():
    with pytest.raises(UserError, match="--tokenizer-config"):
        benchmark.main([TOY_GENERATOR, "tokenizer.weights=no_such_file.pth", "--what", "encode", "--device", "cpu"])
