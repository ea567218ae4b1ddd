"""docs/extending.md as it stands: its modules are registered, trained, sampled and held against core/specs.py."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
import yaml

from core import promises
from core.registry import Registry
from core.rng import Draws
from data import sources
from run.load import REGISTRIES, load_config, read_generator, read_tokenizer
from run.models import load_generator
from run.train import train
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
MODULES = {  # as the page says: file -> (registry, its line)
    "tokenizer/continuous/my_vae.py": ("tokenizer", "my_vae"),
    "generator/ar/my_maskgit.py": ("generator", "my_maskgit"),
    "tokenizer/losses/my_judge.py": ("discriminator", "my_judge"),
    "data/arrays.py": (None, "npz"),
}
SHORT = [
    "data.workers=0",
    "train.duration=2step",
    "train.global_batch=4",
    "train.precision=fp32",
    "train.device=cpu",
    "train.preview_every=2step",
]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.S)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The page's modules, in files of other names than those in it so that nothing is written beside our own code."""
    codes = blocks("python")
    assert len(codes) == len(MODULES)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    (tmp_path / "code").mkdir()
    for (path, (kind, name)), code in zip(MODULES.items(), codes):
        assert f"`{path}`" in PAGE
        module = path.removesuffix(".py").replace("/", ".")
        (tmp_path / "code" / f"page_{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, f"page_{name}", raising=False)
        if kind is None:
            found = __import__(f"page_{name}").open_arrays
            assert '`"npz": (open_arrays, ("classes",))`' in PAGE
            monkeypatch.setitem(sources.SCHEMES, name, (found, ("classes",)))
            continue
        entry = re.search(rf'"{name}": "{re.escape(module)}:(\w+)"', PAGE)
        assert entry, f"the line of {name} is not on the page"
        monkeypatch.setitem(REGISTRIES[kind].entries, name, f"page_{name}:{entry[1]}")
    return tmp_path


def config_of(name: str, tmp_path, *overrides: str):
    content = next(text for text in blocks("yaml") if yaml.safe_load(text)["name"] == name)
    path = tmp_path / f"{name}.yaml"
    path.write_text(content)
    return load_config(str(path), [*SHORT, f"work_dir={tmp_path / 'runs'}", *overrides])


def test_the_tokenizer_trains_and_takes_an_existing_generator(written):
    tmp_path = written
    assert train(config_of("my_vae", tmp_path)) == 0
    run = tmp_path / "runs" / "my_vae"
    pair = [*SHORT, f"work_dir={tmp_path / 'runs'}", f"tokenizer.weights={run}", "name=on_my_vae"]
    pair += ["data.cache_latents=false", "data.stats_images=64", "train.schedule.warmup=1step"]
    assert train(load_config("configs/tiny/rectok/generator.yaml", pair)) == 0
    pictures = load_generator(str(tmp_path / "runs" / "on_my_vae")).sample([0, 1])
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    module = read_tokenizer({"weights": str(run)}).module
    with torch.no_grad():
        images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        promises.values_kept(module, images, Draws(0, torch.arange(3)))


def test_the_generator_trains_and_samples(written):
    assert train(config_of("my_maskgit", written)) == 0
    run = written / "runs" / "my_maskgit"
    tokenizer = read_tokenizer({"weights": "tiny/rear"})
    generator = read_generator(str(run), tokenizer)
    with torch.no_grad():
        promises.samples_kept(generator.module, tokenizer.module.spec, Draws(0, torch.arange(3)), 4, steps=3)
    assert '"loss"' in (run / "metrics.jsonl").read_text()


def test_discriminator_and_data_source_are_used(written):
    pictures = np.random.default_rng(0).integers(0, 256, (8, 70, 66, 3), dtype=np.uint8)
    np.savez(written / "my.npz", arr_0=pictures, arr_1=np.arange(8) % 2)
    more = [f"data.url=npz://{written / 'my.npz'}", "discriminator.name=my_judge", "objective.weights.gan=0.1"]
    assert train(config_of("my_vae", written, *more)) == 0
    checkpoint = written / "runs" / "my_vae" / "checkpoints" / "latest"
    assert (checkpoint / "discriminator.safetensors").is_file()


def test_every_place_that_the_page_names_is_there():
    for path in set(re.findall(r"`((?:core|data|tokenizer|generator|evaluation|tests)/[\w./]*)`", PAGE)) - set(MODULES):
        assert (ROOT / path).exists(), path
    names = {"PIXEL_LOSSES", "FEATURE_DISTANCES", "GAN_LOSSES", "JUDGEMENT_LOSSES"}
    assert names <= set(vars(__import__("tokenizer.losses.objective", fromlist=["x"])))
    assert all(isinstance(registry, Registry) for registry in REGISTRIES.values())


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_the_optimisers_that_the_page_names_heed_the_guard(optimiser):
    """A step that is to be skipped changes nothing, any other one moves the weights."""
    for skipped in (0.0, 1.0):
        weight = torch.nn.Parameter(torch.ones(3))
        made = optimiser([weight], lr=0.1, fused=True)
        weight.grad = torch.ones(3)
        made.grad_scale, made.found_inf = torch.tensor(2.0), torch.tensor(skipped)
        made.step()
        assert bool((weight == 1).all()) == bool(skipped)
