"""The shipped tiny models as golden models: what they score is recorded, and pictured for the README.

    python -m tests.tools.tiny --record               measure all of them and write tests/run/tiny.json
    python -m tests.tools.tiny --picture docs/tiny.png

A system's figures are the PSNR of 48 unseen pictures, and of 90 samples (seed 0, guidance of the recipe) the share that a
classifier recognises as the class asked for. The classifier is the quickstart's, kept beside the figures so that the test
need not look at all training pictures.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import run
from core import images as image_tools
from core.schema import RunConfig
from data.sources import open_source
from evaluation import networks, toy
from evaluation.images import psnr
from evaluation.measure import source_labels
from evaluation.pictures import SourcePictures
from run.load import load_config
from run.models import GeneratorModel
from run.quickstart import TINY, is_shipped
from run.quickstart.shown import Standard

RECORD = Path(__file__).parents[1] / "run" / "tiny.json"
CLASSIFIER = RECORD.with_name("tiny_classifier.safetensors")
SYSTEMS = [path.name for path in sorted(TINY.iterdir()) if is_shipped(path.name)]
PICTURED = ["rectok", "fqgan", "rear", "imagefolder", "dar"]  # from above
UNSEEN, SAMPLES, COLUMNS = 48, 90, 9
CLASSIFIED = 64  # px of the pictures that the classifier has learnt from


@functools.cache
def feature_network() -> networks.FeatureNet:
    return networks.feature_net(torch.device("cpu"))


def recipe(system: str) -> RunConfig:
    return load_config(str(TINY / system / "generator.yaml"), [])


@functools.cache
def model(system: str) -> GeneratorModel:
    return run.load_generator(f"tiny/{system}", "cpu")


def unseen(size: int, count: int) -> Tensor:
    """(count, 3, size, size) uint8, spread over the pictures that were not trained on."""
    pictures = SourcePictures(open_source("embedded://emoji64", "val"), size, 0)
    places = [i * len(pictures) // count for i in range(count)]
    return torch.cat([pictures.read(place, place + 1) for place in places])


def unseen_labels(count: int) -> Tensor:
    """(count,) classes of the pictures of `unseen`."""
    labels = source_labels(open_source("embedded://emoji64", "val"))
    return torch.tensor([labels[i * len(labels) // count] for i in range(count)])


def samples(system: str, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(pictures (count, 3, H, W) uint8, classes (count,)), the classes in turn."""
    generator = model(system)
    classes = generator.sampler.num_classes
    pictures = generator.sample(list(range(classes)), num=count, seed=seed, output="uint8")
    assert isinstance(pictures, Tensor)
    return pictures, torch.arange(count) % classes


def classifier() -> toy.LinearClassifier:
    return toy.LinearClassifier(**{name: tensor.double() for name, tensor in load_file(CLASSIFIER).items()})


def figures(system: str) -> dict[str, float]:
    """PSNR in dB and the share of samples of their class."""
    tokenizer = model(system).tokenizer
    originals = unseen(tokenizer.image_size, UNSEEN)
    rebuilt = tokenizer.reconstruct(originals, output="uint8")
    assert isinstance(rebuilt, Tensor)
    decibels = psnr(originals / 255, rebuilt / 255).mean()
    pictures, labels = samples(system, SAMPLES)
    features = torch.cat([feature_network().taps(part)[toy.CLASS_TAP] for part in pictures.split(30)])
    right = (classifier().predict(features) == labels).double().mean()
    return {"psnr": round(float(decibels), 3), "class_accuracy": round(float(right), 4)}


def record() -> None:
    """The classifier, in fp16, and then the figures that it gives."""
    standard = Standard(recipe(SYSTEMS[0]), CLASSIFIED)
    fitted = standard.classifier
    state = {name: getattr(fitted, name).half() for name in ("mean", "scale", "weight", "bias")}
    save_file(state, CLASSIFIER)
    RECORD.write_text(json.dumps({system: figures(system) for system in SYSTEMS}, indent=2) + "\n")


def picture(path: Path, side: int = 64) -> None:
    """A band for each system: unseen pictures above their reconstructions, then samples, a class in each column."""
    bands = []
    for system in sorted(SYSTEMS, key=PICTURED.index):
        tokenizer = model(system).tokenizer
        originals = unseen(tokenizer.image_size, COLUMNS)
        rebuilt = tokenizer.reconstruct(originals, output="uint8")
        drawn, _ = samples(system, 2 * COLUMNS)
        rows = torch.cat((originals, torch.as_tensor(rebuilt), drawn))
        enlarged = torch.nn.functional.interpolate(rows.float(), (side, side), mode="nearest").byte()
        bands.append(image_tools.grid(enlarged, columns=COLUMNS))
    white = torch.full((3, 12, bands[0].shape[2]), 255, dtype=torch.uint8)
    image_tools.save_png(torch.cat([part for band in bands for part in (band, white)][:-1], dim=1), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.record:
        record()
        print(RECORD.read_text())
    if options.picture:
        picture(options.picture)


if __name__ == "__main__":
    main()
