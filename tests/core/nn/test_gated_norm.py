"""The fused norm against the plain operations: its arithmetic in Triton's interpreter, its machine code for three GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from core.nn.gated_norm import gated_norm

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

INTERPRETED = """
import torch
from core.nn import gated_norm as module

torch.manual_seed(0)
for stream, dtype in ((torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2):
    for affine in (False, True):
        for gated in (affine, True):
            shift, factor, gate = torch.randn(2, 1, 6, 40).to(dtype).unbind(2)[1:4]
            x, branch = torch.randn(2, 2, 40).to(stream), torch.randn(2, 2, 40).to(dtype)
            weight, bias = (torch.randn(40), torch.randn(40)) if affine else (None, None)
            arguments = shift, factor, weight, bias, 1e-6, *((gate, branch) if gated else (None, None))
            (fused, after), (plain, wanted) = ((run(y := x.clone(), *arguments), y) for run in (module._launch, module._plain))
            assert fused.dtype == dtype and (gated or torch.equal(after, x))
            ulp = 2.0**-7 if torch.bfloat16 in (stream, dtype) else 1e-6
            torch.testing.assert_close(after, wanted, rtol=ulp, atol=ulp)
            torch.testing.assert_close(fused, plain, rtol=4 * ulp, atol=4 * ulp)
            assert module._works(torch.device("cpu"), stream, dtype, 48, affine, gated)
assert module.triton_works(torch.device("cpu"))
"""


@needs_triton
def test_the_kernel_computes_what_the_plain_operations_do():
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

    from core.nn.triton_kernels import gated_norm_kernel

    types = dict.fromkeys(("x_rows", "y_rows", "shift_rows", "factor_rows", "gate_rows", "branch_rows"), "*bf16")
    types |= {"weight_row": "*fp32", "bias_row": "*fp32", "eps": "fp32"}
    constants = {"GATED": True, "AFFINE": True, "BLOCK": 2048}
    names = gated_norm_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(gated_norm_kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    assert triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]


def test_where_triton_fails_the_plain_operations_go_on(monkeypatch, capsys):
    """It is asked once, and the reason is told."""
    from core.nn import gated_norm as module

    def broken(*_):
        raise RuntimeError("Failed to find C compiler\nPlease ...")

    monkeypatch.setattr(module, "_launch", broken)
    module._works.cache_clear(), module._tell.cache_clear()
    x, rows = torch.randn(2, 3, 8), torch.randn(3, 2, 1, 8)
    arguments = rows[0], rows[1], None, None, 1e-6, rows[2], torch.randn(2, 3, 8)
    found = module._on_gpu._init_fn(y := x.clone(), *arguments)
    module._on_gpu._init_fn(x.clone(), *arguments)
    assert torch.equal(found, module._plain(z := x.clone(), *arguments)) and torch.equal(y, z)
    assert capsys.readouterr().err.count("Failed to find C compiler") == 1
    module._works.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [768, 1088])
def test_the_kernel_on_a_gpu(dtype, width):
    from core.nn import gated_norm as module

    assert module.triton_works(torch.device("cuda", 0))
    norm = nn.LayerNorm(width, eps=1e-6, device="cuda")
    x, branch = torch.randn(2, 6, 5, width, device="cuda").to(dtype).unbind(0)
    shift, factor, gate = torch.randn(6, 1, 6, width, device="cuda").to(dtype).unbind(2)[:3]
    stream = x.clone()
    found = gated_norm(stream, shift, factor, norm, gate, branch)
    wanted = module._plain(x, shift, factor, norm.weight, norm.bias, norm.eps, gate, branch)
    limit = 1e-4 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(stream, x, rtol=limit, atol=limit)
    torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)
