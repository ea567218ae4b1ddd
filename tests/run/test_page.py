"""run/page.py: the page of a run, and several runs on one; what the task logs and the sinks are told."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from core import config as config_module
from core.schema import LogConfig
from core.train.log import _session_id, _Tensorboard, _Trackio, _Wandb
from core.train.run import RunFolder
from run import page
from run.load import REGISTRIES, load_config, random_task
from run.train import next_command
from scripts import report
from tests.conftest import ROOT, TOY_TOKENIZER, toy

GOLDEN = ROOT / "tests" / "core" / "train" / "golden"


@pytest.fixture
def copy(generator_run, tmp_path) -> Path:
    return Path(shutil.copytree(generator_run, tmp_path / "work" / generator_run.name, symlinks=True))


def is_self_contained(html: str) -> bool:
    return not re.search(r"""(src|href)=(?!"data:)|@import|url\((?!data:)|https?://""", html)


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_a_run_leaves_its_page(kind, tokenizer_run, generator_run):
    folder = {"tokenizer": tokenizer_run, "generator": generator_run}[kind]
    html = (folder / page.PAGE).read_text()
    assert is_self_contained(html) and "finished; written" in html and "data-reload" not in html.split("<script>")[0]
    run = page.read_run(folder)
    assert run.is_finished and run.seconds_left == 0 and run.seconds_done > 0
    for title in {"tokenizer": ("loss", "terms of the loss"), "generator": ("loss",)}[kind]:
        assert f"<h3>{title}" in html
    for title in ("learning rate", "images per second", "Environment", "Previews", "most memory so far, GiB"):
        assert title in html
    steps = [step for step, _ in run.previews]
    assert steps == [10, 20] and all(f'data-label="step {step}"' in html for step in steps)
    captions = [name for name, _ in run.about["preview"]]
    assert captions[:2] == {"tokenizer": ["", ""], "generator": ["disc 0", "square 1"]}[kind]
    frame = run.frames()[-1]
    assert {len(pictures) for _, pictures in frame.groups} == {{"tokenizer": 2, "generator": 1}[kind]}
    assert {picture.size for _, pictures in frame.groups for picture in pictures} == {(32, 32)}
    last = (folder / "log.txt").read_text().splitlines()[-1]
    assert f"look at {folder / page.PAGE}; next: bash run_" in last


def test_the_next_command_can_be_pasted(tmp_path):
    """It names the pictures that are here, unless they are those taken anyway, and quotes what a shell would take apart."""
    words = ["name=mine", f"work_dir={tmp_path}/my runs", "data.url=folder://my pictures", "data.val_url=null"]
    command = next_command(load_config(TOY_TOKENIZER, words), 4)
    assert shlex.split(command)[1:] == ["run_eval_tokenizer.sh", f"{tmp_path}/my runs/mine", "folder://my pictures"]
    command = next_command(load_config(TOY_TOKENIZER, [*words[:2], "data.val_url=folder://data/imagenet/val"]), 4)
    assert shlex.split(command)[2:] == [f"{tmp_path}/my runs/mine"]


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.txt")))
def test_every_number_that_a_task_logs_has_its_chart(name):
    """And the first of those on the live line is logged."""
    task = random_task(load_config(toy(name), _whole(name)), torch.device("meta"))
    logged = (GOLDEN / f"{name}.txt").read_text().split("\n")[0].split()
    patterns = [pattern for chart in [*task.charts(), *page.SPEED] for pattern in chart.names]
    undrawn = [n for n in logged if n not in page.NOT_DRAWN and not any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    assert not undrawn
    assert task.charts()[0].live and task.charts()[0].names[0] in logged


def _whole(name: str) -> list[str]:
    """A generator's tokenizer by its config, which needs no weights."""
    if name.endswith("tokenizer"):
        return []
    tokenizers = {"far": "fqgan", "rear": "vqgan_plus", "imagefolder_var": "imagefolder"}
    config = load_config(toy(f"{tokenizers.get(name, name.split('_')[0])}_tokenizer"), [])
    settings = {k: v for k, v in config.tokenizer.items() if k != "semantic"}
    return ["tokenizer.weights=null", *(f"tokenizer.{key}={json.dumps(value)}" for key, value in settings.items())]


def test_names_are_text_and_changes_are_told(copy):
    about = json.loads((copy / "about.json").read_text())
    evil = "<script>alert('x')</script>"
    about["preview"] = [[evil, [0]], ['"quoted" & more', [1]]]
    about |= {"recipe": "configs/toy/x.yaml", "changes": [["train.duration", "9step", evil]]}
    (copy / "about.json").write_text(json.dumps(about))
    with (copy / "log.txt").open("a") as file:
        file.write(f"[2026] warning: {evil} cannot be read\n")
    html = page.write([copy]).read_text()
    assert evil not in html and html.count("&lt;script&gt;alert(") == 2 * 3 + 2  # frames; table cells
    assert html.count("<script") == 1 and "&quot;quoted&quot; &amp; more" in html
    assert "Changes to configs/toy/x.yaml" in html and "train.duration" in html


def test_changes_of_a_recipe():
    recipe = toy("rectok_tokenizer")
    told = page.changes(load_config(recipe, ["train.optimizer.lr=0.5", "name=mine"]), recipe)
    assert told["recipe"] == recipe
    assert {key: now for key, _, now in told["changes"]} == {"name": "mine", "train.optimizer.lr": 0.5}
    assert page.changes(load_config(recipe, []), None) == {}


def test_a_living_run_and_one_without_anything(copy, tmp_path):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[:10]) + "\n" + '{"step": 11, "ima')  # as a reader may find it
    run = page.read_run(copy)
    assert not run.is_finished and run.seconds_left > 0
    assert "50 % done" in page.write([copy]).read_text() and "data-reload=60" in page.write([copy]).read_text()
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(copy / "config.yaml", bare)
    assert "just begun" in page.write([bare]).read_text()


def test_runs_beside_each_other(copy, tokenizer_run, tmp_path, capsys):
    other = shutil.copytree(copy, tmp_path / "work" / "other")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("lr: 0.001", "lr: 0.002"))
    assert report.main([str(copy), str(other)]) == 0
    place = tmp_path / "work" / "comparison.html"
    html = place.read_text()
    assert str(place) in capsys.readouterr().out and is_self_contained(html)
    assert "train.optimizer.lr" in html and "0.002" in html and "train.duration" not in html
    assert html.count(f"</i>{copy.name} <b>") == html.count("</i>other <b>") >= 4
    assert report.main([str(copy), str(tokenizer_run), "--out", str(tmp_path / "both.html")]) == 0
    with pytest.raises(Exception, match="not the folder of a run"):
        report.main([str(tmp_path)])


def test_a_curve_called_like_its_chart_is_named_once(copy, tmp_path):
    """Where another run draws something else on the chart, as FAR's loss beside the flow of DiT^DH."""
    other = shutil.copytree(copy, tmp_path / "work" / "other")
    logged = page.read_run(copy).charts[0].names[0]
    for file in ("about.json", "metrics.jsonl"):
        (other / file).write_text((other / file).read_text().replace(f'"{logged}"', '"loss"'))
    html = page.write([copy, other], tmp_path / "both.html").read_text()
    assert f"<h3>loss: {logged}" in html and "<h3>loss</h3>" in html and "loss: loss" not in html


def test_a_page_that_cannot_be_written_ends_nothing(copy):
    said: list[str] = []
    (copy / page.PAGE).unlink()
    (copy / page.PAGE).mkdir()
    writer = page.PageWriter(copy, said.append)
    writer.begin()
    writer({"eval/psnr": 1.0}, 3)
    writer.close()
    assert len(said) == 1 and "warning: " in said[0] and "could not be written" in said[0]


# ---------------------------------------------------------------------------------------------------------------------
# Sinks
# ---------------------------------------------------------------------------------------------------------------------
GRID = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_sinks_get_numbers_and_grids(name, tmp_path, monkeypatch):
    told: list = []
    session = types.SimpleNamespace(
        log=lambda record, step: told.append((step, record)), finish=lambda: told.append("end")
    )
    library = types.SimpleNamespace(init=lambda **options: told.append(options) or session, Image=lambda a: a.shape)
    monkeypatch.setitem(sys.modules, name, library)
    sink = {"wandb": _Wandb, "trackio": _Trackio}[name](types.SimpleNamespace(path=tmp_path), LogConfig(), {"a": 1})
    sink({"loss": 0.5}, 7)
    sink.picture(GRID, 8)
    sink.close()
    assert told[0]["config"] == {"a": 1} and told[0]["resume"] == "allow" and told[0]["name"] == tmp_path.name
    assert told[1:] == [(7, {"loss": 0.5}), (8, {"preview": (4, 6, 3)}), "end"]


def test_a_session_is_that_of_its_folder(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "old"]
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[2] / "wandb").mkdir()
    first, second, old = map(_session_id, folders)
    assert first != second and first == _session_id(folders[0]) and old == "old"
    moved = folders[0].rename(tmp_path / "moved")
    assert _session_id(moved) == first
    fork = shutil.copytree(moved, tmp_path / "fork")
    forked = _session_id(fork)
    assert forked != first and forked == _session_id(fork) and _session_id(moved) == first
    (fork / "wandb_id.txt").write_text("")
    assert _session_id(fork).startswith("fork-")
    (fork / "wandb_id.txt").write_text("plain\n")  # as an earlier version wrote it
    assert _session_id(fork) == "plain"


def test_tensorboard_forgets_what_is_written_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = types.SimpleNamespace(path=tmp_path)
    for start, value in ((0, 1.0), (2, 5.0)):  # killed after step 4, resumed from step 2
        writer = _Tensorboard(run, start)
        for step in range(start + 1, 5 if not start else 4):
            writer({"loss": value}, step)
        writer.picture(GRID, 3)
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 5.0)]
    assert events.Images("preview")[-1].width == 6


def test_about_is_written_by_the_main_rank_alone(tmp_path):
    config = config_module.override(
        lambda: config_module.to_plain(load_config(toy("rectok_tokenizer"), [])),
        [f"work_dir={tmp_path}"],
        REGISTRIES,
        "",
    )
    RunFolder(config, is_main=False).describe({"a": 1})
    assert not config.run_dir.exists()
