"""run/adapt.py: weights for other classes and other grids, in every family."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from core.config import to_plain
from core.dist import World
from core.errors import UserError
from core.files import read_json
from core.rng import Draws
from core.schema import LoraConfig, OptimizerConfig
from core.specs import Guidance
from core.train.checkpoint import Checkpoint
from core.train.low_rank import AdaptingAdamW, adapted_weights, factors_of, keep_adapted
from core.train.optim import freeze, make_adamw
from core.train.optimizer_state import flatten_optimizer
from core.train.parallel import replicate
from core.weights import files as weight_files
from generator import GENERATORS
from run import adapt
from run.convert import in_bf16
from run.load import introduce, read_generator, read_tokenizer
from run.weights import Weights
from scripts import convert, pretokenize
from tests.conftest import ROOT
from tests.ranks import in_processes
from tests.run.test_mix import GENERATORS_TO_TRY, NATIVE, TOKENIZERS_TO_TRY
from tokenizer import TOKENIZERS

SYSTEMS = sorted(path.name for path in (ROOT / "configs" / "tiny").iterdir())
FAR = str(ROOT / "configs" / "toy" / "far.yaml")
OTHER_GRID = {name: {"image_size": 2 * TOKENIZERS_TO_TRY[name]["image_size"]} for name in TOKENIZERS_TO_TRY}
OTHER_GRID["imagefolder"] |= {"latent_grid": 5, "scales": [1, 3, 5]}


def tokenizer_of(name: str, **changes: object):
    arguments = {"name": name, **TOKENIZERS_TO_TRY[name], **changes}
    if "pretrained" in TOKENIZERS.signature(name):
        arguments["pretrained"] = False
    return TOKENIZERS.build(arguments).eval()


def generator_of(name: str, tokenizer, num_classes: int):
    """With random weights everywhere: some start at zero, and then no class shows."""
    accepted = GENERATORS.signature(name)
    sizes = {k: v for k, v in {**tokenizer.spec.sizes(), "num_classes": num_classes}.items() if k in accepted}
    torch.manual_seed(num_classes)
    generator = GENERATORS.build({"name": name, **GENERATORS_TO_TRY[name], **sizes}).eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    introduce(generator, tokenizer)
    return generator


@pytest.mark.parametrize(("tokenizer", "_", "name"), NATIVE)
def test_a_copied_class_is_sampled_as_it_was(tokenizer, _, name):
    """Trunk, no class and copied rows are all that guided samples depend on."""
    codec = tokenizer_of(tokenizer)
    old, new = generator_of(name, codec, 5), generator_of(name, codec, 3)
    new.load_state_dict(adapt.with_rows(old.state_dict(), new, [2, None, 4]))
    draws, guidance = Draws(0, torch.arange(2)), Guidance(2.0)
    ours = new.sample(torch.tensor([0, 2]), draws, guidance)
    assert torch.equal(ours, old.sample(torch.tensor([2, 4]), draws, guidance))
    assert not torch.equal(ours, old.sample(torch.tensor([1, 3]), draws, guidance))
    table, first = new.class_rows()
    before, after = old.state_dict()[table], new.state_dict()[table]
    assert torch.allclose(after[first + 1], before[first : first + 5].mean(0), atol=1e-6)
    assert torch.equal(after[:first], before[:first]) and torch.equal(after[-1], before[-1])


@pytest.mark.parametrize(("tokenizer", "_", "name"), NATIVE)
def test_generators_of_another_grid(tokenizer, _, name):
    codec, larger = tokenizer_of(tokenizer), tokenizer_of(tokenizer, **OTHER_GRID[tokenizer])
    old, new = generator_of(name, codec, 3), generator_of(name, larger, 3)
    settings = {"scales": getattr(codec.spec, "scales", None)}
    state = old.state_dict()
    assert all(torch.equal(old.resized(state, settings, codec.spec)[k], v) for k, v in state.items())
    resized = new.resized(state, settings, larger.spec)
    fixed = {"pos_embed": new.pos_embed} if name == "dit_dh" else {}
    new.load_state_dict(resized)
    assert all(torch.equal(new.state_dict()[k], v) for k, v in fixed.items())
    assert torch.isfinite(new.sample(torch.tensor([0]), Draws(0, torch.arange(1))).float()).all()


def test_learned_positions_keep_their_place():
    """A table that rises from left to right still does, at every size; what is no place stays."""
    codec, larger = tokenizer_of("maskgit_vqgan"), tokenizer_of("maskgit_vqgan", image_size=32)
    old, new = generator_of("rar", codec, 3), generator_of("rar", larger, 3)
    side, wide = codec.spec.grid[0], larger.spec.grid[0]
    state = {name: value.clone() for name, value in old.state_dict().items()}
    ramp = torch.arange(side).repeat(side).float()
    state["pos_embed"][0, 2 : 2 + side * side] = ramp[:, None]
    steps = old.length
    state["timesteps_embeddings"][0, 2 : 2 + steps] = torch.linspace(0, 1, steps)[:, None]
    resized = new.resized(state, {}, larger.spec)
    rows = resized["pos_embed"][0, 2 : 2 + wide * wide, 0].reshape(wide, wide)
    assert (rows.diff(dim=1) > 0).all() and rows.diff(dim=0).abs().max() < 1e-5
    assert torch.equal(resized["pos_embed"][0, :2], state["pos_embed"][0, :2])
    line = resized["timesteps_embeddings"][0, 2 : 2 + new.length, 0]
    assert torch.allclose(line, torch.linspace(0, 1, new.length), atol=1e-5)


@pytest.mark.parametrize("name", list(TOKENIZERS_TO_TRY))
def test_tokenizers_of_another_size(name):
    old, new = tokenizer_of(name), tokenizer_of(name, **OTHER_GRID[name])
    settings = {"name": name, **TOKENIZERS_TO_TRY[name]}
    weights = Weights("tokenizer", Path("old"), settings, lambda _: old.state_dict())
    new.load_state_dict(weights.read(new, change=lambda state: new.resized(state, settings)))
    pictures = torch.zeros(1, 3, new.image_size, new.image_size)
    draws = Draws(0, torch.arange(1))
    assert new.decode(new.encode(pictures), draws).shape == pictures.shape
    same = {k: v for k, v in old.state_dict().items() if v.shape == new.state_dict()[k].shape}
    assert len(same) > 5 and all(torch.equal(new.state_dict()[k], v) for k, v in same.items())


def test_sizes_that_cannot_be_had():
    latents, more = tokenizer_of("titok"), tokenizer_of("titok", latents=9)
    old, new = generator_of("rar", latents, 3), generator_of("rar", more, 3)
    with pytest.raises(UserError, match="6 codes and the tokenizer gives 9 that lie on no grid"):
        new.resized(old.state_dict(), {}, more.spec)
    scales, other = tokenizer_of("imagefolder"), tokenizer_of("imagefolder", scales=[1, 3], start_drop=1)
    old, new = generator_of("var", scales, 3), generator_of("var", other, 3)
    with pytest.raises(UserError, match="number and the first one cannot"):
        new.resized(old.state_dict(), {"scales": [1, 2, 3]}, other.spec)


def test_the_trunk_has_a_rate_of_its_own():
    generator = generator_of("far", tokenizer_of("fqgan"), 3)
    groups = make_adamw(generator, OptimizerConfig(weight_decay=0.1), 0.25).param_groups
    table = generator.class_rows()[0]
    assert {tuple(g["names"]) for g in groups if g.get("factor", 1) == 1} == {(table,)}
    assert sum(len(g["names"]) for g in groups) == len(list(generator.parameters()))
    plain = make_adamw(generator, OptimizerConfig(weight_decay=0.1)).param_groups
    assert len(plain) == 2 and "factor" not in plain[0]


def small_step(network, optimizer, seed: int) -> None:
    """With gradients of random numbers."""
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group.get("factor", 1)
    random = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=random)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_codes_in_the_table_of_classes_have_the_rate_of_the_trunk(share):
    """RAR's codes come before the class rows; Adam does not care for the size of a gradient, so rates it must be."""
    network, plain = (generator_of("rar", tokenizer_of("maskgit_vqgan"), 3) for _ in range(2))
    table, first = network.class_rows()
    start = network.state_dict()[table].clone()
    small_step(network, make_adamw(network, OptimizerConfig(weight_decay=0.1), share), 0)
    small_step(plain, make_adamw(plain, OptimizerConfig(weight_decay=0.1)), 0)
    moved, whole = (n.state_dict()[table] - start for n in (network, plain))
    assert torch.equal(moved[first:], whole[first:]) and moved[first:].abs().min() > 0
    assert torch.allclose(moved[:first], share * whole[:first], atol=1e-7)
    assert share or torch.equal(network.state_dict()[table][:first], start[:first])


@pytest.mark.parametrize("name", ["far", "rar", "var", "dit_dh", "gpt"])
def test_low_rank_changes(name):
    """Class rows and low-rank changes of the blocks alone, and what the optimiser keeps is small."""
    network = generator_of(name, tokenizer_of({g: t for t, _, g in NATIVE}[name]), 3)
    keep_adapted(network)
    before = {n: v.clone() for n, v in network.state_dict().items()}
    optimizer = make_adamw(network, OptimizerConfig(), lora=LoraConfig(rank=2, alpha=4))
    for seed in range(3):
        small_step(network, optimizer, seed)
    after, adapted, (table, first) = network.state_dict(), adapted_weights(network), network.class_rows()
    assert len(adapted) > 3
    for parameter, value in before.items():
        moved = after[parameter] - value
        if parameter in adapted:
            assert torch.linalg.matrix_rank(moved.double(), rtol=1e-4) <= 2 and moved.abs().max() > 0, parameter
        elif parameter == table:
            assert torch.equal(moved[:first], torch.zeros_like(moved[:first])) and moved[first:].abs().min() > 0
        else:
            assert torch.equal(after[parameter], value), parameter
    kept = sum(t.numel() for k, t in flatten_optimizer(optimizer)[0].items() if k.startswith("exp_avg/"))
    assert kept == after[table].numel() + sum(2 * sum(w.shape) for w in adapted.values())


def test_low_rank_changes_are_those_of_adapters():
    """Against layers that compute with W0 + scale B A and train A and B by torch's own AdamW."""
    network = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(5, 4))]))
    layer, x = network[0][0][0], torch.randn(7, 5)
    (f,) = factors_of(network, 2, 6.0)
    groups = [{"params": [f.a, f.b], "names": ["a", "b"]}]
    optimizer = AdaptingAdamW(groups, [f], None, lr=0.05, weight_decay=0.1)
    base, a, b = (t.detach().clone() for t in (layer.weight, f.a, f.b))
    a.requires_grad_(), b.requires_grad_()
    usual = torch.optim.AdamW([a, b], lr=0.05, weight_decay=0.1)
    for _ in range(5):
        layer(x).square().mean().backward()
        torch.nn.functional.linear(x, base + 3.0 * (b @ a), layer.bias).square().mean().backward()
        for each in (optimizer, usual):
            each.step(), each.zero_grad()
    assert torch.allclose(layer.weight, base + 3.0 * (b @ a), atol=1e-6)
    assert (layer.weight - base).abs().max() > 0.05


def lora_steps(world: World | None, folder: Path) -> None:
    """Four steps on six samples, of which each rank has its part; the weights go to a file of the rank."""
    torch.manual_seed(0)
    network = generator_of("far", tokenizer_of("fqgan"), 3).train()
    keep_adapted(network)
    codes = torch.randint(0, network.vocab, (6, network.length, network.branches))
    labels, size, rank = torch.tensor([0, 1, 2, 0, 1, 2]), world.size if world else 1, world.rank if world else 0
    replicated = replicate(network, world) if world else network
    optimizer = make_adamw(network, OptimizerConfig(), lora=LoraConfig(rank=2, alpha=4))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for step in range(4):
        part = torch.arange(6).chunk(size)[rank]
        replicated(codes[part], labels[part], Draws(step, part)).total.backward()
        optimizer.step(), optimizer.zero_grad()
    torch.save(network.state_dict(), folder / f"{size}_{rank}.pt")


def test_low_rank_changes_on_two_ranks(tmp_path):
    """Both end with the same bits, and with what one rank makes of all samples but for the order of sums."""
    lora_steps(None, tmp_path)
    assert in_processes(2, lora_steps, tmp_path, method="spawn") == [0, 0]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    fresh = generator_of("far", tokenizer_of("fqgan"), 3)
    start = fresh.state_dict()
    assert {n for n in one if not torch.equal(start[n], one[n])} == {*adapted_weights(fresh), fresh.class_rows()[0]}
    for name in one:
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - one[name]).norm() <= 0.02 * (one[name] - start[name]).norm(), name


# ---------------------------------------------------------------------------------------------------------------------
# From the command line
# ---------------------------------------------------------------------------------------------------------------------
TOY = ["tokenizer.weights=null", "tokenizer.name=toy_codes", "train.device=cpu", "train.preview_every=never"]
THREE = "data.url=synthetic://?size=32&classes=3&count=24"


@pytest.fixture
def run(monkeypatch, train_main, tmp_path):
    monkeypatch.setitem(TOKENIZERS.entries, "toy_codes", "tests.toy_codes:ToyCodes")

    def call(name: str, *overrides: str) -> tuple[int, str]:
        words = [*TOY, f"work_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache", f"name={name}"]
        code, _, said = train_main(FAR, *words, "train.duration=2step", *overrides)
        return code, said

    return call


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return Checkpoint(folder / "checkpoints" / "latest").tensors("generator")


def test_new_classes_from_a_run(run, tmp_path):
    """With the trunk held still by trunk_lr=0 all but the class rows keep their bits."""
    assert run("old")[0] == 0
    words = [THREE, f"train.init_from={tmp_path}/old", "train.new_classes=from:3,mean,0"]
    code, said = run("new", *words, "train.trunk_lr=0")
    assert code == 0, said
    old, new, table = weights_of(tmp_path / "old"), weights_of(tmp_path / "new"), "cls_embedding.embedding_table.weight"
    assert new[table].shape[0] == 4 and old[table].shape[0] == 5
    assert all(torch.equal(old[name], new[name]) for name in old if name != table)
    start = torch.stack([old[table][3], old[table][:4].mean(0), old[table][0], old[table][4]])
    moved = (new[table] - start).abs()
    assert 0 < moved.max() < 0.01, moved.max()
    state = Checkpoint(tmp_path / "new" / "checkpoints" / "latest").state
    assert to_plain(state["config"])["generator"]["num_classes"] == 3
    assert run("new", *words, "train.trunk_lr=0", "train.duration=3step")[0] == 0, "the run goes on"


def test_low_rank_changes_of_a_run(run, tmp_path):
    """Resumed, it ends with the same bits; its weights are plain ones, which are loaded, converted and trained on as any."""
    assert run("old")[0] == 0
    words = [
        THREE,
        f"train.init_from={tmp_path}/old",
        "train.new_classes=mean",
        "train.lora.rank=2",
        "train.lora.alpha=2",
    ]
    code, said = run("whole", *words, "train.duration=4step", "train.schedule.kind=constant")
    assert code == 0, said
    assert run("parts", *words, "train.duration=2step", "train.schedule.kind=constant")[0] == 0
    assert run("parts", *words, "train.duration=4step", "train.schedule.kind=constant")[0] == 0
    whole, parts, old = (weights_of(tmp_path / name) for name in ("whole", "parts", "old"))
    assert whole.keys() == old.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    changed = {name for name in old if whole[name].shape != old[name].shape or not torch.equal(whole[name], old[name])}
    moved = [name for name in changed if name != "cls_embedding.embedding_table.weight"]
    assert len(changed) == len(moved) + 1 and 3 < len(moved) < len(old) / 2
    assert all(torch.linalg.matrix_rank((whole[n] - old[n]).double(), rtol=1e-3) <= 2 for n in moved)
    assert convert.main([str(tmp_path / "whole"), str(tmp_path / "merged.safetensors"), "--weights", "raw"]) == 0
    file = weight_files.read(tmp_path / "merged.safetensors")
    assert file is not None and file.weights.keys() == old.keys()
    assert all(torch.equal(file.weights[name], whole[name]) for name in moved)


def test_frozen_weights_are_the_averaged_ones_of_a_run(run, tmp_path):
    assert run("old")[0] == 0
    words = [f"train.init_from={tmp_path}/old", "train.freeze=[layers.*,cls_*]"]
    code, said = run("tuned", *words)
    assert code == 0, said
    averaged = Checkpoint(tmp_path / "old" / "checkpoints" / "latest").tensors("generator.ema_0.9")
    old, tuned = weights_of(tmp_path / "old"), weights_of(tmp_path / "tuned")
    frozen = {name for name in averaged if name.startswith(("layers.", "cls_"))}
    assert frozen and all(torch.equal(tuned[name], averaged[name]) for name in frozen)
    assert any(not torch.equal(averaged[name], old[name]) for name in frozen)
    assert any(not torch.equal(tuned[name], old[name]) for name in averaged.keys() - frozen)
    assert run("tuned", *words, "train.duration=3step")[0] == 0, "the run goes on"
    code, error = run("more", *words, "train.freeze=[layer.*]", "--check")
    assert code == 2 and "no parameter is named layer.*" in error, error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "knows 4 classes and the data have 3: train.new_classes=mean"),
        (["train.new_classes=median"], "give mean, or from:"),
        (["train.new_classes=from:1,2"], "names 2 old classes and the data have 3"),
        (["train.new_classes=from:1,2,tench"], 'train.new_classes: "tench" is neither'),
    ],
)
def test_mistakes_are_found_before_training(run, tmp_path, words, said):
    assert run("old")[0] == 0
    for more in ([], ["--check"]):
        code, error = run("new", THREE, f"train.init_from={tmp_path}/old", *words, *more)
        assert code == 2 and said in error, error


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        (FAR, ["train.new_classes=mean"], "name its weights"),
        (FAR, ["train.trunk_lr=2"], "trunk_lr"),
        (FAR, ["train.lora={rank: 4}"], "changes weights that are there"),
        (str(ROOT / "configs/toy/fqgan_tokenizer.yaml"), ["train.lora={}"], "is for generators"),
        (str(ROOT / "configs/toy/fqgan_tokenizer.yaml"), ["train.trunk_lr=0.1"], "a tokenizer knows no classes"),
    ],
)
def test_settings_that_do_not_go_together(train_main, config, words, said):
    code, _, error = train_main(config, *words)
    assert code == 2 and said in error


def documented_patterns() -> dict[str, list[str]]:
    """Of docs/adapt.md, by tokenizer."""
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `\[(.+)\]` \|$", (ROOT / "docs" / "adapt.md").read_text(), re.M)
    return {name: patterns.split(",") for names, patterns in rows for name in re.findall(r"\w+", names)}


def test_every_tokenizer_says_what_keeps_its_codes():
    assert documented_patterns().keys() == set(TOKENIZERS.names())


@pytest.mark.parametrize("name", sorted(TOKENIZERS_TO_TRY))
def test_codes_stay_where_what_encodes_is_frozen(name):
    torch.manual_seed(0)
    tokenizer, draws = tokenizer_of(name), Draws(0, torch.arange(4))
    size = TOKENIZERS_TO_TRY[name]["image_size"]
    images = torch.rand(4, 3, size, size) * 2 - 1
    codes = tokenizer.encode(images, draws)
    pictures = tokenizer.decode(codes, draws)
    freeze(tokenizer, documented_patterns()[name])
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    assert torch.equal(tokenizer.encode(images, draws), codes)
    assert not torch.equal(tokenizer.decode(codes, draws), pictures)


def test_a_generator_takes_a_tokenizer_whose_decoder_was_tuned(train_main, tmp_path):
    def run(config: str, name: str, *words: str) -> tuple[int, str]:
        common = [f"work_dir={tmp_path}", f"name={name}", "train.device=cpu", "train.duration=2step"]
        code, _, said = train_main(str(ROOT / "configs" / "toy" / config), *common, *words)
        return code, said

    tokenizer = "fqgan_tokenizer.yaml"
    assert run(tokenizer, "first")[0] == 0
    start = f"train.init_from={tmp_path}/first"
    frozen = f"train.freeze=[{','.join(documented_patterns()['fqgan'])}]"
    assert run(tokenizer, "decoder", start, frozen)[0] == 0
    assert run(tokenizer, "other", start)[0] == 0
    codes = ["data.url=synthetic://?size=32&classes=4&count=24", f"data.cache_dir={tmp_path}/cache"]
    code, said = run("far.yaml", "generator", *codes, f"tokenizer.weights={tmp_path}/first")
    assert code == 0, said
    loaded = {name: read_tokenizer({"weights": f"{tmp_path}/{name}"}) for name in ("first", "decoder", "other")}
    assert len({each.fingerprint for each in loaded.values()}) == 3
    for name in ("first", "decoder"):
        read_generator(f"{tmp_path}/generator", loaded[name])
    with pytest.raises(UserError, match="does not encode as they did"):
        read_generator(f"{tmp_path}/generator", loaded["other"])
    more = [*codes, "train.duration=3step"]
    assert run("far.yaml", "generator", *more, f"tokenizer.weights={tmp_path}/decoder")[0] == 0
    code, said = run("far.yaml", "generator", *more, f"tokenizer.weights={tmp_path}/other", "train.duration=4step")
    assert code == 2 and "latents of another tokenizer" in said, said


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_shipped_tokenizer_is_trained_on(train_main, tmp_path, system):
    """Its files are in bf16, where a window of codes as fractions held numbers beyond the codebook."""
    words = [
        f"work_dir={tmp_path}",
        "train.duration=1step",
        "train.global_batch=2",
        "train.preview_every=never",
        "data.cache_features=false",
    ]
    recipe = str(ROOT / "configs" / "tiny" / system / "tokenizer.yaml")
    code, told, said = train_main(recipe, f"train.init_from=tiny/{system}", "train.device=cpu", *words)
    assert code == 0, said
    assert ("holds no sem_decoders.efficientnet_lite0, which only training needs" in told) == (system == "rectok")


def test_whole_numbers_survive_in_half_the_room():
    window = torch.tensor([0.0, 255.0, 257.0, 511.0])
    kept = in_bf16({"window": window, "weight": torch.tensor([1.0, 0.1]), "count": torch.tensor(300)})
    assert torch.equal(kept["window"], window)
    assert kept["weight"].dtype == torch.bfloat16 and kept["count"].dtype == torch.int64


def test_stores_take_a_tokenizer_whose_decoder_was_tuned(train_main, tmp_path):
    """What is kept of codes is the encoder's work; what an earlier version kept stays good for the tokenizer that made it."""

    def run(config: str, name: str, *words: str) -> tuple[int, str]:
        common = [f"work_dir={tmp_path}", f"name={name}", "train.device=cpu", "train.duration=2step"]
        code, _, said = train_main(str(ROOT / "configs" / "toy" / config), *common, *words)
        return code, said

    tokenizer, start = "fqgan_tokenizer.yaml", f"train.init_from={tmp_path}/first"
    assert run(tokenizer, "first")[0] == 0
    assert run(tokenizer, "decoder", start, f"train.freeze=[{','.join(documented_patterns()['fqgan'])}]")[0] == 0
    assert run(tokenizer, "other", start)[0] == 0
    data = ["data.url=synthetic://?size=32&classes=4&count=24", f"data.cache_dir={tmp_path}/cache", "data.crop=center"]

    def generator(name: str, weights: str, *words: str) -> tuple[int, str]:
        return run("far.yaml", name, *data, "data.flip=false", f"tokenizer.weights={tmp_path}/{weights}", *words)

    def kept() -> int:
        return len([*(tmp_path / "cache").glob("latents_*")])

    for name, weights, folders in (("a", "first", 1), ("b", "decoder", 1), ("c", "other", 2)):
        code, said = generator(name, weights, "data.cache_latents=true")
        assert code == 0 and kept() == folders, said
    store, description = tmp_path / "store", tmp_path / "store" / "description.json"
    words = [str(ROOT / "configs" / "toy" / "far.yaml"), f"tokenizer.weights={tmp_path}/first", "train.device=cpu"]
    assert pretokenize.main([*words, *data, "data.workers=0", "--out", str(store)]) == 0
    stored = f"data.url=tokens://{store}"
    assert generator("d", "decoder", stored)[0] == 0
    assert (
        pretokenize.main([*words, f"tokenizer.weights={tmp_path}/decoder", *data, "--out", str(store)]) == 0
    )  # looked at
    code, said = generator("e", "other", stored)
    assert code == 2 and "made by another tokenizer" in said, said
    told = read_json(description)
    description.write_text(json.dumps({key: value for key, value in told.items() if key != "encoding"}))
    assert generator("f", "first", stored)[0] == 0
    code, said = generator("g", "decoder", stored)
    assert code == 2 and "does not note which of them encode" in said, said


def test_freeze_refuses_what_it_cannot_mean():
    tokenizer = tokenizer_of("fqgan")
    with pytest.raises(UserError, match=r"no parameter is named encodr.\*. Names begin with encoder, heads"):
        freeze(tokenizer, ["encodr.*"])
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(tokenizer, ["*"])
