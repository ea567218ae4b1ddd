"""Whether this torch can pretend to have a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture(scope="session", autouse=True)
def fake_gpu():
    """torch 2.8 wants a driver even for tensors of a GPU that hold nothing."""
    try:
        with FakeTensorMode():
            torch.empty(1).to("cuda")
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} makes no fake tensors of a GPU here: {str(error).splitlines()[0]}")
