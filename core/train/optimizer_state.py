"""The state of an optimiser as tensors and JSON, keyed by parameter name, and back, bit for bit.

torch's own state_dict numbers parameters by their place in the groups, needs pickle for the rest and casts to the
parameter's dtype on loading. Names survive a new grouping, and values keep the dtype they were saved with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.train.parallel import place


def _ordered(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter, int]]:
    """(name, parameter, group number) in the order of the optimiser's groups, whose "names" name their parameters."""
    return [
        (name, parameter, number)
        for number, group in enumerate(optimizer.param_groups)
        for name, parameter in zip(group["names"], group["params"], strict=True)
    ]


# Keys of a group that are not options.
_MEMBERS = ("params", "names")


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything an optimiser remembers: tensors by "<what>/<parameter>", such as "exp_avg/blocks.0.weight", and a JSON
    object with all else."""
    tensors: dict[str, Tensor] = {}
    parameters = {}
    for name, parameter, group in _ordered(optimizer):
        plain = {}
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
            else:
                plain[key] = value
        parameters[name] = {"group": group, "shape": list(parameter.shape), "state": plain}
    groups = [{k: v for k, v in group.items() if k not in _MEMBERS} for group in optimizer.param_groups]
    return tensors, {"optimizer": type(optimizer).__name__, "groups": groups, "parameters": parameters}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], description: dict[str, Any]
) -> None:
    """Undo `flatten_optimizer` on an optimiser over parameters of the same names, grouped in any way.

    An option of a group (weight decay, say) is restored where the saved groups of its parameters agree on it.
    UserError where the parameters are others, or the optimiser is.
    """
    saved = description["parameters"]
    ordered = _ordered(optimizer)
    if description["optimizer"] != type(optimizer).__name__:
        raise UserError(
            f"The checkpoint holds the state of {description['optimizer']}, the run uses {type(optimizer).__name__}. "
            "Set the same optimiser, or start a new run from the weights alone."
        )
    shapes = {name: list(parameter.shape) for name, parameter, _ in ordered}
    problems = [f"{name} is new" for name in sorted(shapes.keys() - saved.keys())]
    problems += [f"{name} is gone" for name in sorted(saved.keys() - shapes.keys())]
    problems += [
        f"{name} was {saved[name]['shape']}, is {shape}"
        for name, shape in shapes.items()
        if name in saved and saved[name]["shape"] != shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(
            f"The optimiser state of the checkpoint does not fit the model: {shown}. "
            "Use the configuration that the run started with, or start a new run from the weights alone."
        )

    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        key, name = full_name.split("/", 1)
        by_name.setdefault(name, {})[key] = value
    optimizer.state.clear()
    for name, parameter, number in ordered:
        state = dict(saved[name]["state"])
        for key, value in by_name.get(name, {}).items():
            state[key] = _place(key, value, parameter, optimizer.param_groups[number])
        if state:
            optimizer.state[parameter] = state

    for number, group in enumerate(optimizer.param_groups):
        former = [description["groups"][i] for i in sorted({saved[n]["group"] for n, _, g in ordered if g == number})]
        for key in group:
            if key in _MEMBERS or not former or any(key not in f for f in former):
                continue
            if all(f[key] == former[0][key] for f in former):
                pair = isinstance(group[key], tuple)  # betas, which JSON keeps as a list
                group[key] = tuple(former[0][key]) if pair else former[0][key]


def _place(key: str, value: Tensor, parameter: nn.Parameter, group: dict) -> Tensor:
    """A copy of `value` where torch's optimisers expect it."""
    on_host = key == "step" and not group.get("fused")  # torch keeps step counters there unless the update is fused
    device = torch.device("cpu") if on_host else parameter.device
    if value.shape == parameter.shape and value.dim() > 0:
        # With the parameter's strides (channels_last), which the foreach and fused kernels need to be fast.
        target = torch.empty_like(parameter, dtype=value.dtype, device=device, requires_grad=False)
        return target.copy_(place(value, target))
    return value.to(device, copy=True)
