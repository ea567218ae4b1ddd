"""The benchmark at toy size: what is measured, what is counted, and what it is asked for."""

from __future__ import annotations

import json
import re
import statistics
import time

import pytest
import torch

from core.devices import Peak, floor_seconds, peak_of
from core.errors import UserError
from core.train.trainer import Trainer
from run import benchmark, estimate
from run.load import load_config, random_task, tokenizer_layout
from scripts.benchmark import main
from tests.conftest import ROOT, TOY_GENERATOR, TOY_TOKENIZER, toy

META = torch.device("meta")
DAR, DAR_TOKENIZER, VAR, VAR_TOKENIZER = (
    str(ROOT / "configs" / "toy" / f"{name}.yaml")
    for name in ("dar_generator", "dar_tokenizer", "imagefolder_var", "imagefolder_tokenizer")
)


@pytest.fixture
def bench(capsys, tmp_path):
    """bench(config, tokenizer config or None, *options) -> (rows of the table, what was printed)."""

    def call(config: object, tokenizer: object, *options: object) -> tuple[list[list[str]], str]:
        table = tmp_path / "deep" / "table.md"
        arguments = [config, *(["--tokenizer-config", tokenizer] if tokenizer else []), *options]
        arguments += ["--device", "cpu", "--repeats", 1, "--warmup", 0, "--markdown", table]
        assert main(list(map(str, arguments))) == 0
        rows = [line.strip("|").split("|") for line in table.read_text().splitlines() if line.startswith("| toy")]
        return [[cell.strip() for cell in row] for row in rows], capsys.readouterr().out

    return call


def test_without_weights_or_data(tmp_path, bench):
    bench(TOY_TOKENIZER, None, "--batch", "2,4")
    rows, _ = bench(TOY_GENERATOR, TOY_TOKENIZER, "--what", "sample,train", "--batch", 2)
    expected = [(what, batch) for what in ("train", "encode", "decode") for batch in "24"]
    assert [(row[1], row[3]) for row in rows] == [*expected, ("sample", "2"), ("train", "2")]
    assert all(float(row[4]) > 0 and row[5] != "-" and row[10] == "fp32" for row in rows)
    assert rows[2][5] == rows[3][5]  # FLOPs of a picture do not depend on the batch
    assert (tmp_path / "deep" / "table.md").read_text().count("| config |") == 1  # later rows join the table


@pytest.mark.parametrize("generator, tokenizer", [("far", "fqgan_tokenizer"), ("rear", "vqgan_plus_tokenizer")])
def test_the_cache_is_measured_against_none(bench, generator, tokenizer):
    toy = ROOT / "configs" / "toy"
    rows, out = bench(toy / f"{generator}.yaml", toy / f"{tokenizer}.yaml", "--what", "generate,uncached", "--batch", 2)
    assert re.search(r"batch 2, eager: [\d.]+ times faster with the cache", out)
    cached, anew = (float(row[5].split()[0]) for row in rows)  # both in M
    assert anew > 10 * cached


def test_records_in_numbers(bench, tmp_path):
    """A CPU is in no table of peaks: they are measured."""
    record = tmp_path / "rows.json"
    for _ in range(2):
        ((row, *_), _) = bench(TOY_TOKENIZER, None, "--what", "decode", "--batch", 2, "--json", record)
    first, second = json.loads(record.read_text())
    assert first["what"] == "decode" and first["img_per_s"] == pytest.approx(2 / first["seconds"])
    assert second["floor"]["source"] == "probe" and 0 < second["floor"]["seconds"] < second["seconds"]
    assert second["work"]["flops"] > 0 and "probed)" in row[7] and 0 < float(row[6].split()[0]) < 100


def test_slow_calls_are_repeated_less():
    calls = []
    job = benchmark.Job(None, [], [], torch.device("cpu"), warmup=2, repeats=20, seconds=0.2)
    timing = benchmark.timed(lambda: calls.append(time.sleep(0.03)), job)
    assert 2 < len(calls) < 10 and timing.median >= 0.03


def test_networks_are_as_the_programs_have_them(monkeypatch, bench):
    """Frozen for what is no training; a training cuts its batch into parts of train.micro_batch."""
    seen = []
    monkeypatch.setattr(benchmark, "random_task", lambda *a: seen.append(random_task(*a)) or seen[-1])
    bench(TOY_GENERATOR, TOY_TOKENIZER, "--what", "sample", "--batch", 2)
    assert not any(p.requires_grad for p in seen[-1].generator.parameters()) and not seen[-1].generator.training
    trainers = []
    monkeypatch.setattr(benchmark, "Trainer", lambda *a, **k: trainers.append(Trainer(*a, **k)) or trainers[-1])
    bench(TOY_GENERATOR, TOY_TOKENIZER, "--what", "train", "--batch", 4, "train.micro_batch=2")
    assert trainers[-1].accumulation == 2 and trainers[-1].step == 2  # the first and one repeat


def test_no_table_before_a_mistake(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Only the tokenizer.s sizes are needed here.*--tokenizer-config"):
        main([TOY_GENERATOR, "tokenizer.weights=nobodys_run", "--what", "sample", "--device", "cpu"])
    assert capsys.readouterr().out == ""
    known, said = tokenizer_layout({"weights": "work_dirs/rectok_stage1"})  # recipes are found from any folder
    assert known["name"] == "rectok" and said.endswith("its sizes are those of configs/rectok/tokenizer.yaml")


# -- counting -----------------------------------------------------------------------------------------------------------
def numbers(module: torch.nn.Module, without: tuple[str, ...] = ()) -> int:
    """Of weights, but for those whose name has one of these words."""
    return sum(p.numel() for name, p in module.named_parameters() if not any(word in name for word in without))


def counted(config, what: str, batch: int = 3) -> benchmark.Work:
    work = benchmark.count(config, None, what, batch)
    assert isinstance(work, benchmark.Work), work
    return work


def test_flops_agree_with_the_estimate():
    """Guided sampling: 4 updates of 2 predictions, and one decoding; time and class are embedded once, not per update."""
    config = load_config(TOY_GENERATOR, [])
    config.tokenizer = dict(load_config(TOY_TOKENIZER, []).tokenizer)
    forward = estimate.costs(config)[1][0].forward_flops
    sample, decode = counted(config, "sample"), counted(config, "decode")
    assert (sample.flops - decode.flops) / 3 == pytest.approx(8 * forward, rel=0.1)
    assert sample.moved > decode.moved > 0


def test_bytes_of_dar_by_hand():
    """Every step reads all weights, one row of a table, and the keys and values so far; every decoder step its network."""
    config = benchmark.read_config(DAR, [], DAR_TOKENIZER)
    task = random_task(config, META)
    codes, width, rows = 16, 32, 6  # a guided batch of 3
    steps = numbers(task.generator, ("embedding",)) * codes
    tables = 3 * width * codes + rows * width
    cache = 2 * 2 * rows * width * sum(range(1, codes + 1))  # of two layers
    assert counted(config, "generate").moved == 4 * (steps + tables + cache)
    core = task.tokenizer.diff_decoder.net
    (_, _, four), (_, label, eight) = benchmark.Job(config, ["decode"], [3], META, steps=(4, 8)).variants()
    assert label == "decode (8 steps)"
    assert counted(eight, "decode").moved - counted(four, "decode").moved == 4 * 4 * numbers(core, ("time_embed",))
    flops = {what: counted(config, what).flops for what in ("sample", "stream", "generate", "decode")}
    assert flops["sample"] == flops["generate"] + flops["decode"] >= flops["stream"]  # previews cost nothing


def test_bytes_of_var_by_hand():
    """Every scale reads all weights but those that depend on the class alone or are folded into others once, all but the
    first the layer of its inputs; the tokenizer's codes and phis are read once, for the tables that all scales share."""
    config = benchmark.read_config(VAR, [], VAR_TOKENIZER)
    task = random_task(config, META)
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
    quantizer = numbers(task.tokenizer.quantizer)
    assert counted(config, "generate").moved == 4 * (weights + tables + cache + quantizer)


@pytest.mark.parametrize("config, tokenizer", [(DAR, DAR_TOKENIZER), (VAR, VAR_TOKENIZER)])
def test_floors_beside_samples(bench, monkeypatch, config, tokenizer):
    monkeypatch.setattr(benchmark, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    ((row,), _) = bench(config, tokenizer, "--what", "generate", "--batch", 3, "--precision", "bf16")
    work = counted(benchmark.read_config(config, ["train.precision=bf16"], tokenizer), "generate")
    assert row[7] == f"{3 / (work.moved / 3.35e12):.4g} (bytes)" and work.flops / 989e12 < work.moved / 3.35e12
    assert float(row[6].split()[0]) < 1 and 0 < float(row[4]) < float(row[7].split()[0])


def test_peaks_and_floors():
    h100, pcie = peak_of("NVIDIA H100 80GB HBM3"), peak_of("NVIDIA H100 PCIe")
    assert h100.bandwidth == pytest.approx(3.35e12) and pcie.flops == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB").bandwidth == pytest.approx(2.039e12)
    assert peak_of("NVIDIA L40S").flops == 362e12 and peak_of("AMD EPYC") is None
    assert floor_seconds(10, 1, Peak(5, 1)) == 2 and floor_seconds(1, 10, Peak(5, 1)) == 10


# -- what can be asked for ----------------------------------------------------------------------------------------------
def test_time_to_the_first_preview(bench):
    ((row,), out) = bench(DAR, DAR_TOKENIZER, "--what", "stream", "--batch", 2)
    share = re.search(r"stream, batch 2, eager: first preview after (\d+) % of the time", out)
    assert 0 < int(share[1]) < 100
    assert row[1] == f"stream (first preview after {share[1]} % of the time)"


def test_autoguidance_needs_a_second_config(bench):
    options = ("--what", "sample", "--batch", 1, "--guide-config", TOY_GENERATOR)
    assert len(bench(TOY_GENERATOR, TOY_TOKENIZER, *options)[0]) == 1
    with pytest.raises(UserError, match="guidance is off"):
        bench(TOY_GENERATOR, TOY_TOKENIZER, *options, "sample.scale=1")


def test_two_ways_in_turn(bench, tmp_path):
    """The ratio is the median over turns, and has a table of its own beside that of single rows."""
    record, generator, tokenizer = tmp_path / "rows.json", toy("rear"), toy("vqgan_plus_tokenizer")
    bench(generator, tokenizer, "--what", "generate", "--batch", 1)
    words = ["--what", "generate", "--batch", 1, "--versus", "uncached", "--json", record, "--repeats", 3]
    _, out = bench(generator, tokenizer, *words)
    assert "times as fast as with the whole sequence" in out
    ((row,), table) = json.loads(record.read_text()), (tmp_path / "deep" / "table.md").read_text()
    assert row["versus"] == "uncached" and row["times_other"] == statistics.median(row["ratios"])
    line = table.rstrip().splitlines()[-1].split("|")
    assert table.count("| config |") == 2 and line[6].strip() == "uncached"
    assert line[7].strip() == f"{row['times_other']:.2f}"


def test_turns_begin_with_either_side():
    """What a turn leaves behind, in caches for instance, is to the advantage of neither."""
    calls = []
    job = benchmark.Job(None, [], [], torch.device("cpu"), warmup=0, repeats=4)
    timing = benchmark.timed(lambda: calls.append("a"), job, lambda: calls.append("b") or 2.0, iter(range(99)).__next__)
    assert "".join(calls) == "ab" + "abba" * 2 and timing.ratios == [2.0] * 4


@pytest.mark.parametrize(
    "way, layout, kept",
    [("nchw", 0, True), ("plain", 0, True), ("nhwc", 1, True), ("fresh", 1, False), (None, 1, True)],
)
def test_ways_of_the_same_work(way, layout, kept):
    config = benchmark.read_config(toy("far"), [], toy("fqgan_tokenizer"))
    job = benchmark.Job(config, [], [], torch.device("cpu"), versus=way)
    task, call, _ = benchmark.make_ready(job, config, "sample", 1, "eager", way)
    (kernel, *_) = (p for p in task.tokenizer.parameters() if p.ndim == 4 and min(p.shape) > 1)
    assert kernel.is_contiguous(memory_format=(torch.contiguous_format, torch.channels_last)[layout])
    call()
    first = task.generator._state.value
    call()
    assert first is not None and (task.generator._state.value is first) == kept


def test_the_eager_side_is_not_compiled():
    config = benchmark.read_config(TOY_GENERATOR, [], TOY_TOKENIZER)
    job = benchmark.Job(config, [], [], torch.device("cpu"))
    sides = [benchmark.make_ready(job, config, "sample", 1, "compiled", way) for way in (None, "eager")]  # not called
    assert [is_compiled for *_, is_compiled in sides] == [True, False]
    assert [any(m._compiled_call_impl for m in task.tokenizer.modules()) for task, *_ in sides] == [True, False]


@pytest.mark.parametrize(
    "config, tokenizer, arguments, message",
    [
        (TOY_TOKENIZER, None, ["--what", "trian"], 'Did you mean "train"'),
        (TOY_TOKENIZER, None, ["--batch", "x"], "whole numbers"),
        (TOY_TOKENIZER, None, ["--batch", "0"], "1 or more"),
        (VAR, VAR_TOKENIZER, ["--what", "stream"], "ImageFolder needs all codes"),
        (VAR, VAR_TOKENIZER, ["--what", "uncached"], "samples in one way only"),
        (VAR, VAR_TOKENIZER, ["--decode-steps", "4"], "in one pass"),
        (VAR, VAR_TOKENIZER, ["--what", "generate", "--versus", "uncached"], "samples in one way only"),
        (DAR, DAR_TOKENIZER, ["--versus", "uncached"], "add --what generate"),
        (DAR_TOKENIZER, None, ["--versus", "fresh"], "toy_dar_tokenizer is a tokenizer"),
        (DAR_TOKENIZER, None, ["--versus", "eager"], "add --mode compiled"),
        (DAR_TOKENIZER, None, ["--versus", "ncwh"], 'Did you mean "nchw"'),
        (TOY_GENERATOR, None, ["tokenizer.weights=no_such_file.pth", "--what", "encode"], "--tokenizer-config"),
    ],
)
def test_mistakes(bench, config, tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        bench(config, tokenizer, *arguments)
