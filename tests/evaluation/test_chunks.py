"""Work in chunks: kept, continued, refused."""

from __future__ import annotations

import json

import pytest
import torch

from core.dist import World
from core.errors import UserError
from evaluation.chunks import Work

ONE = World(0, 1, 0, torch.device("cpu"))


def compute(indices: range) -> dict[str, torch.Tensor]:
    x = torch.arange(indices.start, indices.stop)
    return {"square": (x * x).float(), "sum/even": torch.tensor([int((x % 2 == 0).sum())])}


class Killed(BaseException):
    """Not an error that anything may catch."""


@pytest.mark.parametrize("kept", [True, False])
def test_work(tmp_path, kept):
    work = Work(23, ONE, tmp_path / "work" if kept else None, {"seed": 1}, chunk=5)
    work.compute(compute)
    result = work.gather()
    assert torch.equal(result["square"], torch.arange(23).float() ** 2) and result["sum/even"].item() == 12


def test_work_goes_on_where_it_was_killed(tmp_path):
    calls: list[int] = []

    def counted(indices: range, limit: int) -> dict[str, torch.Tensor]:
        if len(calls) == limit:
            raise Killed
        calls.append(indices.start)
        return compute(indices)

    for limit in (2, 3, 5):
        with pytest.raises(Killed):
            Work(23, ONE, tmp_path / "work", {"seed": 1}, chunk=4).compute(lambda indices: counted(indices, limit))
    (tmp_path / "work" / "chunk_000001.safetensors").write_bytes(b"torn")  # by a broken disk: done again
    work = Work(23, ONE, tmp_path / "work", {"seed": 1}, chunk=9)  # keeps the chunks it began with
    work.compute(lambda indices: counted(indices, 99))
    assert calls == [0, 4, 8, 12, 16, 4, 20]
    assert torch.equal(work.gather()["square"], torch.arange(23).float() ** 2)
    with pytest.raises(UserError, match="seed was 1, now 2"):
        Work(23, ONE, tmp_path / "work", {"seed": 2})
    work.forget()
    assert not (tmp_path / "work").exists()


def test_two_programs_on_one_evaluation(tmp_path, monkeypatch):
    """The second would delete what the first still writes."""
    work = Work(23, ONE, tmp_path / "work", {"seed": 1})
    monkeypatch.setattr("os.getpid", lambda: 1)  # another process, as far as locks know
    with pytest.raises(UserError, match="work is in use by process"):
        Work(23, ONE, tmp_path / "work", {"seed": 1})
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), work:
        raise ZeroDivisionError
    monkeypatch.setattr("os.getpid", lambda: 1)
    Work(23, ONE, tmp_path / "work", {"seed": 1})  # the first has ended


def test_work_that_an_earlier_version_began_goes_on(tmp_path):
    """The folder as it lies on users' disks, to the letter."""
    from safetensors.torch import save_file

    (tmp_path / "job.json").write_text('{\n  "chunk": 4,\n  "count": 10,\n  "seed": 1\n}\n')
    began = {"square": torch.tensor([16.0, 25, 36, 49]), "sum/even": torch.tensor([2]), "index": torch.arange(4, 8)}
    save_file(began, tmp_path / "chunk_000001.safetensors")
    work, calls = Work(10, ONE, tmp_path, {"seed": 1}), []
    work.compute(lambda indices: calls.append(indices) or compute(indices))
    assert calls == [range(4), range(8, 10)]
    result = work.gather()
    assert torch.equal(result["square"], torch.arange(10).float() ** 2) and result["sum/even"].item() == 5


def test_work_refuses_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        Work(4, ONE).compute(lambda indices: {"x": torch.full((4,), torch.nan)})
    with pytest.raises(UserError, match="nothing to evaluate"):
        Work(0, ONE)
    work = Work(8, ONE, tmp_path / "work", {}, chunk=4)
    work.compute(compute)
    work.path(1).write_bytes(work.path(0).read_bytes())
    with pytest.raises(UserError, match="each once"):
        work.gather()
    assert json.loads((tmp_path / "work" / "job.json").read_text()) == {"chunk": 4, "count": 8}
