"""What a run will cost: --dry-run of scripts/train.py. No weights, no data, no GPU: networks and tensors have sizes only.

FLOPs are counted by torch over one training step with all that takes part (frozen tokenizer, teachers, loss networks,
backward). Memory is that of one GPU: weights, gradients, AdamW, averages, frozen networks, and the most that is alive
while a micro-batch goes forward and backward, by core.estimate.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from core import promises
from core.devices import rehearsal
from core.errors import UserError, where
from core.estimate import FlopCounter, Rehearsal, Step, number
from core.images import to_model_range
from core.rng import Draws
from core.schema import RunConfig
from core.specs import Batch, Phase, Progress, Tokenizer
from core.train import parallel
from core.train.low_rank import adapted_weights
from generator.task import GeneratorTask
from run.adapt import choose_trained
from run.data import num_classes, open_train
from run.load import random_task, tokenizer_layout
from run.weights import Source
from tokenizer.task import TokenizerTask

GPUS, GPU_GB = 8, 80.0  # what the recipes are written for, where no GPU is found
TFLOPS = {"bf16": 400.0, "fp32": 200.0}  # assumed per GPU: 40 % of an H100's peak (fp32: convolutions in TF32)
LIBRARIES = 1.5e9  # bytes of the CUDA context, cuDNN, cuBLAS and NCCL
IMAGENET = 1_281_167
INCEPTION = 11.4e9  # FLOPs per picture
STAGE = 0.6  # of the run that is looked at: discriminators have begun, orders are still being permuted


@dataclass
class Cost:
    """Of one trained network."""

    name: str
    parameters: int
    trainable: int
    forward_flops: float  # per image


@dataclass
class Memory:
    """Of one GPU, in bytes."""

    state: float  # weights, gradients, AdamW's moments and averages
    frozen: float
    peak: float  # of a micro-batch

    @property
    def total(self) -> float:
        return self.state + self.frozen + self.peak + LIBRARIES


@contextlib.contextmanager
def explained(config: RunConfig) -> Iterator[None]:
    """Inside, what a step stumbles over becomes a sentence with its place: settings may be at fault, or a new network."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"a step of {config.name} would fail, at {where(error)}: sizes or settings do not go together. "
            "TESSERA_TRACEBACK=1 shows the way there."
        ) from error


class Plan:
    """A run looked at before it starts.

    Args:
        gpus: that share the global batch.
        sources: weights that are open already, see run.load.build_pair.
        classes: of the data; None: look there.
    """

    def __init__(
        self, config: RunConfig, gpus: int = GPUS, sources: dict[str, Source] | None = None, classes: int | None = None
    ):
        self.config, self.gpus = config, gpus
        if config.train.global_batch % gpus:
            raise UserError(
                f"train.global_batch={config.train.global_batch} cannot be shared by {gpus} GPUs evenly; give --gpus N."
            )
        self.per_gpu = config.train.global_batch // gpus
        self.micro = self.per_gpu // parallel.accumulation(self.per_gpu, config.train.micro_batch)
        self.task = random_task(
            config, torch.device("meta"), num_classes=classes or num_classes(config), sources=sources
        )
        self.tokenizer = self.task.tokenizer
        trained, frozen = self.task.networks(), list(self.task.frozen().values())
        if config.train.activation_checkpointing:
            parallel.checkpoint_activations(trained[self.task.primary])
        for network in frozen:
            network.eval().requires_grad_(False)
        for network in trained.values():
            network.train()
        choose_trained(config, self.task)
        self.rehearsal = Rehearsal(trained, frozen, config.train.precision == "bf16")
        self.state = sum(self._state(name, network) for name, network in trained.items())
        self.frozen = 4.0 * sum(t.numel() for n in frozen for t in [*n.parameters(), *n.buffers()])
        self.stage = STAGE
        self._require_round_trip()
        self.step = self._step(self.micro)
        if trained.keys() - self.step.forward.keys():  # a discriminator that begins later
            self.stage = 1.0
            self.step = self._step(self.micro)
        self.costs = [
            Cost(
                name,
                _count(network.parameters()),
                _count(p for p in network.parameters() if p.requires_grad),
                self.step.forward.get(name, 0.0) / self.micro,
            )
            for name, network in trained.items()
        ]

    def _require_round_trip(self) -> None:
        """UserError where the tokenizer's methods do not go together: a training meets most of them late, in a preview.
        What depends on values (D-AR's decoder asks for its times) is looked at as far as sizes lead."""
        size, training = self.tokenizer.image_size, self.tokenizer.training
        values_decide = contextlib.suppress(
            DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException
        )
        with values_decide, self.rehearsal.mode, rehearsal(), torch.no_grad():
            promises.round_trip(self.tokenizer.eval(), torch.zeros(1, 3, size, size))
        self.tokenizer.train(training)

    def _state(self, name: str, network: nn.Module) -> float:
        """Weights and averages in fp32, gradients and two moments of what is trained; shared out by FSDP."""
        averages = len(self.config.train.ema) if name == self.task.primary else 0
        trained = _count(p for p in network.parameters() if p.requires_grad)
        moments = trained
        if lora := self.config.train.lora:
            adapted = adapted_weights(network).values()
            moments += sum(lora.rank * sum(weight.shape) - weight.numel() for weight in adapted)
        size = 4.0 * (_count(network.parameters()) * (1 + averages) + trained + 2 * moments)
        return size / self.gpus if self.config.train.parallel == "fsdp" else size

    def _step(self, micro: int) -> Step:
        with self.rehearsal.mode:
            batch = self._batch(micro)
        with rehearsal():
            return self.rehearsal.step(lambda networks: self._phases(networks, batch))

    def _batch(self, micro: int) -> Batch:
        """Pictures of nothing, or what is stored of them where the run has it stored."""
        data, size = self.config.data, self.tokenizer.image_size
        zeros, places = torch.zeros(micro, dtype=torch.int64), torch.arange(micro)
        images = torch.zeros(micro, 3, size, size, dtype=torch.uint8)
        if self.config.task == "generator" and (data.url.startswith("tokens://") or data.cache_latents or data.moments):
            with torch.no_grad():
                return Batch(zeros, places, stored=self.tokenizer.precompute(to_model_range(images)))
        return Batch(zeros, places, images=images)

    def _phases(self, networks: dict[str, Any], batch: Batch) -> Iterator[Phase]:
        train = self.config.train
        total = train.duration.images(IMAGENET, train.global_batch) or train.global_batch
        step = max(1, round(self.stage * total / train.global_batch))
        progress = Progress(step * train.global_batch, total, IMAGENET, step, train.global_batch)
        return self.task.phases(networks, batch, Draws(0, batch.positions), progress)

    @property
    def memory(self) -> Memory:
        return Memory(self.state, self.frozen, self.step.peak)

    def fitting(self, gpu_bytes: float) -> int | None:
        """The largest equal part of a GPU's pictures that fits; None where not even one picture does."""
        parts = [n for n in range(1, self.per_gpu + 1) if self.per_gpu % n == 0]
        base = self.memory.total - self.step.peak
        other = max(1, self.micro // 2) if self.micro > 1 else 2
        each = (self.step.peak - self._step(other).peak) / (self.micro - other)  # bytes per picture
        return max((n for n in parts if base + self.step.peak + (n - self.micro) * each <= gpu_bytes), default=None)


def _count(tensors: Any) -> int:
    return sum(t.numel() for t in tensors)


def costs(config: RunConfig, sources: dict[str, Source] | None = None) -> tuple[Tokenizer, list[Cost]]:
    """The tokenizer and the cost of every trained network, by a step on one picture.

    Args:
        sources: weights that are open already, see run.load.build_pair.
    """
    plan = of_one_picture(config, sources)
    return plan.tokenizer, plan.costs


def of_one_picture(config: RunConfig, sources: dict[str, Source] | None, classes: int | None = None) -> Plan:
    """The step of a run on one picture."""
    alone = dataclasses.replace(config.train, global_batch=1, micro_batch=1)
    return Plan(dataclasses.replace(config, train=alone), 1, sources, classes)


def evaluation_flops(task: TokenizerTask | GeneratorTask | Tokenizer) -> float:
    """FLOPs behind one picture of an evaluation: sampled, or rebuilt, and looked at by Inception with what it is held against.

    A sample is one pass over the whole picture per step of the generator, and as much again for guidance: codes that are
    drawn one after another with a cache cost as much as one pass.

    Args:
        task: with networks on the meta device.
    """
    tokenizer = task if isinstance(task, Tokenizer) else task.tokenizer
    draws, labels = Draws(0, torch.arange(1, device="meta")), torch.zeros(1, dtype=torch.int64, device="meta")
    progress = Progress(IMAGENET, 2 * IMAGENET, IMAGENET, 1)

    def flops(call: Callable[..., Any], *inputs: Any) -> float:
        with torch.no_grad(), FlopCounter() as counter:
            call(*inputs)
        return counter.flops

    picture = torch.zeros(1, 3, tokenizer.image_size, tokenizer.image_size, device="meta")
    latents = tokenizer.encode(picture)
    decoding = flops(tokenizer.decode, latents, draws)
    if not isinstance(task, GeneratorTask):
        return flops(tokenizer.encode, picture) + decoding + 2 * INCEPTION
    guidance, each = task.guidance, flops(task.generator, latents, labels, draws, progress)
    beside = flops(guidance.guide, latents, labels, draws, progress) if guidance.guide else each * guidance.active
    return task.sample_options.get("steps", 1) * (each + beside) + decoding + INCEPTION


def describe(
    config: RunConfig, gpus: int | None = None, gpu_gb: float | None = None, tflops: float | None = None
) -> str:
    """A table for the terminal.

    Args:
        gpus: that share the global batch; None: those found here, else 8.
        gpu_gb: memory of each in 10^9 bytes; None: that of the first one here, else 80.
        tflops: FLOPs per second of each in 10^12 that the hours are computed with; None: TFLOPS.
    """
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = gpus or here or GPUS
    gpu_gb = gpu_gb or (torch.cuda.get_device_properties(0).total_memory / 1e9 if here else GPU_GB)
    with explained(config):
        plan, train = Plan(config, gpus), config.train
    memory, parts = plan.memory, plan.per_gpu // plan.micro
    lines = [f"latents        {plan.tokenizer.spec}"]
    if config.task == "generator" and (note := tokenizer_layout(config.tokenizer)[1]):
        lines.append(f"               {note}")
    for cost in plan.costs:
        lines += [
            f"{cost.name}",
            f"  parameters   {cost.parameters:,} ({cost.trainable:,} trained)",
            f"  forward      {number(cost.forward_flops)}FLOPs per image",
        ]
    each = plan.step.flops / plan.micro
    lines += [
        f"step           {number(each)}FLOPs per image with backward and frozen networks, "
        f"{number(each * train.global_batch)}FLOPs for {train.global_batch} images",
        f"batch          {train.global_batch} images on {gpus} GPU(s): {plan.per_gpu} each, {plan.micro} at a time in "
        f"{parts} part(s)",
        f"memory         {_gb(memory.total)} of {gpu_gb:.0f} GB per GPU: {_gb(memory.state)} weights, gradients, AdamW and "
        f"{len(train.ema)} average(s), {_gb(memory.frozen)} frozen networks, {_gb(memory.peak)} for {plan.micro} images in "
        f"{train.precision}, {_gb(LIBRARIES)} CUDA libraries (what the compiler saves is not counted)",
        f"               {_verdict(plan, gpu_gb)}",
        _length(config, each, gpus, tflops or TFLOPS[train.precision]),
    ]
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _verdict(plan: Plan, gpu_gb: float) -> str:
    fitting = plan.fitting(gpu_gb * 1e9)
    state = "fits" if plan.memory.total <= gpu_gb * 1e9 else "does not fit"
    if fitting is None:
        return f"{state}; not even one image at a time would. Try train.activation_checkpointing=true" + (
            " or train.parallel=fsdp" if plan.config.task == "generator" else ""
        )
    return f"{state}; the most that fits is train.micro_batch={fitting}"


def _length(config: RunConfig, each: float, gpus: int, tflops: float) -> str:
    train, assumed = config.train, ""
    try:
        per_epoch = len(open_train(config))
    except UserError:
        per_epoch = IMAGENET
        assumed = f", if the data are ImageNet's {IMAGENET:,} pictures (not here: {config.data.url})"
    total = train.duration.images(per_epoch, train.global_batch)
    hours = each * total / (gpus * tflops * 1e12) / 3600
    return (
        f"run            {total:,} images, {total // train.global_batch:,} steps, {number(each * total)}FLOPs{assumed}\n"
        f"               about {hours:.3g} hours on {gpus} GPU(s) at {tflops:g} TFLOP/s each, which is assumed (--tflops) "
        "and not measured"
    )
