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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from core import dist
from core.devices import peak_memory
from core.errors import UserError, brief
from core.estimate import number
from core.files import explain_os_errors, human_bytes, read_json, write_atomic, write_json
from core.images import to_model_range
from core.nn.linear import plain_products
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
from run.against import Originals, asked
from run.floors import Floor, ReadCounter, Work, peak_here, synchronize
from run.load import GENERATORS, TOKENIZERS, load_config, networks_of, random_task, tokenizer_layout
from run.target import COMPILED_BATCHES, Sampler

OF_GENERATORS = ("sample", "generate", "uncached", "stream")
IMAGENET = 1_281_167
TITLES = "| config | what | mode | batch | img/s | FLOPs/img | MFU | floor img/s | memory | first | precision | device | torch |"
HEADER = [title.strip() for title in TITLES.strip("|").split("|")]
PRINTED = HEADER[1:10]
PAIR_TITLES = (
    "| config | what | mode | batch | time | against | times as fast | quartiles | precision | device | torch |"
)
# Other ways to do the same work, which a row may be timed in turn with.
WAYS = {
    "eager": "without torch.compile",
    "plain": "plain PyTorch: eager, nchw, matrix products by MKL",
    "nchw": "every convolution with the pixels of a channel side by side",
    "nhwc": "every convolution with the channels of a pixel side by side",
    "uncached": "with the whole sequence computed anew for every code",
    "fresh": "with no weights, caches and recordings kept from call to call",
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last, "plain": torch.contiguous_format}


@dataclass
class Effort:
    """How long one call is timed; a `Job` says it for many."""

    device: torch.device
    warmup: int = 3
    repeats: int = 10
    seconds: float = float("inf")


@dataclass
class Job:
    """Everything to measure: each of `wanted`, with each number of decoding `steps`, for each batch, in each mode."""

    config: RunConfig
    wanted: list[str]
    batches: list[int]
    device: torch.device
    guide: RunConfig | None = None  # of the weaker model of autoguidance
    steps: tuple[int, ...] = ()
    modes: tuple[str, ...] = ("config",)  # as it says, "eager" or "compiled"
    warmup: int = 3
    repeats: int = 10
    seconds: float = float("inf")  # of a row: fewer repeats where a call takes long, one at least
    against: Originals | None = None  # timed in turn with ours
    versus: str | None = None  # one of WAYS, timed in turn instead

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
        if job.versus in ("uncached", "fresh"):
            raise UserError(
                f"--versus {job.versus}: only sampling is done in this way, and {job.config.name} is a tokenizer"
            )
        return
    assert job.config.generator is not None
    name = job.config.generator["name"]
    if (
        "uncached" in (*job.wanted, job.versus)
        and "cached" not in inspect.signature(GENERATORS.get(name).sample).parameters
    ):
        raise UserError(f"uncached: {name} samples in one way only; leave the word out")
    if job.versus == "uncached" and set(job.wanted) != {"generate"}:
        raise UserError("--versus uncached: add --what generate, the only thing that is done in this way")
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


def make_trainer(task: Any, config: RunConfig, batch: int, device: torch.device) -> Trainer:
    """The trainer of `config` before its first step, with `batch` pictures in a step and no data."""
    config.train.global_batch = batch
    with tempfile.TemporaryDirectory() as folder:
        config.work_dir = folder
        return Trainer(
            task,
            config,
            batches=lambda seen: iter(()),
            split=split,
            images_per_epoch=IMAGENET,
            data_fingerprint="noise",
            run=RunFolder(config, False),
            world=dist.World(0, 1, 0, device),
        )


def make_step(task: Any, config: RunConfig, batch: int, device: torch.device) -> Callable[[], Any]:
    """The trainer's step on one batch over and over."""
    trainer = make_trainer(task, config, batch, device)
    data = make_batch(task, batch, device, starts_from_latents(config, "train"))
    return lambda: trainer.train_step(data)


# ---------------------------------------------------------------------------------------------------------------------
# Counting, on the meta device
# ---------------------------------------------------------------------------------------------------------------------
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
        return brief(error)


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------
def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


@dataclass
class Timing:
    """Of one call, in seconds.

    Attributes:
        results: what the timed calls returned.
        theirs: median of the calls that were timed in turn with ours.
        ratios: of theirs to ours, turn by turn.
    """

    first: float
    median: float
    results: list[Any]
    theirs: float | None = None
    ratios: list[float] = field(default_factory=list)


Clock = Callable[[], float]


def steady_clock(device: torch.device) -> Clock:
    """The process's own time where one thread does everything, so that other programs on the machine count less."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def once(call: Callable[[], Any], device: torch.device, clock: Clock) -> tuple[float, Any]:
    """(seconds, result)."""
    synchronize(device)
    started = clock()
    result = call()
    synchronize(device)
    return clock() - started, result


def timed(
    call: Callable[[], Any],
    job: Job | Effort,
    theirs: Callable[[], float] | None = None,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Time `call`, and `theirs`, which tells its seconds itself, in turn with it; every second turn theirs begins."""

    def turn(theirs_first: bool = False) -> tuple[float, Any, float]:
        before = theirs() if theirs and theirs_first else 0.0
        ours = once(call, job.device, clock)
        return *ours, theirs() if theirs and not theirs_first else before

    first, _, their_first = turn()
    warmup, repeats = job.warmup, job.repeats
    if job.seconds < (warmup + repeats) * (first + their_first):  # the first may have compiled: the second tells
        second, _, their_second = turn()
        warmup, left = 0, job.seconds - first - their_first
        repeats = max(1, min(repeats, int(left / max(second + their_second, 1e-9)) - 1))
    for _ in range(warmup):
        turn()
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    seconds, results, others = zip(*(turn(index % 2 == 1) for index in range(repeats)))
    timing = Timing(first, statistics.median(seconds), list(results))
    if theirs:
        timing.theirs = statistics.median(others)
        timing.ratios = [other / ours for ours, other in zip(seconds, others)]
    return timing


@dataclass
class Row:
    """One measurement. `cells` is its line of the table, `record` all of it in numbers.

    Attributes:
        what: train, encode, decode, sample ..., with what belongs to it.
        compiled: whether torch.compile took part.
        seconds, first: of a call, and of the first one.
        memory: bytes, at most.
        work, floor: what the call asks for, and how long that takes at least; None where it could not be counted.
        first_preview: share of the time after which a stream shows something.
        theirs: seconds of the call that was timed in turn: the original's, or of ours done in another way.
        versus: which of WAYS that is; None for the original.
        ratios: of theirs to ours, turn by turn.
    """

    config: str
    what: str
    compiled: bool
    batch: int
    seconds: float
    first: float
    memory: int
    precision: str
    device: str
    work: Work | None = None
    floor: Floor | None = None
    first_preview: float | None = None
    theirs: float | None = None
    versus: str | None = None
    ratios: list[float] = field(default_factory=list)
    torch: str = field(default_factory=lambda: torch.__version__.split("+")[0])

    @property
    def speed(self) -> float:
        """Pictures per second."""
        return self.batch / self.seconds

    @property
    def label(self) -> str:
        if self.first_preview is None:
            return self.what
        return f"{self.what} (first preview after {100 * self.first_preview:.0f} % of the time)"

    def cells(self) -> dict[str, str]:
        cells = dict.fromkeys(HEADER, "-") | {
            "config": self.config,
            "what": self.label,
            "mode": "compiled" if self.compiled else "eager",
            "batch": str(self.batch),
            "img/s": f"{self.speed:.4g}",
            "memory": human_bytes(self.memory),
            "first": f"{self.first:.2f} s",
            "precision": self.precision,
            "device": self.device,
            "torch": self.torch,
        }
        if self.work:
            cells["FLOPs/img"] = number(self.work.flops / self.batch)
        if self.work and self.floor:
            probed = ", probed" if self.floor.source == "probe" else ""
            cells["MFU"] = f"{100 * self.work.flops / self.seconds / self.floor.peak.flops:.1f} %"
            cells["floor img/s"] = f"{self.batch / self.floor.seconds:.4g} ({self.floor.bound}{probed})"
        return cells

    @property
    def times(self) -> float:
        """How many times as fast as what was timed in turn: the median over turns."""
        return statistics.median(self.ratios)

    def pair_cells(self) -> list[str]:
        """Its line below PAIR_TITLES."""
        low, _, high = statistics.quantiles(self.ratios, n=4) if len(self.ratios) > 1 else self.ratios * 3
        cells, quartiles = self.cells(), f"{low:.2f} to {high:.2f}"
        where = [cells[name] for name in ("config", "what", "mode", "batch")]
        machine = [cells[name] for name in ("precision", "device", "torch")]
        return [*where, f"{1000 * self.seconds:.4g} ms", str(self.versus), f"{self.times:.2f}", quartiles, *machine]

    def record(self) -> dict[str, Any]:
        record = {name: value for name, value in asdict(self).items() if value not in (None, [])}
        told = "times_other" if self.versus else "times_original"
        return {**record, "img_per_s": self.speed, **({told: self.times} if self.ratios else {})}


def compile_as_the_programs(task: Any, config: RunConfig, mode: str, device: torch.device) -> bool:
    """Compile what sampling or evaluating compiles, if `mode` or, as in long runs, the config says so. Whether it did."""
    if isinstance(task, GeneratorTask):
        if mode != "config":
            config.sample.compile = mode == "compiled"
        torch._dynamo.reset()
        return Sampler(config, task, {}).prepare(COMPILED_BATCHES, device)
    if mode == "compiled" or (mode == "config" and config.eval.compile == "always"):
        torch._dynamo.reset()
        compile_blocks(task.tokenizer)
        return True
    return False


def make_ready(
    job: Job, config: RunConfig, what: str, batch: int, mode: str, way: str | None = None
) -> tuple[Any, Callable[[], Any], bool]:
    """(task, what to time, whether it is compiled), done in the product's way or in another of WAYS."""
    config, device = copy.deepcopy(config), job.device
    mode = "eager" if way in ("eager", "plain") else mode
    compiled = config.train.compile if mode == "config" else mode == "compiled"
    task = random_task(copy.deepcopy(config), device, job.guide)
    if way in LAYOUTS:
        for network in networks_of(task):
            network.to(memory_format=LAYOUTS[way])
    if what == "train":
        config.train.compile = compiled
        call = make_step(task, config, batch, device)
    else:
        for network in networks_of(task):
            network.eval().requires_grad_(False)  # as run.load gives finished networks
        compiled = compile_as_the_programs(task, config, mode, device)
        call = make_call(task, config, "uncached" if way == "uncached" else what, batch, device)
    if way == "plain":
        return task, plain_products()(call), compiled
    if way == "fresh" and what != "train" and isinstance(task, GeneratorTask):
        return task, lambda: (task.generator.train().eval(), call())[1], compiled
    return task, call, compiled


def measure(job: Job, config: RunConfig, what: str, label: str, batch: int, mode: str, work: Work | str) -> Row:
    """One row of the table. `label` names it, `work` is what `count` gave."""
    config, device, clock = copy.deepcopy(config), job.device, time.perf_counter
    task, call, compiled = make_ready(job, config, what, batch, mode)
    theirs = None
    if job.against:
        request = asked(config, task.tokenizer.spec.sizes(), what, batch, device)
        theirs = job.against.open(request)
    elif job.versus:
        clock = steady_clock(device)
        _, other, _ = make_ready(job, config, what, batch, mode, job.versus)
        theirs = lambda: once(other, device, clock)[0]
    timing = timed(call, job, theirs, clock)
    name = device_name(device)
    return Row(
        config=config.name,
        what=label + (" (stored latents)" if starts_from_latents(config, what) else ""),
        compiled=compiled,
        batch=batch,
        seconds=timing.median,
        first=timing.first,
        memory=peak_memory(device),
        precision=config.train.precision,
        device=name,
        work=None if isinstance(work, str) else work,
        floor=None if isinstance(work, str) else Floor.of(work, *peak_here(name, device, config.train.precision)),
        first_preview=statistics.median(s.first_share for s in timing.results) if what == "stream" else None,
        theirs=timing.theirs,
        versus=job.versus if timing.theirs else None,
        ratios=timing.ratios,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------
def run(job: Job) -> list[Row]:
    """Measure and print everything; returns the rows."""
    rows: list[Row] = []
    for what, label, config in job.variants():
        for batch in job.batches:
            work = "of ratios alone" if job.versus else count(config, job.guide, what, batch)
            if isinstance(work, str) and not job.versus:
                print(f"note: FLOPs of {label} could not be counted ({work})", file=sys.stderr)
            for mode in job.modes:
                try:
                    row = measure(job, config, what, label, batch, mode, work)
                except torch.cuda.OutOfMemoryError:
                    print(f"{label}, batch {batch}: out of memory", flush=True)
                    torch.cuda.empty_cache()
                    continue
                if not rows:  # not above a mistake that only building the networks shows
                    print("  ".join(f"{column:>10}" for column in PRINTED), flush=True)
                rows.append(row)
                cells = row.cells()
                print("  ".join(f"{cells[column]:>10}" for column in PRINTED), flush=True)
    if job.against:
        job.against.close()
    for line in comparisons(rows):
        print(line)
    return rows


def comparisons(rows: list[Row]) -> Iterator[str]:
    """What rows say together, or beside the original."""
    for row in rows:
        where = f"batch {row.batch}, {'compiled' if row.compiled else 'eager'}"
        if row.what == "uncached":
            for other in rows:
                if (other.what, other.compiled, other.batch) == ("generate", row.compiled, row.batch):
                    ratio = row.seconds / other.seconds
                    yield f"{where}: {ratio:.1f} times faster with the cache than without"
        if row.first_preview is not None:
            yield f"stream, {where}: first preview after {100 * row.first_preview:.0f} % of the time to the whole picture"
        if row.theirs:
            other = WAYS[row.versus] if row.versus else "the original"
            yield f"{row.what}, {where}: {row.times:.2f} times as fast as {other} ({row.theirs:.3g} s)"


def append_json(path: Path, rows: list[Row], command: str) -> None:
    """Add the records of `rows` to the list in a JSON file."""
    with explain_os_errors(path):
        before = read_json(path) if path.is_file() else []
        write_json(path, [*before, *({**row.record(), "command": command} for row in rows)])


def table_lines(rows: list[Row]) -> list[str]:
    """Of a markdown table below TITLES."""
    return ["| " + " | ".join(row.cells()[column] for column in HEADER) + " |" for row in rows]


def append_rows(path: Path, rows: list[Row], arguments: list[str]) -> None:
    """Add rows to the last table of a markdown file that has our header; a new section with one where there is none. Rows
    that were timed in turn with another way have a table of their own.

    Args:
        arguments: of the command, for the section's heading.
    """
    titles, lines = TITLES, table_lines(rows)
    if any(row.versus for row in rows):
        titles, lines = PAIR_TITLES, ["| " + " | ".join(row.pair_cells()) + " |" for row in rows if row.versus]
    with explain_os_errors(path):
        text = path.read_text() if path.is_file() else "# Benchmarks\n"
    kept = text.rstrip("\n").split("\n")
    if titles in kept:
        end = len(kept) - 1 - kept[::-1].index(titles)
        while end < len(kept) and kept[end].startswith("|"):
            end += 1
        kept[end:end] = lines
    else:
        command = f"`python -m scripts.benchmark {shlex.join(arguments)}`"
        kept += ["", command, "", titles, "|" + "---|" * (titles.count("|") - 1), *lines]
    write_atomic(path, "\n".join(kept) + "\n")
