"""--dry-run: counts agree with the published ones, recipes fit their GPUs, nothing but the config is needed."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from core.errors import UserError
from core.estimate import Rehearsal, number
from core.specs import Loss, Phase
from run import estimate
from run.load import load_config
from tests.conftest import ROOT
from tests.gpu_path.memory import CEILING
from tests.run.test_recipes import RECIPES

# The hungriest of each network, or the one with another kind of latents; all others run with all tests.
EACH_KIND = {
    f"configs/{name}.yaml"
    for name in (
        "dar/ar_xl",
        "dar/tokenizer",
        "fqgan/dual_ds16",
        "fqgan/far_l_triple",
        "fqgan/triple_ds8",
        "imagefolder/ablation_1",
        "imagefolder/ms_pq2_4096",
        "imagefolder/var_d17",
        "mix/dar__dit_dh",
        "mix/imagefolder__far",
        "mix/titok__gpt",
        "rear/rar_xxl",
        "rear/rear_b",
        "rear/vqgan_plus_tokenizer",
        "rectok/decoder_finetune",
        "rectok/ditdh_xl_512",
        "rectok/tokenizer_512",
    )
}
assert set(RECIPES) >= EACH_KIND


def costs(path: str, *overrides: str):
    return {c.name: c for c in estimate.costs(load_config(path, list(overrides)))[1]}


def test_published_sizes_and_flops():
    """Figures of the RecTok spec: 172 M + semantic decoder, 835 M; 46.3 GFLOPs to decode, 321.4 for DiT^DH-XL."""
    tokenizer = costs("configs/rectok/tokenizer.yaml", "tokenizer.mask_ratio=0")["tokenizer"]
    assert tokenizer.parameters == 171_970_900 + 1_606_336
    assert tokenizer.forward_flops == pytest.approx((46.3 + 46.3 + 0.94) * 1e9, rel=0.01)
    generator = costs("configs/rectok/ditdh_xl.yaml", "tokenizer.name=rectok")["generator"]
    assert generator.parameters == 835_316_436 and generator.trainable == 835_021_268
    assert generator.forward_flops == pytest.approx(321.4e9, rel=0.005)


class Toy(nn.Module):
    def __init__(self, width: int = 64):
        super().__init__()
        self.first, self.second = nn.Linear(4, width, bias=False), nn.Linear(width, 8, bias=False)

    def forward(self, x):
        return self.second(self.first(x).relu())


def rehearse(images: int, half: bool, width: int = 64):
    with torch.device("meta"):
        network = Toy(width)

    def phases(networks):
        yield Phase("n", Loss(networks["n"](torch.zeros(images, 4)).float().sum()))

    return Rehearsal({"n": network}, [], half).step(phases)


def test_flops_and_peak_by_hand():
    """Two layers and a ReLU: products of forward and backward, and what is alive when the second gradient is made."""
    step = rehearse(32, half=False)
    forward = 2 * 32 * 64 * (4 + 8)
    assert step.forward["n"] == forward
    assert step.flops == 2 * forward + 2 * 32 * 64 * 8  # the input needs no gradient
    # At its peak, at the ReLU's backward: input, ReLU's output, both layers' gradients; before it the ReLU's input went.
    assert 4 * 32 * (4 + 2 * 64 + 8) <= step.peak <= 4 * 32 * (4 + 2 * 64 + 2 * 8) + 2 * 4 * 64 * (4 + 8) + 64
    grown = rehearse(320, half=False).peak
    assert 9 < grown / step.peak <= 10.1


def test_numbers_leave_room_for_their_unit():
    assert [number(v) for v in (12.0, 1234.5, 7.277e11, 1.865e20)] == ["12 ", "1.234 k", "727.7 G", "1.86e20 "]


def test_half_precision_is_measured_not_assumed():
    """Under bf16 the weights' copies stay for backward and do not grow with the batch; activations take half."""
    small, large = (rehearse(n, half=True, width=512).peak for n in (1024, 2048))
    full = [rehearse(n, half=False, width=512).peak for n in (1024, 2048)]
    assert (large - small) / (full[1] - full[0]) == pytest.approx(0.5, abs=0.06)


def test_attention_dropout_keeps_no_scores():
    """RAR's recipe drops attention weights: on a GPU that keeps the results of one more pass and no scores."""

    def peak(dropout: float) -> int:
        config = load_config(
            "configs/toy/rear.yaml",
            [
                f"generator.attention_dropout={dropout}",
                "tokenizer.weights=null",
                "tokenizer.name=maskgit_vqgan",
                "generator.size={width: 32, layers: 2, heads: 8, hidden: 32}",
                "train.global_batch=4",
                "data.cache_latents=true",
            ],
        )
        return estimate.Plan(config, 1).step.peak

    scores = 2 * 4 * 8 * 258 * 258  # layers, pictures, heads, slots x slots
    results = 2 * 4 * 258 * (32 + 8) * 4  # layers, pictures, slots, width and sums, bytes
    assert results <= peak(0.1) - peak(0.0) < 2 * results < scores


COST = re.compile(r"about ([\d.]+) (min|h)(?: per epoch|(?: for (\d+) epochs)?)[^(]*\(([\d.]+e\d+) FLOPs( per epoch)?")


def stated(path: str) -> str:
    """The comment at the head of a recipe, in one line."""
    lines = (ROOT / path).read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))


def require_stated_cost(path: str, plan: estimate.Plan) -> None:
    """The hours and FLOPs at the head of a recipe are those that --dry-run computes; of an alike recipe about those."""
    head, train, rough = stated(path), plan.config.train, 0.0
    if "Cost: --dry-run" in head:
        return
    if alike := re.search(r"(?:Hardware and time|Cost) as (\w+\.yaml)", head):
        head, rough = stated(str(Path(path).with_name(alike[1]))), 0.2
    found = COST.search(head)
    assert found, f"{path} does not say what it costs"
    duration, unit, epochs, flops, per_epoch = found.groups()
    images = train.duration.images(estimate.IMAGENET, train.global_batch)
    if per_epoch or epochs:
        images = estimate.IMAGENET * int(epochs or 1)
    counted = plan.step.flops / plan.micro * images
    hours = counted / (8 * estimate.TFLOPS[train.precision] * 1e12) / 3600
    assert float(flops) == pytest.approx(counted, rel=rough or 0.06)  # two digits
    said = float(duration) / (60 if unit == "min" else 1)
    assert said == pytest.approx(hours, rel=rough or 0.06, abs=0.5 / (60 if unit == "min" else 1))


@pytest.mark.parametrize("path", [pytest.param(p, marks=[] if p in EACH_KIND else pytest.mark.slow) for p in RECIPES])
def test_recipes_fit_their_hardware(path):
    """Every published recipe keeps below 80 GB on each of 8 GPUs, and costs what it says; no weights, data or GPU."""
    plan = estimate.Plan(load_config(path, []), 8)
    assert plan.memory.total < min(80e9, CEILING), (
        f"{plan.memory.total / 1e9:.1f} GB; train.micro_batch={plan.fitting(80e9)} fits"
    )
    require_stated_cost(path, plan)


@pytest.mark.parametrize("system", ["fqgan", "imagefolder"])
def test_discriminators_that_begin_late_are_counted(system):
    plan = estimate.Plan(load_config(f"configs/quickstart/{system}/tokenizer.yaml", []), 1)
    assert all(cost.forward_flops > 0 for cost in plan.costs) and "discriminator" in {cost.name for cost in plan.costs}


def test_dry_run_compares_with_the_gpu(capsys):
    """What fits is the largest equal part of a GPU's pictures."""
    from scripts import train

    words = ["configs/fqgan/far_b_dual.yaml", "train.micro_batch=0", "--dry-run"]
    assert train.main([*words, "--gpus", "1", "--gpu-gb=40"]) == 0
    printed = capsys.readouterr().out
    assert "fqgan_dual_ds16.pt is not here; its sizes are those of configs/fqgan/dual_ds16.yaml" in printed
    assert "256 images on 1 GPU(s): 256 each, 256 at a time" in printed and "does not fit" in printed
    fitting = int(re.search(r"the most that fits is train.micro_batch=(\d+)", printed)[1])
    assert fitting in (32, 64)
    assert train.main([*words, f"train.micro_batch={fitting}", "--gpus=1", "--gpu-gb", "40"]) == 0
    printed = capsys.readouterr().out
    assert f"fits; the most that fits is train.micro_batch={fitting}" in printed
    assert (
        "if the data are ImageNet's" in printed and "hours on 1 GPU(s) at 400 TFLOP/s each, which is assumed" in printed
    )
    with pytest.raises(UserError, match="--gpus: a whole number"):
        train.main([*words, "--gpus", "many"])


def test_dry_run_prints_and_creates_nothing(tmp_path, capsys, monkeypatch):
    from scripts import train

    assert train.main(["configs/toy/rectok_tokenizer.yaml", f"work_dir={tmp_path}/runs", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "parameters" in printed and "FLOPs" in printed and "20 steps" in printed and "GB per GPU" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("toy", sorted(path.stem for path in (ROOT / "configs" / "toy").glob("*_tokenizer.yaml")))
def test_toy_recipes_pass_the_check(toy, tmp_path):
    from scripts import train

    assert train.main([f"configs/toy/{toy}.yaml", f"work_dir={tmp_path}", "--check"]) == 0
