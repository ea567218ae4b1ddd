"""AdamW groups and learning-rate schedules. Schedules are pure functions of images seen, so resume needs no state."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from core.errors import UserError
from core.schema import LoraConfig, OptimizerConfig, ScheduleConfig
from core.specs import Generator, SparesWeightDecay
from core.train.low_rank import AdaptingAdamW, factors_of


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of images seen. All lengths in images."""

    kind: str  # constant | cosine | linear | exponential | bent
    peak: float
    minimum: float
    warmup: int
    decay_start: int
    decay_end: int
    warmup_lr: float = 0.0
    warmup_from: int = 0
    hold: float = 0.0
    knee: float = 0.5
    every: int = 1

    @classmethod
    def from_config(
        cls,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        *,
        global_batch: int,
        images_per_epoch: int,
        total_images: int,
    ) -> Schedule:
        """Resolve durations and the linear scaling rule lr = base_lr * global_batch / 256 (Goyal et al. 2017)."""

        def images(duration, default: int) -> int:
            return default if duration is None else duration.images(images_per_epoch, global_batch)

        peak = optimizer.lr if optimizer.lr is not None else (optimizer.base_lr or 0.0) * global_batch / 256
        warmup, begin = images(schedule.warmup, 0), images(schedule.warmup_from, 0)
        end = total_images - global_batch if schedule.inclusive else total_images
        return cls(
            schedule.kind,
            peak,
            schedule.min_lr,
            warmup,
            images(schedule.decay_start, begin + warmup),
            images(schedule.decay_end, end),
            schedule.warmup_lr,
            begin,
            schedule.hold,
            schedule.knee,
            max(1, images(schedule.every, 1)),
        )

    def __call__(self, images_seen: int) -> float:
        images_seen -= images_seen % self.every
        risen = images_seen - self.warmup_from
        if risen < self.warmup or risen < 0:
            return self.warmup_lr + (self.peak - self.warmup_lr) * max(0, risen) / max(1, self.warmup)
        if self.kind == "constant" or images_seen < self.decay_start:
            return self.peak
        span = max(1, self.decay_end - self.decay_start)
        part = min(1.0, (images_seen - self.decay_start) / span)
        if part < self.hold:
            return self.peak
        return self._decayed((part - self.hold) / (1.0 - self.hold))

    def _decayed(self, part: float) -> float:
        """When this share of the decay is done."""
        if self.kind == "exponential":
            return self.peak * (self.minimum / self.peak) ** part
        if self.kind == "bent":  # two lines through a point above the straight one (VAR's "lin0.8" and the like)
            floor = self.minimum / self.peak
            middle = (1 + floor + (1 - floor) * (1 - self.knee)) / 2
            if part < self.knee:
                return self.peak * (1 + (middle - 1) * part / self.knee)
            return self.peak * (middle + (floor - middle) * (part - self.knee) / (1 - self.knee))
        remaining = 0.5 * (1.0 + math.cos(math.pi * part)) if self.kind == "cosine" else 1.0 - part
        return self.minimum + (self.peak - self.minimum) * remaining


def weight_decay_at(config: OptimizerConfig, fraction: float) -> float:
    """Weight decay when this share of the run is done: a cosine from weight_decay to weight_decay_end, if there is one."""
    if config.weight_decay_end is None:
        return config.weight_decay
    end = config.weight_decay_end
    return end + (config.weight_decay - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, fraction)))


def freeze(network: nn.Module, patterns: list[str]) -> list[str]:
    """Stop training the parameters whose names match one of `patterns` (fnmatch); returns the names.

    Raises:
        UserError: for a pattern that matches none, and where nothing is left to train.
    """
    parameters, frozen = dict(network.named_parameters()), set[str]()
    for pattern in patterns:
        matches = fnmatch.filter(parameters, pattern)
        if not matches:
            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in parameters))
            raise UserError(
                f"train.freeze: no parameter is named {pattern}. Names begin with {parts}; {pattern.split('.')[0]}.* would be "
                "all of one."
            )
        frozen.update(matches)
    for name in frozen:
        parameters[name].requires_grad_(False)
    if frozen and not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"train.freeze={patterns} leaves nothing to train.")
    return sorted(frozen)


def make_adamw(
    network: nn.Module, config: OptimizerConfig, trunk_lr: float = 1.0, lora: LoraConfig | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `network`, in two groups: decayed and not.

    See core.specs.SparesWeightDecay for which is which. Each group carries its parameter names, for checkpoints.

    Args:
        trunk_lr: share of the learning rate for all but the class rows of a Generator, which then are groups of their own:
            "factor" of a group is its share. Rows before the classes' in the same table (RAR's codes) get it too.
        lora: weights of the blocks change by low-rank products alone; what core.train.low_rank.keep_adapted leaves
            trainable is expected. Those rows before the classes' then stay.
    """
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    factors = factors_of(network, lora.rank, lora.alpha) if lora else []
    for f in factors:
        del trainable[f.name]
        trainable |= {f"{f.name}.lora_A": f.a, f"{f.name}.lora_B": f.b}
    if isinstance(network, SparesWeightDecay):
        spared = network.no_weight_decay()
    else:
        spared = {name for name, p in trainable.items() if p.ndim < 2}
    shares = {"factor": trunk_lr} if trunk_lr != 1 else {}
    table, first = network.class_rows() if (shares or lora) and isinstance(network, Generator) else ("", 0)
    groups = []
    for rows, decayed in ((False, True), (False, False), (True, True), (True, False)):
        names = [n for n in trainable if (n == table) == rows and (n not in spared) == decayed]
        if names:
            groups.append(
                {
                    "params": [trainable[n] for n in names],
                    "names": names,
                    "weight_decay": config.weight_decay if decayed else 0.0,
                    "decayed": decayed,
                    **({} if rows else shares),
                }
            )
    # lr is set before every step; fused updates all tensors in one kernel and can skip a step on the device.
    beta1, beta2 = config.betas
    options: dict[str, Any] = {"lr": 0.0, "betas": (beta1, beta2), "eps": config.eps, "fused": True}
    if not factors and not first:
        return torch.optim.AdamW(groups, **options)
    if first and isinstance(trainable[table], DTensor):
        raise UserError(
            "train.trunk_lr with train.parallel=fsdp: this generator keeps its codes in the table of its classes, whose rows "
            "cannot have two rates when they are shared between GPUs. Use train.parallel=ddp."
        )
    return AdaptingAdamW(
        groups, factors, (trainable[table], first, 0.0 if lora else trunk_lr) if first else None, **options
    )
