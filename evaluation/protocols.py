"""What each published evaluation does, as data. Nothing else in the repository asks for a protocol's name.

A protocol says which metrics are reported, how floats became uint8, how the feature network saw the pictures, and which
file was the reference. Where a repository is silent the entry follows guided-diffusion (ADM). docs/evaluation.md has
the same as a table, with the mistakes that each choice invites.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from core.errors import UserError, nearest


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


def get(name: str, purpose: str = "generation") -> Protocol:
    """The protocol called `name`, as it is used for `purpose` ("generation" or "reconstruction")."""
    if name not in PROTOCOLS:
        raise UserError(f'unknown protocol "{name}".{nearest(name, PROTOCOLS)}')
    protocol = PROTOCOLS[name]
    return replace(protocol, **protocol.for_reconstruction) if purpose == "reconstruction" else protocol


def of_tokenizer(name: str) -> str:
    """The protocol that the authors of the tokenizer `name` measure by; "adm" where none is known."""
    return next((p.name for p in PROTOCOLS.values() if name in p.tokenizers), "adm")


def describe() -> str:
    """One line per protocol, for --help."""
    width = max(map(len, PROTOCOLS))
    return "\n".join(f"  {p.name:<{width}}  {p.about}" for p in PROTOCOLS.values())
