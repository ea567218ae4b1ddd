"""core/nn/linear.py: oneDNN's products beside PyTorch's own. Processors that do not prefer it are told that they do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.nn import linear as module
from core.nn.linear import Linear, adopt, by_onednn, linear, plain_products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture
def preferred(monkeypatch):
    """oneDNN makes every product of three dimensions; the list of those that it made."""
    made = []
    product = module._product
    monkeypatch.setattr(module, "_prefers_onednn", lambda: True)
    monkeypatch.setattr(module, "TOKENS", 1), monkeypatch.setattr(module, "WEIGHTS", 1)
    monkeypatch.setattr(module, "_product", lambda x, *others: (made.append(x.shape), product(x, *others))[1])
    return made


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
def test_it_gives_what_torch_gives_with_first_and_second_gradients(preferred, bias):
    def results(product):
        x, weight, offset = numbers(2, 5, 24), numbers(16, 24), numbers(16) if bias else None
        inputs = [tensor for tensor in (x, weight, offset) if tensor is not None]
        y = product(x, weight, offset)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [y, *first, *second]

    ours = results(linear)
    assert len(preferred) >= 3  # forward, and the gradient of the input twice
    torch.testing.assert_close(ours, results(F.linear), rtol=1e-4, atol=1e-4)


def test_inputs_and_weights_may_lie_otherwise(preferred):
    x, weight = numbers(2, 24, 5).detach().transpose(1, 2), numbers(24, 16).detach().t()
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
        assert linear(x[:0], weight).shape == (0, 5, 16)
    assert preferred


def test_a_compiled_layer_gives_the_same(preferred):
    layer, x = Linear(24, 16), numbers(2, 5, 24)
    wanted = layer(x)
    wanted.sum().backward()
    gradient, x.grad = x.grad, None
    result = torch.compile(layer, fullgraph=True)(x)
    result.sum().backward()
    torch.testing.assert_close((result, x.grad), (wanted, gradient), rtol=1e-5, atol=1e-5)


def test_the_question_for_the_processor_breaks_no_graph(monkeypatch):
    monkeypatch.setattr(module, "TOKENS", 1), monkeypatch.setattr(module, "WEIGHTS", 1)
    layer, x = Linear(24, 16), numbers(2, 5, 24)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_the_choice_does_not_depend_on_the_batch(monkeypatch):
    monkeypatch.setattr(module, "prefers_onednn", lambda: True)
    weight = torch.empty(512, 512)

    def chosen(*shape: int) -> set[bool]:
        return {by_onednn(torch.empty(batch, *shape), weight) for batch in (1, 2, 7, 256)}

    assert chosen(64, 512) == {True}
    assert chosen(63, 512) == chosen(512) == {False}
    assert not by_onednn(torch.empty(1, 64, 512), weight[:256])


def test_a_row_is_the_same_in_any_batch():
    """What lets the number of ranks change without a changed bit."""
    weight, offset, x = numbers(768, 384).detach(), numbers(768).detach(), numbers(5, 64, 384).detach()
    whole = module._product(x, weight, offset)
    for batch in (1, 2, 3):
        assert torch.equal(module._product(x[:batch].contiguous(), weight, offset), whole[:batch])


def test_other_numbers_are_left_to_torch(preferred):
    x, weight = numbers(2, 5, 24).detach(), numbers(16, 24).detach()
    assert by_onednn(x, weight)
    assert not by_onednn(x.double(), weight.double()) and not by_onednn(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_onednn(x, weight)
    with plain_products():
        assert not by_onednn(x, weight)
    assert by_onednn(x, weight)


def test_networks_of_others_are_adopted():
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2), nn.ReLU()))
    state = network.state_dict()
    adopt(network)
    assert [type(m) for m in network.modules() if isinstance(m, nn.Linear)] == [Linear, Linear]
    assert network.state_dict().keys() == state.keys()
