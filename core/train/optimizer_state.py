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


def _ordered(optimizer: torch.optim.Optimizer, names: list[str] | None) -> list[tuple[str, nn.Parameter, int]]:
    """(name, parameter, group number) in the order of the optimiser's groups."""
    if names is None:
        names = [name for group in optimizer.param_groups for name in group["names"]]
    found = [(p, number) for number, group in enumerate(optimizer.param_groups) for p in group["params"]]
    if len(names) != len(found) or len(set(names)) != len(names):
        raise ValueError(f"{len(names)} names ({len(set(names))} distinct) for {len(found)} parameters")
    return [(name, p, number) for name, (p, number) in zip(names, found)]


# Keys of a group that are not options.
_MEMBERS = ("params", "names")


def _plain(value: Any) -> Any:
    """An option of a group as JSON can hold it. One-number tensors (a capturable learning rate) become numbers."""
    if isinstance(value, Tensor):
        return value.item()
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _like(value: Any, current: Any) -> Any:
    """Inverse of `_plain`, shaped like the option it replaces."""
    if isinstance(current, Tensor):
        return torch.full_like(current, value)
    if isinstance(current, (list, tuple)) and len(current) == len(value):
        return type(current)(_like(v, c) for v, c in zip(value, current))
    return value


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str] | None = None
) -> tuple[dict[str, Tensor], dict]:
    """Everything an optimiser remembers.

    Args:
        names: of its parameters, in the order of its groups. None: group["names"] of each group.

    Returns:
        Tensors by "<what>/<parameter>", such as "exp_avg/blocks.0.weight", and a JSON object with all else.
    """
    tensors: dict[str, Tensor] = {}
    parameters = {}
    for name, parameter, group in _ordered(optimizer, names):
        plain = {}
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
            else:
                plain[key] = value
        parameters[name] = {"group": group, "shape": list(parameter.shape), "state": plain}
    groups = [{k: _plain(v) for k, v in group.items() if k not in _MEMBERS} for group in optimizer.param_groups]
    return tensors, {"optimizer": type(optimizer).__name__, "groups": groups, "parameters": parameters}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    description: dict,
    names: list[str] | None = None,
    keep_options: tuple[str, ...] = (),
) -> None:
    """Undo `flatten_optimizer` on an optimiser over parameters of the same names, grouped in any way.

    An option of a group (weight decay, say) is restored where the saved groups of its parameters agree on it.

    Args:
        names: as for `flatten_optimizer`.
        keep_options: options that stay as the optimiser has them now, because the configuration decides.
    """
    saved = description["parameters"]
    ordered = _ordered(optimizer, names)
    if description["optimizer"] != type(optimizer).__name__:
        raise UserError(
            f"The checkpoint holds the state of {description['optimizer']}, the run uses {type(optimizer).__name__}. "
            "Set the same optimiser, or start a new run from the weights alone."
        )
    present = {name for name, _, _ in ordered}
    problems = [f"{n} is new" for n in sorted(present - set(saved))]
    problems += [f"{n} is gone" for n in sorted(set(saved) - present)]
    problems += [
        f"{n} was {s['shape']}, is {list(p.shape)}"
        for n, p, _ in ordered
        if (s := saved.get(n)) and s["shape"] != list(p.shape)
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
            if key in (*_MEMBERS, *keep_options) or not former or any(key not in f for f in former):
                continue
            if all(f[key] == former[0][key] for f in former):
                group[key] = _like(former[0][key], group[key])


def _place(key: str, value: Tensor, parameter: nn.Parameter, group: dict) -> Tensor:
    """A copy of `value` where torch's optimisers expect it."""
    # torch keeps step counters on the CPU unless the whole update runs on the device.
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    device = torch.device("cpu") if on_host else parameter.device
    if value.shape == parameter.shape and value.dim() > 0:
        # With the parameter's strides (channels_last), which the foreach and fused kernels need to be fast.
        target = torch.empty_like(parameter, dtype=value.dtype, device=device, requires_grad=False)
        return target.copy_(place(value, target))
    return value.to(device, copy=True)
