"""Masks of dropout: one kernel on a GPU, its arithmetic in Triton's interpreter, its machine code for three GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from core.nn import dropout as module
from core.nn.dropout import dropout
from core.rng import GOLDEN, MIX1, MIX2, Draws, random_bits
from tests.gpu_path.fake import Count, gpu

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

INTERPRETED = """
import torch
from core.nn import dropout as module
from core.rng import Draws

torch.manual_seed(0)
module._on_gpu.register_kernel("cpu")(module._launch)
for shape, dtype in (((3, 7, 5), torch.float32), ((6, 530), torch.bfloat16)):
    x = torch.randn(shape).to(dtype).requires_grad_()
    keys = Draws(1, torch.arange(3)).keys("dropout")
    upstream = torch.randn(shape).to(dtype)
    for salt, p in ((9, 0.3),):
        wanted = module.dropout(x, p, keys, salt)
        found = torch.ops.tessera.dropout(x, keys, salt, module.threshold_of(p))
        gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (found, wanted)]
        torch.testing.assert_close(found, wanted, rtol=0.01, atol=0)
        torch.testing.assert_close(*gradients, rtol=0.01, atol=0)
        assert torch.equal(found == 0, wanted == 0) and 0 < (found == 0).float().mean() < 1
    assert module._kernel_works(torch.device("cpu"), dtype)
"""


@needs_triton
def test_the_kernel_draws_the_masks_of_the_plain_operations():
    """Backward draws them again."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_kernel_compiles(architecture):
    """To machine code of Ampere, Hopper and Blackwell; it needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from core.nn.triton_kernels import dropout_kernel

    types = {"x_rows": "*bf16", "y_rows": "*bf16", "keys": "*i64", "salt": "i64", "scale": "fp32"}
    constants = {"GOLDEN": GOLDEN, "FIRST": MIX1, "SECOND": MIX2, "DRAWS": 256}
    names = dropout_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(dropout_kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    assert triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]


@pytest.mark.parametrize("shape", [(3, 5, 7), (6, 4, 2)])
def test_what_a_compiler_fuses_draws_the_same_masks(shape):
    x, keys = torch.randn(shape), Draws(1, torch.arange(3)).keys("dropout")
    assert torch.equal(module._by_element(x, keys, 4, module.threshold_of(0.3)), dropout(x, 0.3, keys, 4))


def test_a_mask_is_one_kernel_on_a_gpu():
    with gpu():
        x, keys = torch.empty(4, 8, 16, device="cuda"), torch.empty(4, dtype=torch.int64, device="cuda")
        with Count() as count:
            assert dropout(x, 0.1, keys, 1).shape == x.shape
    assert dict(count.kernels) == {"dropout": 1} and not count.waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    keys, upstream = Draws(1, torch.arange(3)).keys("dropout"), torch.randn(3, 50, 70, dtype=dtype)
    results = []
    for device in ("cpu", "cuda"):
        x = torch.linspace(-1, 1, 3 * 50 * 70).view(3, 50, 70).to(device, dtype).requires_grad_()
        y = dropout(x, 0.2, keys.to(device), 5)
        results.append([t.cpu() for t in (y.detach(), *torch.autograd.grad(y, x, upstream.to(device)))])
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted, rtol=0.01, atol=0)
    assert module._kernel_works(torch.device("cuda"), dtype)


def test_compiled_draws_stay_within_their_tensor():
    """Inductor made a product with the loop counter of draws, `x0 * golden`: its overflow is undefined in C++, and the loop
    wrote whole vectors behind the last draws, over other memory."""
    from torch._inductor.utils import run_and_get_code

    keys = torch.tensor([5])
    drawn, (code,) = run_and_get_code(torch.compile(lambda keys: random_bits(keys, 162), dynamic=False), keys)
    assert torch.equal(drawn, random_bits(keys, 162))
    assert "x0" in code and not re.search(r"\d{18,}L?\)?\s*\*\s*x0", code)
