"""Stages of run/gpu_check.py that are no program of their own, and what the benchmark's rows are made of."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from core.devices import Peak
from core.errors import brief
from core.files import ROOT, read_json_lines
from core.rng import Draws
from core.schema import RunConfig
from core.specs import Guidance
from core.train.run import read_metrics
from generator.ar import decode
from generator.ar.far import FAR
from generator.ar.gpt import GPT
from generator.ar.rar import RAR
from run import benchmark
from run.benchmark import Row
from run.floors import Floor, Work, peak_here
from run.load import load_config, random_task

MARK = "summary: "


def say(sentence: str) -> None:
    """A line that ends up in the table of stages."""
    print(MARK + json.dumps(sentence), flush=True)


def work(words: list[str], device: str, rehearse: bool, out: Path) -> int:
    """Run one stage in this process; words[0] names it. Returns its exit code."""
    stages: dict[str, Callable[..., int]] = {
        "graphs": graphs,
        "compile": compiled,
        "train": train,
        "benchmark": measure,
        "count": count,
    }
    return stages[words[0]](torch.device(device), rehearse, out.parent, *words[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Are the fast ways the same?
# ---------------------------------------------------------------------------------------------------------------------
_SIZE = {"width": 256, "layers": 4, "heads": 4, "hidden": 512}


def _generators(rehearse: bool) -> dict[str, tuple[Callable[[], Any], Guidance]]:
    """Small enough to be made in a moment, long enough for several recordings."""
    length, size = (8, {"width": 32, "layers": 1, "heads": 2, "hidden": 32}) if rehearse else (256, _SIZE)
    cosine = Guidance(4.0, schedule="cosine", power=2.0)
    return {
        "RAR": (lambda: RAR(size=size, length=length, vocab=1024), cosine),
        "FAR": (lambda: FAR(size={**size, "head_layers": 1}, length=length, branches=2, vocab=1024), Guidance(2.0)),
        "GPT": (lambda: GPT(size=size, length=length, vocab=1024), Guidance(4.0)),
    }


def graphs(device: torch.device, rehearse: bool, folder: Path) -> int:
    """Codes drawn by replaying CUDA graphs against codes drawn kernel by kernel, in fp32 and bf16."""
    wrong = 0
    for name, (make, guidance) in _generators(rehearse).items():
        torch.manual_seed(0)
        model = make().to(device).eval().requires_grad_(False)
        for p in model.parameters():  # nothing is zero, and every class and position has a say
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        for precision in ("fp32", "bf16"):
            for batch in (1, 8):
                wrong += _same_codes(name, model, guidance, precision, torch.arange(batch, device=device))
    say("every code the same" if not wrong else f"{wrong} settings differ")
    if device.type != "cuda":
        say("no graphs without a GPU")
    return 1 if wrong else 0


def _same_codes(name: str, model: Any, guidance: Guidance, precision: str, labels: Tensor) -> bool:
    """Prints one line; returns whether something is wrong."""
    recordings: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        recordings.append(1)
        return capture(*arguments, **options)

    def sample(seed: int) -> Tensor:
        with torch.no_grad(), torch.autocast(labels.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model.sample(labels, Draws(seed, labels), guidance)

    capture = decode.capture
    with mock.patch.object(decode, "capture", counted):
        sample(0)
        first = len(recordings)
        recorded = sample(1)
        again = len(recordings) - first
    model.train().eval()  # gives recordings back
    with mock.patch.object(decode.Recordings, "records", lambda self: False):
        plain = sample(1)
    model.train().eval()
    share = (recorded != plain).float().mean().item()
    print(
        f"{name} {precision} batch {len(labels)}: {share:.2%} of the codes differ, {first} recordings in the first call, "
        f"{again} in the second",
        flush=True,
    )
    # The same kernels in the same order: not one code may differ, whatever the precision.
    return bool(share > 0 or again > 0 or (labels.device.type == "cuda" and first == 0))


STEPS = 3
CLOSE = {"fp32": 1e-4, "bf16": 3e-2}  # relative, in the first step
LATER = {"fp32": 1e-3, "bf16": 3e-2}  # Adam makes steps of full length of gradients that are rounding


def compiled(device: torch.device, rehearse: bool, folder: Path) -> int:
    """Losses of some steps of a tokenizer and a generator, compiled and eager, from the same weights and pictures."""
    small = "toy" if rehearse else "quickstart"
    pairs = {
        "toy": [("configs/toy/far.yaml", "configs/toy/fqgan_tokenizer.yaml")],
        "quickstart": [
            ("configs/quickstart/fqgan/tokenizer.yaml", None),
            ("configs/quickstart/rear/generator.yaml", "configs/quickstart/rear/tokenizer.yaml"),
            ("configs/quickstart/rectok/generator.yaml", "configs/quickstart/rectok/tokenizer.yaml"),
        ],
    }[small]
    wrong = 0
    for precision in ("fp32",) if rehearse else ("fp32", "bf16"):
        for path, tokenizer in pairs:
            overrides = [f"train.precision={precision}", "data.cache_latents=false"]
            config = benchmark.read_config(str(ROOT / path), overrides if tokenizer else overrides[:1], tokenizer)
            try:
                eager, fast = (_losses(config, device, 8, on) for on in (False, True))
            except Exception as error:  # whatever a compiler may raise: the others are still to be compared
                wrong += 1
                say(f"{config.name} {precision} does not run: {brief(error)[:150]}")
                continue
            first, *later = (abs(a - b) / max(abs(a), 1e-6) for a, b in zip(eager, fast))
            error, good = max(first, *later), first <= CLOSE[precision] and all(e <= LATER[precision] for e in later)
            wrong += not good
            print(f"{config.name} {precision}: {eager} eager, {fast} compiled", flush=True)
            say(f"{config.task} {precision} within {error:.1e}" + ("" if good else " (too much)"))
    return 1 if wrong else 0


def _losses(config: RunConfig, device: torch.device, batch: int, on: bool) -> list[float]:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=on))
    torch._dynamo.reset()
    trainer = benchmark.make_trainer(random_task(config, device), config, batch, device)
    torch.manual_seed(0)
    data, losses = benchmark.make_batch(trainer.task, batch, device), []
    for _ in range(STEPS):
        trainer.train_step(data)
        names = [n for n in trainer.averages.sums if n in ("total", "loss")] or list(trainer.averages.sums)[:1]
        losses.append(float(trainer.averages.sums[names[0]]))
        trainer.averages.reset()
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# Real training
# ---------------------------------------------------------------------------------------------------------------------
LPIPS_PACKAGES = ("ndf", "lpips")  # of the perceptual loss that needs no download
UNTRAINED_LPIPS = "objective.perceptual={lpips_squeeze: {weight: 1.0, pretrained: false}}"
WITHOUT_LPIPS = "train: its perceptual loss has random weights"


def is_installed(package: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.distribution(package))
    return False


def train(device: torch.device, rehearse: bool, folder: Path) -> int:
    """A tokenizer, then a generator on what it made, by the training program on embedded pictures."""
    steps = 4 if rehearse else 60
    common = [f"train.device={device.type}", f"train.duration={steps}step", f"train.log_every={max(1, steps // 6)}step"]
    common += ["data.workers=0", "train.preview_every=never", f"train.checkpoint_every={steps}step"]
    plain = [] if rehearse or all(map(is_installed, LPIPS_PACKAGES)) else [UNTRAINED_LPIPS]
    if plain:
        say(WITHOUT_LPIPS)
    if rehearse:
        recipes, more = ("configs/toy/fqgan_tokenizer.yaml", "configs/toy/far.yaml"), []
    else:
        recipes = ("configs/quickstart/fqgan/tokenizer.yaml", "configs/quickstart/fqgan/generator.yaml")
        more = ["train.precision=bf16", "train.global_batch=128", "train.schedule.warmup=10step"]
    runs = folder / "runs"
    tokenizer = None
    for path in recipes:
        config = load_config(str(ROOT / path), [])
        words = [str(ROOT / path), f"work_dir={runs}", f"data.cache_dir={runs}/cache", *common, *more]
        words += [f"tokenizer.weights={tokenizer}"] if tokenizer else plain
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "scripts.train", *words], cwd=ROOT)
        if done.returncode:
            say(f"{config.task}: exit {done.returncode}")
            return 1
        tokenizer = runs / config.name
        records = [r for r in read_metrics(tokenizer / "metrics.jsonl") if "images_per_second" in r]
        first, last = (next(v for k, v in r.items() if k in ("total", "loss", "ce")) for r in (records[0], records[-1]))
        finite = all(abs(v) < float("inf") for r in records for v in r.values() if isinstance(v, float))
        say(
            f"{config.task}: {last:.3g} after {steps} steps from {first:.3g}, {records[-1]['images_per_second']:.0f} img/s, "
            f"{time.perf_counter() - began:.0f} s in all" + ("" if finite else "; not finite")
        )
        if not finite or not last < first:
            return 1
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class System:
    """Recipes of a tokenizer and a generator; `toy` are those of a rehearsal.

    Attributes:
        guide: recipe of the weaker model of autoguidance.
        settings: of the generator.
    """

    tokenizer: str
    generator: str
    toy: tuple[str, str]
    guide: str | None = None
    settings: tuple[str, ...] = ()

    def config(self, kind: str, rehearse: bool) -> tuple[RunConfig, RunConfig | None]:
        """(config, guide's) of "tokenizer" or "generator"."""
        tokenizer, generator = self.toy if rehearse else (self.tokenizer, self.generator)
        precision = [] if rehearse else ["train.precision=bf16"]
        path = str(ROOT / f"configs/{tokenizer}.yaml")
        if kind == "tokenizer":
            return load_config(path, precision), None
        settings = [] if rehearse else [*precision, *self.settings]
        config = benchmark.read_config(str(ROOT / f"configs/{generator}.yaml"), settings, path)
        guide = None
        if self.guide and not rehearse:
            guide = benchmark.read_guide(str(ROOT / f"configs/{self.guide}.yaml"), config)
        return config, guide


SYSTEMS = {
    "rear": System("rear/maskgit_vqgan_tokenizer", "rear/rar_b", ("toy/vqgan_plus_tokenizer", "toy/rear")),
    "dar": System("dar/tokenizer", "dar/ar_l", ("toy/dar_tokenizer", "toy/dar_generator")),
    "fqgan": System("fqgan/dual_ds16", "fqgan/far_b_dual", ("toy/fqgan_tokenizer", "toy/far")),
    "imagefolder": System(
        "imagefolder/ms_pq2_4096", "imagefolder/var_d17", ("toy/imagefolder_tokenizer", "toy/imagefolder_var")
    ),
    "rectok": System(  # 10 updates in place of 49: time is short, and speed is all but proportional
        "rectok/tokenizer",
        "rectok/ditdh_xl",
        ("toy/rectok_tokenizer", "toy/rectok_generator"),
        "rectok/ditdh_s",
        ("sample.steps=11", "sample.scale=1.29", "name=rectok_ditdh_xl_10_updates"),
    ),
}
BATCHES = (1, 64, 256)
SECONDS = 4.0  # of a row, when its first call is done


@dataclass(frozen=True)
class Wanted:
    """One row."""

    system: str
    kind: str
    what: str
    batch: int
    mode: str = "eager"

    @property
    def key(self) -> str:
        return f"{self.system} {self.kind} {self.what} {self.mode} {self.batch}"


def rows_wanted(rehearse: bool) -> Iterator[Wanted]:
    """In the order of their value."""
    batches = (1, 2) if rehearse else BATCHES
    for batch in batches:
        for system in SYSTEMS:
            yield Wanted(system, "generator", "sample", batch)
    for system in SYSTEMS:
        for batch in batches:
            for what in ("decode", "encode"):
                yield Wanted(system, "tokenizer", what, batch)
    for system in SYSTEMS:
        for kind in ("generator", "tokenizer"):
            yield Wanted(system, kind, "train", batches[1])
    if not rehearse:  # minutes of compilation
        yield Wanted("rectok", "generator", "sample", batches[1], "compiled")
        for system in SYSTEMS:
            for kind in ("generator", "tokenizer"):
                yield Wanted(system, kind, "train", batches[1], "compiled")


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.is_file() else []


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def measure(device: torch.device, rehearse: bool, folder: Path) -> int:
    """Every row that is not in rows.jsonl yet. One that ended its process before is passed over."""
    path, bad = folder / "rows.jsonl", 0
    begun = {record["key"] for record in _lines(path)}
    for wanted in rows_wanted(rehearse):
        if wanted.key in begun:
            continue
        _append(path, {"key": wanted.key})
        config, guide = SYSTEMS[wanted.system].config(wanted.kind, rehearse)
        job = benchmark.Job(config, [], [], device, guide, warmup=1, repeats=3 if rehearse else 7, seconds=SECONDS)
        try:
            row = benchmark.measure(job, config, wanted.what, wanted.what, wanted.batch, wanted.mode, "counted aside")
        except Exception as error:  # whatever a compiler or a library may raise: the other rows are still wanted
            bad += not isinstance(error, torch.OutOfMemoryError)
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else brief(error)[:150]
            _append(path, {"key": wanted.key, "failed": reason})
            print(f"{wanted.key}: {reason}", flush=True)
            if "CUDA error" in str(error):  # from here on everything would fail in this process
                sys.stdout.flush()
                os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
            continue
        finally:
            torch._dynamo.reset()
            gc.collect()  # networks refer to what they keep, and that to them
            if device.type == "cuda":
                torch.cuda.empty_cache()
        peak, source = peak_here(row.device, device, row.precision)
        _append(path, {"key": wanted.key, "row": row.record(), "peak": dataclasses.asdict(peak), "source": source})
        print(f"{wanted.key}: {row.speed:.4g} img/s, first call {row.first:.1f} s", flush=True)
    rows = [record for record in _lines(path) if "row" in record]
    failed = [f"{record['key']}: {record['failed']}" for record in _lines(path) if "failed" in record]
    say(f"{len(rows)} rows" + (f"; without {'; '.join(failed)}" if failed else ""))
    return 1 if bad or not rows else 0


def count(device: torch.device, rehearse: bool, folder: Path, *systems: str) -> int:
    """FLOPs and bytes of all rows, from those of batches of one and two: both are a constant and a share per picture."""
    path = folder / f"counts_{systems[0]}.jsonl"
    known = {record["key"] for record in _lines(path)}
    kinds = {(w.system, w.kind, w.what): None for w in rows_wanted(rehearse) if w.system in systems}
    for system, kind, what in reversed(kinds):  # sampling takes minutes to count, the others seconds
        key = f"{system} {kind} {what}"
        if key in known:
            continue
        config, guide = SYSTEMS[system].config(kind, rehearse)
        one, two = (benchmark.count(config, guide, what, batch) for batch in (1, 2))
        if isinstance(one, Work) and isinstance(two, Work):
            _append(path, {"key": key, "counts": [dataclasses.asdict(work) for work in (one, two)]})
        else:
            print(f"{key}: {one}, {two}", flush=True)
    return 0


def rows_with_floors(folder: Path) -> list[Row]:
    """All rows so far, with the floors of those whose operations are counted."""
    counts = {r["key"]: [Work(**w) for w in r["counts"]] for p in folder.glob("counts_*.jsonl") for r in _lines(p)}
    rows = []
    for record in _lines(folder / "rows.jsonl"):
        if "row" not in record:
            continue
        names = {f.name for f in dataclasses.fields(Row)}
        row = Row(**{name: value for name, value in record["row"].items() if name in names})
        if two_counts := counts.get(record["key"].rsplit(" ", 2)[0]):
            row.work = work = extrapolated(two_counts[0], two_counts[1], row.batch)
            row.floor = Floor.of(work, Peak(**record["peak"]), record["source"])
        rows.append(row)
    return rows


def extrapolated(one: Work, two: Work, batch: int) -> Work:
    """Work of a batch from that of one and of two pictures."""
    more = batch - 1
    return Work(one.flops + more * (two.flops - one.flops), one.moved + more * (two.moved - one.moved))


def table(rows: list[Row]) -> list[str]:
    """Lines of markdown."""
    return [benchmark.TITLES, "|" + "---|" * len(benchmark.HEADER), *benchmark.table_lines(rows)]
