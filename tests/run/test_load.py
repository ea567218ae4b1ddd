"""run/load.py and run/weights.py: each file is opened and hashed once per program, whatever a program asks of it."""

from __future__ import annotations

import types
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from core.errors import UserError
from core.specs import Codes
from core.train import checkpoint as checkpoint_module
from core.train.checkpoint import Checkpoint, CheckpointStore, step_name
from core.weights import hub
from data.sources import open_source
from run.check import check
from run.data import open_moments
from run.load import build_pair, load_config, random_task, read_tokenizer
from run.weights import Source, read_weights
from scripts import convert, sample, train
from tests.conftest import ROOT, TOY_GENERATOR
from tests.ranks import in_threads
from tokenizer.continuous.stats import LatentStats, save_stats
from tokenizer.losses import PERCEPTUAL
from tokenizer.teachers import TEACHERS


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """counted["read", file], counted["checked", file] and counted["fingerprint", digest]: how often."""
    counts: Counter = Counter()
    monkeypatch.setattr(checkpoint_module, "_verified", {})  # by other tests, in this process

    def watch(where: str, what: str) -> None:
        module, _, name = where.rpartition(".")
        inner = getattr(__import__(module, fromlist=[name]), name)

        def call(argument, *more, **named):
            result = inner(argument, *more, **named)
            for one in argument if what == "checked" else [argument]:
                counts[what, result if what == "fingerprint" else Path(one).resolve()] += 1
            return result

        monkeypatch.setattr(where, call)

    watch("safetensors.torch.load_file", "read")
    watch("core.train.checkpoint._read_open", "read")
    watch("core.weights.hub.load_pickle", "read")
    watch("core.train.checkpoint.digests", "checked")
    watch("core.weights.hub.fingerprint", "fingerprint")
    return counts


def seen(counts: Counter, what: str) -> list[str]:
    return sorted(getattr(key, "name", key) for kind, key in counts if kind == what)


def test_sampling_from_a_run(generator_run, tokenizer_run, tmp_path, counted):
    assert sample.main([str(generator_run), "--labels", "0", "--num", "1", "--out", str(tmp_path / "s")]) == 0
    assert set(counted.values()) == {1}
    read = seen(counted, "read")
    assert read.count("constants.safetensors") == 1 and sum("ema" in name for name in read) == 2  # generator, tokenizer
    assert len(seen(counted, "fingerprint")) == 2
    for run in (generator_run, tokenizer_run):
        checked = [key for what, key in counted if what == "checked" and key.is_relative_to(run.resolve())]
        assert checked  # a damaged checkpoint is found


@pytest.mark.parametrize("mode", ["--check", "train"])
def test_training(tokenizer_run, tmp_path, counted, mode):
    words = [TOY_GENERATOR, f"tokenizer.weights={tokenizer_run}", f"work_dir={tmp_path}", f"data.cache_dir={tmp_path}"]
    words += ["train.duration=1step", "train.device=cpu"]
    assert train.main([*words, "--check"] if mode == "--check" else words) == 0
    of_tokenizer = {
        key: n for key, n in counted.items() if key[0] != "fingerprint" and tokenizer_run.name in str(key[1])
    }
    assert set(of_tokenizer.values()) == {1}


def test_one_file_of_two_networks(tmp_path, counted, generator_run):
    """A source answers for both; a checkpoint is read where a network wants its tensors, and not before."""
    source = Source(str(generator_run))
    counted.clear()
    read_weights("generator", source)
    assert seen(counted, "read") == ["constants.safetensors"] and not seen(counted, "checked")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "x.pth")
    file = Source(str(tmp_path / "x.pth"))
    assert isinstance(file.content, dict) and file.content is file.content
    assert counted["read", (tmp_path / "x.pth").resolve()] == 1
    file.close()
    assert isinstance(file.content, dict) and counted["read", (tmp_path / "x.pth").resolve()] == 2


def test_where_weights_come_from(tokenizer_run):
    """The same pair with weights, at random and by sizes alone."""
    config = load_config(TOY_GENERATOR, [f"tokenizer.weights={tokenizer_run}"])
    shapes = []
    for weights in ("load", "random", "meta"):
        pair = build_pair(config, weights, num_classes=4)
        networks = (pair.tokenizer.module, pair.generator.module)
        assert all(p.is_meta == (weights == "meta") for network in networks for p in network.state_dict().values())
        assert bool(pair.tokenizer.fingerprint) == (weights == "load") and not pair.generator.fingerprint
        assert pair.generator.settings["num_classes"] == 4 and (weights == "meta" or pair.lacks_statistics)
        shapes.append([{name: t.shape for name, t in network.state_dict().items()} for network in networks])
    assert shapes[0] == shapes[1] == shapes[2]
    assert hub.fingerprint(build_pair(config).tokenizer.module.state_dict()) == build_pair(config).tokenizer.fingerprint


def test_the_check_reads_the_values_of_a_tokenizer(tokenizer_run, tmp_path):
    def problem(**settings: str) -> str:
        words = [f"tokenizer.{key}={value}" for key, value in settings.items()]
        with pytest.raises(UserError) as said:
            check(load_config(TOY_GENERATOR, words))
        return str(said.value)

    moments = load_config(TOY_GENERATOR, [f"tokenizer.weights={tokenizer_run}", f"data.moments={tmp_path}"])
    with pytest.raises(UserError, match="must be folder://"):
        check(moments)
    with pytest.raises(UserError, match="makes codes, which have no moments"):
        open_moments(moments, open_source(moments.data.url), types.SimpleNamespace(spec=Codes(4, 1, 8, 2)))  # pyright: ignore
    broken, stats = tmp_path / "x.safetensors", tmp_path / "stats.safetensors"
    convert.main([str(tokenizer_run), str(broken)])
    weights = load_file(broken)
    weights[next(iter(weights))].view(-1)[0] = torch.nan
    with safe_open(broken, "pt") as file:
        save_file(weights, broken, file.metadata())
    assert "NaN or infinite" in problem(weights=str(broken))
    for channels, fingerprint, sentence in (
        (8, "0" * 16, "Compute them again"),
        (16, None, "16 values for 8 channels"),
    ):
        values = torch.zeros(2 * channels), torch.ones(2 * channels)  # of means and of log variances
        made = read_tokenizer({"weights": str(tokenizer_run)}).fingerprint
        save_stats(stats, LatentStats(*values, torch.zeros(()), torch.ones(()), 10**6), fingerprint or made)
        assert sentence in problem(weights=str(tokenizer_run), latent_stats=str(stats))


@pytest.mark.parametrize("moment", ["after it was chosen", "while it is verified", "once it is open"])
def test_a_trainer_deletes_the_chosen_checkpoint(tokenizer_copy, monkeypatch, moment):
    """Weights beside a running trainer: the newest checkpoint takes the place of one that is deleted meanwhile."""
    checkpoints = tokenizer_copy / "checkpoints"
    expected = read_weights("tokenizer", str(tokenizer_copy)).tensors(True)
    (newest,) = CheckpointStore(checkpoints).steps()[-1:]
    chosen, next_one = checkpoints / step_name(newest), checkpoints / step_name(newest + 1)
    state = Checkpoint(chosen).state

    def train_on(*_) -> None:
        """What a trainer with train.keep_checkpoints=1 does at its next checkpoint."""
        tensors = {f.stem: load_file(f) for f in chosen.glob("*.safetensors")}
        CheckpointStore(checkpoints, keep=1).save(newest + 1, tensors, {**state, "step": newest + 1}, wait=True)

    if moment == "while it is verified":
        inner = checkpoint_module.find_damage

        def find_damage(path, contents=True):
            if contents and chosen.exists() and not next_one.exists():
                train_on()
            return inner(path, contents)

        monkeypatch.setattr(checkpoint_module, "find_damage", find_damage)
    source = Source(str(tokenizer_copy))
    if moment == "after it was chosen":
        train_on()
    weights = read_weights("tokenizer", source)
    if moment == "once it is open":
        train_on()
    assert not chosen.exists() and next_one.exists()
    assert source.path.resolve() == (chosen if moment == "once it is open" else next_one)
    tensors = weights.tensors(True)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_ranks_take_the_same_checkpoint(tokenizer_copy):
    """Also where a trainer saves a newer one before the second rank looks."""
    checkpoints = tokenizer_copy / "checkpoints"
    (first,) = CheckpointStore(checkpoints).steps()[-1:]
    main = Source(str(tokenizer_copy))
    state = Checkpoint(checkpoints / step_name(first)).state
    tensors = {f.stem: load_file(f) for f in (checkpoints / step_name(first)).glob("*.safetensors")}
    CheckpointStore(checkpoints).save(first + 1, tensors, {**state, "step": first + 1}, wait=True)
    late = Source(str(tokenizer_copy))
    assert late.content.step == first + 1
    sources = [main, late]
    assert in_threads(2, lambda world: sources[world.rank].follow(world)) == [None, None]
    assert main.content.step == late.content.step == first


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ("sample.scale=[2.0,1.0]", "DiTDH has no codebooks: sample.scale is one number"),
        ("sample.schedule=linear", "DiTDH takes a constant scale, not sample.schedule: linear"),
    ],
)
def test_guidance_that_a_generator_does_not_have(tokenizer_run, wrong, sentence):
    """Found where networks are laid out, not at the first preview."""
    config = load_config(TOY_GENERATOR, [f"tokenizer.weights={tokenizer_run}", wrong])
    with pytest.raises(UserError, match=sentence):
        random_task(config, torch.device("meta"), num_classes=4)


def test_sizes_alone_need_no_weights_of_frozen_networks():
    """On the meta device torch warns of each tensor that is copied, dozens of lines before what was asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        random_task(load_config(str(ROOT / "configs/quickstart/rectok/tokenizer.yaml"), []), torch.device("meta"))
    for registry in (TEACHERS, PERCEPTUAL):
        assert all("pretrained" in registry.signature(name) for name in registry.names())
