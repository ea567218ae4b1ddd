"""What travels with weights: names of classes, how pictures are prepared, how to sample, the paired tokenizer, results.

about_weights       of a run or a file, for the header of the file that is made of it
paired_tokenizer    from what a generator's file says to the tokenizer's weights on this machine
names_of_classes    of a target, wherever they are known
publish             a folder with weights and a model card, on the hub or ready to be put there
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core import caller
from core.errors import UserError
from core.files import ROOT, read_json
from core.schema import RunConfig
from core.specs import Tokenizer
from core.train.checkpoint import Checkpoint
from core.train.run import ABOUT
from core.weights import files as weight_files
from core.weights import hub
from data.sources import SPLITS
from run.data import class_names
from run.load import IMAGENET_CLASSES
from run.weights import Source, Weights

WNID = re.compile(r"n\d{8}")


# ---------------------------------------------------------------------------------------------------------------------
# Names of classes
# ---------------------------------------------------------------------------------------------------------------------
@functools.cache
def _imagenet() -> Any:
    from timm.data.imagenet_info import ImageNetInfo

    return ImageNetInfo("imagenet-1k")


def imagenet_names() -> list[str]:
    """Of ImageNet's 1000 classes: "tench, Tinca tinca"; no data set is needed."""
    return [_imagenet().index_to_description(i) for i in range(_imagenet().num_classes())]


def readable(names: Sequence[str]) -> list[str]:
    """The same, where all are ImageNet's folder names (n01440764) in words."""
    if not names or not all(WNID.fullmatch(name) for name in names):
        return list(names)
    words = [_imagenet().label_name_to_description(n) if n in _imagenet().label_names() else "" for n in names]
    return words if all(words) else list(names)


def in_words(word: str) -> str:
    """The description behind one of ImageNet's folder names; other words as they are."""
    known = WNID.fullmatch(word) and word in _imagenet().label_names()
    return _imagenet().label_name_to_description(word) if known else word


def names_of_classes(config: RunConfig, generator: Source, num_classes: int) -> list[str]:
    """What the weights say, else the training data, else ImageNet where there are as many classes; [] where unknown."""
    return readable(noted_classes(generator) or class_names(config) or _of_imagenet(num_classes))


def _of_imagenet(num_classes: int) -> list[str]:
    return imagenet_names() if num_classes == IMAGENET_CLASSES else []


def classes_of_weights(generator: Source, num_classes: int) -> list[str]:
    """The same without a config: what the weights say, else ImageNet's."""
    return readable(noted_classes(generator) or _of_imagenet(num_classes))


def noted_classes(generator: Source) -> list[str]:
    """Names of classes that are written beside the weights; [] where there are none."""
    content = generator.content
    if isinstance(content, weight_files.WeightFile):
        return content.about.get("class_names", [])
    return about_run(folder_of(content.path)).get("class_names", []) if isinstance(content, Checkpoint) else []


# ---------------------------------------------------------------------------------------------------------------------
# What a file says
# ---------------------------------------------------------------------------------------------------------------------
def about_run(run: Path) -> dict[str, Any]:
    """about.json of a run's folder; {} for runs of earlier versions."""
    return read_json(run / ABOUT, {})


def folder_of(checkpoint: Path) -> Path:
    """Of the run that a checkpoint belongs to."""
    return checkpoint.resolve().parents[1]


def about_weights(weights: Weights, fingerprint: str, network: Any) -> dict[str, Any]:
    """For the header of a file of these weights.

    Args:
        fingerprint: of the weights that are used, core.weights.hub.fingerprint.
        network: that they were loaded into.
    """
    about = dict(weights.about)
    if (config := weights.trained) is not None:
        about["class_names"] = readable(about_run(folder_of(weights.path)).get("class_names", []))
        about["config"] = {
            key: config[key] for key in ("sample", "eval") if weights.kind == "generator" or key == "eval"
        }
        about["config"]["data"] = {key: config["data"][key] for key in ("url", "val_url", "crop", "flip")}
        about["trained"] = {key: config["train"][key] for key in ("duration", "global_batch", "precision")}
        if weights.kind == "generator":
            section = {**config["tokenizer"]}
            reference = section.pop("weights", None)
            of_latents = weights.provenance.get("tokenizer_fingerprint")
            about["tokenizer"] = {"weights": reference, "fingerprint": of_latents, "section": section}
    if isinstance(network, Tokenizer):
        crop = "centre, resized as ADM's evaluation does"
        about["preprocessing"] = {"image_size": network.image_size, "crop": crop, "range": [-1, 1]}
    path = weights.path if weights.trained is None else folder_of(weights.path)
    results = results_of(fingerprint, path) or about.get("results", [])
    return {**about, "fingerprint": fingerprint, **({"results": results} if results else {})}


def results_of(fingerprint: str, path: Path) -> list[dict[str, Any]]:
    """What run_eval_*.sh measured of these weights, in work_dirs/eval and beside the run or file: metric, value, protocol ..."""
    roots = (Path("work_dirs"), path.resolve().parent)
    places = {p.resolve() for root in roots for p in root.glob("eval/*/metrics.json")}
    results = []
    for place in sorted(places):
        context = read_json(place).get("context", {})
        if context.get("weights_fingerprint") != fingerprint:
            continue
        facts = {key: context[key] for key in ("count", "net", "sample.scale", "seed") if context.get(key) is not None}
        for name, score in context.get("scores", {}).items():
            kept = {key: score[key] for key in ("value", "protocol", "reference", "count") if key in score}
            results.append({"metric": name, **facts, **kept})
    return results


def without_places(value: Any) -> Any:
    """Plain data in which paths of this machine keep their last part alone, as others have no use for the rest: a folder's
    name, that of the folder of splits with the split, or the path in this repository."""
    if isinstance(value, dict):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    if not isinstance(value, str):
        return value
    url = caller.URL.fullmatch(value)
    if url is None:
        return _end_of(value)
    query = caller.QUERY.sub(lambda part: part[1] + _end_of(part[2]), url[3] or "")
    return f"{url[1]}://{_end_of(url[2])}{query}"


def _end_of(path: str) -> str:
    if not path.startswith(("/", "~", "..")) or not Path(path).name:
        return path
    if (whole := Path(path).expanduser().resolve()).is_relative_to(ROOT):
        return str(whole.relative_to(ROOT))
    parts = Path(path).parts
    return "/".join(parts[-2:] if parts[-1] in SPLITS and len(parts) > 2 else parts[-1:])


def paired_tokenizer(path: Path, noted: dict[str, Any]) -> str:
    """Where the tokenizer of a generator's file is: beside it, in pretrained_models/, or where it was in training.

    Args:
        path: of the generator's file.
        noted: about["tokenizer"] of its header.
    """
    wanted, reference = noted.get("fingerprint"), noted.get("weights")
    for folder in (path.parent, hub.CACHE):
        for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            header = weight_files.read_header(file)
            if header and header.kind == "tokenizer" and wanted and header.about.get("fingerprint") == wanted:
                return str(file)
    if reference and ("://" in reference or Path(reference).exists() or (hub.CACHE / reference).exists()):
        return reference
    raise UserError(
        f"{path} models the latents of tokenizer weights {wanted}, and they are not here ({reference} neither). Put their "
        "file beside it, or say where they are: tokenizer.weights=FILE_OR_RUN"
    )
