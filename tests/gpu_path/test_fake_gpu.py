"""Code for a GPU, where there is none: fake CUDA tensors tell whether a step would wait for the device or leave it.

What is captured as a CUDA graph may do neither; a training step should not.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from core.devices import rehearsal
from core.nn import cuda_graph
from core.rng import Draws
from core.specs import Guidance, Progress
from generator.ar import decode
from generator.ar.far import FAR
from generator.ar.rar import RAR
from tests.generator import test_var

WAITING = ("_local_scalar_dense", "nonzero", "unique", "is_nonzero", "equal.default")


class Watch(TorchDispatchMode):
    """Notes operations that wait for the device, or whose result or copy lies on the CPU."""

    def __init__(self):
        super().__init__()
        self.seen, self.wrong = 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.seen += 1
        name = str(operation)
        if any(word in name for word in WAITING) or (isinstance(result, torch.Tensor) and result.device.type == "cpu"):
            self.wrong.append(name)
        return result


SIZE = {"width": 64, "layers": 2, "heads": 4, "hidden": 48}
COMMON = {"length": 81, "vocab": 200, "num_classes": 5}
MODELS = {
    "far": lambda: FAR(size={**SIZE, "kv_heads": 2, "head_layers": 1}, grid=[9, 9], branches=2, **COMMON),
    "rar": lambda: RAR(size=SIZE, permute=[0.0, 1.0], **COMMON),
}


@pytest.fixture(params=MODELS)
def model(request):
    """A generator on a GPU that does not exist; everything made while it is used is fake as well."""
    made = MODELS[request.param]()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield made.to("cuda")
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def branches(model: torch.nn.Module) -> int:
    return getattr(model, "branches", 1)


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 50, "top_p": 0.9, "temperature": 0.9}, {"top_p": 0.5}, {"temperature": 0}]
)
def test_a_captured_step_stays_on_the_device(monkeypatch, model, filters):
    model.eval()
    captured: list[Watch] = []

    class Graph:
        def replay(self):
            pass

    def capture(step, warm_up, pool):
        with Watch() as watch:
            step()
        captured.append(watch)
        return Graph(), None

    monkeypatch.setattr(decode, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    labels = torch.zeros(3, dtype=torch.int64, device="cuda")
    codes = model.sample(labels, Draws(0, labels), Guidance(2.0), **filters)
    assert codes.shape == (3, 81, branches(model)) and codes.device.type == "cuda"
    assert len(captured) == 4 and all(watch.seen > 50 and not watch.wrong for watch in captured), captured[0].wrong


def test_a_recorded_scale_stays_on_the_device(monkeypatch):
    """VAR: the classes of a batch, then every scale."""
    captured: list[Watch] = []

    class Graph:
        def replay(self):
            pass

    def capture(function, *_):
        with Watch() as watch:
            result = function()
        captured.append(watch)
        return Graph(), result

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model, tokenizer = test_var.var(), test_var.tokenizer()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to("cuda").bind(tokenizer.to("cuda"))
        labels = torch.zeros(3, dtype=torch.int64, device="cuda")
        for _ in range(2):
            codes = model.sample(labels, Draws(0, labels), Guidance(2.0), top_k=5, top_p=0.9, cuda_graph=True)
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert codes.shape == (3, 14, 2) and codes.device.type == "cuda"
    assert len(captured) == 4 and not any(watch.wrong for watch in captured), [watch.wrong for watch in captured]
    assert all(watch.seen > 40 for watch in captured[1:])


def test_a_training_step_does_not_wait(model):
    model.train()
    codes = torch.zeros(3, 81, branches(model), dtype=torch.int64, device="cuda")
    labels = torch.zeros(3, dtype=torch.int64, device="cuda")
    with rehearsal(), Watch() as watch:  # FlexAttention takes no tensor without data
        loss = model(codes, labels, Draws(0, labels), Progress(1, 10, 2, 1))
    assert loss.total.device.type == "cuda" and watch.seen > 100 and not watch.wrong, watch.wrong
