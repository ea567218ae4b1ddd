"""What a training step asks of a GPU: `python -m tests.gpu_path` prints it. Without numbers, without a GPU.

Everything is looked at in the published recipes, at their published sizes: which share of the forward FLOPs runs inside of
what `train.compile` compiles (meta device), and, on fake CUDA tensors, the compiler's graph breaks and the moments at
which the host would wait. Backward is left out: the autograd engine has no thread for a device that is not there.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.estimate import FlopCounter
from core.schema import RunConfig
from core.specs import Progress
from core.train import parallel
from run.benchmark import IMAGENET, draws_for, make_batch, read_config
from run.load import networks_of, random_task
from tests.conftest import ROOT
from tests.gpu_path.fake import Count, gpu

RECIPES = {  # (recipe, the tokenizer of a generator), in configs/
    "RecTok": ("rectok/tokenizer", None),
    "DiT-DH-XL": ("rectok/ditdh_xl", "rectok/tokenizer"),
    "FQGAN": ("fqgan/dual_ds16", None),
    "FAR-B": ("fqgan/far_b_dual", "fqgan/dual_ds16"),
    "VQGAN+": ("rear/vqgan_plus_tokenizer", None),
    "reAR-B": ("rear/rear_b", "rear/maskgit_vqgan_tokenizer"),
    "D-AR": ("dar/tokenizer", None),
    "D-AR-L": ("dar/ar_l", "dar/tokenizer"),
    "ImageFolder": ("imagefolder/ms_pq2_4096", None),
    "VAR-d17": ("imagefolder/var_d17", "imagefolder/ms_pq2_4096"),
}
PROGRESS = Progress(150 * IMAGENET, 200 * IMAGENET, IMAGENET, 1)  # discriminators have begun


def read(name: str, tokenizer: str | None, *overrides: str) -> RunConfig:
    """A recipe of configs/."""
    folder = ROOT / "configs"
    return read_config(str(folder / f"{name}.yaml"), list(overrides), tokenizer and str(folder / f"{tokenizer}.yaml"))


def make(config: RunConfig):
    """Its task on the meta device, as the trainer sets it up."""
    task = random_task(config, torch.device("meta"))
    trained = task.networks().values()
    for network in networks_of(task):
        network.train(any(network is other for other in trained))
    for network in task.frozen().values():
        network.requires_grad_(False)
    return task


# ---------------------------------------------------------------------------------------------------------------------
# What is compiled
# ---------------------------------------------------------------------------------------------------------------------
class Shares(FlopCounter):
    """Forward FLOPs of products and convolutions: all, those inside of compiled parts, those outside by module."""

    def __init__(self, networks: dict[str, nn.Module]):
        super().__init__()
        self.seen = self.total = self.inside = 0.0
        self.outside, self.depth, self.path = Counter(), 0, []
        for name, network in networks.items():
            for part in parallel.compiled_parts(network):
                part.register_forward_pre_hook(lambda *_: self._deeper(1))
                part.register_forward_hook(lambda *_: self._deeper(-1))
            for inner, module in network.named_modules():
                module.register_forward_pre_hook(lambda *_, place=f"{name}.{inner}": self.path.append(place))
                module.register_forward_hook(lambda *_: self._leave())

    def _deeper(self, by: int) -> None:
        self.depth += by

    def _leave(self) -> None:
        self.path.pop()

    def see(self, operation, arguments, result) -> None:
        flops, self.seen = self.flops - self.seen, self.flops
        if torch._C._current_graph_task_id() >= 0:  # inside of the backward pass that adaptive weights take
            return
        self.total += flops
        if self.depth:
            self.inside += flops
        elif flops:
            self.outside[self.path[-1] if self.path else "(task)"] += flops


@functools.lru_cache(None)
def compiled_share(name: str) -> tuple[float, dict[str, float]]:
    """(share of a step's forward FLOPs that is compiled, module -> share that is not)."""
    device, task = torch.device("meta"), make(read(*RECIPES[name]))
    with Shares({**task.networks(), **task.frozen()}) as shares:
        for _ in task.phases(task.networks(), make_batch(task, 2, device), draws_for(2, device), PROGRESS):
            pass
    return shares.inside / shares.total, {place: n / shares.total for place, n in shares.outside.most_common()}


# ---------------------------------------------------------------------------------------------------------------------
# What a GPU would see
# ---------------------------------------------------------------------------------------------------------------------
def _no_gradients(outputs, inputs, *_, **__) -> tuple[Tensor, ...]:
    """In place of torch.autograd.grad, for which there is no engine."""
    inputs = inputs if isinstance(inputs, (list, tuple)) else [inputs]
    return tuple(torch.zeros_like(x) for x in inputs)


def _one_kernel(q: Tensor, k: Tensor, v: Tensor, mask, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _two_kernels(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, threshold: int, scale: float | None, mask) -> Tensor:
    return _one_kernel(q, k, v, mask, scale) * _one_kernel(q, k, v, mask, scale)[..., :1]


@contextmanager
def on_gpu(task) -> Iterator[None]:
    """Inside, the task's networks are on a GPU that is not there."""
    with gpu(), mock.patch("torch.autograd.grad", _no_gradients):
        for module in (module for network in networks_of(task) for module in network.modules()):
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if any(tensor.device.type != "cuda" for tensor in own):
                module.to_empty(device="cuda", recurse=False)
        yield


@dataclass
class Report:
    """Of the forward passes of one step."""

    kernels: int  # uncompiled
    waits: dict[str, int]
    graphs: int
    breaks: dict[str, int]


@functools.lru_cache(None)
def measure(name: str, *overrides: str) -> Report:
    """A step of this recipe, or of one of configs/toy, on a GPU, as it is and compiled."""
    from torch._dynamo.utils import counters

    config = read(*RECIPES[name], *overrides)
    task = make(config)
    with on_gpu(task):
        device = torch.device("cuda")
        data, draws = make_batch(task, 4, device), draws_for(4, device)

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=config.train.precision == "bf16"):
                for _ in task.phases(task.networks(), data, draws, PROGRESS):
                    pass

        # Without FlexAttention, which the compiler makes a kernel of even where nothing else is compiled.
        dropped = mock.patch("core.nn.dropped_attention._compiled", lambda: _two_kernels)
        with mock.patch("core.nn.blockcausal.flex", _one_kernel), dropped, Count() as count:
            step()
        torch._dynamo.reset()
        counters.clear()
        for network in [*task.networks().values(), *task.frozen().values()]:
            parallel.compile_blocks(network, backend="eager")
        step()
        breaks = {reason.splitlines()[0]: times for reason, times in counters["graph_break"].items()}
        return Report(count.total, dict(count.waits), counters["stats"]["unique_graphs"], breaks)


def table() -> str:
    """Every recipe, one line each."""
    lines = [
        "| recipe | forward FLOPs compiled | graphs | graph breaks | host waits per step | kernels of forward, eager |",
        "|---|---|---|---|---|---|",
    ]
    for name in RECIPES:
        share, report = compiled_share(name)[0], measure(name)
        lines.append(
            f"| {name} | {100 * share:.1f} % | {report.graphs} | {sum(report.breaks.values())} | "
            f"{sum(report.waits.values())} | {report.kernels} |"
        )
    return "\n".join(lines)
