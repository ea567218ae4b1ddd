"""core/nn/conv.py: what is written over where no gradient is wanted."""

import pytest
import torch

from core.nn.conv import ResBlock


@pytest.mark.parametrize("channels, shortcut", [((8, 8), "input"), ((8, 16), "input"), ((8, 16), "branch")])
def test_a_residual_block_is_the_same_without_gradients_and_leaves_its_input(channels, shortcut):
    block, x = ResBlock(*channels, shortcut=shortcut, groups=4), torch.randn(2, 8, 6, 6)
    before, wanted = x.clone(), block(x)
    with torch.no_grad():
        result = block(x)
    assert torch.equal(result, wanted) and torch.equal(x, before)


def test_the_sum_keeps_the_precision_of_the_input():
    block, x = ResBlock(8, 8, groups=4), torch.randn(2, 8, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == torch.float32
