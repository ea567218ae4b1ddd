"""What each published evaluation does, as data: its metrics, their names, its labels. Nothing else in the repository
asks for a protocol's name.

A protocol says which metrics are reported, how floats became uint8, how the feature network saw the pictures, and which
file was the reference. Where a repository is silent the entry follows guided-diffusion (ADM). docs/evaluation.md has
the same as a table, with the mistakes that each choice invites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.arrays import read_npy
from core.errors import UserError, nearest, plainly
from core.files import expanded, explain_os_errors
from core.rng import Draws, hash64


@dataclass(frozen=True)
class Protocol:
    """One way to measure.

    Rounding is a name of core.images.to_uint8. Reference names are files looked for in data/fid_stats/ and
    pretrained_models/, of which the one for the pictures' size counts; none means: computed from the originals
    (reconstruction), or none known (generation).
    """

    name: str
    about: str
    tokenizers: tuple[str, ...] = ()  # names of those whose authors measure so
    # feature network
    network: str = "inception"
    preprocess: str = "tf1"  # how the network's input is resized and scaled: "tf1" or "pytorch_fid"
    dtype: str = "float32"  # of the network
    # generation
    generation: tuple[str, ...] = ("fid", "sfid", "is", "precision", "recall")
    labels: str = "balanced"
    rounding: str = "nearest"
    bf16_pixels: bool = False  # under bf16 autocast, multiply by 255 in bf16 too: 0.17 levels brighter on average
    reference: tuple[str, ...] = ("VIRTUAL_imagenet256_labeled.npz", "VIRTUAL_imagenet512.npz")
    inception_score: str = "adm"  # form: "adm" chunks of 5,000 as they come, "shuffled" ten splits, "single" one split
    shuffle: bool = False  # pictures before the chunks of "adm"
    precision_recall: str = "exact"  # or "adm_fp16"
    # reconstruction
    reconstruction: tuple[str, ...] = ("fid", "psnr", "ssim", "lpips", "codebook")
    reconstruction_rounding: str = "nearest"
    original_rounding: str | None = None  # None: originals as they are; else through [-1, 1] and back with this
    reconstruction_reference: tuple[str, ...] = ()
    psnr_of: str = "uint8"  # what PSNR compares with the original: "uint8" reconstruction / 255, or clamped "float"
    ssim: tuple[str, ...] = ("ssim",)
    for_reconstruction: dict[str, str] = field(default_factory=dict)  # fields that differ for rFID


_ADM = Protocol("adm", "guided-diffusion's evaluator (Dhariwal & Nichol 2021): FID, sFID, IS, precision, recall")
_TORCH_FIDELITY = Protocol(
    "torch-fidelity",
    "the torch-fidelity 0.4 library: FID, IS over ten shuffled splits, KID, precision, recall",
    generation=("fid", "is", "kid", "precision", "recall"),
    inception_score="shuffled",
    reference=("adm_in256_stats.npz",),
    psnr_of="float",
)

PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        _ADM,
        _TORCH_FIDELITY,
        Protocol(
            "pytorch-fid",
            "the pytorch-fid library: FID alone, half-pixel resize, inputs on [-1, 1]",
            preprocess="pytorch_fid",
            generation=("fid",),
            reconstruction=("fid",),
            reference=(),
        ),
        replace(
            _TORCH_FIDELITY,
            name="rectok",
            about="RecTok (as DeTok): torch-fidelity against stored statistics",
            tokenizers=("rectok",),
            generation=("fid", "is"),
            labels="balanced",
            rounding="truncate",
            reconstruction_rounding="truncate",
            bf16_pixels=True,
            reconstruction=("fid", "psnr"),
            reconstruction_reference=("val_fid_statistics_file_256.npz", "val_fid_statistics_file_512.npz"),
        ),
        replace(
            _ADM,
            name="fqgan",
            about="FQGAN and LlamaGen: ADM's evaluator; SSIM with data range 2 on [0, 1]",
            tokenizers=("fqgan",),
            labels="random",
            rounding="plus128",
            reconstruction_rounding="plus128",
            reconstruction=("fid", "sfid", "is", "precision", "recall", "psnr", "ssim"),
            ssim=("ssim_llamagen",),
            precision_recall="adm_fp16",
        ),
        replace(
            _ADM,
            name="rear",
            about="reAR (1d-tokenizer): gFID by ADM's evaluator, rFID by its float64 streaming one",
            tokenizers=("maskgit_vqgan", "vqgan_plus", "titok"),
            labels="balanced",
            rounding="truncate",
            precision_recall="adm_fp16",
            inception_score="adm",
            reconstruction=("fid", "is", "codebook"),
            reconstruction_rounding="truncate",
            for_reconstruction={"dtype": "float64", "inception_score": "single"},
        ),
        replace(
            _ADM,
            name="dar",
            about="D-AR: gFID by ADM's evaluator, rFID by pytorch-fid on truncated originals",
            tokenizers=("dar",),
            labels="random",
            rounding="plus128",
            precision_recall="adm_fp16",
            reconstruction=("fid", "psnr", "ssim"),
            reconstruction_rounding="plus128",
            original_rounding="truncate",
            ssim=("ssim_llamagen",),
            for_reconstruction={"preprocess": "pytorch_fid"},
        ),
        replace(
            _ADM,
            name="imagefolder",
            about="ImageFolder and VAR: ADM's evaluator on shuffled arrays",
            tokenizers=("imagefolder",),
            generation=("fid", "is", "precision", "recall"),
            labels="val",
            rounding="truncate",
            shuffle=True,
            precision_recall="adm_fp16",
            reconstruction=("fid", "is", "precision", "recall", "codebook"),
            reconstruction_rounding="plus128",
        ),
    )
}


def get(name: str, purpose: str = "generation", rounding: str | None = None) -> Protocol:
    """The protocol called `name`, as it is used for `purpose` ("generation" or "reconstruction").

    Args:
        rounding: of samples and reconstructions, in place of the protocol's own.
    """
    if name not in PROTOCOLS:
        raise UserError(f'unknown protocol "{name}".{nearest(name, PROTOCOLS)}')
    protocol = PROTOCOLS[name]
    if rounding:
        protocol = replace(protocol, rounding=rounding, reconstruction_rounding=rounding)
    return replace(protocol, **protocol.for_reconstruction) if purpose == "reconstruction" else protocol


def of_tokenizer(name: str) -> str:
    """The protocol that the authors of the tokenizer `name` measure by; "adm" where none is known."""
    return next((p.name for p in PROTOCOLS.values() if name in p.tokenizers), "adm")


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------
# Which class each generated picture is asked to show. This moves FID by a few hundredths, so it is recorded.
#
# | name | label of picture i | who does so |
# |---|---|---|
# | balanced | i mod classes | RecTok, reAR |
# | random | uniform, drawn from (seed, i) | FQGAN, D-AR: torch.randint per batch and rank, not balanced |
# | val | those of the validation set, one of each class in turn | ImageFolder: 50 of each class, then shuffled |
# | a path | line i of a text file, or entry i of an integer .npy | |
#
# The random labels of FQGAN and D-AR come from torch's generator of each rank, shared with the sampling of codes: they
# change with the number of GPUs, the batch size and the torch version, so nobody can draw theirs again. Ours have the
# same distribution.

LABEL_KINDS = ("balanced", "random", "val")


def make_labels(kind: str, count: int, num_classes: int, seed: int = 0, val: Sequence[int] | None = None) -> Tensor:
    """(count,) int64 labels.

    Args:
        kind: a name of the table above, or the path of a file.
        val: labels of the validation set, for kind "val".
    """
    if kind == "balanced":
        return torch.arange(count) % num_classes
    if kind == "random":
        drawn = Draws(hash64(seed, "labels"), torch.arange(count)).uniform("label").flatten()
        return (drawn.double() * num_classes).long().clamp(max=num_classes - 1)
    if kind == "val":
        if val is None:
            raise UserError(
                "labels: val needs the validation set, whose labels are used. Give data.val_url, or a file of labels."
            )
        labels = torch.as_tensor(list(val), dtype=torch.int64)
        if len(labels) < count:
            raise UserError(
                f"labels: val has {len(labels)} pictures and {count} samples are asked for. "
                f"Use --num {len(labels)}, or labels: balanced."
            )
        return _in_turn(_check_range(labels, num_classes, "the validation set"))[:count]
    return _check_range(_read_labels(expanded(kind), count), num_classes, kind)


def _in_turn(labels: Tensor) -> Tensor:
    """The first of each class, then the second of each ...: validation sets are sorted by class, and the first few pictures of
    a measurement are to show all of them."""
    order, sizes = labels.argsort(stable=True), torch.bincount(labels)
    turn = torch.empty_like(labels)
    turn[order] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[order]]
    return labels[turn.argsort(stable=True)]


def _read_labels(path: Path, count: int) -> Tensor:
    if not path.is_file():
        raise UserError(f'labels: "{path}" is neither {", ".join(LABEL_KINDS)} nor a file with one label per line.')
    with explain_os_errors(path):
        try:
            if path.suffix == ".npy":
                values = read_npy(path)
                if values.ndim != 1 or values.dtype.kind not in "iu":
                    raise UserError(f"{path}: expected a row of whole numbers, got {values.dtype} {values.shape}.")
                labels = torch.from_numpy(values.astype(np.int64))
            else:
                labels = torch.tensor([int(line.split()[-1]) for line in path.read_text().splitlines() if line.strip()])
        except ValueError as error:
            raise UserError(f"{path}: expected one whole number per line ({plainly(error)}).") from error
    if len(labels) < count:
        raise UserError(f"{path} has {len(labels)} labels and {count} samples are asked for.")
    return labels[:count]


def _check_range(labels: Tensor, num_classes: int, name: str) -> Tensor:
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise UserError(
            f"labels of {name} run from {int(labels.min())} to {int(labels.max())}; the generator knows "
            f"classes 0 to {num_classes - 1}."
        )
    return labels.long()


def describe_labels(labels: Tensor, num_classes: int) -> dict[str, int]:
    """How even they are: fewest and most pictures of a class."""
    counts = torch.bincount(labels, minlength=num_classes)
    return {"classes": num_classes, "fewest_per_class": int(counts.min()), "most_per_class": int(counts.max())}


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------
# What a measured number may be called. The name carries the protocol and N: neither can be guessed from a value.
#
#     metric_name("fid", 50_000)                        fid_50k
#     metric_name("fid", 5_000, "pytorch_fid")          fid_pytorch_fid_5k
#     metric_name("is", 50_000, "torch_fidelity")       is_torch_fidelity_50k
#     metric_name("fd_lite0_block4", 270)               fd_lite0_block4_270
#
# Only the 2015 Inception network's pool features give a "fid" and its spatial ones an "sfid"; every other network's
# Frechet distance is "fd_<network>_<tap>" (FeatureNet.distance_name says which).


PREFIXES = {"generation": "", "reconstruction": "r", "perturbed": "p"}  # of metrics of features, by purpose
IS_VARIANTS = {"adm": "", "shuffled": "torch_fidelity", "single": "streaming"}  # by form of the Inception Score


def short_count(count: int) -> str:
    """50000 -> "50k", 5000 -> "5k", 270 -> "270", 12345 -> "12345"."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


def metric_name(base: str, count: int, variant: str = "") -> str:
    """The name of metric `base` measured on `count` pictures.

    Args:
        variant: what sets the number apart from others called `base`: a protocol ("torch_fidelity"), a resize
            ("pytorch_fid"), an arithmetic ("adm_fp16"). "" for the plain one.
    """
    if count < 1:
        raise UserError(f"{base} of {count} pictures has no name: measure at least one.")
    return "_".join(part for part in (base, variant, short_count(count)) if part)


def few_pictures(count: int, dim: int) -> str:
    """A sentence to print beside a Frechet distance of `count` pictures, or "" when there are enough.

    The expectation of the distance is that of infinitely many pictures plus about c / N.
    """
    if count <= dim:
        return (
            f"{count} pictures in {dim} dimensions: the covariance has no full rank and the distance is far too high. "
            "Compare it with nothing but the same number of pictures, or ask run_eval_tokenizer.sh or run_eval_generator.sh for --infinity."
        )
    if count < min(50 * dim, 50_000):
        return f"A Frechet distance of {count} pictures is biased upwards: compare it with equal numbers only."
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# What the numbers mean
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Meaning:
    """What a number says: `better` is "lower", "higher" or "" when neither is."""

    title: str
    unit: str
    better: str
    sentence: str


# The longest prefix of a metric's name counts. What follows it (network and tap) is put after the title.
MEANINGS = {
    "fid_": Meaning("FID", "", "lower", "Frechet Inception distance of samples to real pictures."),
    "rfid_": Meaning("rFID", "", "lower", "Frechet Inception distance of reconstructions to their originals."),
    "sfid_": Meaning("sFID", "", "lower", "The same on spatial features: composition rather than content."),
    "pfid_": Meaning("pFID", "", "lower", "rFID of reconstructions from disturbed codes."),
    "pfd_": Meaning("Perturbed Frechet", "", "lower", "Distance of reconstructions from disturbed codes. Not FID."),
    "rsfid_": Meaning("rsFID", "", "lower", "sFID of reconstructions to their originals."),
    "fd_": Meaning("Frechet", "", "lower", "Feature distance of samples to real pictures. Not FID."),
    "rfd_": Meaning("Reconstruction Frechet", "", "lower", "Distance of reconstructions to originals. Not FID."),
    "is_": Meaning(
        "Inception Score", "", "higher", "How sure a classifier is of each picture, and how varied all are."
    ),
    "ris_": Meaning("Inception Score", "", "higher", "The same of reconstructions."),
    "kid_": Meaning("KID", "", "lower", "Kernel distance of samples to real pictures."),
    "precision_": Meaning("Precision", "", "higher", "Share of samples that lie among real pictures."),
    "rprecision_": Meaning("Precision", "", "higher", "Share of reconstructions that lie among their originals."),
    "rrecall_": Meaning("Recall", "", "higher", "Share of originals that lie among their reconstructions."),
    "recall_": Meaning("Recall", "", "higher", "Share of real pictures that lie among samples."),
    "ssim": Meaning("SSIM", "", "higher", "Structural likeness of reconstructions, at most 1 (uniform 7 x 7 window)."),
    "ssim_llamagen": Meaning("SSIM (LlamaGen)", "", "higher", "With data range 2 on [0, 1] pictures: reads too high."),
    "lpips_vgg": Meaning("LPIPS", "", "lower", "Perceptual distance of reconstructions (VGG16, version 0.1)."),
    "codebook_usage": Meaning("Codebook usage", "share", "higher", "Codes that occur at all."),
    "codebook_entropy_bits": Meaning("Code entropy", "bits", "higher", "Of the codes' frequencies."),
    "codebook_perplexity": Meaning("Code perplexity", "codes", "higher", "Codes in effective use."),
    "psnr": Meaning("PSNR", "dB", "higher", "Pixel error of reconstructions, averaged per picture."),
    "ssim_gauss": Meaning("SSIM", "", "higher", "Structural likeness of reconstructions, at most 1 (Gaussian window)."),
    "class_accuracy": Meaning("Class accuracy", "share", "higher", "Samples recognised as the class asked for."),
    "neighbour_similarity": Meaning(
        "Neighbour similarity", "cosine", "", "To the nearest training picture, mean. Far above real means copying."
    ),
    "num_": Meaning("Number of", "pictures", "", "How many pictures the numbers are made of."),
}


def meaning_of(name: str) -> Meaning:
    """Title, unit, direction and one line of meaning for a metric's name.

    "real_" before a name says: the same measurement on real held-out pictures, what perfect samples would score.
    """
    if name.startswith("real_"):
        of = meaning_of(name.removeprefix("real_"))
        return Meaning(f"{of.title}, real", of.unit, "", "The same measurement on real held-out pictures.")
    known = max((prefix for prefix in MEANINGS if name.startswith(prefix)), key=len, default=None)
    if known is None:
        return Meaning(name.replace("_", " "), "", "", "")
    meaning = MEANINGS[known]
    return replace(meaning, title=f"{meaning.title} {name.removeprefix(known)}".strip())
