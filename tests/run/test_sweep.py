"""run/sweep.py: a grid of sampling settings, from the command line to a config snippet."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from core.errors import UserError
from core.signals import Stopped
from run import sweep as module
from scripts import sample, sweep

GRID = ("--scale", "1:4", "--steps", "2,3", "--bootstrap", "2")
SIZES = ("--num", "64", "--first", "8")


@pytest.fixture
def run_sweep(generator_run, tmp_path):
    def call(*words: object, out: str = "sweep") -> int:
        return sweep.main([str(generator_run), *map(str, words), "--out", str(tmp_path / out)])

    return call


def numbers(folder) -> tuple:
    kept = json.loads((folder / "metrics.json").read_text())
    return kept["metrics"], kept["context"]["best"], (folder / "sweep.csv").read_text()


def test_the_best_is_that_of_the_whole_grid_for_a_part_of_its_pictures(run_sweep, generator_run, tmp_path, monkeypatch):
    drawn = []
    produce = module.Drawing.produce

    def counted(self, generator):
        made = produce(self, generator)
        return lambda indices: (drawn.append(len(indices)), made(indices))[1]

    monkeypatch.setattr(module.Drawing, "produce", counted)
    assert run_sweep(*GRID, *SIZES) == 0
    kept = json.loads((tmp_path / "sweep" / "metrics.json").read_text())["context"]
    assert sum(drawn) == kept["drawn"] <= 0.4 * kept["whole_grid"] and kept["whole_grid"] == 8 * 64
    drawn.clear()
    assert run_sweep(*GRID, "--num", "64", "--first", "64", out="whole") == 0
    assert sum(drawn) == 8 * 64
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())["context"]
    assert kept["best"] == whole["best"]

    # the snippet is a config's, and both programs take what it says
    snippet = yaml.safe_load((tmp_path / "sweep" / "best.yaml").read_text())
    words = (tmp_path / "sweep" / "best.txt").read_text().split()
    assert words == [f"sample.{key}={value}" for key, value in snippet["sample"].items()] == kept["best"]
    out = tmp_path / "drawn"
    assert sample.main([str(generator_run), "--labels", "0", "--num", "1", "--out", str(out), *words]) == 0
    noted = json.loads((out / "sample.json").read_text())
    assert all(noted[f"sample.{key}"] == value for key, value in snippet["sample"].items())


def test_a_killed_sweep_goes_on_with_the_same_result(run_sweep, tmp_path, monkeypatch):
    assert run_sweep(*GRID, *SIZES, out="whole") == 0
    measured, measure = [], module.Sweep._features

    def fails_once(self, setting, count, place):
        measured.append((setting, count))
        if len(measured) == 10:
            raise Stopped("SIGTERM")
        return measure(self, setting, count, place)

    monkeypatch.setattr(module.Sweep, "_features", fails_once)
    with pytest.raises(Stopped):
        run_sweep(*GRID, *SIZES)
    shutil.rmtree(next((tmp_path / "sweep" / "work").glob("*")) / "0-8")  # as if the last chunk had not been finished
    assert run_sweep(*GRID, *SIZES) == 0
    assert len(measured) == len({*measured}) + 1  # what had been measured was not measured again
    assert numbers(tmp_path / "sweep") == numbers(tmp_path / "whole")
    with pytest.raises(UserError, match="another sweep"):
        run_sweep("--scale", "1:2", *SIZES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="mine holds other things, which would be deleted"):
        run_sweep(*GRID, *SIZES, "--again", out="mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--top-k", "5"), "no such sampling option"),
        (("--steps", "1:3"), "sample.steps"),
        (("--scale", "4:1"), "--scale 4:1"),
        (("--scale", "0.5:1"), "FROM:TO:STEP"),
        (("--interval", "0.5"), "--interval 0.5"),
        (("--schedule", "sine"), "sample.schedule"),
        (("--scale", "1:900"), "stands for more than 500 values"),
        (("--scale", "1:30", "--temperature", "1:30"), "900 settings"),
        (("--ema", "missing.safetensors"), "missing.safetensors"),
        (("--first", "99", "--num", "64"), "--first 99"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(run_sweep, words, said, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "open_generator", lambda *_: pytest.fail("a network was loaded"))
    with pytest.raises(UserError, match=said) as told:
        run_sweep(*words)
    assert len(str(told.value)) < 1200 and not (tmp_path / "sweep").exists()


def test_twins_are_not_compared(tmp_path):
    """A file that holds one set of weights, asked for averaged and for raw ones."""
    with pytest.raises(
        UserError, match="generator.use_ema=false and generator.use_ema=true are the same weights.*tiny/dar"
    ):
        sweep.main(["tiny/dar", "--ema", "true,false", "--num", "64", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.glob("out/*.html"))


def test_where_guidance_is_off_its_schedule_makes_no_setting():
    made = module.grid({"scale": "1,2", "interval": "0:1,0.1:0.9", "schedule": "constant,cosine", "power": "1,2"})
    names = [setting.name for setting in made]
    assert names.count("scale 1") == 1 and len(names) == 1 + 2 * (1 + 2)
    assert module.values_of("scale", "1:2:0.25") == ["1", "1.25", "1.5", "1.75", "2"]
    assert module.values_of("scale", "[3,2],4") == ["[3,2]", "4"]
    for many in ("1:inf", "1:2:1e-9", "0:1e308:1e-308", "1:" + "9" * 5000):
        with pytest.raises(UserError, match="more than 500 values"):
            module.values_of("scale", many)


def test_without_a_generator_a_tiny_one_is_taken(capsys, monkeypatch):
    options, settings, _ = sweep.parse(["--scale", "1:2", "eval.batch=8"])
    assert options.target == "tiny/rear" and settings == ["eval.batch=8", "eval.num_images=400"]
    assert sweep.parse(["--num", "16"])[1] == ["eval.num_images=16"]
    named, settings, _ = sweep.parse(["tiny/rear", "--scale", "1:2"])
    assert named.target == "tiny/rear" and settings == ["eval.num_images=400"] and "400 pictures" in named.taken
    assert not sweep.parse(["work_dirs/mine", "--scale", "1:2"])[1]
    monkeypatch.setattr(module, "sweep", lambda *_: print("began") or 0)
    assert sweep.main(["--scale", "1:2"]) == 0
    assert capsys.readouterr().out.startswith("no generator was named: sweeping tiny/rear")
