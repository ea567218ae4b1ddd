"""bash run_gpu_check.sh: stages that fail, hang and go on, and what is written of them."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys

import pytest
import torch

from core.errors import UserError
from run import benchmark, gpu_check, gpu_stages
from run.floors import Work
from run.gpu_check import Check, Stage
from run.load import build_tokenizer_task, load_config
from scripts.gpu_check import main
from tests.conftest import ROOT, shell

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@NO_GPU
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    out = tmp_path / "results.json"
    with pytest.raises(UserError) as said:
        main(["--out", str(out)])
    assert re.fullmatch(r"torch \S+ sees no GPU here: run this on one, or add .*--rehearse .*[^.]\.", str(said.value))
    assert not out.exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "words, says", [(["--only", "test"], 'Did you mean "tests"'), (["--minutes", "0"], "more than 0")]
)
def test_mistakes(words, says):
    with pytest.raises(UserError, match=says):
        main(words)


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(name=(share, Python code) ...) -> (exit code, results, markdown); the stages are these programs."""
    monkeypatch.setattr(gpu_check, "LEAST", 0.1)

    def call(again: bool = False, seconds: float = 480, **stages: tuple[float, str]):
        made = tuple(
            Stage(name, share, lambda _, code=code: ["-c", code], gpu_check._of_worker)
            for name, (share, code) in stages.items()
        )
        monkeypatch.setattr(gpu_check, "STAGES", made)
        out, markdown = tmp_path / "results.json", tmp_path / "b.md"
        code = Check("cpu", True, out, markdown, seconds).run(list(stages), again)
        return code, json.loads(out.read_text()), markdown.read_text()

    return call


def said(text: str) -> str:
    return f"print('{gpu_stages.MARK}' + '\"{text}\"', flush=True)"


def test_every_stage_has_its_time_and_its_line(check, tmp_path):
    (tmp_path / "b.md").write_text("# Title\n\ntext\n\n## Another section\n\nmore\n")
    code, found, text = check(
        good=(60, said("fine")),
        broken=(60, "raise SystemExit('it | broke')"),
        hung=(2, f"{said('half')}; import time; time.sleep(60)"),
        last=(60, said("end")),
    )
    stages = found["stages"]
    assert code == 1 and {name: (s["status"], s["summary"]) for name, s in stages.items()} == {
        "good": ("passed", "fine"),
        "broken": ("failed", "it | broke"),
        "hung": ("ran out of time", "half"),
        "last": ("passed", "end"),
    }
    assert "| broken | failed | 0 | it / broke |" in text and text.startswith(
        "# Title\n\ntext\n\n## Another section\n\nmore\n"
    )
    ran = f"open({str(tmp_path / 'ran')!r}, 'a').write('x'); "
    code, found, again = check(good=(60, ran), broken=(60, ran + said("mended")), hung=(60, ran), last=(60, ran))
    assert code == 0 and (tmp_path / "ran").read_text() == "xx"  # what had not passed
    assert found["stages"]["broken"]["summary"] == "mended" and again.count(gpu_check.SECTION) == 1
    assert check(again=True, good=(60, ran))[0] == 0 and (tmp_path / "ran").read_text() == "xxx"


def test_a_stage_gets_some_of_what_was_spared(check):
    slow = "import time; time.sleep(1.5)"
    assert check(fast=(3, "pass"), slow=(0.9, slow), last=(60, "pass"))[0] == 0
    code, found, _ = check(again=True, slow=(0.9, slow), last=(60, "pass"))
    assert code == 1 and found["stages"]["slow"]["status"] == "ran out of time"


def test_warnings_are_no_result():
    log = (
        "half of it\nW1129 21:22:04.808000 31129 torch/x.py:183] [0/0] No CUDA runtime\n/a/b.py:3: UserWarning: this\n"
    )
    assert gpu_check._last_line(log, None) == "half of it"
    assert gpu_check._last_line(log.split("\n", 1)[1], None) == "nothing was finished"


@pytest.mark.parametrize(
    "compiled, code",
    [([1.0, 0.9, 0.8004], 0), ([1.001, 0.9, 0.8], 1), ([1.0, 0.9, 0.81], 1), ([1.0, 0.9, float("nan")], 1)],
)
def test_what_of_a_compiled_loss_is_too_much(monkeypatch, tmp_path, compiled, code):
    """The first step is held to rounding; Adam makes more of it in the later ones."""
    monkeypatch.setattr(gpu_stages, "_losses", lambda config, device, batch, on: compiled if on else [1.0, 0.9, 0.8])
    assert gpu_stages.compiled(torch.device("cpu"), True, tmp_path) == code


def test_what_there_is_no_time_for_is_said(check):
    _, found, _ = check(seconds=5.05, first=(480, "pass"), second=(480, "pass"))
    assert {s["status"] for s in found["stages"].values()} == {"not begun"}


def test_another_machine_does_not_go_on(check, monkeypatch):
    check(good=(60, "pass"))
    monkeypatch.setattr(gpu_check, "describe", lambda device: {"device": "another"})
    with pytest.raises(UserError, match="another machine, torch or code.*--again"):
        check(good=(60, "pass"))


def test_what_is_not_installed_is_told_first(tmp_path, monkeypatch, capsys):
    """A stage that needs it is not begun, and costs no time."""
    stages = tuple(
        Stage(name, 60, lambda _: ["-c", "pass"], gpu_check._last_line, needs)
        for name, needs in (("needy", ("no-such-package",)), ("train", ()))
    )
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_stages, "LPIPS_PACKAGES", ("no-such-weights",))
    out = tmp_path / "results.json"
    assert Check("cpu", True, out, tmp_path / "b.md", 480).run(["needy", "train"], False) == 1
    found = json.loads(out.read_text())["stages"]
    assert found["needy"] == {"status": "not begun", "summary": "no package no-such-package", "seconds": 0.0}
    assert found["train"]["status"] == "passed"
    printed = capsys.readouterr().out
    assert "not installed: no-such-package (not begun: needy)" in printed and f"({gpu_stages.WITHOUT_LPIPS})" in printed


def test_a_tokenizer_trains_without_the_packages_of_its_loss(monkeypatch):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    config = load_config(str(ROOT / "configs/quickstart/fqgan/tokenizer.yaml"), [gpu_stages.UNTRAINED_LPIPS])
    assert build_tokenizer_task(config).objective is not None
    assert not gpu_stages.is_installed("torch")


def test_one_row_that_fails_leaves_the_others(tmp_path, monkeypatch):
    """Whatever was raised. Where the device is lost, the rest is measured by a process that begins anew."""
    wanted = [gpu_stages.Wanted("rectok", "tokenizer", what, 2) for what in ("train", "decode", "encode")]
    monkeypatch.setattr(gpu_stages, "rows_wanted", lambda rehearse: wanted)
    errors = iter((TypeError("another torch"), RuntimeError("CUDA error: an illegal memory access")))
    begun: list[list[str]] = []

    def replaced(program, words):
        begun.append(words)
        raise SystemExit

    def fails(*_):
        raise next(errors)

    monkeypatch.setattr(benchmark, "measure", fails)
    monkeypatch.setattr(gpu_stages.os, "execv", replaced)
    with pytest.raises(SystemExit):
        gpu_stages.measure(torch.device("cpu"), True, tmp_path)
    records = gpu_stages._lines(tmp_path / "rows.jsonl")
    assert [r.get("failed", "") for r in records if "failed" in r] == [
        "TypeError: another torch",
        "RuntimeError: CUDA error: an illegal memory access",
    ]
    assert len(records) == 4 and begun[0][1:] == sys.orig_argv[1:]


def test_a_compiler_that_fails_leaves_the_other_comparisons(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_stages, "_losses", lambda *_: 1 / 0)
    assert gpu_stages.compiled(torch.device("cpu"), True, tmp_path) == 1
    assert "toy_far fp32 does not run: ZeroDivisionError" in capsys.readouterr().out


def test_a_section_is_replaced(tmp_path):
    path = tmp_path / "b.md"
    path.write_text("# T\n\n## A\n\nold\nold\n\n## B\n\nkept\n")
    gpu_check.replace_section(path, ["## A", "", "new"])
    assert path.read_text() == "# T\n\n## A\n\nnew\n\n## B\n\nkept\n"
    gpu_check.replace_section(path, ["## C", "", "added"])
    gpu_check.replace_section(path, ["## C", "", "added"])
    assert path.read_text() == "# T\n\n## A\n\nnew\n\n## B\n\nkept\n\n## C\n\nadded\n"


def test_work_of_a_batch_follows_from_two_counts():
    for system, kind, what in (("rectok", "generator", "sample"), ("imagefolder", "tokenizer", "train")):
        config, guide = gpu_stages.SYSTEMS[system].config(kind, rehearse=True)
        one, two, five = (benchmark.count(config, guide, what, batch) for batch in (1, 2, 5))
        guess = gpu_stages.extrapolated(one, two, 5)
        assert guess.flops == pytest.approx(five.flops, rel=1e-3) and guess.moved == pytest.approx(five.moved, rel=0.02)


def test_rows_get_their_floors_and_are_measured_once(tmp_path, monkeypatch):
    wanted = [gpu_stages.Wanted("rectok", "tokenizer", what, 2) for what in ("decode", "encode")]
    monkeypatch.setattr(gpu_stages, "rows_wanted", lambda rehearse: wanted)
    cpu = torch.device("cpu")
    (tmp_path / "rows.jsonl").write_text(
        '{"key": "rectok tokenizer decode eager 2"}\n{"key": "rect'
    )  # killed in this row
    assert gpu_stages.measure(cpu, True, tmp_path) == 0 == gpu_stages.count(cpu, True, tmp_path, "rectok", "dar")
    (row,) = gpu_stages.rows_with_floors(tmp_path)
    counted = benchmark.count(*gpu_stages.SYSTEMS["rectok"].config("tokenizer", True), "encode", 2)
    assert row.what == "encode" and row.work.flops == counted.flops
    assert "probed" in row.cells()["floor img/s"] and isinstance(row.work, Work)
    before = (tmp_path / "rows.jsonl").read_text()
    gpu_stages.measure(cpu, True, tmp_path)
    assert (tmp_path / "rows.jsonl").read_text() == before


def test_recipes_of_the_benchmark_exist():
    """At their published sizes, with the batches that the issue of speed is about."""
    rows = list(gpu_stages.rows_wanted(rehearse=False))
    assert {(r.system, r.batch) for r in rows if r.what == "sample"} == {
        (s, b) for s in gpu_stages.SYSTEMS for b in (1, 64, 256)
    }
    for system in gpu_stages.SYSTEMS.values():
        for kind in ("tokenizer", "generator"):
            config, guide = system.config(kind, rehearse=False)
            assert config.train.precision == "bf16" and (guide is None or config.sample.guidance == "auto")


def test_stages_name_tests_that_need_a_gpu():
    words = gpu_check._tests(None)
    files = [word for word in words if word.endswith(".py")]
    assert len(files) >= 4 and all((ROOT / file).is_file() for file in files)
    log = "....\n=========== 3 passed, 1 failed in 2.31s ===========\nFAILED tests/a.py::b - x\n"
    assert gpu_check._of_tests(log, 1) == "3 passed, 1 failed in 2.31s; tests/a.py::b"
    assert gpu_check._of_parity("PASS a.safetensors [x]\nFAIL b.safetensors [y]: z\n", None) == (
        "1 of 2 passed, the rest not reached; failed: b.safetensors"
    )


@NO_GPU
@pytest.mark.slow
def test_the_rehearsal(tmp_path):
    out = tmp_path / "results.json"
    done = shell("run_gpu_check.sh", "--device", "cpu", "--rehearse", "--minutes", 9, "--out", out)
    found = json.loads(out.read_text())
    assert done.returncode == 0, done.stdout
    assert {s["status"] for s in found["stages"].values()} == {"passed"} and len(found["rows"]) == 40
