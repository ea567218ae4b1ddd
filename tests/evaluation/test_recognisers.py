"""evaluation/recognisers.py: which package is taken, and that each is called as it wants to be."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from core.errors import UserError
from evaluation import recognisers
from evaluation.instances import Face, Recogniser
from evaluation.recognisers import PPOCR, Dlib, DocTR, InsightFace, start

CPU = torch.device("cpu")


def package(monkeypatch, name: str, **contents) -> types.ModuleType:
    """A stand-in for an installed one."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class Works(Recogniser):
    name, suffix, modules, install = "it", "_it", ("json",), "it"

    def __init__(self, device):
        self.device = device


class Absent(Works):
    modules, install = ("json", "no_such_package_at_all"), "no-such-package"


class Broken(Works):
    install = "broken and more"

    def __init__(self, device):
        raise OSError("no route\nto its weights")


def test_the_first_that_starts_is_taken():
    assert isinstance(start((Absent, Broken, Works), CPU), Works)
    with pytest.raises(UserError) as caught:
        start((Absent, Broken), CPU)
    assert str(caught.value) == (
        "no recogniser is here: pip install no-such-package; or broken is installed and does not start (OSError: no route)"
    )


def test_scores_of_others_have_other_names():
    """Only TokBench's own recognisers give its numbers."""
    assert (DocTR.suffix, InsightFace.suffix) == ("", "")
    assert len({kind.suffix for kind in recognisers.TEXT_READERS}) == len(recognisers.TEXT_READERS)
    assert len({kind.suffix for kind in recognisers.FACE_NETS}) == len(recognisers.FACE_NETS)


def test_doctr_gives_boxes_in_pixels(monkeypatch):
    class Predictor(torch.nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.answer = answer

        def forward(self, pictures):
            return self.answer(pictures)

    asked = []

    def detector(arch, **options):
        asked.append((arch, options["pretrained"]))
        return Predictor(lambda pages: [{"words": np.array([[0.25, 0.5, 0.75, 1.0, 0.9]])} for _ in pages])

    def reader(arch, **options):
        asked.append((arch, options["pretrained"]))
        return Predictor(lambda crops: [(f"{crop.shape[1]}", 0.9) for crop in crops])

    package(monkeypatch, "doctr")
    package(monkeypatch, "doctr.models", detection_predictor=detector, recognition_predictor=reader)
    it = DocTR(CPU)
    assert asked == [("db_resnet50", True), ("parseq", True)]
    assert it.find(np.zeros((40, 80, 3), np.uint8)) == [(20, 20, 60, 40)]
    assert it.read([np.zeros((3, n, 3), np.uint8) for n in (5, 9)]) == ["5", "9"]


def test_insightface_is_given_blue_first_and_finds_a_nested_folder(monkeypatch, tmp_path, capsys):
    seen = {}

    class Detection:
        def detect(self, picture, max_num, metric):
            seen["first"] = picture[0, 0].tolist()
            found = picture.max() > 0
            boxes = np.array([[1, 2, 5, 8, 0.9]] if found else np.empty((0, 5)))
            return boxes, np.ones((1, 5, 2)) if found else None

    class Recognition:
        def get(self, picture, face):
            return face.kps.sum(0) + picture[0, 0, 0]

    class App:
        models = {"detection": Detection(), "recognition": Recognition()}

        def __init__(self, name, allowed_modules):
            print("find model: noise")
            seen["name"] = name

        def prepare(self, ctx_id, det_size):
            seen["device"] = ctx_id

    class Known(dict):
        __getattr__ = dict.__getitem__

    package(monkeypatch, "insightface")
    package(monkeypatch, "insightface.app", FaceAnalysis=App)
    package(monkeypatch, "insightface.app.common", Face=Known)
    monkeypatch.setenv("HOME", str(tmp_path))
    it = InsightFace(CPU)
    assert seen["name"] == "antelopev2" and seen["device"] == -1 and not capsys.readouterr().out
    picture = np.zeros((9, 9, 3), np.uint8)
    assert it.find(picture) == []
    picture[..., 0] = 200
    (face,) = it.find(picture)
    assert seen["first"] == [0, 0, 200] and face.box == (1, 2, 5, 8) and face.points.shape == (5, 2)
    assert it.embed(picture, [face, face]).tolist() == [[5, 5], [5, 5]]
    (tmp_path / ".insightface/models/antelopev2/antelopev2").mkdir(parents=True)
    InsightFace(CPU)
    assert seen["name"] == "antelopev2/antelopev2"


def test_ppocr_reads():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).text((20, 30), "STOP HERE", fill="black", font=ImageFont.load_default(28))
    it, picture = PPOCR(CPU), np.array(image)
    (box,) = it.find(picture)
    assert np.abs(np.array(box) - (20, 36, 170, 60)).max() < 8
    assert it.read([picture[20:70, 10:200], np.full((20, 40, 3), 255, np.uint8)]) == ["STOP HERE", ""]
    assert it.find(np.full((64, 64, 3), 255, np.uint8)) == []


def test_dlib_embeds_at_given_landmarks():
    pytest.importorskip("dlib")
    pytest.importorskip("face_recognition_models")
    it = Dlib(CPU)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert it.find(np.full((64, 64, 3), 255, np.uint8)) == []
    face = Face((30, 30, 90, 90), np.array([(80, 50), (70, 50), (40, 50), (50, 50), (60, 70)]))
    assert it.embed(noise, [face, face]).shape == (2, 128)
