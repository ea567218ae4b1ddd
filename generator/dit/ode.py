"""Fixed-grid solvers of dx/dt = velocity(x, t): pure functions that know nothing about networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor, trajectory: list[Tensor] | None = None
) -> Tensor:
    """Euler's method.

    Args:
        velocity: of a state and one time for the whole batch, a 0-dim tensor.
        x: state at times[0], fp32. It is updated in fp32 whatever precision `velocity` returns.
        times: (K,) on the CPU (then no step waits for the accelerator); K - 1 updates.
        trajectory: appended to, if given: the K states.
    """
    if trajectory is not None:
        trajectory.append(x)
    for now, after in itertools.pairwise(times):
        x = x + (after - now) * velocity(x, now).float()
        if trajectory is not None:
            trajectory.append(x)
    return x
