"""scripts/sample.py: pictures that depend on seed, label and index alone, added to and never mixed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from core import lock
from core.dist import OtherRankFailed
from core.errors import UserError
from run import streaming
from run.sample import SampleFolder, parse_labels
from run.target import Sampler
from scripts import sample
from tests.conftest import ROOT
from tests.ranks import in_threads


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
    made = (tmp_path / "s.npz").stat().st_mtime_ns
    run("--labels", "0-1", "--num", 4, "--out", folder, "--npz", tmp_path / "s.npz")  # killed when all was written
    assert (tmp_path / "s.npz").stat().st_mtime_ns == made
    for more, seed in ((6, 0), (4, 1)):
        with pytest.raises(UserError, match="exists already"):
            out = ["--out", tmp_path / f"other_{seed}" if seed else folder]
            run("--labels", "0-1", "--num", more, "--seed", seed, *out, "--npz", tmp_path / "s.npz")


def test_two_programs_in_one_folder(run, tmp_path):
    owner = {"host": os.uname().nodename, "process": 1, "started": lock._started(1)}
    (tmp_path / ".owner").write_text(json.dumps(owner))
    with pytest.raises(UserError, match="is in use by process 1 on"):
        run("--labels", "0", "--num", 1, "--out", tmp_path)
    (tmp_path / ".owner").write_text(json.dumps({**owner, "started": "0"}))  # its number was given again
    run("--labels", "0", "--num", 1, "--out", tmp_path)
    assert not (tmp_path / ".owner").exists()


def test_a_folder_that_an_earlier_version_began_goes_on(run, tmp_path):
    """Its settings as they lie on users' disks, to the letter; the weights may have moved since."""
    run("--labels", "0,1", "--num", 4, "--out", tmp_path / "whole")
    noted = json.loads((tmp_path / "whole" / "sample.json").read_text())
    began = """{"labels": [0, 1], "precision": "fp32", "sample.guidance": "cfg", "sample.interval": [0.0, 1.0],
        "sample.power": 1.0, "sample.scale": 1.5, "sample.schedule": "constant", "sample.start": 1.0,
        "sample.steps": 5, "seed": 0, "tokenizer": "/elsewhere/tokenizer", "tokenizer_fingerprint": "TOKENIZER",
        "use_ema": true, "weights": "/elsewhere/checkpoints/step_00000003", "weights_fingerprint": "GENERATOR"}"""
    began = began.replace("TOKENIZER", noted["tokenizer_fingerprint"]).replace(
        "GENERATOR", noted["weights_fingerprint"]
    )
    assert noted.keys() == json.loads(began).keys()
    folder = tmp_path / "began"
    folder.mkdir()
    (folder / "sample.json").write_text(began)
    for name in ("000000_0.png", "000002_0.png"):
        shutil.copy2(tmp_path / "whole" / name, folder / name)
    assert "(2 new" in run("--labels", "0,1", "--num", 4, "--out", folder)
    assert pictures(folder) == pictures(tmp_path / "whole") and (folder / "sample.json").read_text() == began


def test_a_rank_that_fails_leaves_no_other_waiting(tmp_path):
    """And the pictures of the others stay."""

    def draw(world, unlucky=None):
        def colours(labels, draws):
            if world.rank == unlucky and 3 in draws.positions:
                raise UserError("no luck")
            return torch.zeros(len(labels), 3, 4, 4) + labels[:, None, None, None] / 2

        sampler = SimpleNamespace(config=SimpleNamespace(seed=0), sample=colours)
        return SampleFolder(tmp_path, [0, 1], 6).draw(sampler, 1, world)

    well, failed = in_threads(2, lambda world: draw(world, unlucky=1))
    assert isinstance(well, OtherRankFailed) and str(failed) == "no luck"
    assert sorted(pictures(tmp_path)) == ["000000_0.png", "000001_1.png", "000002_0.png", "000004_0.png"]
    assert in_threads(3, draw) == [1, 1, 0] and len(pictures(tmp_path)) == 6


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
    for many in ("9" * 5000, "0-" + "9" * 5000):  # more digits than Python reads
        with pytest.raises(UserError, match="the generator knows classes 0 to 2"):
            parse_labels(many, 3, names)
    commas = ["tench, Tinca tinca", "tench", "crane", "a, b, c"]
    assert parse_labels("Tench,tinca tinca", 4, commas) == [0]
    with pytest.raises(UserError, match='^train.new_classes: "tensh" is neither'):  # as it was written there
        parse_labels("tensh", 4, commas, "train.new_classes")
    assert parse_labels("2, tench , a,b,C,1-2,tench, Tinca tinca", 4, commas) == [2, 1, 3, 1, 2, 0]
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


def test_check_sees_what_sampling_will_see(generator_run, tokenizer_run, tmp_path):
    """Everything that --check lets pass would only be refused with the weights loaded, on every GPU."""
    page = tmp_path / "page.pth"
    page.write_text("<!DOCTYPE html><html></html>")
    guided = ["sample.guidance=auto", "sample.scale=2"]
    for arguments, message in (
        (["--labels", "4"], "knows classes 0 to 3"),
        (["--labels", "cow"], '"cow" is neither a class number'),
        (["sample.top_k=5"], "no such sampling option"),
        (["sample.shared=3"], "no such sampling option"),
        (["--layout", str(page)], "cannot continue codes"),
        (["--preview"], "nothing to preview"),
        ([*guided, f"sample.guide={page}"], "a web page"),
        ([*guided, f"sample.guide={tokenizer_run}"], "a generator was asked for"),
        ([f"tokenizer.weights={page}"], "a web page"),
    ):
        with pytest.raises(UserError, match=message):
            sample.main([str(generator_run), "--labels", "0", "--out", str(tmp_path / "out"), *arguments, "--check"])
    assert sample.main([str(generator_run), "--labels", "0", "--out", str(tmp_path / "out"), "--check"]) == 0
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("preview", [False, True])
def test_pictures_that_are_not_finite_are_not_written(run, tmp_path, monkeypatch, preview):
    """NaN would become an inconspicuous black."""
    real = Sampler.sample

    def poisoned(sampler, labels, draws):
        images = real(sampler, labels, draws)
        images[-1, 0, 0, 0] = torch.nan
        if preview:  # a stage that nobody kept
            return SimpleNamespace(pictures=[images, images.nan_to_num()], seconds=[1.0, 2.0], first_share=0.5)
        return images

    monkeypatch.setattr(Sampler, "stream" if preview else "sample", poisoned)
    monkeypatch.setattr(streaming, "check", lambda *_: None)
    with pytest.raises(UserError, match="a picture between 0 and 4 has pixels that are not finite"):
        run("--labels", "0", "--num", 5, "--out", tmp_path / "s", *(["--preview"] if preview else []))
    assert not list((tmp_path / "s").glob("*.png"))
