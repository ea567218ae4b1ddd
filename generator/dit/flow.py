"""The linear flow path between noise (t = 0) and data (t = 1), its shifted time and its solver (RecTok; SD3, Esser et al. 2024).

The more values a latent has, the easier it is to see through a given amount of noise; the shift spends correspondingly
more time near pure noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def time_shift(values: int) -> float:
    """The shift of a latent with this many values (tokens x channels), relative to 4096."""
    return math.sqrt(values / 4096)


def shifted(u: Tensor, shift: float) -> Tensor:
    """[0, 1] -> [0, 1], pushed towards 1 by shift > 1."""
    return shift * u / (1 + (shift - 1) * u)


def training_time(u: Tensor, shift: float) -> Tensor:
    """Uniform draws -> times to train at, dense near noise."""
    return 1 - shifted(u, shift) if shift > 1 else u


def sampling_times(points: int, shift: float) -> Tensor:
    """(points,) increasing times from 0 to 1: points - 1 steps of the solver."""
    grid = shifted(torch.linspace(0, 1, points, device="cpu"), shift)
    # parity: a shift below 1 is not reversed here, and not applied at all in training.
    return (1 - grid).flip(0) if shift > 1 else grid


def mix(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point at time t (B,) of the straight line from noise to data."""
    t = t.view(-1, *[1] * (data.ndim - 1))
    return t * data + (1 - t) * noise


def target(data: Tensor, noise: Tensor) -> Tensor:
    """The velocity along that line."""
    return data - noise


def euler(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: Tensor,
    trajectory: list[Tensor] | None = None,
    after: Callable[[Tensor, float], Tensor] | None = None,
    watch: Callable[[Tensor, float], None] | None = None,
) -> Tensor:
    """Euler's method.

    Args:
        velocity: of a state and one time for the whole batch.
        x: state at times[0], fp32. It is updated in fp32 whatever precision `velocity` returns.
        times: (K,) fp32 on the CPU (then no step waits for the accelerator); K - 1 updates.
        trajectory: appended to, if given: the K states.
        after: (state, its time) -> the state to go on from, called after every update.
        watch: called after that with (state, share of the updates that are done).
    """
    if trajectory is not None:
        trajectory.append(x)
    for done, (now, then) in enumerate(itertools.pairwise(times.tolist()), 1):
        x = x + float(np.float32(then) - np.float32(now)) * velocity(x, now).float()
        if after is not None:
            x = after(x, then)
        if watch is not None:
            watch(x, done / (len(times) - 1))
        if trajectory is not None:
            trajectory.append(x)
    return x
