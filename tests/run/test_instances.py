"""run/instances.py: texts and faces of a comparison, by recognisers that need no package."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.images import save_png
from evaluation import recognisers
from evaluation.instances import Face, FaceNet, TextReader, cosine, likeness
from evaluation.measure import alone
from run import compare as comparing
from run import instances as module
from scripts import compare
from tests.conftest import finished_run, toy
from tests.ranks import in_threads

PICTURES = 40
BOXES = [(0.0, 0.0, 16.0, 8.0), (16.0, 8.0, 32.0, 24.0)]
QUICK = ("--seconds", "0", "--bootstrap", "0", "--workers", "0")


class Reader(TextReader):
    """Two texts in each picture, their brightness in letters."""

    suffix, modules, install, name = "_toy", ("json",), "toy", "toy reader"
    looked: list[bytes] = []

    def __init__(self, device):
        pass

    def find(self, picture):
        self.looked.append(picture.tobytes())
        return BOXES

    def read(self, crops):
        return ["".join(chr(97 + int(crop[..., c].mean()) // 16) for c in range(3)) for crop in crops]


class Faces(FaceNet):
    """A face in each picture with an even first pixel."""

    suffix, modules, install, name = "_toy", ("json",), "toy", "toy faces"

    def __init__(self, device):
        pass

    def find(self, picture):
        return [Face((4.0, 4.0, 20.0, 28.0), np.zeros((5, 2)))] if picture[0, 0, 0] % 2 == 0 else []

    def embed(self, picture, faces):
        return np.stack([picture.reshape(-1, 3).astype(np.float64).mean(0) - 100 for _ in faces])


@pytest.fixture(scope="module")
def fqgan(tmp_path_factory):
    return finished_run(tmp_path_factory, toy("fqgan_tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures in files."""
    path = tmp_path_factory.mktemp("pictures")
    coarse = torch.randint(0, 256, (PICTURES, 3, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    for i, picture in enumerate(torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear").to(torch.uint8)):
        save_png(picture, path / f"{i:03}.png")
    return path


@pytest.fixture
def recognising(monkeypatch):
    monkeypatch.setattr(module, "TEXT_READERS", (Reader,))
    monkeypatch.setattr(module, "FACE_NETS", (Faces,))
    monkeypatch.setattr(Reader, "looked", [])


def numbers(folder) -> dict[tuple[str, str], float]:
    rows = csv.DictReader((folder / "compare.csv").read_text().splitlines())
    return {(row["name"], row["metric"]): float(row["value"]) for row in rows}


def test_scores_are_those_of_the_reconstructions(fqgan, tokenizer_run, folder, recognising, tmp_path):
    out = tmp_path / "out"
    words = [str(fqgan), str(tokenizer_run), "--data", str(folder), *QUICK, "--text-and-faces", "30", "--out", str(out)]
    assert compare.main(words) == 0
    found, (a, b) = numbers(out), comparing.names_of([str(fqgan), str(tokenizer_run)])
    options, settings = compare.parse(words)
    means = {}
    for target, name in ((fqgan, a), (tokenizer_run, b)):
        each = comparing.options_for(options, str(target), name, tmp_path)
        rebuild = comparing.by_tokenizer(
            each, comparing.with_one_protocol(settings), alone(torch.device("cpu"))
        ).rebuild
        reader, net, values, faces = Reader(None), Faces(None), [], []
        for pair in rebuild(range(30)):
            for sides in zip(pair.original, pair.recon):
                x, y = (side.permute(1, 2, 0).numpy() for side in sides)
                for left, top, right, bottom in (tuple(map(int, box)) for box in BOXES):
                    (said,), (read,) = (reader.read([z[top:bottom, left:right]]) for z in (x, y))
                    values.append(likeness(said, read))
                if known := net.find(x):
                    faces.append(cosine(net.embed(x, known), net.embed(y, known))[0])
        assert found[name, "t_ned_toy"] == pytest.approx(np.mean(values))
        assert found[name, "t_acc_toy"] == pytest.approx(np.mean(np.array(values) == 1))
        assert found[name, "f_sim_toy"] == pytest.approx(np.mean(faces))
        assert found[name, "t_ned_toy_large"] == pytest.approx(np.mean(values)), "both boxes are larger than a tenth"
        means[name] = np.mean(values)
    rows = {row["metric"]: row for row in csv.DictReader((out / "differences.csv").read_text().splitlines())}
    assert float(rows["t_ned_toy"]["value"]) == pytest.approx(means[b] - means[a])
    page = (out / "report.html").read_text()
    for said in ("Texts and faces", "toy reader", "first 30 originals", "What is read there", ">Faces<", "t_acc_toy"):
        assert said in page
    assert "t\\_acc\\_toy &" in (out / "compare.tex").read_text() and "large" not in (out / "compare.tex").read_text()
    # again: nothing is looked for anew
    before, looked = (out / "compare.csv").read_text(), len(Reader.looked)
    assert compare.main(words) == 0
    assert (out / "compare.csv").read_text() == before and len(Reader.looked) == looked


def test_a_killed_search_goes_on(fqgan, folder, recognising, tmp_path, monkeypatch):
    words = [str(fqgan), str(fqgan) + "/../" + fqgan.name, "--data", str(folder), *QUICK]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert compare.main([*words, "--out", str(whole)]) == 0
    once = Reader.looked.copy()
    find = Reader.find

    def dies(self, picture):
        if len(self.looked) == 20:
            raise KeyboardInterrupt
        return find(self, picture)

    Reader.looked.clear()
    monkeypatch.setattr(Reader, "find", dies)
    with pytest.raises(KeyboardInterrupt):
        compare.main([*words, "--out", str(torn)])
    monkeypatch.setattr(Reader, "find", find)
    Reader.looked.clear()
    assert compare.main([*words, "--out", str(torn)]) == 0
    assert len(Reader.looked) == len(once) - 16, "a chunk of 16 was finished"
    assert (torn / "compare.csv").read_text() == (whole / "compare.csv").read_text()
    assert not list(torn.glob("*/text_and_faces-*/"))


def test_what_a_list_says_is_right(fqgan, tokenizer_run, folder, recognising, tmp_path):
    """The originals have a row of their own: the reader does not read everything right."""
    listed = tmp_path / "texts.jsonl"
    lines = []
    for i in range(10):
        picture = np.asarray(Image.open(folder / f"{i:03}.png"))
        (said,) = Reader(None).read([picture[8:24, 16:32]])
        truth = said if i < 7 else "x" * 9
        lines.append(json.dumps({"file": f"{i:03}.png", "texts": [{"box": [16, 8, 32, 24], "says": truth}]}))
    listed.write_text("\n".join(lines))
    out = tmp_path / "out"
    words = [str(fqgan), str(tokenizer_run), "--data", str(folder), *QUICK, "--texts", str(listed), "--out", str(out)]
    assert compare.main(words) == 0
    assert not Reader.looked, "nothing is looked for where a list says where it is"
    page = (out / "report.html").read_text()
    row = page[page.index("the originals") :]
    assert ">10<" in row[:200] and "0.7000 [" in row[:300]


def test_without_recognisers_they_are_named(fqgan, tokenizer_run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(recognisers, "installed", lambda kinds: [])
    out = tmp_path / "out"
    words = [str(fqgan), str(tokenizer_run), "--data", str(folder), *QUICK, "--num", "8", "--out", str(out)]
    assert compare.main(words) == 0
    left_out = json.loads((out / "metrics.json").read_text())["context"]["left_out"]
    assert "pip install python-doctr; or pip install rapidocr onnxruntime" in left_out["T-ACC, T-NED (TokBench)"]
    assert "pip install insightface onnxruntime; or pip install dlib-bin" in left_out["F-Sim (TokBench)"]
    assert compare.main([*words[:-2], "--text-and-faces", "0", "--out", str(tmp_path / "none")]) == 0
    left_out = json.loads((tmp_path / "none" / "metrics.json").read_text())["context"]["left_out"]
    assert left_out["T-ACC, T-NED (TokBench), F-Sim (TokBench)"].startswith("not asked for")


def test_ranks_agree_on_a_recogniser():
    """One that starts on some ranks only is left out on all of them."""

    class Picky(Reader):
        made: list[torch.device] = []

        def __init__(self, device):
            if self.made:
                raise OSError("only one of them fits")
            self.made.append(device)

    def work(world):
        return module.agreed((Reader,), world), module.agreed((Picky,), world)

    for good, (none, why) in in_threads(2, work):
        assert good[0].name == "toy reader" and none is None and why


def test_a_list_of_other_pictures_is_told(fqgan, tokenizer_run, generator_run, folder, recognising, tmp_path):
    listed = tmp_path / "t.jsonl"
    listed.write_text('{"file": "elsewhere.png", "texts": [{"box": [0, 0, 2, 2], "says": "ok"}]}')
    out = tmp_path / "out"
    words = [str(fqgan), str(tokenizer_run), "--data", str(folder), *QUICK, "--num", "8", "--out", str(out)]
    assert compare.main([*words, "--texts", str(listed)]) == 0
    left_out = json.loads((out / "metrics.json").read_text())["context"]["left_out"]
    assert "is whole in the first 8 pictures; a file in it is elsewhere.png" in left_out["T-ACC, T-NED (TokBench)"]
    other = shutil.copytree(generator_run, tmp_path / "other", symlinks=True)
    with pytest.raises(UserError, match="for tokenizers"):
        compare.main([str(generator_run), str(other), "--texts", str(listed), "--check"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--text-and-faces", "-1"), "-1: a number of pictures"),
        (("--texts", "missing.jsonl"), "missing.jsonl: this list of texts cannot be read"),
    ],
)
def test_mistakes(words, said, fqgan, tokenizer_run, folder):
    with pytest.raises(UserError, match=said):
        compare.main([str(fqgan), str(tokenizer_run), "--data", str(folder), *words, "--check"])


def test_pictures_without_names_have_no_list(fqgan, tokenizer_run, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    (tmp_path / "t.jsonl").write_text('{"file": "a", "texts": [{"box": [0, 0, 2, 2], "says": "ok"}]}')
    words = [str(fqgan), str(tokenizer_run), "--data", str(tmp_path / "a.npz"), "--texts", str(tmp_path / "t.jsonl")]
    with pytest.raises(UserError, match="no names to look up"):
        compare.main([*words, "--check"])
