"""The quickstart runs from end to end, and its plan cannot rot."""

import json

import pytest

import assemble
import quickstart


@pytest.mark.parametrize("mode", ["cpu", "cpu_bf16", "gpu", "smoke"])
def test_every_stage_is_a_valid_config_in_every_mode(mode):
    plan = quickstart.read_plan("rectok")
    for stage in plan["stages"]:
        assemble.load_config(str(quickstart.FOLDER / "rectok" / f"{stage}.yaml"),
                             quickstart.overrides_for(plan, stage, [mode], "work_dirs/none"))
    assert plan["report"]["headline"] in {g["label"] for g in plan["report"]["guidance"]}
    assert {plan["tokenizer"], plan["generator"], plan["guide"]} <= set(plan["stages"])


def test_unknown_system_names_the_known_ones():
    from core.errors import UserError

    with pytest.raises(UserError, match='Did you mean "rectok"'):
        quickstart.main(["rektok"])


@pytest.mark.slow
def test_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert quickstart.main(["rectok", "--smoke"]) == 0
    folder = tmp_path / "work_dirs" / "quickstart_rectok_smoke"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page and page.count("data:image/png") > 100
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    for guidance in ("none", "cfg 5.0", "auto 2.5"):
        assert 0 <= metrics[f"class_accuracy ({guidance})"]["value"] <= 1
    assert metrics["psnr"]["unit"] == "dB"
    assert len(list(folder.glob("*.png"))) == 4
