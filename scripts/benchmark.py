#!/usr/bin/env python3
"""How fast a config runs here: python -m scripts.benchmark CONFIG [key=value ...] [--what ...] [--batch ...] [options]

  benchmark.py configs/rectok/ditdh_xl.yaml --tokenizer-config configs/rectok/tokenizer.yaml
  benchmark.py configs/toy/rectok_tokenizer.yaml --what train,decode --batch 1,8 --markdown docs/benchmarks.md
  benchmark.py configs/dar/ar_l.yaml --tokenizer-config configs/dar/tokenizer.yaml --what sample,stream --batch 1,64

Networks start from random weights and pictures are noise: neither weights nor data are needed, speed depends on
neither. train is the trainer's own step (forward, backward, clipping, AdamW, EMA; a generator encodes its pictures,
unless data.cache_latents is set); sample includes decoding to pixels; the `sample` section of the config says how.
Three more can be asked for:

  generate      sample without the decoding
  uncached      generate with the whole sequence computed anew for every code
  stream        sample with every picture that can be seen on the way (sample.py --preview); the row says after which
                share of the time to the whole picture the first one was there

--decode-steps 8,16 measures decode once for each number of steps, where the tokenizer decodes in steps. Columns:

  img/s         batch / median time of --repeats calls after --warmup, the device synchronised around each
  FLOPs/img     counted by torch on the meta device: matrix products and convolutions of the whole call, with backward
  MFU           FLOPs per second of the bf16 peak of the device, where core/devices.py knows it
  floor         img/s if arithmetic ran at peak and every byte (weights at each use, key and value cache) moved once at
                the full bandwidth, the longer of the two; bound by flops or bytes; for devices whose peak is known
  first         seconds of the first call: compilation, captured graphs, library set-up
  memory        peak on the GPU during the timed calls; of the process on a CPU
"""

import argparse
import contextlib
import inspect
import platform
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from core import cli

DEFAULT = ("train", "encode", "decode", "sample")
OF_GENERATORS = ("sample", "generate", "uncached", "stream")
WHAT = (*DEFAULT, *OF_GENERATORS[1:])
IMAGENET = 1_281_167
HEADER = (
    "config",
    "what",
    "mode",
    "batch",
    "img/s",
    "FLOPs/img",
    "MFU",
    "floor img/s",
    "memory",
    "first",
    "precision",
    "device",
    "torch",
)


@dataclass
class Work:
    """Of one call, for the whole batch."""

    flops: float
    moved: float  # bytes


# ---------------------------------------------------------------------------------------------------------------------
# One call of each kind
# ---------------------------------------------------------------------------------------------------------------------
def draws_for(batch: int, device, step: int = 0):
    import torch

    from core.rng import Draws

    return Draws(0, torch.arange(batch, device=device), step)


def make_batch(task, batch: int, device, stored: bool):
    """Noise as pictures, or what the tokenizer would have stored of them."""
    import torch

    from core.images import to_model_range
    from core.specs import Batch

    size = task.tokenizer.image_size
    images = (
        torch.zeros(batch, 3, size, size, dtype=torch.uint8, device=device)
        if device.type == "meta"
        else torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    )
    places = torch.arange(batch, device=device)
    labels = places % getattr(task, "num_classes", 1)
    if stored:
        with torch.no_grad():
            return Batch(labels, places, stored=task.tokenizer.precompute(to_model_range(images)))
    return Batch(labels, places, images=images)


def make_call(task, what: str, batch: int, device, stored: bool):
    """A function without arguments that does the work once; training goes through the Trainer instead."""
    import torch

    data = make_batch(task, batch, device, False)
    if what == "sample":
        return lambda: task.sample(task.generator, data.labels, draws_for(batch, device))
    if what == "stream":
        from run import streaming

        return lambda: streaming.stream(
            task.generator, task.tokenizer, data.labels, draws_for(batch, device), task.guidance, task.sample_options
        )
    if what in OF_GENERATORS:
        options = {**task.sample_options, **({"cached": False} if what == "uncached" else {})}
        return lambda: task.generator.sample(data.labels, draws_for(batch, device), task.guidance, **options)
    from core.images import to_model_range

    pictures = to_model_range(data.images)

    @torch.no_grad()
    def encode():
        return task.tokenizer.encode(pictures)

    if what == "encode":
        return encode
    latents = encode()
    return torch.no_grad()(lambda: task.tokenizer.decode(latents, draws_for(batch, device)))


def make_step(task, config, batch: int, device, stored: bool):
    """The trainer's step on one batch over and over."""
    from core import dist
    from core.train.run import RunFolder
    from core.train.trainer import Trainer
    from data.loader import split

    config.train.global_batch, config.train.micro_batch = batch, 0
    world = dist.World(0, 1, 0, device)
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
            world=world,
        )
    data = make_batch(task, batch, device, stored)
    return lambda: trainer.train_step(data)


def stores(config, what: str) -> bool:
    """Whether the call begins with what the tokenizer has stored of the pictures."""
    return what == "train" and config.task == "generator" and config.data.cache_latents


# ---------------------------------------------------------------------------------------------------------------------
# Counting, on the meta device
# ---------------------------------------------------------------------------------------------------------------------
def make_counter(networks):
    """A context that counts into `flops` and `weights` (numbers of weights read), from every operation inside it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    picking = {aten.embedding, aten.index_select, aten.index, aten.gather}  # these read what they return
    blank = {aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.new_zeros, aten.new_empty}
    held = {p.untyped_storage()._cdata: p.numel() for network in networks for p in network.parameters()}

    class Counter(TorchDispatchMode):
        flops = weights = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            result = operation(*args, **kwargs)
            packet = operation._overloadpacket
            if operation.is_view or packet in blank:
                return result
            if packet in flop_registry:
                self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
            for given in tree_leaves((args, kwargs)):
                if isinstance(given, torch.Tensor) and (size := held.get(given.untyped_storage()._cdata)):
                    self.weights += min(size, (result if packet in picking else given).numel())
            return result

    return Counter()


def count(config, guide_config, what: str, batch: int, stored: bool = False) -> Work | str:
    """FLOPs and bytes of one call; a reason where the networks cannot run without data."""
    import torch

    from core.nn.kvcache import KVCache
    from core.specs import Progress
    from run.load import make_task, networks_of

    device = torch.device("meta")
    try:
        task = make_task(config, guide_config, device)
        data = make_batch(task, batch, device, stored)
        call = None if what == "train" else make_call(task, what, batch, device, stored)
        half = 2 if config.train.precision == "bf16" else 4
        cached = 0
        update = KVCache.update

        def watched(self, *arguments):
            nonlocal cached
            found = update(self, *arguments)
            cached += sum(t.numel() for t in found)
            return found

        KVCache.update = watched
        try:
            with make_counter(networks_of(task)) as counter:
                if what == "train":
                    for phase in task.phases(
                        task.networks(), data, draws_for(batch, device), Progress(IMAGENET, 2 * IMAGENET, IMAGENET, 1)
                    ):
                        phase.loss.total.backward()
                else:
                    call()
        finally:
            KVCache.update = update
        moved = half * (counter.weights + cached)  # each at the precision of the products
        if what == "train":  # gradients, moments, averages and weights move in fp32
            trained = sum(p.numel() for n in task.networks().values() for p in n.parameters() if p.requires_grad)
            moved += 4 * (8 + 2 * len(config.train.ema)) * trained
        return Work(counter.flops, moved)
    except Exception as error:  # whatever a network does that needs values: only the count is lost, and we say so
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------
def device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory(device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def timed(call, device, warmup: int, repeats: int) -> tuple[float, float]:
    """(seconds of the first call, median of the repeats)."""
    import torch

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    first = once()
    for _ in range(warmup):
        once()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return first, statistics.median(once() for _ in range(repeats))


def measure(
    config, guide_config, what: str, label: str, batch: int, compiled: bool, device, options, work: Work | str
) -> dict[str, str]:
    """One row of the table. `label` names it, `work` is what `count` gave."""
    import copy

    import torch

    from core.devices import floor_seconds, peak_of
    from core.estimate import number
    from core.files import human_bytes
    from core.train.parallel import compile_blocks
    from run.load import make_task, networks_of

    config = copy.deepcopy(config)
    half = config.train.precision == "bf16"
    stored = stores(config, what)
    shares: list[float] = []  # of the first preview, of every call
    task = make_task(copy.deepcopy(config), guide_config, device)
    if compiled and what != "train":
        torch._dynamo.reset()
        for network in networks_of(task):
            compile_blocks(network)
    if what == "train":
        config.train.compile = compiled
        call = make_step(task, config, batch, device, stored)
    else:
        for network in [*task.networks().values(), task.tokenizer]:
            network.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            inner = make_call(task, what, batch, device, stored)

        def call():
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                result = inner()
            if what == "stream":
                shares.append(result.first_share)

    first, seconds = timed(call, device, options.warmup, options.repeats)
    name, speed = device_name(device), batch / seconds
    peak = peak_of(name) if half else None
    label += " (stored latents)" if stored else ""
    share = f"{100 * statistics.median(shares[-options.repeats :]):.0f} % of the time" if shares else ""
    label += f" (first preview after {share})" if shares else ""
    row = {
        "config": config.name,
        "what": label,
        "mode": "compiled" if compiled else "eager",
        "batch": str(batch),
        "img/s": f"{speed:.4g}",
        "FLOPs/img": "-",
        "MFU": "-",
        "floor img/s": "-",
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
    if peak:
        bound = "flops" if work.flops / peak.flops > work.moved / peak.bandwidth else "bytes"
        row["MFU"] = f"{100 * work.flops / seconds / peak.flops:.1f} %"
        row["floor img/s"] = f"{batch / floor_seconds(work.flops, work.moved, peak):.4g} ({bound})"
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Table
# ---------------------------------------------------------------------------------------------------------------------
def append_rows(path: Path, rows: list[dict[str, str]], command: str) -> None:
    """Add rows to the last table of a markdown file that has our header; a new section with one where there is none."""
    from core.files import explain_os_errors, write_atomic

    header = "| " + " | ".join(HEADER) + " |"
    lines = ["| " + " | ".join(row[column] for column in HEADER) + " |" for row in rows]
    with explain_os_errors(path):
        text = path.read_text() if path.is_file() else "# Benchmarks\n"
        path.parent.mkdir(parents=True, exist_ok=True)
    kept = text.rstrip("\n").split("\n")
    if header in kept:
        end = len(kept) - 1 - kept[::-1].index(header)
        while end < len(kept) and kept[end].startswith("|"):
            end += 1
        kept[end:end] = lines
    else:
        kept += ["", f"`{command}`", "", header, "|" + "---|" * len(HEADER), *lines]
    write_atomic(path, "\n".join(kept) + "\n")


def whole_numbers(text: str, option: str) -> list[int]:
    """Of "1,32,256"."""
    from core.errors import UserError

    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: whole numbers separated by commas") from None
    if min(numbers) < 1:
        raise UserError(f"{option} {text}: give 1 or more")
    return numbers


def read_config(path: str, overrides: list[str], tokenizer_config: str | None):
    """The config, with the tokenizer of another where one is named: tokenizer.* then changes that one."""
    from run.load import load_config, tokenizer_layout

    if not tokenizer_config:
        return load_config(path, overrides)
    for_tokenizer = [o for o in overrides if o.startswith("tokenizer.")]
    config = load_config(path, [o for o in overrides if o not in for_tokenizer])
    config.tokenizer = tokenizer_layout(load_config(tokenizer_config, for_tokenizer).tokenizer)[0]
    return config


def check_words(config, wanted: list[str], steps: list[int]) -> None:
    """UserError for what this config cannot be asked for."""
    import torch

    from core.errors import UserError
    from run import streaming
    from run.load import GENERATORS, TOKENIZERS, make_task, tokenizer_layout

    tokenizer = tokenizer_layout(config.tokenizer)[0]["name"]
    if steps and "steps" not in TOKENIZERS.signature(tokenizer):
        raise UserError(f"--decode-steps: {tokenizer} decodes in one pass; leave the option out")
    if config.task == "tokenizer":
        return
    name = config.generator["name"]
    if "uncached" in wanted and "cached" not in inspect.signature(GENERATORS.get(name).sample).parameters:
        raise UserError(f"--what uncached: {name} samples in one way only; leave the word out")
    if "stream" in wanted:
        task = make_task(config, None, torch.device("meta"))
        streaming.check(task.generator, task.tokenizer)


def variants(config, wanted: list[str], steps: list[int]):
    """(word, its name in the table, config) of everything to measure."""
    import copy

    from run.load import tokenizer_layout

    for word in wanted:
        if word != "decode" or not steps:
            yield word, word, config
            continue
        for count_ in steps:
            changed = copy.deepcopy(config)
            changed.tokenizer = {**tokenizer_layout(config.tokenizer)[0], "steps": count_}
            yield word, f"decode ({count_} steps)", changed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--what", default=",".join(DEFAULT), help=f"of {','.join(WHAT)} (default: the first four, if they apply)"
    )
    parser.add_argument("--batch", default="32", help="batch sizes, 1,32,256 (default 32)")
    parser.add_argument("--mode", choices=("eager", "compiled", "both"), default="eager")
    parser.add_argument("--decode-steps", help="numbers of steps that decode is measured with, 8,16 (default: its own)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: the config's")
    parser.add_argument("--tokenizer-config", help="config whose tokenizer is used, where the weights are not here")
    parser.add_argument("--guide-config", help="config of the weaker model of autoguidance")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--markdown", help="file whose table gets the rows")
    options = parser.parse_intermixed_args(arguments)

    from core.errors import UserError, nearest

    batches = whole_numbers(options.batch, "--batch")
    steps = whole_numbers(options.decode_steps, "--decode-steps") if options.decode_steps else []
    if options.repeats < 1 or options.warmup < 0:
        raise UserError("--repeats: give 1 or more")
    wanted = options.what.split(",")
    for word in wanted:
        if word not in WHAT:
            raise UserError(f'--what: "{word}" is not known.{nearest(word, WHAT)}')

    import copy

    import torch

    from core import dist
    from run.load import load_config

    overrides = [*options.overrides, *([f"train.precision={options.precision}"] if options.precision else [])]
    config = read_config(options.config, overrides, options.tokenizer_config)
    guide = load_config(options.guide_config, []) if options.guide_config else None
    if guide is not None:
        config.sample.guidance = "auto"
        if not isinstance(config.sample.scale, list) and config.sample.scale <= 1:
            raise UserError("--guide-config: guidance is off; set sample.scale above 1, say sample.scale=1.29")
    if config.task == "tokenizer":
        wanted = [w for w in wanted if w not in OF_GENERATORS]
    check_words(config, wanted, steps)
    device = dist.pick_device(options.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    rows = []
    for what, label, chosen in variants(config, wanted, steps):
        for batch in batches:
            work = count(copy.deepcopy(chosen), guide, what, batch, stores(chosen, what))
            if isinstance(work, str):
                print(f"note: FLOPs of {label} could not be counted ({work})", file=sys.stderr)
            for compiled in {"eager": (False,), "compiled": (True,), "both": (False, True)}[options.mode]:
                try:
                    rows.append(measure(chosen, guide, what, label, batch, compiled, device, options, work))
                except torch.cuda.OutOfMemoryError:
                    print(f"{label}, batch {batch}: out of memory", flush=True)
                    torch.cuda.empty_cache()
                    continue
                if len(rows) == 1:  # not above a mistake that only building the networks shows
                    print("  ".join(f"{column:>10}" for column in HEADER[1:10]), flush=True)
                print("  ".join(f"{rows[-1][column]:>10}" for column in HEADER[1:10]), flush=True)
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
    if options.markdown and rows:
        append_rows(Path(options.markdown), rows, f"python -m scripts.benchmark {shlex.join(arguments)}")
        print(f"added to {options.markdown}")
    return 0


if __name__ == "__main__":
    cli.run(main)
