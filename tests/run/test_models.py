"""run/models.py, hubconf.py and examples/: models from Python, with pictures as people have them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import run
from core.errors import UserError
from data.sources import open_source
from scripts import sample
from tests.conftest import ROOT, finished_run, toy


@pytest.fixture(scope="module")
def fqgan(tmp_path_factory):
    return finished_run(tmp_path_factory, toy("fqgan_tokenizer"))


def test_pictures_of_every_kind_are_taken_and_given(fqgan, tmp_path):
    tokenizer = run.load_tokenizer(fqgan, device="cpu")
    picture = open_source("synthetic://?size=32&classes=4&count=8", "val")[0].image
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
    codes = tokenizer.encode(picture)
    picture.save(tmp_path / "picture.png")
    assert codes.shape == (1, tokenizer.spec.length, tokenizer.spec.branches) and codes.dtype == torch.int64
    for same in (
        tmp_path / "picture.png",
        array,
        array[None],
        tensor,
        tensor[None],
        [picture],
        tensor[None] / 127.5 - 1.0,
    ):
        assert torch.equal(tokenizer.encode(same), codes)
    assert tokenizer.encode([picture, array, tensor], batch=2).shape[0] == 3
    pixels = tokenizer.decode(codes, output="uint8")
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == torch.uint8
    assert np.array_equal(tokenizer.decode(codes.numpy(), output="numpy")[0], pixels[0].movedim(0, -1).numpy())
    (rebuilt,) = tokenizer.reconstruct(picture.resize((70, 50)).convert("RGBA"))
    assert rebuilt.size == (32, 32) and rebuilt.mode == "RGB"
    assert tokenizer.decode(codes, output="float").abs().max() <= 2


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        (np.zeros((32, 32, 3)), "not ndarray float64"),
        (np.zeros((32, 32), np.uint8), "not ndarray uint8"),
        (torch.zeros(3, 32, 32), r"a float tensor of pictures is \(B, 3, 32, 32\)"),
        ("cat.jpg", "no such file"),
        (7, "not int"),
        ([], "no pictures"),
    ],
)
def test_what_is_no_picture_is_refused_in_a_sentence(fqgan, pictures, said):
    tokenizer = run.load_tokenizer(fqgan, device="cpu")
    with pytest.raises(UserError, match=said):
        tokenizer.encode(pictures)
    with pytest.raises(UserError, match="output"):
        tokenizer.decode(torch.zeros(1, tokenizer.spec.length, tokenizer.spec.branches).long(), output="jpeg")


def test_samples_are_those_of_the_command(generator_run, tmp_path):
    generator = run.load_generator(generator_run, device="cpu")
    drawn = generator.sample(["ring 3", 0], num=3, seed=5, output="numpy")
    command = [str(generator_run), "--labels", "ring 3,0", "--num", "3", "--seed", "5", "--out", str(tmp_path / "s")]
    assert sample.main(command) == 0
    files = [np.asarray(Image.open(f)) for f in sorted((tmp_path / "s").glob("[0-9]*.png"))]
    assert np.array_equal(drawn, np.stack(files))
    tuned = generator.tuned({"scale": 9.0, "steps": 2}).task  # a toy's pictures hardly depend on guidance
    assert (tuned.guidance.scale, tuned.sample_options) == (9.0, {"steps": 2})
    plain, quick = (generator.sample("ring 3", seed=5, output="float", **how) for how in ({}, {"steps": 2}))
    assert not torch.equal(plain, quick)
    for wrong, said in (
        ({"steps": 1}, "sample.steps"),
        ({"top_k": 5}, "no such sampling option"),
        ({"stps": 5}, "stps"),
    ):
        with pytest.raises(UserError, match=said):
            generator.sample(0, **wrong)
    with pytest.raises(UserError, match="class name"):
        generator.sample(["tree frog"])
    with pytest.raises(UserError, match="holds a generator, a tokenizer was asked for"):
        run.load_tokenizer(generator_run)


def test_torch_hub_in_another_folder(tokenizer_run, generator_run, tmp_path):
    """As users do it: a process of its own, elsewhere, with nothing of ours on its path."""
    program = (
        f"import torch; load = lambda *a: torch.hub.load({str(ROOT)!r}, *a, source='local', device='cpu');"
        f"t = load('tokenizer', {str(tokenizer_run)!r}); g = load('generator', {str(generator_run)!r});"
        "p = g.sample(labels=[1], seed=0); print(p[0].size, t.encode(p).shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("(32, 32) torch.Size([1, "), done.stderr


@pytest.mark.parametrize(
    "imported, says",
    [
        ("data", "another `data` .*my_project/data\\), the name of a package of Tessera"),
        ("run", "another `run` .*my_project/run.py|cannot import name 'load_generator' from 'run' .*my_project/run.py"),
    ],
)
def test_packages_of_another_project_that_are_called_as_ours(imported, says, tmp_path):
    project = tmp_path / "my_project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "__init__.py").write_text("mine = 1\n")
    (project / "run.py").write_text("mine = 1\n")
    program = f"import {imported}, torch; torch.hub.load({str(ROOT)!r}, 'generator', 'tiny/rectok', source='local')"
    done = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True)
    assert done.returncode and re.search(says, done.stderr.splitlines()[-1]), done.stderr


def test_models_are_shown_on_a_line(tokenizer_run, generator_run):
    shown = repr(run.load_generator(str(generator_run)))
    assert re.fullmatch(r"DiTDH of \d+ classes, decoded by RecTok, pictures of 32 pixels, continuous .* on cpu", shown)
    assert repr(run.load_tokenizer(str(tokenizer_run))).startswith("RecTok, pictures of 32 pixels")


@pytest.mark.parametrize("name", ["tokenizer", "generator"])
def test_notebooks_run(name, tmp_path, monkeypatch):
    """Their code cells, one after another, on the shipped model that they name."""
    (tmp_path / "hubconf.py").symlink_to(ROOT / "hubconf.py")
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.syspath_prepend(str(ROOT))
    cells = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text())["cells"]
    names: dict = {"display": lambda *shown: None}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert isinstance(names["panel"], Image.Image) and names["panel"].getbbox()
