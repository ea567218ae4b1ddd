"""Readers of texts and networks of faces that other packages bring. None of them is required; what is installed is used.

| package | finds and reads | weights | names |
|---|---|---|---|
| `python-doctr` | texts, by PARSeq: TokBench's reader | fetched once by the package | `t_acc`, `t_ned` |
| `rapidocr onnxruntime` | texts, by PP-OCR | come with it | `t_acc_ppocr`, `t_ned_ppocr` |
| `insightface onnxruntime` | faces, by ArcFace of antelopev2: TokBench's network; not for commercial use | fetched once by the package | `f_sim` |
| `dlib-bin face_recognition_models` | faces, by dlib's ResNet | come with it | `f_sim_dlib` |

Scores of different recognisers are different numbers, so only TokBench's own have the plain names.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from core.dist import version_of
from core.errors import UserError, brief
from evaluation.instances import Box, Face, FaceNet, Picture, Recogniser, TextReader, bounds

R = TypeVar("R", bound=Recogniser)


class DocTR(TextReader):
    """docTR's detector of words and PARSeq."""

    suffix = ""
    modules = ("doctr",)
    install = "python-doctr"

    def __init__(self, device: torch.device, pretrained: bool = True):
        from doctr.models import detection_predictor, recognition_predictor

        self.name = f"PARSeq of docTR {version_of('python-doctr')}"
        self.detector = detection_predictor("db_resnet50", pretrained=pretrained, pretrained_backbone=False).to(device)
        self.reader = recognition_predictor("parseq", pretrained=pretrained, pretrained_backbone=False).to(device)

    def find(self, picture: Picture) -> list[Box]:
        (page,) = self.detector([picture])
        height, width = picture.shape[:2]
        rows = page["words"][:, :4] * np.array([width, height, width, height])
        return [(float(a), float(b), float(c), float(d)) for a, b, c, d in rows]

    def read(self, crops: list[Picture]) -> list[str]:
        return [text for text, _ in self.reader(crops)]


class PPOCR(TextReader):
    """PP-OCR's detector of lines and its reader, as RapidOCR has them."""

    suffix = "_ppocr"
    modules = ("rapidocr", "onnxruntime")
    install = "rapidocr onnxruntime"

    def __init__(self, device: torch.device):
        from rapidocr import RapidOCR

        self.name = f"PP-OCR of RapidOCR {version_of('rapidocr')}"
        self.engine = RapidOCR(params={"Global.log_level": "error"})

    def find(self, picture: Picture) -> list[Box]:
        found = self.engine(_bgr(picture), use_det=True, use_cls=False, use_rec=False)
        return [] if found.boxes is None else [bounds(corners) for corners in found.boxes]

    def read(self, crops: list[Picture]) -> list[str]:
        found = [self.engine(_bgr(crop), use_det=False, use_cls=False, use_rec=True) for crop in crops]
        return [result.txts[0] if result.txts else "" for result in found]


class InsightFace(FaceNet):
    """ArcFace of InsightFace's antelopev2, with its detector."""

    suffix = ""
    modules = ("insightface", "onnxruntime")
    install = "insightface onnxruntime"
    models = "antelopev2"

    def __init__(self, device: torch.device):
        from insightface.app import FaceAnalysis

        self.name = f"ArcFace ({self.models}) of InsightFace {version_of('insightface')}"
        models = Path("~/.insightface/models").expanduser()
        nested = f"{self.models}/{self.models}"  # as its archive unpacks
        name = nested if (models / nested).is_dir() else self.models
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of each file
            self.app = FaceAnalysis(name=name, allowed_modules=["detection", "recognition"])
            self.app.prepare(ctx_id=(device.index or 0) if device.type == "cuda" else -1, det_size=(640, 640))

    def find(self, picture: Picture) -> list[Face]:
        boxes, landmarks = self.app.models["detection"].detect(_bgr(picture), max_num=0, metric="default")
        return [Face(bounds(box[:4]), points) for box, points in zip(boxes, landmarks if len(boxes) else ())]

    def embed(self, picture: Picture, faces: list[Face]) -> np.ndarray:
        from insightface.app.common import Face as Known

        rows = [self.app.models["recognition"].get(_bgr(picture), Known(kps=face.points)) for face in faces]
        return np.stack(rows)


class Dlib(FaceNet):
    """dlib's frontal detector, five landmarks and ResNet."""

    suffix = "_dlib"
    modules = ("dlib", "face_recognition_models")
    install = "dlib-bin face_recognition_models"

    def __init__(self, device: torch.device):
        import dlib

        self.dlib, self.name = dlib, f"ResNet of dlib {dlib.__version__}"
        # found and not imported: it asks for pkg_resources, which setuptools gave up
        spec = importlib.util.find_spec("face_recognition_models")
        models = Path(next(iter(spec.submodule_search_locations))) / "models"
        self.detector = dlib.get_frontal_face_detector()
        self.landmarks = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
        self.net = dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))

    def find(self, picture: Picture) -> list[Face]:
        faces = []
        for box in self.detector(picture, 1):
            points = [(p.x, p.y) for p in self.landmarks(picture, box).parts()]
            sides = float(box.left()), float(box.top()), float(box.right()), float(box.bottom())
            faces.append(Face(sides, np.array(points)))
        return faces

    def embed(self, picture: Picture, faces: list[Face]) -> np.ndarray:
        rows = []
        for face in faces:
            box = self.dlib.rectangle(*(int(x) for x in face.box))
            points = [self.dlib.point(int(x), int(y)) for x, y in face.points]
            rows.append(self.net.compute_face_descriptor(picture, self.dlib.full_object_detection(box, points)))
        return np.array(rows)


TEXT_READERS: tuple[type[TextReader], ...] = (DocTR, PPOCR)  # in the order of preference
FACE_NETS: tuple[type[FaceNet], ...] = (InsightFace, Dlib)


def _bgr(picture: Picture) -> np.ndarray:
    """As OpenCV's users have it."""
    return np.ascontiguousarray(picture[:, :, ::-1])


def installed(kinds: tuple[type[R], ...]) -> list[type[R]]:
    """Those whose packages are here."""
    return [kind for kind in kinds if all(importlib.util.find_spec(name) for name in kind.modules)]


def start(kinds: tuple[type[R], ...], device: torch.device) -> R:
    """The first one that is installed and starts; UserError with what each of them lacks."""
    reasons = []
    for kind in kinds:
        if kind not in installed(kinds):
            reasons.append(f"pip install {kind.install}")
            continue
        try:
            return kind(device)
        except Exception as error:  # of packages with errors of their own: no network, a torn file, another version
            reasons.append(f"{kind.install.split()[0]} is installed and does not start ({brief(error)})")
    raise UserError("no recogniser is here: " + "; or ".join(reasons))
