"""scripts/sample.py: pictures that depend on seed, label and index alone, added to and never mixed."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from run.sample import parse_labels
from scripts import sample
from tests.conftest import ROOT


@pytest.fixture
def run(capsys, generator_run):
    def call(*arguments: object) -> str:
        assert sample.main([str(generator_run), *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return call


def pictures(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("[0-9]*.png"))}


def test_pictures_depend_on_seed_label_and_index(run, tmp_path):
    run("--labels", "2,ring 3,0", "--num", 7, "--batch", 7, "--out", tmp_path / "a")
    whole = pictures(tmp_path / "a")
    assert list(whole) == [f"{i:06d}_{label}.png" for i, label in enumerate((2, 1, 0, 2, 1, 0, 2))] or len(whole) == 7
    run("--labels", "2,ring 3,0", "--num", 4, "--batch", 3, "--out", tmp_path / "b")
    run("--labels", "2,ring 3,0", "--num", 7, "--batch", 2, "--out", tmp_path / "b")
    assert pictures(tmp_path / "b").keys() == whole.keys()
    for name in whole:  # sums of another batch may differ in the last bit
        a, b = (np.asarray(Image.open(tmp_path / d / name)).astype(int) for d in "ab")
        assert np.abs(a - b).max() <= 1
    run("--labels", "2,ring 3,0", "--num", 7, "--seed", 5, "--out", tmp_path / "c")
    assert pictures(tmp_path / "c") != whole
    assert Image.open(tmp_path / "a" / "grid.png").width == 3 * 34 + 2  # one column per label


def test_what_is_there_stays(run, tmp_path):
    folder = tmp_path / "s"
    run("--labels", "0-1", "--num", 4, "--out", folder)
    (folder / "000001_1.png").unlink()
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("0*.png")}
    assert "(1 new" in run("--labels", "0-1", "--num", 4, "--out", folder, "--npz", tmp_path / "s.npz")
    assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items())
    stored = np.load(tmp_path / "s.npz")["arr_0"]
    assert stored.shape == (4, 32, 32, 3) and (stored[1] == np.asarray(Image.open(folder / "000001_1.png"))).all()
    with pytest.raises(UserError, match="exists already"):
        run("--labels", "0-1", "--num", 4, "--out", folder, "--npz", tmp_path / "s.npz")


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--scale", "3"], r"sample.scale was 1.5, now 3.0"),
        (["--seed", "4"], "seed was 0, now 4"),
        (["--steps", "3"], "sample.steps was 5, now 3"),
        (["--labels", "1,0"], r"labels was \[0, 1\]"),
    ],
)
def test_other_settings_are_refused(run, tmp_path, extra, message):
    run("--labels", "0,1", "--num", 2, "--out", tmp_path)
    before = pictures(tmp_path)
    with pytest.raises(UserError, match=message):
        run("--labels", "0,1", "--num", 4, "--out", tmp_path, *extra)
    assert pictures(tmp_path) == before


def test_labels(capsys):
    names = ["tench", "goldfish", "tree frog"]
    assert parse_labels("2, 0-1,Tree Frog", 3, names) == [2, 0, 1, 2]
    assert parse_labels("207..209", 1000, []) == [207, 208, 209]
    numbered = sorted(map(str, range(12)))  # as folders are: 0, 1, 10, 11, 2
    assert [parse_labels(text, 12, n) for text in ("10", "10-10") for n in (numbered, [])] == [[10]] * 4
    assert "--labels 10: class number 10, called 8; the class that is called 10 has number 2" in capsys.readouterr().out
    with pytest.raises(UserError, match='"Crane" is the name of classes 0 and 2; give the number'):
        parse_labels("Crane", 3, ["crane", "x", "crane"])
    for text, message in (
        ("3", "classes 0 to 2"),
        ("2-1", "smaller number first"),
        ("goldfsh", 'Did you mean "goldfish"'),
        ("", "neither a class number"),
    ):
        with pytest.raises(UserError, match=message):
            parse_labels(text, 3, names)


def test_mistakes(generator_run, tokenizer_run, tmp_path):
    for arguments, message in (
        (["--labels", "0", "--out", tmp_path], "name a generator"),
        ([generator_run, "--labels", "0", "--out", tmp_path, "--num", "0"], "1 or more"),
        ([tokenizer_run, "--labels", "0", "--out", tmp_path], "tokenizer"),
        ([generator_run, "--labels", "0", "--out", tmp_path, "--npz", "x.npy"], "ends in .npz"),
    ):
        with pytest.raises(UserError, match=message):
            sample.main([str(a) for a in arguments])
    Image.new("RGB", (4, 4)).save(tmp_path / "000000_0.png")
    with pytest.raises(UserError, match="pictures of unknown settings"):
        sample.main([str(generator_run), "--labels", "0", "--out", str(tmp_path)])


@pytest.mark.slow
def test_two_ranks_make_the_same_pictures(generator_run, tmp_path):
    import sys

    for count in (1, 2):
        command = [
            "bash",
            "run_sample.sh",
            str(generator_run),
            "--labels",
            "0-3",
            "--num",
            "6",
            "--batch",
            "1",
            "--out",
            str(tmp_path / str(count)),
        ]
        subprocess.run(
            command, cwd=ROOT, check=True, env={**os.environ, "NPROC": str(count), "TESSERA_PYTHON": sys.executable}
        )
    assert pictures(tmp_path / "1") == pictures(tmp_path / "2")
