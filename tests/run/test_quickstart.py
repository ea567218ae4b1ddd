"""The quickstart runs from end to end, and its plan cannot rot."""

import dataclasses
import json
import types
from pathlib import Path

import pytest
import torch

from data.sources import open_source
from run import quickstart
from run.load import load_config
from scripts.quickstart import main
from tests.conftest import TOY_TOKENIZER

SYSTEMS = sorted(path.parent.name for path in quickstart.FOLDER.glob("*/quickstart.yaml"))
TWO_ACTS = [system for system in SYSTEMS if "shipped" in quickstart.read_plan(system)]


@pytest.mark.parametrize("mode", ["cpu", "cpu_bf16", "gpu", "smoke"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_stage_is_a_valid_config_in_every_mode(system, mode):
    plan = quickstart.read_plan(system)
    for stage in plan["stages"]:
        config = load_config(
            str(quickstart.FOLDER / system / f"{stage}.yaml"),
            quickstart.overrides_for(plan, stage, [mode], "work_dirs/none"),
        )
        keys = {f.name for f in dataclasses.fields(config.sample)}
    variants = plan["report"]["variants"]
    assert plan["report"]["headline"] in {variant["label"] for variant in variants}
    assert all(set(variant) <= {"label", *keys} for variant in variants)
    assert {plan["tokenizer"], plan["generator"], plan.get("guide", plan["generator"])} <= set(plan["stages"])


def test_what_is_shipped_has_both_acts():
    assert [system for system in SYSTEMS if quickstart.is_shipped(system)] == TWO_ACTS


@pytest.mark.parametrize("mode", ["cpu", "gpu", "smoke"])
@pytest.mark.parametrize("system", TWO_ACTS)
def test_the_second_act_is_a_valid_config_in_every_mode(system, mode):
    plan = quickstart.read_plan(system)["shipped"]
    recipe = quickstart.TINY / system / "generator.yaml"
    config = load_config(str(recipe), quickstart.overrides_for(plan, "generator", [mode], "work_dirs/none"))
    assert config.tokenizer["weights"] == f"tiny/{system}" and config.run_dir == Path("work_dirs/none/generator")
    assert plan["report"]["headline"] in {variant["label"] for variant in plan["report"]["variants"]}


def test_unknown_system_names_the_known_ones():
    from core.errors import UserError

    with pytest.raises(UserError, match='Did you mean "rectok"'):
        main(["rektok"])


def test_features_of_real_pictures_are_computed_once(tmp_path):
    from data.sources import open_source
    from evaluation.networks import EfficientNetLite0
    from evaluation.pictures import SourcePictures

    config = load_config(TOY_TOKENIZER, [f"data.cache_dir={tmp_path}"])
    net, seen = EfficientNetLite0(64), []
    taps = net.taps
    net.taps = lambda pixels: seen.append(len(pixels)) or taps(pixels)

    def features(count: int):
        source = open_source(f"synthetic://?size=16&classes=4&count={count}")
        return quickstart.real_features(SourcePictures(source, 16), net, config)

    first, again = features(10), features(10)
    assert sum(seen) == 10 and first.labels.tolist() == again.labels.tolist() and len(set(first.labels.tolist())) > 1
    assert all(torch.equal(first.features[tap], again.features[tap]) for tap in net.dims)
    assert len(features(9)) == 9 and sum(seen) == 19  # another list of pictures
    net.name = "other"
    assert len(features(9)) == 9 and sum(seen) == 28


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_smoke(system, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([system, "--from-scratch", "--smoke"]) == 0
    folder = tmp_path / "work_dirs" / f"from_scratch_{system}_smoke"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert (
        "http://" not in page.replace("http://www.w3.org", "")
        and "https://" not in page
        and page.count("data:image/png") > 60
    )
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    variants = [variant["label"] for variant in quickstart.read_plan(system)["report"]["variants"]]
    for label in variants:
        assert 0 <= metrics[f"class_accuracy ({label})"]["value"] <= 1
    assert metrics["psnr"]["unit"] == "dB"
    assert len(list(folder.glob("samples_*.png"))) == len(variants) and (folder / "reconstructions.png").is_file()
    if system != "rectok":
        assert any(name.startswith("codebook_usage") for name in metrics) and "codebook use" in page


def test_the_page_says_where_training_pictures_are_measured():
    """As --smoke does, where "unseen pictures" are none."""
    train, val = (open_source(f"embedded://emoji64?split={split}") for split in ("train", "val"))
    for source, said in ((train, False), (val, True)):
        standard = types.SimpleNamespace(source=source, val=val, size=64)
        text = quickstart.subtitle(standard, {})
        assert text.startswith(f"{len(source):,} training pictures of 9 classes at 64 px. A toy")
        assert ("no number here means anything" in text) == said


@pytest.mark.slow
@pytest.mark.parametrize("system", TWO_ACTS)
def test_two_acts(system, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([system, "--smoke"]) == 0
    folder, said = tmp_path / "work_dirs" / f"quickstart_{system}_smoke", capsys.readouterr().out
    assert said.count(f"{folder}/report.html") == 2  # after each act
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Side by side" in page and "Samples, shipped" in page and "Samples, trained here" in page
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    for variant in quickstart.read_plan(system)["shipped"]["report"]["variants"]:
        for model in ("shipped", "trained here"):
            assert 0 <= metrics[f"class_accuracy ({model}, {variant['label']})"]["value"] <= 1


def test_without_shipped_models_every_stage_is_trained(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "is_shipped", lambda system: False)
    monkeypatch.setattr(quickstart, "train", lambda config, recipe: asked.append(config.name) or 75)
    assert main(["fqgan"]) == 75 and asked == ["tokenizer"]
    assert "No tiny models of fqgan are here" in capsys.readouterr().out
