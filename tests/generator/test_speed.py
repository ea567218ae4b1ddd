"""What makes RecTok and DiT^DH fast must change nothing: padding, compiled blocks, tables computed once, recorded steps."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from core.nn import mlp
from core.nn.cuda_graph import Replayed, cuda_graphs_work
from core.nn.mlp import SwiGLU
from core.rng import Draws
from core.schema import SampleConfig
from core.specs import Guidance
from core.train import parallel
from core.train.run import read_metrics
from generator.dit.dit_dh import DiTDH
from run import target
from run.target import Sampler
from tests.conftest import TOY_GENERATOR, TOY_TOKENIZER
from tests.generator.test_dit_dh import dit, draws, images, rectok, semantic

SMALLER = {"trunk_width": 24, "trunk_depth": 3, "trunk_heads": 2, "head_width": 40, "head_depth": 2, "head_heads": 2}
LARGER = {"trunk_width": 48, "trunk_depth": 3, "trunk_heads": 4, "head_width": 64, "head_depth": 2, "head_heads": 2}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_padding_of_an_odd_width_changes_nothing(monkeypatch, bias, half):
    torch.manual_seed(0)
    layer = SwiGLU(32, bias=bias)
    assert layer.hidden == 85
    x = torch.randn(2, 5, 32, requires_grad=True)

    def run():
        layer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = layer(x)
        y.float().square().sum().backward()
        return [y.detach(), x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]

    plain = run()
    widths = []
    monkeypatch.setattr(mlp, "PADDED_DEVICES", {"cpu"})
    original = mlp.F.silu
    monkeypatch.setattr(mlp.F, "silu", lambda gate: widths.append(gate) or original(gate))
    padded = run()
    assert widths[0].shape[-1] == 128 and not widths[0][..., 85:].any()
    for ours, expected in zip(padded, plain, strict=True):
        scale = expected.float().abs().max().item()
        torch.testing.assert_close(ours, expected, rtol=0, atol=(2e-2 if half else 2e-6) * scale)
    assert {n: tuple(p.shape) for n, p in layer.state_dict().items() if "weight" in n} == {
        "w12.weight": (170, 32),
        "w3.weight": (32, 85),
    }


def test_which_published_widths_are_padded():
    with torch.device("meta"):
        hidden = {width: SwiGLU(width).hidden for width in (192, 384, 768, 1024, 1152, 2048)}
    assert hidden[2048] == 5461 and [width for width, h in hidden.items() if h % 8] == [1024, 2048]


@pytest.fixture
def frames():
    """Counters of the compiler: how many frames it compiled and how many of these went well."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["frames"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def test_compiled_training_does_not_recompile(frames):
    """The number of visible tokens changes every step; after its second value nothing is compiled anew."""
    tokenizer = rectok(
        encoder={"width": 48, "layers": 3, "heads": 4},
        decoder={"width": 32, "layers": 2, "heads": 2},
        semantic=semantic(teachers={"a": 12, "b": 10}),
    )
    parallel.compile_blocks(tokenizer, backend="eager")
    x, seen, compiled = images(4), [], []
    for step in range(8):
        recon = tokenizer(x, Draws(0, torch.arange(4) + 4 * step, step))
        (recon.images.mean() + sum(p.mean() for p in recon.predictions.values())).backward()
        seen.append(recon.details["kept"].shape[1])
        compiled.append(frames["total"])
    assert len(set(seen)) > 3 and compiled[-1] == compiled[2] and frames["ok"] == frames["total"]


def test_compiled_sampling_does_not_recompile(frames):
    """Training, then previews of every kind, twice: the second round finds everything compiled, by far enough entries."""
    torch.manual_seed(0)
    model, weaker = dit(size=LARGER), dit(size=SMALLER).eval()
    labels, d, z = torch.arange(4), draws(0, 1, 2, 3), torch.randn(4, 8, 4, 4)
    kinds = (Guidance(), Guidance(2.0, "cfg", (0.2, 0.8)), Guidance(2.0, "auto", guide=weaker))
    expected = [model.sample(labels, d, kind, steps=5) for kind in kinds]
    for network in (model, weaker):
        parallel.compile_blocks(network, backend="eager")
    compiled = []
    for _ in range(3):
        model.train()
        model(z, labels, d).total.backward()
        model.eval()
        for kind, wanted in zip(kinds, expected):
            torch.testing.assert_close(model.sample(labels, d, kind, steps=5), wanted, rtol=1e-5, atol=1e-5)
        compiled.append(frames["total"])
    assert compiled[0] == compiled[-1] == frames["ok"]


@pytest.mark.parametrize("half", [False, True])
def test_sampling_may_be_compiled(monkeypatch, frames, half):
    """A finished network's blocks, or those of its copy in the precision of the products; the same samples, both times."""
    torch.manual_seed(0)
    model, labels, d = dit(size=LARGER).eval(), torch.arange(4), draws(0, 1, 2, 3)
    monkeypatch.setattr(
        "generator.dit.dit_dh.compile_blocks", lambda network: parallel.compile_blocks(network, backend="eager")
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        plain = model.sample(labels, d, Guidance(2.0), steps=4)
        assert frames["total"] == 0
        model.compiled = True
        for _ in range(2):
            assert torch.equal(model.sample(labels, d, Guidance(2.0), steps=4), plain)
    assert frames["ok"] == frames["total"] > 0
    assert half == (model.blocks[0]._compiled_call_impl is None)


@pytest.mark.parametrize(
    "wanted, device, batches, compiled",
    [
        (True, "cpu", 1, True),
        (False, "cuda", 99, False),
        ("auto", "cuda", 16, True),
        ("auto", "cuda", 15, False),
        ("auto", "cpu", 99, False),
    ],
)
def test_what_is_compiled_for_a_run(monkeypatch, wanted, device, batches, compiled):
    asked = []
    monkeypatch.setattr(target, "compile_blocks", asked.append)
    monkeypatch.setattr(target, "triton_works", lambda device: True)
    network, guide, tokenizer = dit().eval(), dit(size=SMALLER).eval(), object()
    task = SimpleNamespace(generator=network, guidance=Guidance(2.0, "auto", guide=guide), tokenizer=tokenizer)
    config = SimpleNamespace(sample=SampleConfig(compile=wanted))
    Sampler(config, task, {}).prepare(batches, torch.device(device))
    assert network.compiled == guide.compiled == compiled and asked == [tokenizer] * compiled


@pytest.mark.slow
def test_inductor_gives_the_same_samples_and_gradients(frames):
    torch.manual_seed(0)
    model, plain = dit(size=LARGER), dit(size=LARGER)
    plain.load_state_dict(model.state_dict())
    parallel.compile_blocks(model)
    labels, d, z = torch.arange(4), draws(0, 1, 2, 3), torch.randn(4, 8, 4, 4)
    for network in (model, plain):
        network(z, labels, d).total.backward()
    for ours, expected in zip(model.parameters(), plain.parameters()):
        if expected.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-5)
    guidance = Guidance(1.5)
    torch.testing.assert_close(
        model.sample(labels, d, guidance, steps=6), plain.sample(labels, d, guidance, steps=6), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["cfg", "auto"])
def test_constants_of_sampling_are_computed_once(monkeypatch, kind):
    torch.manual_seed(0)
    model, weaker = dit().eval(), dit(size=SMALLER).eval()
    calls = []
    for name, network in (("model", model), ("weaker", weaker)):
        for part in ("t_embedder", "y_embedder"):
            getattr(network, part).register_forward_hook(
                lambda module, inputs, output, which=(name, part): calls.append((which, output.shape[0]))
            )
    model.sample(torch.tensor([1, 2]), draws(0, 1), Guidance(2.0, kind, guide=weaker), steps=9)
    times = [count for (_, part), count in calls if part == "t_embedder"]
    assert times == [9] * (2 if kind == "auto" else 1)  # all times of the grid at once, per model
    assert sum(part == "y_embedder" for (_, part), _ in calls) <= 3


def test_cuda_graph_on_a_cpu_says_so_and_samples_all_the_same(capsys):
    torch.manual_seed(0)
    cuda_graphs_work.cache_clear()
    model = dit().eval()
    labels, d = torch.tensor([1, 2]), draws(0, 1)
    recorded = model.sample(labels, d, Guidance(1.5), steps=4, cuda_graph=True)
    assert torch.equal(recorded, model.sample(labels, d, Guidance(1.5), steps=4))
    model.sample(labels, d, steps=4, cuda_graph=True)
    assert capsys.readouterr().err.count("no CUDA graphs on cpu") == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", [TOY_TOKENIZER, TOY_GENERATOR])
def test_bf16_training_stays_finite(train_main, tmp_path, tokenizer_run, config):
    """Some hundred steps at a high learning rate: no update is skipped, no number is lost."""
    more = ["objective.gan_start_epoch=1"] if config == TOY_TOKENIZER else [f"tokenizer.weights={tokenizer_run}"]
    code, out, err = train_main(
        config,
        f"work_dir={tmp_path}",
        f"data.cache_dir={tmp_path}/cache",
        "train.device=cpu",
        "train.precision=bf16",
        "train.duration=400step",
        "train.log_every=20step",
        "train.preview_every=never",
        "train.checkpoint_every=400step",
        *more,
    )
    assert code == 0 and "skipped" not in out, err
    (run,) = tmp_path.glob("toy_*")
    records = read_metrics(run / "metrics.jsonl")
    assert len(records) == 20 and all(math.isfinite(v) for r in records for v in r.values() if isinstance(v, float))
    key = "reconstruction" if config == TOY_TOKENIZER else "flow"
    assert sum(r[key] for r in records[-5:]) < sum(r[key] for r in records[:5])  # and it learns


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["cfg", "auto"])
def test_recorded_steps_on_a_gpu(kind):
    torch.manual_seed(0)
    model, weaker = dit().eval().cuda(), dit(size=SMALLER).eval().cuda()
    labels, d = torch.tensor([1, 2], device="cuda"), Draws(0, torch.arange(2, device="cuda"))
    guidance = Guidance(1.5, kind, (0.2, 0.8), weaker)
    for half in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            plain, recorded = (model.sample(labels, d, guidance, steps=9, cuda_graph=on) for on in (False, True))
        torch.testing.assert_close(recorded, plain, rtol=1e-2, atol=1e-2)
    twice = Replayed(lambda x: x * 2)
    assert [twice(torch.full((3,), v, device="cuda")).sum().item() for v in (1.0, 2.0, 3.0)] == [6.0, 12.0, 18.0]


def test_a_guide_of_another_kind_is_refused():
    from core.errors import UserError

    with pytest.raises(UserError, match="another DiT"):
        DiTDH(size=SMALLER, channels=8, grid=4).sample(
            torch.tensor([1]), draws(0), Guidance(2.0, "auto", guide=object())
        )
