"""What is decided by the device: pictures at a time, and TF32."""

from __future__ import annotations

import pytest
import torch

from core.devices import pictures_at_once, set_tf32, without_tf32
from core.schema import EvalConfig
from evaluation.networks import full_precision
from run.evaluate import is_compiled

GPU = torch.device("cuda", 0)


def flags() -> tuple:
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.fixture
def free(monkeypatch):
    """Gives a GPU so many free GiB, one of them kept by torch's allocator."""

    def make(gib: float) -> None:
        total = 80 * 2**30
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int((gib - 1) * 2**30), total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**30)

    return make


@pytest.mark.parametrize(
    "gib, side, expected", [(80, 256, 128), (80, 512, 32), (24, 256, 32), (1.5, 256, 8), (600, 256, 512)]
)
def test_the_batch_follows_the_free_memory(free, gib, side, expected):
    free(gib)
    assert pictures_at_once(0, GPU, side) == expected
    assert pictures_at_once(50, GPU, side) == 50


def test_a_cpu_keeps_its_batch():
    assert pictures_at_once(0, torch.device("cpu")) == 64 and pictures_at_once(3, torch.device("cpu")) == 3


def test_compiling_pays_for_many_pictures_on_a_gpu():
    asked = {kind: EvalConfig(compile=kind) for kind in ("auto", "always", "never")}
    assert is_compiled(asked["auto"], 50_000, GPU) and not is_compiled(asked["auto"], 500, GPU)
    assert not is_compiled(asked["auto"], 50_000, torch.device("cpu"))
    assert is_compiled(asked["always"], 2, torch.device("cpu")) and not is_compiled(asked["never"], 50_000, GPU)


@pytest.mark.skipif(getattr(torch.backends.cudnn, "conv", None) is None, reason="torch before 2.9 has other switches")
def test_tf32_is_set_and_left_out():
    before = flags()
    try:
        for allowed, expected in ((True, ("tf32", "tf32")), (False, ("ieee", "ieee")), (None, ("tf32", "ieee"))):
            set_tf32(allowed)
            assert flags() == expected
            for strict in (without_tf32, full_precision):
                with strict():
                    assert flags() == ("ieee", "ieee")
                assert flags() == expected
    finally:
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before
