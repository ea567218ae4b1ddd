"""The evaluation's benchmark runs and both sides agree."""

import pytest

from core.errors import UserError
from tests.tools import benchmark_evaluation


@pytest.mark.slow
def test_rows_agree_with_torch_fidelity(capsys, tmp_path):
    pytest.importorskip("torch_fidelity")
    page = tmp_path / "rows.md"
    arguments = ["--num", "2", "--size", "32", "--features", "40", "--batch", "2", "--markdown", str(page)]
    assert benchmark_evaluation.main(arguments) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [cells[0].split()[0] for cells in rows] == ["features", "statistics", "distance", "pictures"]
    assert float(rows[0][5]) < 1e-4
    assert page.read_text().count("\n|") >= 5


def test_too_few():
    with pytest.raises(UserError, match="2 or more"):
        benchmark_evaluation.main(["--num", "1"])
