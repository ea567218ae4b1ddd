"""The shipped tiny models: small, as their recipes say, and as good as recorded."""

import json

import pytest
import torch

from core.weights import files as weight_files
from run.load import load_config
from run.quickstart import TINY
from run.sample import parse_labels
from run.weights import constructor_arguments
from tests.tools import tiny

FOLDER = TINY.parents[1] / "pretrained_models" / "tiny"
RECORDED = json.loads(tiny.RECORD.read_text())


def test_they_are_all_recorded_and_small():
    assert sorted(RECORDED) == tiny.SYSTEMS
    sizes = {system: sum(f.stat().st_size for f in (FOLDER / system).iterdir()) for system in tiny.SYSTEMS}
    assert max(sizes.values()) <= 4e6 and sum(sizes.values()) <= 16e6, sizes


@pytest.mark.parametrize("system", tiny.SYSTEMS)
def test_files_are_what_their_recipes_make(system):
    files = {kind: weight_files.read(FOLDER / system / f"{kind}.safetensors") for kind in ("tokenizer", "generator")}
    for kind, file in files.items():
        assert file is not None and file.kind == kind and len(file.about["class_names"]) == 9
        assert parse_labels("faces, smileys, flags", 9, file.about["class_names"]) == [0, 0, 8]
        rounded = [
            t for name, t in file.weights.items() if t.is_floating_point() and not name.endswith("codebook_used")
        ]
        assert {t.dtype for t in rounded} == {torch.bfloat16}
        stage = "decoder" if kind == "tokenizer" and (TINY / system / "decoder.yaml").is_file() else kind
        section = getattr(load_config(str(TINY / system / f"{stage}.yaml"), []), kind)
        said = {key: file.settings[key] for key in constructor_arguments(section)}
        assert said == constructor_arguments(section)
    paired = files["generator"].about["tokenizer"]
    assert paired["fingerprint"] == files["tokenizer"].about["fingerprint"] and paired["weights"] == f"tiny/{system}"


@pytest.mark.parametrize("system", tiny.SYSTEMS)
def test_they_score_as_recorded(system):
    """Codes that another processor's rounding turns over change a few pictures, hence the room."""
    found, recorded = tiny.figures(system), RECORDED[system]
    assert found["psnr"] == pytest.approx(recorded["psnr"], abs=0.1)
    assert found["class_accuracy"] == pytest.approx(recorded["class_accuracy"], abs=0.08)
