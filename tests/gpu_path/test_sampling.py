"""Ceilings of what sampling asks of a GPU, and recordings that really are played again, on CPU tensors."""

from __future__ import annotations

import copy
import gc
import weakref
from unittest import mock

import pytest
import torch

from core.nn import decode_attention
from core.nn.kvcache import KVCache
from core.rng import Draws
from core.specs import Guidance
from core.train.ema import Ema
from generator import engine
from generator.ar import decode, far, rar
from generator.ar.far import FAR
from generator.ar.gpt import GPT
from generator.ar.rar import RAR
from tests.generator import test_var
from tests.generator.test_var import Tape
from tests.gpu_path.sampling import GUIDED, SYSTEMS, decoding_waits, measure, measure_flow


@pytest.mark.parametrize(
    "name, batch, bytes_",
    [
        ("RAR-B", 256, 1.25),
        ("RAR-B", 1, 1.05),
        ("FAR-B", 64, 1.2),
        ("FAR-B", 1, 1.05),
        ("D-AR-L", 64, 1.2),
        ("D-AR-L", 1, 1.05),
        ("VAR-d17", 4, None),
    ],
)
def test_ceilings(name, batch, bytes_):
    """At the published sizes, with guidance, under bf16 autocast. In large batches activations move as well."""
    report, system = measure(name, batch), SYSTEMS[name]
    assert report.kernels <= system.step
    assert 0 < report.recordings[0] <= system.recordings and report.recordings[1] == 0
    assert report.casts == 0 and not report.waits
    if bytes_:
        assert report.ideal < report.bytes <= bytes_ * report.ideal


@pytest.mark.parametrize("kind", GUIDED)
def test_a_sampler_of_flows_neither_waits_nor_records_twice(kind):
    """It has one recording, and one more where some steps are not guided. Weights are cast before the first step."""
    report = measure_flow(kind, size="s")
    assert report.recordings == (2 if kind == "interval" else 1, 0)
    assert report.casts == 0 and not report.waits and report.launched < 100


@pytest.mark.parametrize("name", ["rectok", "fqgan", "vqgan_plus", "dar", "imagefolder"])
def test_decoding_does_not_wait(name):
    assert not decoding_waits(name)


SIZE = {"width": 32, "layers": 2, "heads": 4, "hidden": 48}
COMMON = {"length": 12, "vocab": 20, "num_classes": 5}
MODELS = {
    "far": lambda: FAR(size={**SIZE, "kv_heads": 2, "head_layers": 1}, grid=[3, 4], branches=2, **COMMON),
    "gpt": lambda: GPT(size=SIZE, **COMMON),
    "rar": lambda: RAR(size=SIZE, permute=[0.0, 1.0], **COMMON),
    "var": lambda: test_var.var(),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    for p in made.parameters():  # nothing is zero, and every class and position has a say
        torch.nn.init.normal_(p, std=0.2)
    return made


def sample(model, seed: int = 0, **options) -> torch.Tensor:
    labels = torch.tensor([1, 3, 2 * seed % 5])
    return model.sample(labels, Draws(seed, torch.arange(3)), Guidance(2.0 + seed), top_k=8, **options)


@pytest.mark.parametrize("name", ["far", "gpt", "rar"])
def test_recorded_steps_serve_every_batch_of_their_size(monkeypatch, name):
    """Other labels, noise and scales of guidance, and weights that were changed in place: nothing is recorded again."""
    tapes: list[Tape] = []

    def capture(function, warm_up, pool):
        tapes.append(Tape(function))
        return tapes[-1], None

    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    plain = copy.deepcopy(model)
    monkeypatch.setattr(decode, "capture", capture)
    monkeypatch.setattr(decode.Recordings, "records", lambda self: self.cache.static)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    for seed in range(3):
        assert torch.equal(sample(model, seed, static=True), sample(plain, seed))
    assert len(tapes) == 4
    with torch.no_grad():
        for p, q in zip(model.parameters(), plain.parameters()):
            p.mul_(-1), q.mul_(-1)
    assert torch.equal(sample(model, 5, static=True), sample(plain, 5))
    assert len(tapes) == 4
    model.train().eval()
    assert torch.equal(sample(model, 6, static=True), sample(plain, 6)) and len(tapes) == 8


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("name", ["far", "gpt", "rar"])
def test_attention_that_is_told_the_position_draws_the_same_codes(monkeypatch, name, static):
    """The way of a GPU, with the plain operations that the kernel is held against in its place."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    wanted, calls = sample(copy.deepcopy(model), static=static), []

    def told(heads, memory, position, scale, *others):
        calls.append(memory.shape)
        return decode_attention._plain(heads, memory, position, scale or heads.shape[-1] ** -0.5, *others)

    monkeypatch.setattr(engine, "decode_attention", told)
    for place in (engine, far, rar):
        monkeypatch.setattr(place, "fuses", lambda device: True)
    assert torch.equal(sample(model, static=static), wanted)
    assert calls and model._state.value.cache.hidden is None


def test_a_preview_sees_the_weights_of_its_moment(model):
    """Matrices are cast once, but not for good: an optimiser, an average and new weights are all noticed."""

    def fresh() -> torch.Tensor:
        return copy.deepcopy(model).sample(*arguments)

    arguments = torch.tensor([1, 3]), Draws(0, torch.arange(2)), Guidance(2.0)
    average, seen = Ema(model, [0.5]), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        for _step in range(3):
            wanted = fresh()
            assert torch.equal(model.sample(*arguments), wanted)
            seen.append(wanted)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimiser.step()  # in place, and without leaving eval mode
            average.update()
        with average.applied():
            wanted = fresh()
            assert torch.equal(model.sample(*arguments), wanted)
        assert not torch.equal(seen[0], seen[1])


def test_training_gives_the_memory_back(model):
    sample(model)
    assert model._weights.value is not None
    model.train()
    assert model._weights.value is None and model._state.value is None


def test_what_is_replaced_is_freed_at_once(model):
    """Not when Python next looks for objects that only refer to each other: on a GPU these are gigabytes."""
    held: list[weakref.ref] = []

    def remember(cache: KVCache, *arguments, **options) -> None:
        make(cache, *arguments, **options)
        held.append(weakref.ref(cache.memory))

    make = KVCache.__init__
    gc.collect(), gc.disable()
    try:
        with mock.patch.object(KVCache, "__init__", remember):
            sample(model)
            state = weakref.ref(model._state.value) if model._state.value is not None else None
            first = len(held)
            model.sample(torch.tensor([0]), Draws(0, torch.arange(1)))
        assert first and not any(memory() is not None for memory in held[:first]) and (state is None or state() is None)
        weights = weakref.ref(model._weights.value)
        model.train()
        assert weights() is None and not any(memory() is not None for memory in held)
    finally:
        gc.enable()


def test_a_second_call_casts_nothing(model):
    """Not even with another number of samples."""
    with torch.autocast("cpu", torch.bfloat16):
        sample(model)
        weights = model._weights.value
        before = [made.data_ptr() for _, made in weights._casts.values()]
        model.sample(torch.tensor([0]), Draws(0, torch.arange(1)))
        assert model._weights.value is weights and before
        assert [made.data_ptr() for _, made in weights._casts.values()] == before
