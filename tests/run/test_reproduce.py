"""run/reproduce.py: the table against the list of released files, and what is said of a measured number."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from core.errors import UserError
from core.weights import released
from run import reproduce
from scripts import reproduce as program


def test_every_published_number_of_a_released_file_is_in_the_table():
    rows = reproduce.rows([])
    for file in released.table():
        told = re.findall(r"(FID-50K|rFID|IS|PSNR) ([\d.]+)", file.published.split(" with ")[0].split(";")[0])
        names = {"FID-50K": "fid", "rFID": "rfid", "IS": "is", "PSNR": "psnr"}
        for metric, value in told:
            found = [row.published.get(names[metric]) for row in rows if row.file == file.name]
            assert float(value) in found, (file.name, metric, value, found)
    assert {row.entry.system for row in rows} == {"rectok", "fqgan", "rear", "dar", "imagefolder"}
    assert all(metric in reproduce.TOLERANCE for row in rows for metric in row.published)


def test_files_beside_the_weights_are_known():
    (row,) = reproduce.rows(["ditdhxl_600ep_guided"])
    assert {"RecTok_decft.pth", "ditdhs_epoch_0029.pth", "adm_in256_stats.npz"} < {file.name for file in row.files()}
    (row,) = reproduce.rows(["ditdhxl_600ep_plain"])
    assert "ditdhs_epoch_0029.pth" not in {file.name for file in row.files()}


@pytest.mark.parametrize(
    ("measured", "num", "said"),
    [
        (1.90, 50000, "within another run"),
        (2.30, 50000, "differs"),
        (1.86, 5000, "not comparable: 5,000 pictures instead of 50,000"),
        (None, 50000, "not measured"),
    ],
)
def test_verdicts(measured, num, said):
    assert reproduce.verdict("fid", 1.86, measured, num) == said


def test_numbers_are_found_by_their_name_alone():
    found = {"fid_pytorch_fid_50k": 2.0, "sfid_50k": 5.0, "is_torch_fidelity_50k": 200.0, "rfid_5k": 1.0, "psnr": 20.0}
    assert [reproduce.value_of(m, found) for m in ("fid", "is", "rfid", "psnr")] == [2.0, 200.0, 1.0, 20.0]
    assert reproduce.value_of("fid", {"fid_infinity": 1.0, "fd_inception_50k": 2.0}) is None


def test_a_finished_row_is_not_measured_again(tmp_path, monkeypatch, capsys):
    called = []

    def run(command: list[str], cwd: object) -> SimpleNamespace:
        called.append(command)
        if len(called) == 2:
            return SimpleNamespace(returncode=75)  # a signal
        folder = tmp_path / command[-1].rsplit("/", 1)[-1]
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"metrics": {"rfid_50k": {"value": 0.95}}}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    monkeypatch.setattr(reproduce, "fetch", lambda file: f"fetched {file.name}")
    words = ["fqgan_dual_ds16", "fqgan_dual_ds8", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        program.main(words)
    assert stopped.value.code == 75
    assert program.main(words) == 0
    assert [command[2].rsplit("/", 1)[-1] for command in called] == [f"fqgan_dual_ds{n}.pt" for n in (16, 8, 8)]
    said = capsys.readouterr().out
    assert "fqgan_dual_ds16 | rfid | 0.94 | 0.95 | +0.010 | within another run" in said
    assert "fqgan_dual_ds8 | rfid | 0.32 | 0.95 | +0.630 | differs" in said
    assert "differs" in (tmp_path / "report.html").read_text()


def test_mistakes():
    with pytest.raises(UserError, match=r'"fqgam" is neither a system.*fqgan'):
        reproduce.rows(["fqgam"])
    with pytest.raises(UserError, match="2 or more"):
        program.main(["--num", "1"])
