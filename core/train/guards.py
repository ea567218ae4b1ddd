"""Gradient clipping and the non-finite guard, decided on the device: the host never waits for a norm.

AdamW's fused kernel accepts two device scalars, the protocol of torch.amp.GradScaler: gradients are divided by
`grad_scale`, and the whole step is skipped where `found_inf` is 1. Clipping sets the first, a non-finite norm the
second, so both cost one norm and no copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.train.parallel import whole


class StepGuard:
    """Clips, skips and counts for one network.

    Args:
        names: parameter names, in the order of `parameters`.
        parameters: the trained ones.
        max_norm: largest global gradient norm; 0 turns clipping off, the guard stays.
    """

    def __init__(self, names: list[str], parameters: list[Tensor], max_norm: float):
        self.names, self.parameters, self.max_norm = names, parameters, max_norm
        # [skipped in total, skipped in a row, step of the last skip, index of the parameter that caused it]
        self.record = torch.zeros(4, dtype=torch.int64, device=parameters[0].device)

    @torch.no_grad()
    def before_step(self, optimizer: Any, step: int) -> Tensor:
        """Arm `optimizer` for its next step() and return the global gradient norm (device scalar, fp32)."""
        gradients = []
        for parameter in self.parameters:
            if parameter.grad is None:  # took no part in this step
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
        norms = whole(torch.stack(norms))  # (parameters,)
        total = torch.linalg.vector_norm(norms)
        bad = ~torch.isfinite(total)
        scale = (total / self.max_norm).clamp(min=1.0) if self.max_norm > 0 else torch.ones_like(total)
        optimizer.grad_scale = torch.where(bad, torch.ones_like(scale), scale)
        optimizer.found_inf = bad.to(torch.float32)
        culprit = torch.argmax((~torch.isfinite(norms)).to(torch.int64))
        skipped, streak, last, index = self.record.unbind()
        self.record = torch.stack(
            (skipped + bad, (streak + 1) * bad, torch.where(bad, step, last), torch.where(bad, culprit, index))
        )
        return total

    def describe(self, record: list[int]) -> str:
        """One line about a host copy of `record`."""
        skipped, streak, step, index = record
        return (
            f"{skipped} updates skipped so far for non-finite gradients, {streak} in a row; the last at step {step}, "
            f"first bad parameter {self.names[index]}"
        )
