"""The training loop: arithmetic of a step, guards, averages, schedules and modes."""

from __future__ import annotations

import copy
import errno
import functools
import io
import math
import os
import re
import sys
import threading
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.chunks import ALONE
from core.errors import UserError
from core.nn.lpips import LPIPS
from core.schema import Duration, LogConfig, OptimizerConfig, ScheduleConfig
from core.train import log, parallel
from core.train.checkpoint import CheckpointStore, find_damage
from core.train.ema import Ema
from core.train.guards import StepGuard
from core.train.optim import Schedule, make_adamw
from core.train.run import read_metrics
from core.train.trainer import Trainer
from tests import parity
from tests.conftest import TOY_GENERATOR, TOY_TOKENIZER, toy
from tokenizer.losses.discriminators import PatchGAN

NO_GAN = ("discriminator=null", "objective.weights.gan=0")


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    """So many steps; the means of what each of them logged."""
    batches, records = trainer.batches(trainer.images_seen), []
    for _ in range(count):
        extra = trainer.train_step(next(batches))
        trainer.averages.add(extra)
        records.append(dict(zip(trainer.averages.sums, trainer.averages.means(torch.device("cpu")).tolist())))
        trainer.averages.reset()
    return records


def first_moments(trainer: Trainer) -> dict[str, torch.Tensor]:
    """After one step: (1 - beta1) times the clipped gradient."""
    return {
        f"{name}.{key}": optimizer.state[p]["exp_avg"]
        for name, optimizer in trainer.optimizers.items()
        for key, p in trainer.networks[name].named_parameters()
        if p in optimizer.state
    }


def assert_same(ours: Trainer, reference: Trainer, count: int = 2, rtol: float = 1e-5) -> None:
    """Equal losses and gradients."""
    for number in range(count):
        (a,), (b,) = steps(ours, 1), steps(reference, 1)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=rtol, abs=1e-7), f"{key} of step {number}"
        if number == 0:
            expected = first_moments(reference)
            for key, moment in first_moments(ours).items():
                scale = expected[key].abs().max().item()
                torch.testing.assert_close(moment, expected[key], rtol=0, atol=10 * rtol * scale + 1e-9, msg=key)


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("micro", [4, 2, 1])
def test_accumulation_equals_one_batch(build_trainer, micro):
    accumulated = build_trainer(TOY_TOKENIZER, *NO_GAN, f"train.micro_batch={micro}")
    assert accumulated.accumulation == 8 // micro
    assert_same(accumulated, build_trainer(TOY_TOKENIZER, *NO_GAN))


def test_batches_must_divide(build_trainer):
    with pytest.raises(UserError, match="less than one step"):
        build_trainer(TOY_TOKENIZER, "train.duration=3img")


@pytest.mark.parametrize("max_norm", [0.0, 0.01, 1e9])
def test_folded_clip_is_clip_grad_norm_and_adamw(max_norm):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    theirs = copy.deepcopy(ours)
    optimizer = make_adamw(ours, OptimizerConfig(weight_decay=0.1))
    groups = [
        {"params": [p for p in theirs.parameters() if (p.ndim > 1) == decayed], "weight_decay": 0.1 * decayed}
        for decayed in (True, False)
    ]
    reference = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    guard = StepGuard([n for n, _ in ours.named_parameters()], list(ours.parameters()), max_norm)
    for step in range(5):
        x = torch.randn(4, 5) * 10**step
        for network, used in ((ours, optimizer), (theirs, reference)):
            used.zero_grad()
            network(x).square().sum().backward()
            for group in used.param_groups:
                group["lr"] = 1e-2
        norm = guard.before_step(optimizer, step)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf)
        torch.testing.assert_close(norm, expected)
        optimizer.step()
        reference.step()
        for ours_p, their_p in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(ours_p, their_p, rtol=2e-5, atol=1e-7)


def test_decay_groups():
    class Net(nn.Linear):
        def no_weight_decay(self):
            return {"weight"}

    def decays(network):
        return {
            n: g["weight_decay"]
            for g in make_adamw(network, OptimizerConfig(weight_decay=0.3)).param_groups
            for n in g["names"]
        }

    assert decays(nn.Linear(2, 2)) == {"weight": 0.3, "bias": 0.0}
    assert decays(Net(2, 2)) == {"weight": 0.0, "bias": 0.3}
    frozen = nn.Linear(2, 2)
    frozen.bias.requires_grad_(False)
    assert decays(frozen) == {"weight": 0.3}


# ---------------------------------------------------------------------------------------------------------------------
# Non-finite gradients
# ---------------------------------------------------------------------------------------------------------------------
def spoil(trainer: Trainer, network: str, value: float, first: int, last: int) -> str:
    """Make one gradient non-finite in steps first..last; the parameter's name."""
    name, parameter = list(trainer.networks[network].named_parameters())[3]
    parameter.register_hook(lambda g: g * value if first <= trainer.step <= last else g)
    return name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_update_is_skipped(build_trainer, value):
    trainer = build_trainer(TOY_TOKENIZER, "objective.gan_start_epoch=0", "train.schedule.warmup=0step")
    name = spoil(trainer, "tokenizer", value, 1, 1)
    steps(trainer, 1)
    before = copy.deepcopy({n: net.state_dict() for n, net in trainer.networks.items()})
    moments = copy.deepcopy(first_moments(trainer))
    steps(trainer, 1)
    for key, tensor in trainer.networks["tokenizer"].state_dict().items():
        assert torch.equal(tensor, before["tokenizer"][key]), key
    assert any(
        not torch.equal(t, before["discriminator"][k])
        for k, t in trainer.networks["discriminator"].state_dict().items()
    ), "the other network goes on"
    for key, moment in first_moments(trainer).items():
        assert key.startswith("discriminator") or torch.equal(moment, moments[key]), key
    guard = trainer.guards["tokenizer"]
    assert guard.record.tolist()[:3] == [1, 1, 1]
    assert guard.describe(guard.record.tolist()).endswith(f"first bad parameter {name}")
    steps(trainer, 1)
    assert guard.record.tolist()[:3] == [1, 0, 1]
    for network in trainer.networks.values():
        assert all(torch.isfinite(t).all() for t in network.state_dict().values() if t.is_floating_point())


def poisoned(monkeypatch, first: int, last: int) -> None:
    original, hooked = Trainer.train_step, set()

    def train_step(self, batch):
        if id(self) not in hooked:
            hooked.add(id(self))
            spoil(self, "tokenizer", math.nan, first, last)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_giving_up_leaves_the_last_checkpoint(monkeypatch, train_main, tmp_path):
    poisoned(monkeypatch, 8, 99)
    code, _, err = train_main(TOY_TOKENIZER, f"work_dir={tmp_path}", "train.device=cpu", "train.max_nonfinite_steps=3")
    assert code == 2 and "Giving up (train.max_nonfinite_steps=3)" in err and len(err.splitlines()) == 1
    run = tmp_path / "toy_rectok_tokenizer"
    assert "warning: tokenizer: 1 updates skipped so far" in (run / "log.txt").read_text()
    store = CheckpointStore(run / "checkpoints")
    assert store.steps() and not any(find_damage(run / "checkpoints" / f"step_{s:08d}") for s in store.steps())
    checkpoint = store.latest()
    for stem in ("tokenizer", "tokenizer.optim", "tokenizer.ema_0.9"):
        assert all(torch.isfinite(t).all() for t in checkpoint.tensors(stem).values())


def test_a_few_bad_steps_do_not_end_a_run(monkeypatch, train_main, tmp_path):
    poisoned(monkeypatch, 8, 9)
    code, _, err = train_main(TOY_TOKENIZER, f"work_dir={tmp_path}", "train.device=cpu", "train.max_nonfinite_steps=3")
    assert code == 0, err
    run = tmp_path / "toy_rectok_tokenizer"
    assert (run / "log.txt").read_text().count("warning: tokenizer") == 2
    records = {r["step"]: r for r in read_metrics(run / "metrics.jsonl")}
    assert records[9]["grad_norm/tokenizer"] is None and records[20]["grad_norm/tokenizer"] > 0  # JSON has no NaN


# ---------------------------------------------------------------------------------------------------------------------
# Averages of weights, learning rates
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "trouble",
    ["has pixels that are not finite", "the disk is full", "CUDA out of memory", "which is not there. Mount the disk"],
    ids=["nan", "disk", "memory", "link"],
)
def test_a_preview_never_ends_a_run(build_trainer, monkeypatch, trouble):
    """Neither a black picture nor an end, but a warning: the training knows what to do about its own NaN."""
    trainer = build_trainer(TOY_TOKENIZER)
    before = [p.clone() for p in trainer.networks["tokenizer"].parameters()]
    if "finite" in trouble:
        monkeypatch.setattr(trainer.task, "preview", lambda *_: torch.full((4, 3, 32, 32), torch.nan))
    elif "not there" in trouble:
        (trainer.run.path / "samples").symlink_to("/nowhere/samples")
    elif "disk" in trouble:
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    else:
        monkeypatch.setattr(trainer.task, "preview", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError(trouble)))
    trainer.preview()
    assert not list(trainer.run.path.glob("samples/*.png"))
    assert re.search(f"warning: no preview of step 0: .*{trouble}", (trainer.run.path / "log.txt").read_text())
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.networks["tokenizer"].parameters()))


def test_what_is_being_written_is_finished_before_an_error_ends_the_run(build_trainer, monkeypatch):
    """Python starts no threads, which digests are made by, when it is about to end."""
    trainer = build_trainer(TOY_TOKENIZER, "train.checkpoint_every=1step", "train.preview_every=never")
    failed, write, step = threading.Event(), trainer.store._write, trainer.train_step

    def slow_write(*words) -> None:
        assert failed.wait(60)
        write(*words)

    def second_fails(batch):
        if trainer.step == 1:
            threading.Timer(0.2, failed.set).start()
            raise UserError("more than 5 % of the pictures cannot be read")
        return step(batch)

    monkeypatch.setattr(trainer.store, "_write", slow_write)
    monkeypatch.setattr(trainer, "train_step", second_fails)
    with pytest.raises(UserError, match="more than 5 %"):
        trainer.fit()
    assert os.listdir(trainer.store.folder / "step_00000001")


def test_ema_follows_the_formula():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    network[0].bias.requires_grad_(False)
    decays = [0.0, 0.5, 0.99, 0.9999]
    ema = Ema(network, decays)
    expected = {d: {n: p.detach().double() for n, p in network.named_parameters() if p.requires_grad} for d in decays}
    for _ in range(20):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        for d in decays:
            for n, p in network.named_parameters():
                if p.requires_grad:
                    expected[d][n] = d * expected[d][n] + (1 - d) * p.detach().double()
    for d in decays:
        assert ema.state(d).keys() == expected[d].keys() == {"0.weight", "1.weight", "1.bias"}
        for name, value in ema.state(d).items():
            torch.testing.assert_close(value.double(), expected[d][name], rtol=1e-5, atol=1e-6)


def test_ema_is_swapped_in_and_out():
    network = nn.Linear(2, 2)
    ema = Ema(network, [0.5, 0.9])
    with torch.no_grad():
        network.weight.add_(1.0)
    ema.update()
    weights, places = copy.deepcopy(network.state_dict()), [p.data_ptr() for p in network.parameters()]
    averages = copy.deepcopy(ema.averages)
    with ema.applied():
        assert torch.equal(network.weight, averages[0.5]["weight"])
    with pytest.raises(RuntimeError), ema.applied(0.9):
        assert torch.equal(network.weight, averages[0.9]["weight"])
        raise RuntimeError
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in weights.items())
    assert [p.data_ptr() for p in network.parameters()] == places
    assert all(torch.equal(v, ema.state(d)[k]) for d in averages for k, v in averages[d].items())
    with pytest.raises(ValueError, match="EMA names differ"):
        ema.load(0.5, {"weight": network.weight})
    with Ema(network, []).applied():
        assert torch.equal(network.weight, weights["weight"])


def curve(kind="constant", warmup="0ep", minimum=0.0, start=None, end=None, lr=1.0, base_lr=None) -> Schedule:
    """Over 100 images in steps of 4, 20 images an epoch."""
    settings = ScheduleConfig(kind, Duration(warmup), minimum, start and Duration(start), end and Duration(end))
    return Schedule.from_config(
        OptimizerConfig(lr=None if base_lr else lr, base_lr=base_lr),
        settings,
        global_batch=4,
        images_per_epoch=20,
        total_images=100,
    )


@pytest.mark.parametrize(
    "schedule, values",
    [
        (curve(), {0: 1.0, 50: 1.0, 200: 1.0}),
        (curve(warmup="1ep"), {0: 0.0, 4: 0.2, 10: 0.5, 20: 1.0, 100: 1.0}),
        (curve(base_lr=0.64), {0: 0.01}),
        (curve("linear"), {0: 1.0, 25: 0.75, 100: 0.0, 200: 0.0}),
        (curve("linear", minimum=0.2), {0: 1.0, 50: 0.6, 100: 0.2, 200: 0.2}),
        (curve("linear", "1ep", 0.0, "2ep", "4ep"), {10: 0.5, 20: 1.0, 40: 1.0, 60: 0.5, 80: 0.0, 90: 0.0}),
        (curve("cosine", "1ep"), {0: 0.0, 20: 1.0, 60: 0.5, 40: 0.5 + 0.5 * math.cos(math.pi / 4), 100: 0.0}),
        (curve("cosine", minimum=0.5), {0: 1.0, 50: 0.75, 100: 0.5}),
        (curve("cosine", "5ep"), {0: 0.0, 50: 0.5}),  # nothing is left for the decay
    ],
)
def test_schedules_by_hand(schedule, values):
    for images, expected in values.items():
        assert schedule(images) == pytest.approx(expected, abs=1e-12), images


def test_official_curves():
    path = parity.fixture_folder() / "rectok" / "utils_data_lr_ema_fid.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not here (set TESSERA_PARITY)")
    from tests.parity.rectok_utils import IMAGES_PER_EPOCH, schedule

    case = parity.Case.load(path)
    for name, recipe in case.config["lr"].items():
        ours = schedule(recipe)
        for epoch, expected in zip(case.inputs[f"epochs_{name}"].tolist(), case.outputs[f"lr_{name}"].tolist()):
            assert ours(round(epoch * IMAGES_PER_EPOCH)) == pytest.approx(expected, rel=1e-9, abs=1e-15), (name, epoch)


def test_trainer_uses_schedule_and_ema(build_trainer):
    trainer = build_trainer(TOY_TOKENIZER)
    name, parameter = next((n, p) for n, p in trainer.networks["tokenizer"].named_parameters() if p.requires_grad)
    by_hand = {decay: parameter.detach().clone() for decay in (0.9, 0.99)}
    batches = trainer.batches(0)
    for number in range(7):
        extra = trainer.train_step(next(batches))
        assert extra["lr"] == trainer.schedules["tokenizer"](8 * number) and trainer.step == number + 1
        by_hand = {decay: decay * average + (1 - decay) * parameter.detach() for decay, average in by_hand.items()}
    for decay, average in by_hand.items():
        torch.testing.assert_close(trainer.ema.state(decay)[name], average, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Modes that must not change results
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mode",
    [
        ["train.activation_checkpointing=true"],
        ["train.compile=true"],
        ["train.compile=true", "train.activation_checkpointing=true"],
    ],
    ids="+".join,
)
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_compile_and_checkpointing_change_nothing(build_trainer, monkeypatch, tokenizer_run, mode, kind):
    # The compiler's graph capture and autograd without its code generation, which takes minutes.
    monkeypatch.setattr(parallel, "compile_blocks", functools.partial(parallel.compile_blocks, backend="aot_eager"))
    torch._dynamo.reset()
    config, more = (
        (TOY_TOKENIZER, []) if kind == "tokenizer" else (TOY_GENERATOR, [f"tokenizer.weights={tokenizer_run}"])
    )
    plain = build_trainer(config, *more, "objective.gan_start_epoch=0" if kind == "tokenizer" else "seed=0")
    changed = build_trainer(config, *more, *mode, "objective.gan_start_epoch=0" if kind == "tokenizer" else "seed=0")
    for name, network in changed.networks.items():
        assert list(network.state_dict()) == list(plain.networks[name].state_dict())
    compilations = torch._dynamo.utils.counters["frames"]["total"]
    assert_same(changed, plain)
    assert (torch._dynamo.utils.counters["frames"]["total"] > compilations) == ("train.compile=true" in mode)


@pytest.mark.parametrize(
    "system, whole", [pytest.param("imagefolder", PatchGAN, marks=pytest.mark.slow), ("vqgan_plus", LPIPS)]
)
def test_everything_of_a_tokenizers_step_compiles(build_trainer, monkeypatch, system, whole):
    """Loss networks, teachers and discriminators too, and adaptive weights, which differentiate parts of them twice."""
    monkeypatch.setattr(parallel, "compile_blocks", functools.partial(parallel.compile_blocks, backend="aot_eager"))
    torch._dynamo.reset()
    compiled: list[nn.Module] = []
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: (compiled.append(self), original(self, **how))[1])
    config, active = toy(f"{system}_tokenizer"), ["objective.gan_start=0step", "objective.adaptive_weight=true"]
    if whole is LPIPS:
        lpips = "{widths: [4, 8, 8, 8, 8], pretrained: false}"
        active += [f"objective.perceptual={{lpips: {lpips}}}", "objective.weights.perceptual=1.0"]
    assert_same(build_trainer(config, *active, "train.compile=true"), build_trainer(config, *active), rtol=1e-4)
    assert any(isinstance(part, whole) for part in compiled)


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_bf16_leaves_losses_and_weights_in_fp32(build_trainer, tokenizer_run, kind):
    config, more = (
        (TOY_TOKENIZER, []) if kind == "tokenizer" else (TOY_GENERATOR, [f"tokenizer.weights={tokenizer_run}"])
    )
    half, full = build_trainer(config, *more, "train.precision=bf16"), build_trainer(config, *more)
    seen: list[torch.dtype] = []
    original = half.task.phases

    def phases(*arguments):
        for phase in original(*arguments):
            seen.extend([phase.loss.total.dtype, *(v.dtype for v in phase.loss.logs.values())])
            yield phase

    half.task.phases = phases
    for a, b in zip(steps(half, 2), steps(full, 2)):
        key = "total" if kind == "tokenizer" else "flow"
        assert a[key] == pytest.approx(b[key], rel=0.05)
        assert a[key] != b[key], "autocast does nothing"
    assert set(seen) == {torch.float32}
    for network in half.networks.values():
        assert {t.dtype for t in network.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert {t.dtype for t in first_moments(half).values()} == {torch.float32}


class NoHostReads(TorchDispatchMode):
    """Fails on operations that would make the host wait for a GPU: reading a number or a data-dependent shape."""

    FORBIDDEN = {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::is_nonzero",
        "aten::nonzero",
        "aten::equal",
        "aten::masked_select",
        "aten::_unique2",
        "aten::repeat_interleave",
    }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in self.FORBIDDEN or (
            name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            raise AssertionError(f"{name} makes the host wait for the device")
        return function(*args, **(kwargs or {}))


def test_the_detector_detects():
    x = torch.ones(3)
    for read in (lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: x[x > 0], lambda: x.nonzero()):
        with pytest.raises(AssertionError, match="wait"), NoHostReads():
            read()


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_reads_the_device(build_trainer, tokenizer_run, kind, precision):
    if kind == "tokenizer":
        trainer = build_trainer(TOY_TOKENIZER, "objective.gan_start_epoch=0", f"train.precision={precision}")
    else:
        trainer = build_trainer(TOY_GENERATOR, f"tokenizer.weights={tokenizer_run}", f"train.precision={precision}")
    batches = trainer.batches(0)
    for batch in (next(batches), next(batches)):
        with NoHostReads():
            trainer.train_step(batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_synchronises_on_a_gpu(build_trainer, tokenizer_run, kind, precision):
    more = ["objective.gan_start_epoch=0"] if kind == "tokenizer" else [f"tokenizer.weights={tokenizer_run}"]
    config = TOY_TOKENIZER if kind == "tokenizer" else TOY_GENERATOR
    trainer = build_trainer(config, *more, f"train.precision={precision}", device="cuda")
    batches = trainer.batches(0)
    trainer.train_step(next(batches))  # kernels are loaded and lazily made state appears
    loaded = [next(batches).to(trainer.world.device) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in loaded:
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_sink_that_fails_later_ends_no_run(tmp_path):
    """The service of Weights & Biases has died, say: told once, and the numbers are in the folder."""

    class Lost:
        def __call__(self, *_):
            raise BrokenPipeError("the service is gone\nmore")

        picture = close = __call__

    said, written = [], []
    run = types.SimpleNamespace(path=tmp_path, log=said.append, write_metrics=written.append)
    running = log.RunLog(run, LogConfig(), ALONE, 100, {}, sinks=[Lost()])
    for step in (1, 2):
        running.write({"step": step, "images_seen": step, "loss": 0.5})
    running.picture(torch.zeros(3, 4, 4, dtype=torch.uint8), 2)
    running.close()
    assert [record["step"] for record in written] == [1, 2]
    assert said == [
        f"warning: Lost does not take {what} (BrokenPipeError: the service is gone)"
        for what in ("numbers", "previews", "the end of the run")
    ]


def test_the_live_line_shows_what_is_known(tmp_path, capsys):
    """Losses are known from the first record on; before it the line has no dashes for them."""
    run = types.SimpleNamespace(path=tmp_path / "mine", write_metrics=lambda record: None)
    running = log.RunLog(run, LogConfig(), ALONE, 2, {}, live=("loss", "psnr"))
    running.show(1, 1)
    running.latest = {"loss": 0.25, "psnr": 9.5, "lr": 1e-4}
    running.show(2, 2)
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("step 1") and last.endswith("step 2  loss 0.25  psnr 9.5  lr 0.0001")


def test_what_cannot_log_is_known_before(tmp_path, monkeypatch):
    assert not log.sink_problems(LogConfig())
    monkeypatch.setattr(log, "_installed", lambda name: False)
    everything = LogConfig(wandb=True, tensorboard=True, trackio=True)
    assert log.sink_problems(everything) == list(log.NEEDS.values())


@pytest.mark.parametrize("login", ["none", "key", "netrc", "offline", "unknown"])
def test_a_login_that_is_missing_is_known_before(login, tmp_path, monkeypatch):
    settings = types.SimpleNamespace(mode="online", api_key=None, identity_token_file=None, base_url="https://w.b")
    settings.api_key, settings.mode = "k" if login == "key" else None, "offline" if login == "offline" else "online"
    stub = types.SimpleNamespace(setup=lambda: types.SimpleNamespace(settings=settings))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace() if login == "unknown" else stub)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine w.b login user password k\n" if login == "netrc" else "")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert bool(log.sink_problems(LogConfig(wandb=True))) == (login == "none")


def test_a_run_that_wandb_does_not_take(tmp_path, monkeypatch):
    """Nobody is logged in, say. Names with a colon get an id without."""
    asked = {}

    def init(**options):
        asked.update(options)
        raise ValueError("No API key configured. Use `wandb login` to log in.\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    run = types.SimpleNamespace(path=tmp_path / "a:b#c")
    run.path.mkdir()
    with pytest.raises(UserError, match=r"does not take the run \(ValueError: No API key .* log in.\). Log in with"):
        log._Wandb(run, LogConfig(wandb=True), {})
    assert re.fullmatch("a-b-c-[0-9a-f]{8}", asked["id"]) and asked["name"] == "a:b#c"
