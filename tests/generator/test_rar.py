"""RAR and reAR where no fixture looks: sampling with cache and tables, noise, orders, alignment, decay groups, layouts."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from core.errors import UserError
from core.rng import Draws
from core.specs import Codes, Generator, Guidance, Progress
from core.weights.layouts import check_layout
from generator.adapters import ADAPTERS
from generator.ar import rar as module
from generator.ar.far import FAR
from generator.ar.llama import run_blocks
from generator.ar.rar import RAR
from generator.ar.rear import CodeAlignment, Settings, annealed, perturb, settings
from tests.parity import fixture_folder
from tests.toy_codes import ToyCodes

ADAPTER = ADAPTERS["rar"]
SIZE = {"width": 32, "layers": 2, "heads": 4, "hidden": 48}
REAR = {"projection": 24}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rar(wake: bool = True, **options) -> RAR:
    model = RAR(**{"size": SIZE, "length": 9, "vocab": 20, "num_classes": 5, "code_dim": 6, **options})
    if wake:  # a fresh model's adaptive norms do nothing
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
    if model.alignment is not None:
        model.alignment.set_codebook(torch.randn(20, 1, 6))
    return model


def draws(*positions: int, seed: int = 0) -> Draws:
    return Draws(seed, torch.tensor(positions))


def codes(batch: int, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 20, (batch, length, 1))


LABELS = torch.tensor([1, 3, 1, 0])


# -- sampling ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(6.0, schedule="cosine", power=2.5), Guidance(2.0)])
@pytest.mark.parametrize("budget", [1 << 30, 20_000])
def test_cached_is_uncached(monkeypatch, guidance, budget):
    """Also with so little memory for adaptive norms that they are computed in several parts, and with fixed shapes."""
    monkeypatch.setattr(module, "MODULATION_BYTES", budget)
    model = rar(rear=REAR).eval()
    wanted = model.sample(LABELS, draws(3, 4, 5, 6), guidance, temperature=1.1, cached=False)
    for static in (False, True):
        assert torch.equal(model.sample(LABELS, draws(3, 4, 5, 6), guidance, temperature=1.1, static=static), wanted)
    assert wanted.shape == (4, 9, 1) and wanted.unique().numel() > 5
    assert torch.equal(model.sample(LABELS[1:2], draws(4), guidance, temperature=1.1), wanted[1:2])  # any batch


def test_spare_rows_are_never_looked_at():
    full, slim = rar().eval(), rar(spare_rows=2).eval()
    assert slim.pos_embed.shape == slim.target_aware_pos_embed.shape == (1, 11, 32)
    slim.load_state_dict({n: v[:, :11] if n.endswith("pos_embed") else v for n, v in full.state_dict().items()})
    how = LABELS, draws(3, 4, 5, 6), Guidance(2.0)
    assert torch.equal(slim.sample(*how), full.sample(*how))
    order, targets = torch.stack([torch.randperm(9) for _ in range(4)]), codes(4)[..., 0]
    assert torch.equal(slim.slots(targets, LABELS, order)[0], full.slots(targets, LABELS, order)[0])
    with pytest.raises(UserError, match="spare_rows=2 cannot be exported"):
        ADAPTER.restore(slim)


def test_half_precision():
    """Under autocast the cache is bf16 and probabilities fp32; with bf16 weights too."""
    model = rar().eval()
    trace: list = []
    with torch.autocast("cpu", torch.bfloat16):
        model.sample(LABELS, draws(0, 1, 2, 3), Guidance(2.0), trace=trace)
        loss = model(codes(4), LABELS, draws(0, 1, 2, 3)).total
    full = model(codes(4), LABELS, draws(0, 1, 2, 3)).total
    assert trace[0][1].dtype == torch.float32 and loss.dtype == torch.float32 and abs(loss - full) < 1.0
    assert model.bfloat16().sample(LABELS, draws(0, 1, 2, 3), Guidance(2.0)).shape == (4, 9, 1)


def test_filters_and_labels():
    model = rar().eval()
    greedy = model.sample(LABELS, draws(0, 1, 2, 3), temperature=0)
    assert torch.equal(greedy, model.sample(LABELS, draws(4, 5, 6, 7), top_k=1))
    assert torch.equal(greedy[0], greedy[2])  # one class
    for wrong in (6, -1):
        with pytest.raises(UserError, match="0..4"):
            model.sample(torch.tensor([wrong]), draws(0))


# -- training ---------------------------------------------------------------------------------------------------------
def test_is_a_generator_and_every_parameter_learns():
    model = rar(rear=REAR, permute=[0.0, 1.0])
    assert isinstance(model, Generator)
    model(codes(4), LABELS, draws(0, 1, 2, 3), Progress(30, 100, 100, 3)).total.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_an_order_is_followed():
    """With a permuted order, code p is predicted from those before it in the order, at its own position."""
    model, x = rar().eval(), codes(1)
    order = torch.randperm(9)[None]
    given = x.gather(1, order[..., None])[..., 0]
    with torch.no_grad():
        inputs, condition = model.slots(given, LABELS[:1], order)
        before = run_blocks(model.blocks, inputs, condition)
        changed = given.clone()
        changed[0, 4] = (given[0, 4] + 1) % 20
        after = run_blocks(model.blocks, *model.slots(changed, LABELS[:1], order))
        raster, _ = model.slots(given, LABELS[:1], torch.arange(9)[None])
    assert [bool(d) for d in (before - after).abs().amax(-1)[0] > 1e-6] == [False] * 6 + [True] * 5
    assert torch.equal(raster, model.slots(given, LABELS[:1])[0])
    assert torch.allclose(
        inputs[0, 2 + 3] - raster[0, 2 + 3],
        model.pos_embed[0, 2 + order[0, 3]]
        - model.pos_embed[0, 5]
        + model.target_aware_pos_embed[0, 2 + order[0, 4]]
        - model.target_aware_pos_embed[0, 6],
        atol=1e-6,
    )


def test_orders_are_annealed():
    model, many = rar(permute=[0.25, 0.75]), draws(*range(400))
    shares = []
    for ratio in (1.0, 0.5, 0.0):
        orders = model.orders(400, many, ratio)
        raster = torch.arange(9)
        shares.append(1.0 if orders is None else (orders == raster).all(-1).double().mean().item())
        assert orders is None or torch.equal(orders.sort(-1).values, raster.expand(400, -1))
    assert shares[0] < 0.01 and abs(shares[1] - 0.5) < 0.08 and shares[2] == 1.0


@pytest.mark.parametrize("fraction, ratio", [(0.0, 1.0), (0.25, 1.0), (0.5, 0.5), (0.75, 0.0), (1.0, 0.0)])
def test_annealing(fraction, ratio):
    assert annealed(Progress(int(fraction * 100), 100, 10, 0), 0.25, 0.75) == ratio
    assert annealed(None, 0.25, 0.75) == 1.0


def test_noise():
    x = codes(4000)
    given, selected = perturb(x, draws(*range(4000)), 0.6, 20)
    assert torch.equal(given[~selected], x[~selected]) and given.max() < 20
    share = selected.double().mean((1, 2))
    assert abs(share.mean() - 0.3) < 0.01  # uniform up to 0.6
    masked, selected = perturb(x, draws(*range(4000)), 1.0, 20, mask_code=20)
    assert torch.equal(masked == 20, selected)
    assert torch.equal(perturb(x, draws(*range(4000)), 0.0, 20)[0], x)


def test_alignment_by_hand():
    vectors, x = torch.randn(20, 2, 3), torch.randint(0, 20, (2, 5, 2))
    z = F.normalize(vectors, dim=-1)[x, torch.arange(2)]
    selected = torch.rand(2, 5, 2) < 0.4
    hidden = torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def loss(**options) -> tuple[torch.Tensor, CodeAlignment]:
        align = CodeAlignment(8, 3, 2, Settings(**{"encode_layer": 0, "decode_layer": 1, "projection": 4, **options}))
        align.set_codebook(vectors)
        return align(hidden[0], hidden[1], x, selected), align

    def cosine(mlp, h):
        return F.cosine_similarity(mlp(h).unflatten(-1, (2, 3)), z, dim=-1)

    value, align = loss()
    wanted = -(cosine(align.encode, hidden[0]) * ~selected).mean() - cosine(align.decode, hidden[1]).mean()
    assert torch.allclose(value, wanted, atol=1e-6)
    value, align = loss(encode_layer=None)
    told = cosine(align.decode, hidden[1])
    assert torch.allclose(value, -(told * ~selected).mean() - told.mean(), atol=1e-6)
    value, align = loss(decode_layer=None)
    read = cosine(align.encode, hidden[0])
    assert torch.allclose(value, -(read * ~selected).mean() - read.mean(), atol=1e-6)
    value, align = loss(decode_layer=None, count_once=True)
    assert torch.allclose(value, -(cosine(align.encode, hidden[0]) * ~selected).mean(), atol=1e-6)


def test_code_vectors_come_from_the_tokenizer():
    tokenizer = ToyCodes(vocab=20, branches=1)
    model = rar(rear=REAR, length=16, code_dim=1)
    model.bind(tokenizer)
    assert model.alignment.codebook.shape == (20, 1, 1)
    assert torch.equal(model.alignment.codebook, F.normalize(tokenizer.levels.detach()[:, None, None], dim=-1))
    assert "alignment.codebook" not in model.state_dict()
    with pytest.raises(UserError, match="code_dim is 6, the code vectors of the tokenizer are 1"):
        rar(rear=REAR, length=16).bind(tokenizer)
    rar().bind(tokenizer)  # nothing to read


def test_far_takes_the_regularisers_too():
    size = {"width": 32, "layers": 2, "heads": 4, "head_layers": 1, "hidden": 48}
    tokenizer = ToyCodes(vocab=20, branches=3)
    model = FAR(size=size, length=16, grid=[4, 4], branches=3, vocab=20, num_classes=5, code_dim=1, rear=REAR)
    model.bind(tokenizer)
    x = torch.randint(0, 20, (4, 16, 3))
    loss = model(x, LABELS, draws(0, 1, 2, 3), Progress(0, 100, 10, 0))
    loss.total.backward()
    assert "alignment" in loss.logs and model.alignment.encode[0].weight.grad.any()
    with pytest.raises(UserError, match="mask code"):
        FAR(size=size, length=16, vocab=20, rear={"noise": "mask"})
    official = ADAPTERS["far"].restore(model)
    assert not any("alignment" in name for name in official)
    ADAPTERS["far"].load(model, official)


# -- settings ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given, message",
    [
        ({"encode_layer": 2}, "encode_layer is 2, but the network has the layers 0 to 1"),
        ({"decode_layer": 7}, "decode_layer is 7, but the network has the layers 0 to 1"),
        ({"noise": "swich"}, 'Did you mean "switch"'),
        ({"anneal": [0.5]}, "expected \\[start, end\\]"),
        ({"anneal": [0.8, 0.2]}, "expected"),
        ({"projektion": 3}, 'Did you mean "projection"'),
        ({"weight": "much"}, "generator.rear.weight: expected a number"),
        ({"anneal": "late"}, "generator.rear.anneal: expected a list"),
    ],
)
def test_mistakes_in_rear(given, message):
    with pytest.raises(UserError, match=message):
        rar(rear=given)


def test_other_mistakes():
    for options, message in (
        ({"branches": 2}, "FAR takes any number"),
        ({"permute": [0.5]}, "permute"),
        ({"size": "m"}, "not known"),
        ({"size": {"width": 32}}, "lacks layers, heads, hidden"),
        ({"size": {**SIZE, "width": "wide"}}, "generator.size.width: expected a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            rar(**options)
    assert rar().fits(Codes(9, 1, 20, 6)) == []
    assert "use FAR" in rar().fits(Codes(9, 2, 20, 6))[0] and len(rar().fits(Codes(8, 1, 21, 6))) == 2


def test_published_layers():
    assert settings({}, 20).decode_layer == 15 and settings({}, 24).decode_layer == 18 and settings(None, 20) is None


def test_alignment_needs_its_tokenizer():
    model = RAR(size=SIZE, length=9, vocab=20, rear=REAR)
    with pytest.raises(RuntimeError, match="bind"):
        model(codes(4), LABELS, draws(0, 1, 2, 3))


# -- weights ----------------------------------------------------------------------------------------------------------
def test_decay_groups_of_rear_s():
    with torch.device("meta"):
        model = RAR(size="s", rear={})
    spared = model.no_weight_decay()
    counts = [
        sum(p.numel() for name, p in model.named_parameters() if (name in spared) == group) for group in (False, True)
    ]
    assert counts == [225_706_752, 5_282_048]
    assert "cls_token" not in spared and "adaln_before_head.adaLN_modulation.1.weight" in spared


def layout(name: str) -> dict:
    path = fixture_folder().parent / "checkpoints" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["reAR-S", "reAR-B", "reAR-L", "rar_b", "rar_l", "rar_xl", "rar_xxl"])
def test_recorded_layouts(name):
    recorded = layout(name)
    assert check_layout(ADAPTER, recorded) == []
    with torch.device("meta"):
        tensors = {n: torch.empty(shape) for n, (shape, _) in recorded["tensors"].items()}
        found = ADAPTER.describe(tensors)
        model = RAR(**found)
    assert found["size"] == name.replace("-", "_").split("_")[1].lower() and ("rear" in found) == name.startswith(
        "reAR"
    )
    official = ADAPTER.restore(model)
    assert {n: list(t.shape) for n, t in official.items()} == {
        n: shape for n, (shape, _) in recorded["tensors"].items()
    }
    assert sum(p.numel() for p in model.parameters()) == recorded["parameters"]


def test_export_and_import():
    model = rar(rear=REAR)
    official = ADAPTER.restore(model)
    assert "encode_align_mlp.0.weight" in official and not any("alignment" in name for name in official)
    other = rar(rear=REAR, wake=False)
    ADAPTER.load(other, {f"_orig_mod.module.{name}": value for name, value in official.items()})
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert ADAPTER.describe(official)["rear"] == {"projection": 24}


def test_heads_may_be_missing_or_surplus():
    full, bare = rar(rear=REAR), rar()
    ADAPTER.load(bare, ADAPTER.restore(full))
    before = {name: value.clone() for name, value in full.alignment.state_dict().items()}
    ADAPTER.load(full, ADAPTER.restore(bare))
    assert all(torch.equal(value, before[name]) for name, value in full.alignment.state_dict().items())
    assert "rear" not in ADAPTER.describe(ADAPTER.restore(bare))
    one = {n: v for n, v in ADAPTER.restore(full).items() if not n.startswith("decode_align")}
    assert ADAPTER.describe(one)["rear"]["decode_layer"] is None
    broken = ADAPTER.restore(full)
    broken.pop("encode_align_mlp.2.bias")
    with pytest.raises(UserError, match="missing 1: alignment.encode.2.bias"):
        ADAPTER.load(full, broken)
    with pytest.raises(UserError, match="unexpected 1: surplus"):
        ADAPTER.load(full, {**ADAPTER.restore(full), "surplus": torch.zeros(1)})


def test_tables_that_disagree_are_refused():
    state = ADAPTER.restore(rar())
    state["timesteps_embeddings"] = torch.zeros(1, 101, 32)
    with pytest.raises(UserError, match="rows for 9 codes, timesteps_embeddings for 1"):
        ADAPTER.describe(state)


def test_sampling_costs_about_two_forward_passes():
    """With guidance: one pass per stream, and less, as adaptive norms are computed once per class. Without a cache it
    would be a pass per code. (reAR-S: 224 GFLOPs for a picture, against 29,100.)"""
    with torch.device("meta"):
        model = RAR(size=SIZE, length=32, vocab=20, num_classes=5).eval()
        labels, x = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 32, 1, dtype=torch.int64)
    with FlopCounterMode(display=False) as sampling:
        model.sample(labels, Draws(0, labels), Guidance(2.0))
    with FlopCounterMode(display=False) as forward:
        model(x, labels, Draws(0, labels))
    assert 1.5 < sampling.get_total_flops() / forward.get_total_flops() < 2.1
