"""run/adapt.py: weights for other classes and other grids, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.config import to_plain
from core.errors import UserError
from core.rng import Draws
from core.schema import OptimizerConfig
from core.specs import Guidance
from core.train.checkpoint import Checkpoint
from core.train.optim import make_adamw
from generator import GENERATORS
from run import adapt
from run.load import Weights, introduce
from tests.conftest import ROOT
from tests.run.test_mix import GENERATORS_TO_TRY, NATIVE, TOKENIZERS_TO_TRY
from tokenizer import TOKENIZERS

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
        (str(ROOT / "configs/toy/fqgan_tokenizer.yaml"), ["train.trunk_lr=0.1"], "a tokenizer knows no classes"),
    ],
)
def test_settings_that_do_not_go_together(train_main, config, words, said):
    code, _, error = train_main(config, *words)
    assert code == 2 and said in error
