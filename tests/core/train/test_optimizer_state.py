"""Optimisers through checkpoints: bit-equal continuation, names instead of numbers, mismatches explained."""

import json

import pytest
import torch
from torch import nn

from core.errors import UserError
from core.train.checkpoint import CheckpointStore
from core.train.optimizer_state import flatten_optimizer, restore_optimizer
from tests.core.train.test_checkpoint import same


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)).to(memory_format=torch.channels_last)


def train(net, optimizer, steps):
    for step in steps:
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def adamw(net, fused, regrouped=False):
    """Two groups, or the same settings as one group for each parameter in reverse order."""
    parameters = dict(net.named_parameters())
    groups = [[n for n, p in parameters.items() if p.ndim > 1], [n for n, p in parameters.items() if p.ndim < 2]]
    if regrouped:
        groups = [[n] for n in reversed(parameters)]
    return torch.optim.AdamW(
        [
            {
                "params": [parameters[n] for n in names],
                "names": names,
                "weight_decay": 0.1 if parameters[names[0]].ndim > 1 else 0.0,
            }
            for names in groups
        ],
        lr=0.01,
        betas=(0.8, 0.95),
        fused=fused,
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("regrouped", [True, False])
def test_adamw_continues_bit_equal(tmp_path, fused, regrouped):
    net = network()
    optimizer = adamw(net, fused)
    train(net, optimizer, range(3))
    tensors, description = flatten_optimizer(optimizer)
    store = CheckpointStore(tmp_path)
    store.save(3, {"net": net.state_dict(), "net.optim": tensors}, {"optim": description})
    train(net, optimizer, range(3, 6))
    store.wait()

    found = store.latest()
    again = network()
    again.load_state_dict(found.tensors("net"))
    resumed = adamw(again, fused, regrouped)
    for group in resumed.param_groups:
        group["lr"], group["betas"] = 7.0, (0.1, 0.1)  # all of it comes from the checkpoint
    restore_optimizer(resumed, found.tensors("net.optim"), found.state["optim"])
    assert same(flatten_optimizer(resumed)[0], found.tensors("net.optim"))
    assert isinstance(resumed.param_groups[0]["betas"], tuple)
    train(again, resumed, range(3, 6))
    assert same(again.state_dict(), net.state_dict())


def test_other_optimisers_and_dtypes():
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    never = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [weight, never], "names": ["w", "never"]}], lr=0.1, momentum=0.9)
    optimizer.state[weight] = {"momentum_buffer": torch.full((3,), 1 / 3), "count": 4}  # fp32 beside a bf16 weight
    tensors, description = flatten_optimizer(optimizer)
    other = torch.optim.SGD([{"params": [never, weight], "names": ["never", "w"]}], lr=0.5, momentum=0.1)
    restore_optimizer(other, tensors, json.loads(json.dumps(description)))
    state = other.state[weight]
    assert state["count"] == 4 and torch.equal(state["momentum_buffer"], torch.full((3,), 1 / 3))
    assert never not in other.state
    group = other.param_groups[0]
    assert group["lr"] == 0.1 and group["momentum"] == 0.9


def test_optimiser_mismatches_are_named():
    net = network()
    names, parameters = zip(*net.named_parameters())
    tensors, description = flatten_optimizer(adamw(net, False))
    with pytest.raises(UserError, match="state of AdamW, the run uses SGD"):
        restore_optimizer(torch.optim.SGD([{"params": parameters, "names": names}]), tensors, description)
    larger = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 5), nn.Linear(5, 5))
    with pytest.raises(UserError, match=r"3.weight is new.*0.weight was \[4, 3, 3, 3\], is \[8, 3, 3, 3\]"):
        restore_optimizer(adamw(larger, False), tensors, description)
