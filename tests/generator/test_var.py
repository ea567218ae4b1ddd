"""VAR: cached sampling against the teacher-forced pass, the block-causal mask, progressive training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.devices import without_tf32
from core.errors import UserError
from core.nn import cuda_graph
from core.nn.blockcausal import _block_mask, blockwise, flex
from core.rng import Draws
from core.specs import Codes, Guidance, Progress
from generator.adapters import ADAPTERS
from generator.engine import gelu_product
from generator.var import var as module
from generator.var.var import VAR, Block, Progressive
from tokenizer.multiscale.imagefolder import ImageFolder

SCALES = [1, 2, 3]
TRUNK = {"width": 32, "layers": 1, "heads": 2}


def tokenizer(branches: int = 2) -> ImageFolder:
    torch.manual_seed(0)
    return ImageFolder(
        image_size=32,
        patch_size=8,
        encoder=TRUNK,
        decoder=TRUNK,
        latent_grid=3,
        scales=SCALES,
        branches=branches,
        vocab=20,
        code_dim=6,
        start_drop=1,
    ).eval()


def var(branches: int = 2, **settings) -> VAR:
    torch.manual_seed(1)
    model = VAR(
        depth=2,
        width=32,
        heads=2,
        scales=SCALES,
        branches=branches,
        vocab=20,
        code_dim=6,
        num_classes=4,
        drop_path=0.0,
        gamma_init=1.0,
        head_init=1.0,
        **settings,
    )
    model.bind(tokenizer(branches))
    return model.eval()


def draws(batch: int) -> Draws:
    return Draws(3, torch.arange(batch))


@pytest.mark.parametrize("settings", [{}, {"branches": 3}, {"branches": 1}, {"l2_norm": False}, {"shared_adaln": True}])
def test_cached_sampling_gives_the_teacher_forced_logits(settings):
    """Scale by scale with cached keys and values, guided; then all at once on the codes that were drawn."""
    model = var(**settings)
    labels, seen, noise = torch.tensor([0, 3, 1]), [], torch.Generator().manual_seed(0)

    def pick(scale, logits):
        seen.append(logits)
        return torch.randint(0, 20, logits.shape[:3], generator=noise)

    codes, _ = model.generate(labels, Guidance((3.0,) * model.branches, schedule="linear"), pick)
    with torch.no_grad():
        inputs = model.ops.scale_inputs(codes)
        plain, hidden = model.logits(inputs, labels), model.logits(inputs, torch.full_like(labels, 4))
    scale = torch.linspace(1, 3, 3).repeat_interleave(torch.tensor([1, 4, 9])).view(1, -1, 1, 1)
    torch.testing.assert_close(torch.cat(seen, dim=1), hidden + scale * (plain - hidden), atol=2e-5, rtol=1e-5)


def test_samples_depend_on_their_position_alone():
    """Picture 2 of a batch of 3 is picture 2 drawn on its own; branches may have settings of their own."""
    model, labels = var(), torch.tensor([0, 3, 1])
    options = {"top_k": [5, 3], "top_p": [0.9, 1.0], "temperature": 1.2}
    together = model.sample(labels, draws(3), Guidance(2.0), **options)
    alone = model.sample(labels[2:], Draws(3, torch.tensor([2])), Guidance(2.0), **options)
    assert together.shape == (3, 14, 2) and torch.equal(together[2:], alone)
    assert not torch.equal(together[:1], together[1:2])


class Tape:
    """A CUDA graph in slow motion: the operations of a function, played again on the very tensors they were recorded on."""

    def __init__(self, function):
        operations = self.operations = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                result = operation(*args, **(kwargs or {}))
                operations.append((operation, args, kwargs or {}, result))
                return result

        with Recorder():
            self.result = function()

    def replay(self):
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            for kept, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(kept, torch.Tensor) and new.data_ptr() != kept.data_ptr():
                    kept.copy_(new)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("settings", [{}, {"shared_adaln": True, "branches": 1}])
def test_recorded_scales_serve_every_batch_of_their_size(monkeypatch, settings):
    tapes = []

    def capture(function, *_):
        tapes.append(Tape(function))
        return tapes[-1], tapes[-1].result

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(module, "cuda_graphs_work", lambda device: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model, labels = var(**settings), [torch.tensor([0, 3, 1]), torch.tensor([2, 2, 0])]
    for batch, noise, guidance in ((0, 3, 2.0), (1, 4, 2.0), (0, 5, 4.0)):
        expected = model.sample(labels[batch], Draws(noise, torch.arange(3)), Guidance(guidance), top_k=5)
        recorded = model.sample(
            labels[batch], Draws(noise, torch.arange(3)), Guidance(guidance), top_k=5, cuda_graph=True
        )
        assert torch.equal(recorded, expected)
    assert len(tapes) == 4  # of the classes and of three scales, once for all batches
    with torch.no_grad():
        model.head.weight.mul_(-1)  # a recording reads the weights as they are
        expected = model.sample(labels[0], draws(3), Guidance(2.0))
        assert torch.equal(model.sample(labels[0], draws(3), Guidance(2.0), cuda_graph=True), expected)
    assert len(tapes) == 4
    for changed, count in ((copy.deepcopy(model), 3), (model.double().float(), 3), (model, 2)):
        plain, recorded = (
            changed.sample(labels[0][:count], draws(count), Guidance(2.0), cuda_graph=on) for on in (False, True)
        )
        assert torch.equal(plain, recorded)
    assert len(tapes) == 16


def test_recording_on_a_cpu_says_so_and_samples_all_the_same(capsys):
    cuda_graph.cuda_graphs_work.cache_clear()
    model, labels = var(), torch.tensor([0, 3])
    plain, recorded = (model.sample(labels, draws(2), Guidance(2.0), cuda_graph=on) for on in (False, True))
    assert torch.equal(plain, recorded) and capsys.readouterr().err.count("no CUDA graphs on cpu") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("half", [False, True])
def test_recorded_scales_on_a_gpu(half):
    model = var().cuda()
    model.ops.cuda()
    for seed in range(3):
        labels, d = torch.tensor([0, 3, seed], device="cuda"), Draws(seed, torch.arange(3, device="cuda"))
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            logits: dict[bool, list] = {False: [], True: []}
            noise = torch.Generator("cuda")
            for on, seen in logits.items():
                noise.manual_seed(seed)

                def pick(scale, found):
                    seen.append(found.clone())
                    return torch.randint(0, 20, found.shape[:3], generator=noise, device="cuda")

                model.generate(labels, Guidance(2.0), pick, cuda_graph=on)
            assert model.sample(labels, d, Guidance(2.0), cuda_graph=True).shape == (3, 14, 2)
        for plain, recorded in zip(*logits.values()):
            torch.testing.assert_close(recorded, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 36, 242])
def test_a_product_that_ends_with_gelu_on_a_gpu(dtype, rows):
    linear = nn.Linear(1088, 4352, device="cuda", dtype=dtype)
    x = torch.randn(2, rows, 1088, device="cuda").to(dtype)
    with torch.no_grad(), without_tf32():
        found, wanted = gelu_product(x, linear), F.gelu(linear(x), approximate="tanh")
        exact = F.gelu(linear(x))
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)
    if dtype == torch.float32:  # by its tanh: the other kind is further away
        assert (found - wanted).abs().max() < (found - exact).abs().max() / 10


def test_flex_attention_agrees_with_one_call_per_block():
    q, k, v = (torch.randn(2, 2, 14, 16) for _ in range(3))
    ends = (1, 5, 14)
    torch.testing.assert_close(
        flex(q, k, v, _block_mask(ends, "cpu"), 1.0, compiled=False), blockwise(q, k, v, ends, 1.0)
    )


@pytest.mark.slow
def test_compiled_block_with_flex_attention():
    """What a GPU runs: the block compiled around FlexAttention."""
    torch.manual_seed(0)
    block, x, condition = Block(64, 4, 256, True, False, 0.0).eval(), torch.randn(2, 14, 64), torch.randn(2, 64)
    ends = (1, 5, 14)
    with torch.no_grad():
        expected = block(x, condition, blocks=ends)
        block.compile()
        torch.testing.assert_close(block(x, condition, blocks=_block_mask(ends, "cpu")), expected, atol=1e-5, rtol=1e-5)


def test_loss_is_the_mean_cross_entropy_and_reaches_every_weight():
    model, codes = var().train(), torch.randint(0, 20, (2, 14, 2))
    loss = model(codes, torch.tensor([0, 1]), draws(2))
    loss.total.backward()
    torch.testing.assert_close(loss.total.detach(), loss.logs["loss_mean"])
    assert all(p.grad is not None for p in model.parameters())


def test_reported_losses_know_no_label_smoothing():
    """-log p of the right code, whatever is trained on; and the share of right codes, in percent."""
    model, codes, labels = var(), torch.randint(0, 20, (2, 14, 2)), torch.tensor([0, 1])
    plain = model(codes, labels, draws(2))
    model.label_smoothing = 0.3
    smoothed = model(codes, labels, draws(2))
    with torch.no_grad():
        logits = model.logits(model.ops.scale_inputs(codes), model.drop_labels(labels, draws(2)))
    logs = logits.log_softmax(-1)
    right = -logs.gather(-1, codes[..., None])[..., 0]
    hits = (logits.argmax(-1) == codes).float() * 100
    for name, value in {
        "loss_mean": right.mean(),
        "loss_tail": right[:, 5:].mean(),
        "acc_mean": hits.mean(),
        "acc_tail": hits[:, 5:].mean(),
    }.items():
        torch.testing.assert_close(smoothed.logs[name], value)
        torch.testing.assert_close(plain.logs[name], value)
    torch.testing.assert_close(smoothed.total, (0.7 * right - 0.3 * logs.mean(-1)).mean())
    assert (smoothed.total - plain.total).abs() > 1e-3


def test_progressive_training_adds_scale_after_scale():
    stages = Progressive(until=0.5, first=1, warmup=0.1, ramp=0.05)
    found = [stages.stage(f, 6)[0] for f in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)]
    assert found == [1, 1, 2, 3, 4, 5, 5]
    assert stages.stage(0.16, 6) == (2, pytest.approx(0.2))  # scale 2 is added at 0.15
    model, codes = var(progressive={"until": 0.5, "first": 1}), torch.randint(0, 20, (2, 14, 2))
    early = model(codes, torch.tensor([0, 1]), draws(2), Progress(0, 100, 100, 0))
    whole = model(codes, torch.tensor([0, 1]), draws(2), Progress(90, 100, 100, 9))
    assert early.total < 0.6 * whole.total  # 5 of 14 positions


def test_a_generator_and_codes_that_do_not_fit_say_why():
    problems = var().fits(Codes(14, 2, 20, 6))
    assert "several scales" in problems[0]
    assert "generator.branches is 3" in var(3).fits(tokenizer().spec)[0]
    with pytest.raises(UserError, match="progressive.*unknown key"):
        var(progressive={"until": 0.5, "firts": 1})
    with pytest.raises(UserError, match="not by"):
        var().sample(torch.tensor([0]), draws(1), Guidance(2.0, "auto"))


@pytest.mark.parametrize("table", ["filled", "zeros", "absent"])
def test_scales_of_a_file(table):
    """From the table of levels; one that was never filled says nothing, then the trainer's own words count."""
    scales = [1, 2, 3]
    model = VAR(scales=scales, branches=2, vocab=16, code_dim=4, depth=1, width=64, heads=1, num_classes=4)
    state = dict(ADAPTERS["var"].restore(model))
    if table != "filled":
        del state["lvl_1L"]
    if table == "zeros":
        state["lvl_1L"] = torch.zeros(1, 14, dtype=torch.int64)
    tokenizer = {"quant_conv.weight": torch.zeros(4, 8, 1, 1)}
    file = {"trainer": {"var_wo_ddp": state, "vae_local": tokenizer, "config": {"patch_nums": (1, 2, 3)}}}
    assert ADAPTERS["var"].describe(file)["scales"] == scales
