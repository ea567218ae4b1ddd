"""The quickstart runs from end to end, and its plan cannot rot."""

import dataclasses
import json

import pytest

from run import assemble
from scripts import quickstart

SYSTEMS = sorted(path.parent.name for path in quickstart.FOLDER.glob("*/quickstart.yaml"))


@pytest.mark.parametrize("mode", ["cpu", "cpu_bf16", "gpu", "smoke"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_stage_is_a_valid_config_in_every_mode(system, mode):
    plan = quickstart.read_plan(system)
    for stage in plan["stages"]:
        config = assemble.load_config(
            str(quickstart.FOLDER / system / f"{stage}.yaml"),
            quickstart.overrides_for(plan, stage, [mode], "work_dirs/none"),
        )
        keys = {f.name for f in dataclasses.fields(config.sample)}
    variants = plan["report"]["variants"]
    assert plan["report"]["headline"] in {variant["label"] for variant in variants}
    assert all(set(variant) <= {"label", *keys} for variant in variants)
    assert {plan["tokenizer"], plan["generator"], plan.get("guide", plan["generator"])} <= set(plan["stages"])


def test_unknown_system_names_the_known_ones():
    from core.errors import UserError

    with pytest.raises(UserError, match='Did you mean "rectok"'):
        quickstart.main(["rektok"])


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_smoke(system, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert quickstart.main([system, "--smoke"]) == 0
    folder = tmp_path / "work_dirs" / f"quickstart_{system}_smoke"
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
