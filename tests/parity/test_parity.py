"""Every recorded fixture of a known kind, as a test; and the runner, which must not pass what it cannot check.

The small set in tests/parity/fixtures always runs; all recordings run where they are at hand ($TESSERA_PARITY, or
../shared/parity).
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from tests import parity
from tests.parity.__main__ import main
from tests.parity.fields import Fields, notes, only, reads
from tests.parity.setting import Setting, placed

parity.discover()
SMALL = parity.find([parity.EMBEDDED])
SAME = {(path.parent.name, path.name) for path in SMALL if "made" not in parity.read_meta(path)}  # official, unchanged
FILES = [
    path for path in parity.find(parity.default_folders()) if path in SMALL or (path.parent.name, path.name) not in SAME
]
LONG = {"full_far_b_dual_recipe"}  # 417 M parameters: 3 GB, and a minute on a busy machine


def kind_of(path) -> tuple[str, str]:
    meta = parity.read_meta(path)
    return meta.get("system"), meta.get("kind")


@pytest.mark.parametrize(
    "path",
    [pytest.param(f, marks=[pytest.mark.slow] * (f.stem in LONG)) for f in FILES if kind_of(f) in parity.KINDS],
    ids=lambda path: f"{'small-' if path in SMALL else ''}{path.parent.name}-{path.stem}",
)
def test_fixture(path):
    outcome = parity.run(path)
    assert outcome.passed, str(outcome)


def test_all_recordings_are_at_hand():
    if not parity.fixture_folder().is_dir():
        pytest.skip(f"no recordings in {parity.fixture_folder()} (set TESSERA_PARITY): only the small set was run")
    assert {kind_of(path) for path in parity.find([parity.fixture_folder()])} <= set(parity.KINDS)


def test_the_small_set_has_every_system_and_kind():
    """And stays small; each file says whether it is official, cut from an official one, or our own."""
    missing = set(parity.KINDS) - {kind_of(path) for path in SMALL} - {("evaluation", "image_metrics")}
    assert not missing, f"tests/parity/fixtures has no file of {sorted(missing)}"
    sizes = {path: path.stat().st_size for path in SMALL}
    assert max(sizes.values()) < 1e6 and sum(sizes.values()) < 15e6
    made = {path: parity.read_meta(path).get("made", "official").split(":")[0] for path in SMALL}
    assert set(made.values()) == {"official", "cut", "own"}
    for system in ("rectok", "fqgan", "rear", "dar", "imagefolder"):  # not our word alone
        assert sum(made[p] != "own" for p in SMALL if kind_of(p)[0] == system) >= 4


def test_the_table_of_options_names_tests_that_exist():
    table = (parity.EMBEDDED.parent / "README.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) > 15 and named <= {path.stem for path in (parity.REPOSITORY / "tests").rglob("test_*.py")}
    small = set(re.findall(r"own `(\w+)`", table))
    assert small and small <= {path.stem for path in SMALL if parity.read_meta(path).get("made", "").startswith("own")}


def test_a_file_by_formula_holds_no_weights_but_those_it_states():
    path = parity.EMBEDDED / "dar" / "gpt_unguided.safetensors"
    case = parity.Case.load(path)
    shapes = json.loads(case.meta["weight_shapes"])
    assert {name: list(value.shape) for name, value in case.weights.items()} == shapes
    assert path.stat().st_size < 20_000 and case.options["cfg_scale"] == "1.0"


def write(path, outputs, **meta):
    save_file({f"outputs/{name}": tensor for name, tensor in outputs.items()}, path, metadata=meta)
    return path


@pytest.fixture
def echo(monkeypatch):
    """A kind "echo" whose outputs are whatever the test puts in."""
    computed = {}
    monkeypatch.setitem(parity.KINDS, ("toy", "echo"), lambda case: computed)
    return computed


def test_every_recorded_output_must_agree(tmp_path, echo):
    reference = {"a": torch.tensor([1.0, 100.0]), "ids": torch.tensor([3, 4])}
    path = write(tmp_path / "f.safetensors", reference, system="toy", kind="echo")
    echo.update(a=reference["a"] + 0.9e-2, ids=reference["ids"])  # the largest value is 100: 1e-2 is allowed
    assert parity.run(path).passed
    echo["a"] = reference["a"] + 1.2e-2
    assert "!! a 1.2e-04" in str(parity.run(path))
    echo["a"] = torch.tensor([float("nan"), 100.0])
    assert not parity.run(path).passed
    echo["a"] = reference["a"][:1]
    assert "shape [1] for [2]" in str(parity.run(path))
    echo.update(a=reference["a"], ids=torch.tensor([3, 5]))
    assert not parity.run(path).passed
    del echo["ids"]
    assert "!! ids not computed" in str(parity.run(path))


KNOWN = (
    reads("ModelArgs.dim ModelArgs.heads lr.*.rate options.top_k")
    | only(**{"ModelArgs.dropout": [0.0, None]})
    | notes("where it comes from", "note extra.**")
)


@pytest.mark.parametrize(
    "config, options, looked_at, says",
    [
        ({"ModelArgs": {"dim": 3, "heads": 2}}, {}, "dim heads", ""),
        ({"ModelArgs": {"dim": 3, "heads": 2}}, {}, "dim", "given but not looked at: ModelArgs.heads"),
        ({"ModelArgs": {"dim": 3, "dropout": None}, "note": "x", "extra": {"a": {"b": 1}}}, {}, "dim", ""),
        (
            {"ModelArgs": {"dim": 3, "dropout": 0.1}},
            {},
            "dim",
            'field "ModelArgs.dropout" is 0.1; this kind serves 0.0 or None only',
        ),
        (
            {"ModelArgs": {"dim": 3, "width": 2}},
            {},
            "dim",
            'unknown field "ModelArgs.width" (it is 2); known: ModelArgs.dim',
        ),
        ({"lr": {"a": {"rate": 1}, "b": {"rate": 2}}}, {}, "", "given but not looked at: lr.a.rate, lr.b.rate"),
        ({}, {"top_k": 5}, "", "given but not looked at: options.top_k"),
        ({}, {"top_p": 5}, "", 'unknown field "options.top_p"'),
    ],
)
def test_every_field_is_known_and_looked_at(tmp_path, monkeypatch, config, options, looked_at, says):
    def function(case):
        for name in looked_at.split():
            case.config["ModelArgs"][name]
        return {"a": torch.zeros(1)}

    monkeypatch.setitem(parity.KINDS, ("toy", "echo"), function)
    monkeypatch.setitem(parity.FIELDS, ("toy", "echo"), KNOWN)
    path = write(
        tmp_path / "f.safetensors",
        {"a": torch.zeros(1)},
        system="toy",
        kind="echo",
        config=json.dumps(config),
        options=json.dumps(options),
    )
    outcome = parity.run(path)
    assert outcome.passed == (not says) and says in outcome.failure


def test_fields_are_read_where_they_are_used():
    fields = Fields({"a": 1, "deep": {"b": 2, "c": {"d": 3}}, "list": [1, 2]})
    assert "a" in fields and fields.get("missing", 5) == 5 and not fields.seen
    assert fields["deep"]["c"]["d"] == 3 and fields.get("list") == [1, 2]
    assert fields.seen == {"deep.c.d", "list"}
    changed = fields["deep"].replaced(b=9)
    assert changed["b"] == 9 and fields["deep"]["b"] == 2 and "deep.b" in fields.seen
    assert {**fields["deep"]["c"]} == {"d": 3} and Fields({"x": {"y": 1}})["x"].plain() == {"y": 1}


def test_kinds_describe_what_they_understand(capsys):
    assert main(["--describe", "gpt_generate"]) == 0
    assert "dar/gpt_generate: dim, n_layer" in (text := capsys.readouterr().out) and "options.cfg_scale" in text
    assert main(["--describe"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(parity.KINDS)
    assert main(["--describe", "nothing"]) == 1 and "rear/gen" in capsys.readouterr().out


def test_stated_tolerance_is_used(tmp_path, echo):
    stated = "per tensor: max|a-b| <= 1e-2*max|ref| + 0.5; uint8 images: at most 25 percent of values off by one"
    path = write(
        tmp_path / "f.safetensors",
        {"a": torch.zeros(2), "u": torch.zeros(4, dtype=torch.uint8)},
        system="toy",
        kind="echo",
        tolerance=stated,
    )
    echo.update(a=torch.tensor([0.4, 0.0]), u=torch.tensor([1, 0, 0, 0], dtype=torch.uint8))
    assert parity.run(path).passed
    echo["u"] = torch.tensor([2, 0, 0, 0], dtype=torch.uint8)
    assert not parity.run(path).passed


def test_another_precision_is_judged_by_its_own_rule(tmp_path, echo, capsys):
    reference = {"a": torch.tensor([3.0, 4.0]), "grad/w": torch.tensor([1.0])}
    path = write(tmp_path / "f.safetensors", reference, system="toy", kind="echo")
    half = Setting(torch.device("cpu"), "bf16")
    echo.update({"a": torch.tensor([3.0, 4.3]), "grad/w": torch.tensor([1.2])})
    assert parity.run(path, half).passed and not parity.run(path).passed
    echo["a"] = torch.tensor([3.0, 5.0])
    assert not parity.run(path, half).passed
    path = write(tmp_path / "f.safetensors", {**reference, "ids": torch.tensor([1, 2])}, system="toy", kind="echo")
    echo["ids"] = torch.tensor([1, 2])
    assert not parity.run(path, half).passed
    echo["ids"] = torch.tensor([1, 3])  # from there on it is another picture
    assert parity.run(path, half).passed and "ids 5.0e-01" in str(parity.run(path, half))
    echo["a"] = torch.tensor([3.0, float("nan")])
    assert not parity.run(path, half).passed
    files = [str(parity.EMBEDDED / name) for name in ("dar/gpt_train.safetensors", "rear/schedules.safetensors")]
    assert main([*files, "--precision", "bf16"]) == 0
    line, count = capsys.readouterr().out.splitlines()  # schedules are nothing to a device
    assert 1e-4 < float(re.search(r"loss ([\d.e-]+)", line)[1]) < 0.1 and count == "1 of 1 passed"


def test_a_fixture_on_another_device():
    """As far as it goes without one: constructors and loaded weights are there, and numbers kept aside follow."""
    device = torch.device("meta")
    with placed(device):
        network = torch.nn.Linear(2, 2)
        network.load_state_dict({"weight": torch.zeros(2, 2, device="cpu"), "bias": torch.zeros(2, device="cpu")})
        assert network.weight.device == torch.full((1,), 1.0).device == device
        assert (torch.zeros(2) + torch.zeros(2, device="cpu")).device == device
    assert torch.zeros(1).device.type == "cpu"


def test_command_line_fails_on_what_it_cannot_check(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path)]) == 1  # nothing there
    write(tmp_path / "strange.safetensors", {"a": torch.zeros(1)}, system="toy", kind="unheard")
    assert main([str(tmp_path)]) == 1
    assert 'FAIL strange.safetensors [toy/unheard]: unknown kind "unheard"' in capsys.readouterr().out

    def broken(case):
        raise RuntimeError("went wrong")

    monkeypatch.setitem(parity.KINDS, ("toy", "unheard"), broken)
    assert main([str(tmp_path)]) == 1
    assert "RuntimeError: went wrong" in capsys.readouterr().out
    monkeypatch.setitem(parity.KINDS, ("toy", "unheard"), lambda case: {"a": torch.zeros(1)})
    assert main([str(tmp_path)]) == 0
    (tmp_path / "damaged.safetensors").write_bytes(b"no header")
    assert main([str(tmp_path)]) == 1
