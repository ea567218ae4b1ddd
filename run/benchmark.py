"""How fast a config runs here: networks with random weights on noise, through the trainer's step and the product's sampling.

Operations and bytes are counted on the meta device, times are measured; a row of the table holds both.
"""

from __future__ import annotations

import copy
import inspect
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from core import dist
from core.devices import floor_seconds, peak_of
from core.errors import UserError
from core.estimate import FlopCounter, number
from core.files import explain_os_errors, human_bytes, write_atomic
from core.images import to_model_range
from core.nn.kvcache import KVCache
from core.nn.precision import bf16_products
from core.rng import Draws
from core.schema import RunConfig
from core.specs import Batch, Progress
from core.train.parallel import compile_blocks
from core.train.run import RunFolder
from core.train.trainer import Trainer
from data.loader import split
from evaluation.report import cpu_name
from generator.task import GeneratorTask
from run import streaming
from run.load import GENERATORS, TOKENIZERS, load_config, networks_of, random_task, tokenizer_layout
from run.target import Sampler

OF_GENERATORS = ("sample", "generate", "uncached", "stream")
IMAGENET = 1_281_167
TITLES = "| config | what | mode | batch | img/s | FLOPs/img | MFU | floor img/s | memory | first | precision | device | torch |"
HEADER = [title.strip() for title in TITLES.strip("|").split("|")]
PRINTED = HEADER[1:10]


@dataclass
class Job:
    """Everything to measure: each of `wanted`, with each number of decoding `steps`, for each batch, in each mode."""

    config: RunConfig
    wanted: list[str]
    batches: list[int]
    device: torch.device
    guide: RunConfig | None = None  # of the weaker model of autoguidance
    steps: tuple[int, ...] = ()
    modes: tuple[str, ...] = ("eager",)  # or "compiled"
    warmup: int = 3
    repeats: int = 10

    def variants(self) -> Iterator[tuple[str, str, RunConfig]]:
        """(word, its name in the table, config) of everything to measure."""
        for word in self.wanted:
            if word != "decode" or not self.steps:
                yield word, word, self.config
                continue
            for steps in self.steps:
                changed = copy.deepcopy(self.config)
                changed.tokenizer = {**tokenizer_layout(self.config.tokenizer)[0], "steps": steps}
                yield word, f"decode ({steps} steps)", changed


def read_config(path: str, overrides: list[str], tokenizer_config: str | None) -> RunConfig:
    """The config, with the tokenizer of another where one is named: tokenizer.* then changes that one."""
    if not tokenizer_config:
        return load_config(path, overrides)
    for_tokenizer = [o for o in overrides if o.startswith("tokenizer.")]
    config = load_config(path, [o for o in overrides if o not in for_tokenizer])
    config.tokenizer = tokenizer_layout(load_config(tokenizer_config, for_tokenizer).tokenizer)[0]
    return config


def read_guide(path: str, config: RunConfig) -> RunConfig:
    """The config of a weaker model; turns autoguidance on in `config`. UserError where its scale is 1."""
    config.sample.guidance = "auto"
    if isinstance(config.sample.scale, (int, float)) and config.sample.scale <= 1:
        raise UserError("--guide-config: guidance is off; set sample.scale above 1, say sample.scale=1.29")
    return load_config(path, [])


def check(job: Job) -> None:
    """UserError for what this config cannot be asked for."""
    tokenizer = tokenizer_layout(job.config.tokenizer)[0]["name"]
    if job.steps and "steps" not in TOKENIZERS.signature(tokenizer):
        raise UserError(f"--decode-steps: {tokenizer} decodes in one pass; leave the option out")
    if job.config.task == "tokenizer":
        return
    assert job.config.generator is not None
    name = job.config.generator["name"]
    if "uncached" in job.wanted and "cached" not in inspect.signature(GENERATORS.get(name).sample).parameters:
        raise UserError(f"--what uncached: {name} samples in one way only; leave the word out")
    if "stream" in job.wanted:
        task = random_task(job.config, torch.device("meta"))
        assert isinstance(task, GeneratorTask)
        streaming.check(task.generator, task.tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# One call of each kind
# ---------------------------------------------------------------------------------------------------------------------
def draws_for(batch: int, device: torch.device) -> Draws:
    return Draws(0, torch.arange(batch, device=device))


def starts_from_latents(config: RunConfig, what: str) -> bool:
    """Whether the call begins with what the tokenizer has stored of the pictures."""
    return what == "train" and config.task == "generator" and config.data.cache_latents


def make_batch(task: Any, batch: int, device: torch.device, latents: bool = False) -> Batch:
    """Noise as pictures, or what the tokenizer would have stored of them."""
    shape = (batch, 3, task.tokenizer.image_size, task.tokenizer.image_size)
    if device.type == "meta":
        images = torch.zeros(shape, dtype=torch.uint8, device=device)
    else:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    places = torch.arange(batch, device=device)
    labels = places % getattr(task, "num_classes", 1)
    if latents:
        with torch.no_grad():
            return Batch(labels, places, stored=task.tokenizer.precompute(to_model_range(images)))
    return Batch(labels, places, images=images)


def make_call(task: Any, config: RunConfig, what: str, batch: int, device: torch.device) -> Callable[[], Any]:
    """A function that does the work once; training goes through `make_step` instead."""
    data, draws = make_batch(task, batch, device), draws_for(batch, device)
    half = config.train.precision == "bf16"
    if what in ("sample", "stream"):
        product = Sampler(config, task, {})
        do = product.sample if what == "sample" else product.stream
        return lambda: do(data.labels, draws)

    def autocast(work: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad(), bf16_products(device, half):
                return work()

        return call

    if what in OF_GENERATORS:
        options = {**task.sample_options, **({"cached": False} if what == "uncached" else {})}
        return autocast(lambda: task.generator.sample(data.labels, draws, task.guidance, **options))
    images = data.images
    assert images is not None
    encode = autocast(lambda: task.tokenizer.encode(to_model_range(images)))
    if what == "encode":
        return encode
    latents = encode()
    return autocast(lambda: task.tokenizer.decode(latents, draws))


def make_step(task: Any, config: RunConfig, batch: int, device: torch.device) -> Callable[[], Any]:
    """The trainer's step on one batch over and over."""
    config.train.global_batch, config.train.micro_batch = batch, 0
    with tempfile.TemporaryDirectory() as folder:
        config.work_dir = folder
        trainer = Trainer(
            task,
            config,
            batches=lambda seen: iter(()),
            split=split,
            images_per_epoch=IMAGENET,
            data_fingerprint="noise",
            run=RunFolder(config, False),
            world=dist.World(0, 1, 0, device),
        )
    data = make_batch(task, batch, device, starts_from_latents(config, "train"))
    return lambda: trainer.train_step(data)


# ---------------------------------------------------------------------------------------------------------------------
# Counting, on the meta device
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Work:
    """Of one call, for the whole batch."""

    flops: float
    moved: float  # bytes


_ATEN = torch.ops.aten
_PICKING = {_ATEN.embedding, _ATEN.index_select, _ATEN.index, _ATEN.gather}  # these read what they return
_BLANK = {_ATEN.zeros_like, _ATEN.ones_like, _ATEN.empty_like, _ATEN.full_like, _ATEN.new_zeros, _ATEN.new_empty}


class ReadCounter(FlopCounter):
    """Counts also `numbers`: weights read by every operation inside, and keys and values read from caches."""

    def __init__(self, networks: list[torch.nn.Module]):
        super().__init__()
        self.numbers = 0
        self.sizes = {p.untyped_storage()._cdata: p.numel() for network in networks for p in network.parameters()}

    def see(self, operation: Any, arguments: Any, result: Any) -> None:
        packet = operation._overloadpacket
        if operation.is_view or packet in _BLANK:
            return
        for tensor in tree_leaves(arguments):
            if isinstance(tensor, Tensor) and (size := self.sizes.get(tensor.untyped_storage()._cdata)):
                self.numbers += min(size, (result if packet in _PICKING else tensor).numel())

    def __enter__(self) -> ReadCounter:
        counter, update = self, KVCache.update
        self.update = update

        def watched(self: KVCache, layer: int, k: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
            keys_and_values = update(self, layer, k, v)
            counter.numbers += sum(t.numel() for t in keys_and_values)
            return keys_and_values

        KVCache.update = watched
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        KVCache.update = self.update
        super().__exit__(*error)


def count(config: RunConfig, guide: RunConfig | None, what: str, batch: int) -> Work | str:
    """FLOPs and bytes of one call; a reason where the networks cannot run without data."""
    device, config = torch.device("meta"), copy.deepcopy(config)
    try:
        task = random_task(config, device, guide)
        if what == "train":
            data = make_batch(task, batch, device, starts_from_latents(config, what))

            def call() -> None:
                progress = Progress(IMAGENET, 2 * IMAGENET, IMAGENET, 1)
                for phase in task.phases(task.networks(), data, draws_for(batch, device), progress):
                    phase.loss.total.backward()
        else:
            call = make_call(task, config, what, batch, device)
        with ReadCounter(networks_of(task)) as counter:
            call()
        moved = (2 if config.train.precision == "bf16" else 4) * counter.numbers  # at the precision of the products
        if what == "train":  # gradients, moments, averages and weights move in fp32
            trained = sum(p.numel() for n in task.networks().values() for p in n.parameters() if p.requires_grad)
            moved += 4 * (8 + 2 * len(config.train.ema)) * trained
        return Work(counter.flops, moved)
    except Exception as error:  # whatever a network does that needs values: only the count is lost, and we say so
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------
def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int:
    """Most bytes since the last reset on a GPU; of this process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def timed(call: Callable[[], Any], job: Job) -> tuple[float, float, list[Any]]:
    """(seconds of the first call, median of the repeats, what those returned)."""

    def synchronize() -> None:
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)

    def once() -> tuple[float, Any]:
        synchronize()
        started = time.perf_counter()
        result = call()
        synchronize()
        return time.perf_counter() - started, result

    first, _ = once()
    for _ in range(job.warmup):
        once()
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    seconds, results = zip(*(once() for _ in range(job.repeats)))
    return first, statistics.median(seconds), list(results)


def measure(
    job: Job, config: RunConfig, what: str, label: str, batch: int, compiled: bool, work: Work | str
) -> dict[str, str]:
    """One row of the table. `label` names it, `work` is what `count` gave."""
    config, device = copy.deepcopy(config), job.device
    task = random_task(copy.deepcopy(config), device, job.guide)
    if what == "train":
        config.train.compile = compiled
        call = make_step(task, config, batch, device)
    else:
        for network in networks_of(task):
            network.eval()
        if compiled:
            torch._dynamo.reset()
            for network in networks_of(task):
                compile_blocks(network)
        call = make_call(task, config, what, batch, device)
    first, seconds, results = timed(call, job)
    name, share = device_name(device), ""
    if starts_from_latents(config, what):
        label += " (stored latents)"
    if what == "stream":
        share = f"{100 * statistics.median(streamed.first_share for streamed in results):.0f} % of the time"
        label += f" (first preview after {share})"
    row = dict.fromkeys(HEADER, "-") | {
        "config": config.name,
        "what": label,
        "mode": "compiled" if compiled else "eager",
        "batch": str(batch),
        "img/s": f"{batch / seconds:.4g}",
        "memory": human_bytes(peak_memory(device)),
        "first": f"{first:.2f} s",
        "precision": config.train.precision,
        "device": name,
        "torch": torch.__version__.split("+")[0],
        "first preview": share,
    }
    if isinstance(work, str):
        return row
    row["FLOPs/img"] = number(work.flops / batch)
    if config.train.precision == "bf16" and (peak := peak_of(name)):
        bound = "flops" if work.flops / peak.flops > work.moved / peak.bandwidth else "bytes"
        row["MFU"] = f"{100 * work.flops / seconds / peak.flops:.1f} %"
        row["floor img/s"] = f"{batch / floor_seconds(work.flops, work.moved, peak):.4g} ({bound})"
    return row


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------
def run(job: Job) -> list[dict[str, str]]:
    """Measure and print everything; returns the rows."""
    rows: list[dict[str, str]] = []
    for what, label, config in job.variants():
        for batch in job.batches:
            work = count(config, job.guide, what, batch)
            if isinstance(work, str):
                print(f"note: FLOPs of {label} could not be counted ({work})", file=sys.stderr)
            for mode in job.modes:
                try:
                    rows.append(measure(job, config, what, label, batch, mode == "compiled", work))
                except torch.cuda.OutOfMemoryError:
                    print(f"{label}, batch {batch}: out of memory", flush=True)
                    torch.cuda.empty_cache()
                    continue
                if len(rows) == 1:  # not above a mistake that only building the networks shows
                    print("  ".join(f"{column:>10}" for column in PRINTED), flush=True)
                print("  ".join(f"{rows[-1][column]:>10}" for column in PRINTED), flush=True)
    speeds = {(row["what"], row["mode"], row["batch"]): float(row["img/s"]) for row in rows}
    for (what, mode, batch), speed in speeds.items():
        if what == "uncached" and ("generate", mode, batch) in speeds:
            ratio = speeds["generate", mode, batch] / speed
            print(f"batch {batch}, {mode}: {ratio:.1f} times faster with the cache than without")
    for row in rows:
        if row["first preview"]:
            print(
                f"stream, batch {row['batch']}, {row['mode']}: first preview after {row['first preview']} to the "
                "whole picture"
            )
    return rows


def append_rows(path: Path, rows: list[dict[str, str]], arguments: list[str]) -> None:
    """Add rows to the last table of a markdown file that has our header; a new section with one where there is none.

    Args:
        arguments: of the command, for the section's heading.
    """
    lines = ["| " + " | ".join(row[column] for column in HEADER) + " |" for row in rows]
    with explain_os_errors(path):
        text = path.read_text() if path.is_file() else "# Benchmarks\n"
    kept = text.rstrip("\n").split("\n")
    if TITLES in kept:
        end = len(kept) - 1 - kept[::-1].index(TITLES)
        while end < len(kept) and kept[end].startswith("|"):
            end += 1
        kept[end:end] = lines
    else:
        command = f"`python -m scripts.benchmark {shlex.join(arguments)}`"
        kept += ["", command, "", TITLES, "|" + "---|" * len(HEADER), *lines]
    write_atomic(path, "\n".join(kept) + "\n")
