"""run/reproduce.py: the table against the lists of published numbers, and what is said of a measured number."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.errors import UserError
from core.weights import released
from evaluation import protocols
from run import reproduce
from scripts import reproduce as program

SEEDS = Path(__file__).resolve().parents[3] / "shared" / "seeds"


def test_every_published_number_of_a_released_file_is_in_the_table():
    rows = reproduce.rows([])
    for file in released.table():
        told = re.findall(r"(FID-50K|rFID|IS|PSNR) ([\d.]+)", file.published.split(" with ")[0].split(";")[0])
        names = {"FID-50K": "fid", "rFID": "rfid", "IS": "is", "PSNR": "psnr"}
        for metric, value in told:
            found = [row.published.get(names[metric]) for row in rows if row.file == file.name]
            assert value in found, (file.name, metric, value, found)
    assert {row.group for row in rows} == {"evaluation", "rectok", "fqgan", "rear", "dar", "imagefolder"}


@pytest.mark.skipif(not SEEDS.is_dir(), reason="no ../shared/seeds here")
def test_every_number_of_the_systems_readmes_is_listed():
    """Tables of FID and its like in Markdown; the scales of guidance in RecTok's are words of its rows."""
    listed = reproduce.listing(reproduce.rows([]))
    count = 0
    for file in SEEDS.glob("*.txt"):
        for line in file.read_text().splitlines():
            numbers = re.findall(r"(?<![\d.])\d{1,3}\.\d{1,2}(?![\d.])", line) if line.startswith("|") else []
            for number in numbers:
                if line.startswith(f"|{number}|"):
                    continue
                count += 1
                assert number in listed, f"{file.name}: {line}"
    assert count > 30


def test_what_is_published_is_measured():
    """Each metric of a row that runs is one that its protocol reports."""
    for row in (row for row in reproduce.rows([]) if not row.missing):
        config = row.config()
        stated = [word.partition("=")[2] for word in row.settings if word.startswith("eval.protocol=")]
        name = config.eval.protocol if config else stated[0] if stated else {"rear": "rear"}.get(row.group, row.group)
        protocol = protocols.get(name)
        known = set(protocol.reconstruction if row.is_tokenizer else protocol.generation)
        for metric in row.published:
            base = {"rfid": "fid", "ris": "is", "codebook_usage": "codebook"}.get(metric, metric)
            assert base in known, (row.name, metric, protocol.name)
            float(row.published[metric])


def test_files_beside_the_weights_are_known():
    (row,) = reproduce.rows(["ditdhxl_600ep_guided"])
    assert {"RecTok_decft.pth", "ditdhs_epoch_0029.pth", "adm_in256_stats.npz"} < {file.name for file in row.files()}
    (row,) = reproduce.rows(["ditdhxl_600ep_plain"])
    assert "ditdhs_epoch_0029.pth" not in {file.name for file in row.files()}
    (row,) = reproduce.rows(["adm_known_answer"])
    assert {file.name for file in row.files()} == {row.file, "VIRTUAL_imagenet256_labeled.npz"}


@pytest.mark.parametrize(
    ("name", "metric", "measured", "entry", "num", "said", "why"),
    [
        ("reAR-L", "fid_50k", 1.90, [1.86, 1.94], 50000, "within another run", "bootstrap"),
        ("reAR-L", "fid_50k", 1.93, [1.89, 1.97], 50000, "differs", r"\+-0.062"),  # sqrt(2) 0.04 + 0.005
        ("reAR-L", "fid_50k", 1.86, None, 50000, "not comparable", "no interval"),
        ("reAR-L", "fid_50k", 1.86, [1.8, 1.9], 5000, "not comparable", "5,000 pictures instead of 50,000"),
        ("reAR-L", "fd_lite0_128px_block4_50k", 1.86, [1.8, 1.9], 50000, "not comparable", "stand-in"),
        ("fqgan_dual_ds16", "rfid_50k", 0.949, None, 50000, "within another run", "arithmetic"),
        ("fqgan_dual_ds16", "rfid_50k", 0.96, [0.8, 1.2], 50000, "differs", r"\+-0.01:"),
        ("adm_known_answer", "fid_50k", 3.9438, None, 50000, "within another run", r"\+-0.005"),
    ],
)
def test_verdicts(name, metric, measured, entry, num, said, why):
    (row,) = reproduce.rows([name])
    found, entry = reproduce.value_of(next(iter(row.published)), {metric: {"value": measured, "interval": entry}})
    verdict, reason = reproduce.verdict(row, next(iter(row.published)), found, entry, num)
    assert verdict == said and re.search(why, reason), (verdict, reason)


def test_what_cannot_be_measured_says_why(tmp_path, monkeypatch):
    far, plot = reproduce.rows(["far_b", "fqgan_dual_1024"])
    assert "run_train_ar.sh configs/fqgan/far_b_dual.yaml" in far.obstacle() and "never released" in plot.obstacle()
    assert reproduce.verdict(plot, "rfid", "", None, 50000) == ("not measured", "never released")
    monkeypatch.setattr(reproduce, "load_config", lambda *_: SimpleNamespace(run_dir=tmp_path))
    assert far.obstacle() == ""  # a run of ours


def test_numbers_are_found_by_their_name_alone():
    found = {"fid_pytorch_fid_50k": 2.0, "sfid_50k": 5.0, "is_torch_fidelity_50k": 200.0, "rfid_5k": 1.0, "psnr": 20.0}
    entries = {name: {"value": value} for name, value in found.items()}
    assert [reproduce.value_of(m, entries)[1]["value"] for m in ("fid", "is", "rfid", "psnr")] == [2, 200, 1, 20]
    assert reproduce.value_of("fid", {"fid_infinity": {}, "fd_lite0_50k": {}})[0] == "fd_lite0_50k"


def test_hours_of_a_row():
    """Flops of the published sizes: 160 + 253 G of the FQGAN tokenizer and two looks by Inception."""
    (row,) = reproduce.rows(["fqgan_dual_ds16"])
    assert row.hours(50000) == pytest.approx((159.9e9 + 252.7e9 + 22.8e9) * 50000 / 200e12 / 3600, rel=0.01)


def test_a_finished_row_is_not_measured_again(tmp_path, monkeypatch, capsys):
    called = []

    def attend(command: list[str], cwd: object) -> int:
        called.append(command)
        if len(called) == 2:
            return 75  # a signal
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(exist_ok=True)
        found = {"metrics": {"rfid_50k": {"value": 0.949}}, "context": {"left_out": {"psnr": "there is no picture."}}}
        (folder / "metrics.json").write_text(json.dumps(found))
        return 0

    monkeypatch.setattr(reproduce, "attend", attend)
    monkeypatch.setattr(reproduce, "fetch", lambda file: f"fetched {file.name}")
    words = ["fqgan_dual_ds16", "fqgan_dual_ds8", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        program.main(words)
    assert stopped.value.code == 75
    assert program.main(words) == 0
    assert [command[2].rsplit("/", 1)[-1] for command in called] == [f"fqgan_dual_ds{n}.pt" for n in (16, 8, 8)]
    said = capsys.readouterr().out
    assert "fqgan_dual_ds16 | rfid | 0.94 | 0.949 | +0.009 | within another run" in said
    assert "fqgan_dual_ds8 | rfid | 0.32 | 0.949 | +0.629 | differs" in said
    assert "fqgan_dual_ds8 | psnr | 26.27 |  |  | not measured | there is no picture." in said
    assert "differs" in (tmp_path / "report.html").read_text()


def test_a_signal_is_handed_on(tmp_path):
    """A launcher that nobody told would measure on without the program that is to write the page."""
    told, started = tmp_path / "told", tmp_path / "started"
    waits = f"trap 'touch {told}; exit 75' TERM; touch {started}; while :; do sleep 0.05; done"
    program = (
        "from pathlib import Path; from core import cli; from run import reproduce; "
        f"cli.run(lambda _: reproduce.attend(['bash', '-c', {waits!r}], Path.cwd()))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=reproduce.ROOT)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 75 and told.exists()


def test_a_file_that_cannot_be_had_leaves_the_other_rows(tmp_path, monkeypatch, capsys):
    def fetch(file: object) -> str:
        raise UserError("there is no network.")

    monkeypatch.setattr(reproduce, "fetch", fetch)
    assert program.main(["fqgan_dual_ds16", "fqgan_dual_ds8", "--out", str(tmp_path)]) == 1
    assert "not measured, see above: fqgan_dual_ds16, fqgan_dual_ds8" in capsys.readouterr().out


def test_mistakes():
    with pytest.raises(UserError, match=r'"fqgam" is neither a system.*fqgan'):
        reproduce.rows(["fqgam"])
    for option in ("--num", "--bootstrap"):
        with pytest.raises(UserError, match="2 or more"):
            program.main([option, "1"])
