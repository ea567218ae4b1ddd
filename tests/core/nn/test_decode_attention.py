"""The fused attention of a decode step against the plain operations: in Triton's interpreter, and as machine code."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from core.nn import decode_attention as module
from core.nn import gated_norm
from core.nn.kvcache import KVCache
from generator import engine

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

INTERPRETED = """
import torch
from core.nn import decode_attention as module

torch.manual_seed(0)
for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
    for queries, pairs, width in ((2, 2, 48), (4, 2, 24)):
        options = (None, None), (torch.randn(2, queries + pairs, width), None), (None, torch.randn(2, width))
        for place, (affine, row) in zip((1, 130, 64, 0, 70, 130), options * 2):
            heads = torch.randn(2, queries + 2 * pairs, width).to(dtype)
            memory = torch.randn(2, 2 * pairs, 140, width).to(dtype)[:, :, :131]
            memory[:, :, place:] = float("nan")  # nothing is read there
            filled, arguments = memory.nan_to_num(), (torch.tensor([place]), width**-0.5, affine, 1e-5, row)
            fused, plain = module._launch(heads, memory, *arguments), module._plain(heads, filled, *arguments)
            torch.testing.assert_close(fused, plain, rtol=limit, atol=limit)
            done = memory[:, :, : place + 1], filled[:, :, : place + 1]
            torch.testing.assert_close(*done, rtol=limit, atol=limit)
            assert memory[:, :, place + 1 :].isnan().all()
kinds = (torch.float16, 5, 1, 64, False, True), (torch.bfloat16, 6, 2, 24, True, False), (torch.float32, 3, 1, 48, False, False)
assert all(module.works(torch.device("cpu"), *kind) for kind in kinds)
"""


@needs_triton
def test_the_kernel_computes_what_the_plain_operations_do():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stderr:  # Triton 3.4, which comes with torch 2.8
        pytest.skip("the interpreter of this Triton does not know this numpy")
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize("architecture, kind", [(80, "bf16"), (90, "bf16"), (90, "fp32"), (100, "bf16")])
@pytest.mark.parametrize("normed", [True, False])
def test_the_kernel_compiles(architecture, kind, normed):
    """To machine code of Ampere, Hopper and Blackwell; it needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from core.nn.triton_kernels import decode_attention_kernel

    types = dict.fromkeys(("heads", "memory", "out"), f"*{kind}")
    types |= {"position": "*i64", "affine": "*fp32", "row": "*fp32", "scale": "fp32", "eps": "fp32"}
    constants = {"NORMED": normed, "TURNED": not normed, "CHANNELS": 64, "PLACES": 64}
    names = decode_attention_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(decode_attention_kernel, signature, constexprs)
    assert triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]


@pytest.mark.parametrize("queries, affine, turned", [(4, True, False), (4, False, True), (2, False, True)])
def test_it_is_what_a_step_computes_elsewhere(queries, affine, turned):
    """The plain operations of this file, which are what the kernel is held against, and those of the engine on a CPU."""
    torch.manual_seed(0)
    cache = KVCache(1, 3, 2, 9, 16, static=True)
    cache.memory.normal_()
    norms = torch.randn(2, queries + 2, 16) if affine else None
    row = engine.turning(torch.randn(9, 16), torch.randn(9, 16))[4] if turned else None
    heads, filled = torch.randn(3, queries + 4, 16), cache.memory[0].clone()
    wanted = module._plain(heads, filled, torch.tensor([4]), 0.3, norms, 1e-6, row)
    cache.seek(4)
    found = engine.attend(heads.clone(), cache.open()[0], 0.3, norms, 1e-6, row)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(cache.memory[0], filled)


def test_where_triton_fails_the_plain_operations_go_on(monkeypatch, capsys):
    """It is asked once, and the reason is told."""

    def broken(*_):
        raise RuntimeError("Failed to find C compiler\nPlease ...")

    monkeypatch.setattr(module, "_launch", broken)
    module.works.cache_clear(), gated_norm._tell.cache_clear()
    heads, memory = torch.randn(2, 6, 8), torch.randn(2, 4, 5, 8)
    arguments = torch.tensor([3]), 0.2, None, 0.0, None
    found = [module._on_gpu._init_fn(heads, memory.clone(), *arguments) for _ in range(2)]
    assert torch.equal(found[1], module._plain(heads, memory.clone(), *arguments))
    assert capsys.readouterr().err.count("Failed to find C compiler") == 1
    module.works.cache_clear()


def _hiding(place_hidden):
    """A kernel that counts the value of one earlier place as zero."""

    def run(heads, memory, position, *others):
        place, seen = int(position), memory.clone()
        if place:
            seen[:, memory.shape[1] // 2 :, place_hidden(place)] = 0
        module._plain(heads, memory, position, *others)
        return module._plain(heads, seen, position, *others)

    return run


WRONG = {
    "the last is left out": _hiding(lambda place: place - 1),
    "the first is left out": _hiding(lambda place: 0),
    "nothing is stored": lambda heads, memory, *others: module._plain(heads, memory.clone(), *others),
    "heads are mixed up": lambda heads, memory, *others: module._plain(heads.roll(1, 1), memory, *others),
    "no norm, no turn": lambda heads, memory, position, scale, *_: module._plain(
        heads, memory, position, scale, None, 0.0, None
    ),
    "another scale": lambda heads, memory, position, scale, *others: module._plain(
        heads, memory, position, 2 * scale, *others
    ),
    "later places are read": None,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fault", [None, *WRONG])
def test_a_wrong_kernel_is_not_used(monkeypatch, capsys, dtype, fault):
    """Its answer is compared before it is used, in the precision and for the heads that it is used for."""

    def kernel(heads, memory, position, *others):
        filled = memory if fault == "later places are read" else memory.nan_to_num(0.0)
        found = (WRONG.get(fault) or module._plain)(heads, filled, position, *others)
        memory[:, :, int(position)] = filled[:, :, int(position)]
        return found

    monkeypatch.setattr(module, "_launch", kernel)
    module.works.cache_clear(), gated_norm._tell.cache_clear()
    for count, kv_heads, width, normed in ((6, 2, 24, False), (48, 16, 48, True)):
        assert module.works(torch.device("cpu"), dtype, count, kv_heads, width, normed, not normed) is (fault is None)
    assert ("it differs by" in capsys.readouterr().err) is (fault is not None)
    module.works.cache_clear(), gated_norm._tell.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries, width, normed", [(16, 48, True), (16, 64, False), (32, 64, False)])
def test_the_kernel_on_a_gpu(dtype, queries, width, normed):
    device = torch.device("cuda", 0)
    assert module.works(device, dtype, queries + 32, 16, width, normed, not normed)
    affine = torch.randn(2, queries + 16, width, device=device) if normed else None
    row = None if normed else torch.randn(2, width, device=device)
    limit = 1e-4 if dtype == torch.float32 else 6e-2
    for place in (0, 1, 200):
        heads = torch.randn(6, queries + 32, width, device=device).to(dtype)
        memory = torch.randn(6, 32, 256, width, device=device).to(dtype)
        filled, position = memory.clone(), torch.full((1,), place, device=device)
        found = module.decode_attention(heads, memory, position, None, affine, 1e-5, row)
        wanted = module._plain(heads, filled, position, width**-0.5, affine, 1e-5, row)
        torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)
        torch.testing.assert_close(memory, filled, rtol=limit, atol=limit)
