"""FAR where no fixture looks: any number of codebooks, cached against uncached sampling, dropout, adapters, mistakes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from core.errors import UserError
from core.rng import Draws
from core.specs import Codes, Continuous, Generator, Guidance
from core.train.parallel import blocks_of
from core.weights.layouts import check_layout, compare
from generator.adapters import ADAPTERS
from generator.ar.far import FAR
from tests.parity import fixture_folder

ADAPTER = ADAPTERS["far"]
SIZE = {"width": 32, "layers": 2, "heads": 4, "head_layers": 1, "hidden": 48}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def far(wake: bool = True, **settings) -> FAR:
    model = FAR(**{"size": SIZE, "length": 9, "grid": [3, 3], "branches": 2, "vocab": 20, "num_classes": 5, **settings})
    if wake:  # a fresh model gives zeros
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return model


def draws(*positions: int, seed: int = 0) -> Draws:
    return Draws(seed, torch.tensor(positions))


def codes(batch: int, branches: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 20, (batch, length, branches))


# -- network and training ---------------------------------------------------------------------------------------------
def test_is_a_generator():
    assert isinstance(far(), Generator)


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_first_loss_and_gradients(branches):
    model = far(wake=False, branches=branches)
    loss = model(codes(3, branches), torch.tensor([0, 1, 4]), draws(0, 1, 2))
    assert loss.total.item() == pytest.approx(math.log(20), rel=1e-6)
    assert set(loss.logs) == {"loss", "ce", *(f"ce_{k + 1}" for k in range(branches))}
    model = far(branches=branches)
    model(codes(3, branches), torch.tensor([0, 1, 4]), draws(0, 1, 2)).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_no_code_sees_itself_or_what_follows():
    model, x, y = far(branches=3).eval(), codes(1, 3), torch.tensor([1])
    with torch.no_grad():
        before = model.features(x, y)
        for place, branch in ((0, 0), (4, 1), (8, 2)):
            changed = x.clone()
            changed[0, place, branch] = (x[0, place, branch] + 1) % 20
            differs = (model.features(changed, y) - before).abs().amax(-1)[0] > 1e-6  # (T, K)
            order = differs.flatten()  # position by position, code by code
            first = place * 3 + branch
            assert not order[: first + 1].any() and order[first + 1 :].all()


def test_one_codebook_without_head_is_llamagen():
    model = far(branches=1, grid=None, size={**SIZE, "head_layers": 0}).eval()
    assert not any("aggregation" in name or "ar_head" in name for name in model.state_dict())
    assert torch.equal(model.rope_cos[0], torch.ones(8))  # the class token has a place of its own on a line
    states = model.trunk(codes(2, 1)[:, :-1], torch.tensor([0, 1]))
    assert torch.equal(model.head(states, [])[:, :, 0], model.norm(states))


def test_dropout_follows_the_sample():
    """Two halves of a batch, each with its own positions, lose the same units as the whole batch."""
    model = far(path_dropout=0.0).train()
    x, y = codes(4), torch.tensor([0, 1, 2, 3])
    whole = model.features(x, y, draws(5, 6, 7, 8).keys("dropout"))
    parts = [model.features(x[i : i + 2], y[i : i + 2], draws(5 + i, 6 + i).keys("dropout")) for i in (0, 2)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    assert not torch.allclose(whole, model.features(x, y), atol=1e-2)
    first, again, other = (model(x, y, draws(*p)).total for p in ((5, 6, 7, 8), (5, 6, 7, 8), (9, 10, 11, 12)))
    assert first == again != other
    model.eval()
    assert model(x, y, draws(5, 6, 7, 8)).total != first


def test_path_dropout_replaces_the_others():
    model = far(path_dropout=0.4)
    assert [b.path_dropout for b in model.layers] == [0.0, pytest.approx(0.4)] and model.layers[0].residual_dropout == 0
    assert not torch.equal(
        *(model.train()(codes(2).zero_(), torch.tensor([0, 1]), draws(p, p + 1)).total for p in (0, 50))
    )


# -- sampling ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        {"branches": 1},
        {"branches": 2},
        {"branches": 3},
        {"branches": 4, "grid": None},
        {"branches": 2, "size": {**SIZE, "kv_heads": 2}},
        {"branches": 1, "grid": None, "size": {**SIZE, "head_layers": 0}},
    ],
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_is_uncached(settings, scale):
    """Token for token, with slices and with the fixed shapes of a captured step."""
    model, labels = far(**settings).eval(), torch.tensor([1, 3])
    options = {"guidance": Guidance(scale), "temperature": 0.9, "top_k": 8, "top_p": 0.9}
    wanted = model.sample(labels, draws(3, 4), cached=False, **options)
    for static in (False, True):
        assert torch.equal(model.sample(labels, draws(3, 4), static=static, **options), wanted)
    assert wanted.unique().numel() > 4


def test_samples_do_not_depend_on_the_batch():
    model = far().eval()
    guidance = Guidance(2.0)
    both = model.sample(torch.tensor([1, 3]), draws(3, 4), guidance)
    assert torch.equal(model.sample(torch.tensor([3]), draws(4), guidance)[0], both[1])
    assert not torch.equal(model.sample(torch.tensor([3]), draws(5), guidance)[0], both[1])


def test_training_compiles_in_one_piece_and_sampling_does_not():
    """Blocks compiled for training: same losses, no graph break, and no compilation while sampling."""
    model = far().train()
    x, y = codes(2), torch.tensor([0, 1])
    plain, sampled = model(x, y, draws(0, 1)).total, model.sample(y, draws(0, 1), Guidance(2.0))
    for block in blocks_of(model):
        block.compile(backend="eager", fullgraph=True)
    assert torch.allclose(model(x, y, draws(0, 1)).total, plain)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(model.sample(y, draws(0, 1), Guidance(2.0)), sampled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0


def test_settings_per_codebook():
    model, labels = far().eval(), torch.tensor([1, 3])
    greedy = model.sample(labels, draws(0, 1), temperature=0)
    mixed = model.sample(
        labels, draws(0, 1), Guidance((1.0, 4.0)), temperature=[1.0, 0.5], top_k=[5, 0], top_p=[1.0, 0.8]
    )
    assert not torch.equal(greedy, mixed)
    assert torch.equal(greedy, model.sample(labels, draws(8, 9), top_k=1))
    with pytest.raises(UserError, match="sample.scale has 3 numbers but the tokenizer has 2"):
        model.sample(labels, draws(0, 1), Guidance((1.0, 2.0, 3.0)))
    with pytest.raises(UserError, match='"cfg" only'):
        model.sample(labels, draws(0, 1), Guidance(2.0, "auto"))


def test_guidance_of_one_is_none_and_a_schedule_of_ones_too():
    model, labels = far().eval(), torch.tensor([1, 3])
    plain = model.sample(labels, draws(0, 1))
    assert torch.equal(model.sample(labels, draws(0, 1), Guidance(4.0, interval=(2.0, 3.0))), plain)


def test_half_precision():
    model, labels, trace = far().eval(), torch.tensor([1, 3]), []
    with torch.autocast("cpu", torch.bfloat16):
        model.sample(labels, draws(0, 1), Guidance(2.0), trace=trace)
        assert model(codes(2), labels, draws(0, 1)).total.dtype == torch.float32
    assert trace[0][0].dtype == torch.float32
    assert model.bfloat16().sample(labels, draws(0, 1), Guidance(2.0)).shape == (2, 9, 2)


def test_nothing_of_a_call_stays_behind():
    model = far().eval()
    names = set(model.state_dict())
    model.sample(torch.tensor([1]), draws(0), Guidance(2.0))
    assert set(model.state_dict()) == names and not any("cache" in name for name in names)


# -- pairing and mistakes ---------------------------------------------------------------------------------------------
def test_fits():
    model = far()
    assert model.fits(Codes(9, 2, 20, 8, (3, 3))) == [] and model.fits(Codes(9, 2, 20, 8)) == []
    assert "branches is 2, the tokenizer has 3" in model.fits(Codes(9, 3, 20, 8))[0]
    assert len(model.fits(Codes(16, 1, 30, 8, (4, 4)))) == 4
    assert "continuous" in model.fits(Continuous((3, 3), 8))[0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": "xxl"}, "xxl"),
        ({"size": {"width": 32, "layers": 2}}, "lacks heads"),
        ({"size": {**SIZE, "heats": 4}}, "heats"),
        ({"size": {**SIZE, "head_layers": 0}}, "head_layers"),
        ({"grid": [4, 4]}, "16|length=9"),
        ({"size": {**SIZE, "heads": 5}}, "5 heads"),
        ({"size": {**SIZE, "kv_heads": 3}}, "3 key/value heads"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(UserError, match=message):
        far(**settings)


# -- weights ----------------------------------------------------------------------------------------------------------
def test_official_names_and_back():
    model = far(branches=3)
    official = ADAPTER.restore(model)
    assert "layers.1.feed_forward.w2.weight" in official and "ar_head.0.attention.wqkv.weight" in official
    other = far(branches=3, wake=False)
    ADAPTER.load(other, {"model": {f"module.{name}": value for name, value in official.items()}, "steps": 3})
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, official[name]) for name, value in ADAPTER.restore(other).items())


@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
def test_containers(container):
    state = ADAPTER.restore(far())
    loaded = {container: state, "steps": 3} if container else state
    assert ADAPTER.open(loaded).keys() == state.keys()
    assert torch.equal(ADAPTER.open({**loaded, "ema": {"x": torch.ones(1)}})["x"], torch.ones(1))


def test_tables_and_caches_in_a_file_are_ignored_by_name():
    state = {
        **ADAPTER.restore(far()),
        "freqs_cis": torch.zeros(3),
        "causal_mask": torch.zeros(2),
        "layers.0.attention.kv_cache.k_cache": torch.zeros(4),
    }
    ADAPTER.load(far(), state)
    with pytest.raises(UserError, match="unexpected 1: surplus"):
        ADAPTER.load(far(), {**state, "surplus": torch.zeros(1)})


def test_a_file_of_another_number_of_codebooks_is_refused():
    with pytest.raises(UserError, match="tok_embeddings_3"):
        ADAPTER.load(far(branches=2), ADAPTER.restore(far(branches=3)))


@pytest.mark.parametrize("name", ["far_b_dual", "far_b_triple", "far_l_dual", "far_l_triple"])
def test_recorded_layouts(name):
    path = fixture_folder().parent / "checkpoints" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    layout = json.loads(path.read_text())
    assert check_layout(ADAPTER, layout) == []
    with torch.device("meta"):
        model = FAR(size=name[4], branches={"dual": 2, "triple": 3}[name[6:]])
    official = ADAPTER.restore(model)
    assert {n: list(t.shape) for n, t in official.items()} == {n: shape for n, (shape, _) in layout["tensors"].items()}
    assert sum(p.numel() for p in model.parameters()) == layout["parameters"]


def test_shared_heads_are_told_only_where_heads_are_known():
    """A file without its heads: as many for keys and values as for queries, however many those are."""
    found = compare(ADAPTER, ADAPTER.restore(far()))
    assert found.asked == ["size.heads"] and "kv_heads" not in found.settings["size"]
    assert compare(ADAPTER, ADAPTER.restore(far()), size={"heads": 2}).model.size["kv_heads"] == 2
    shared = ADAPTER.restore(far(size={**SIZE, "kv_heads": 2}))
    assert compare(ADAPTER, shared, size={"heads": 4}).settings["size"]["kv_heads"] == 2
