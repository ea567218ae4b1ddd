"""Reference statistics: mean and covariance of the features of a set of real pictures, and what they were made from.

| file | holds | whose |
|---|---|---|
| VIRTUAL_imagenet256_labeled.npz | arr_0 (10,000 pictures), mu, sigma, mu_s, sigma_s | ADM (guided-diffusion) |
| adm_in256_stats.npz, val_fid_statistics_file_*.npz | mu, sigma | MAR, DeTok, RecTok |
| *.npz of pytorch-fid | mu, sigma, any float dtype | pytorch-fid |
| *-stat-fid-2048.pt of torch-fidelity's cache | {mu, sigma}, arrays or tensors | torch-fidelity |
| *-features-2048.pt of the same | (N, 2048) features, whose moments are taken | torch-fidelity |
| *.npz, *.safetensors | the same names, and count, network, preprocess, picture size, source | `save` below |

Everything becomes float64. Files of others do not say how they were made; what is known about them stands in KNOWN.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from core.arrays import NpzFile
from core.devices import pictures_at_once
from core.dist import World
from core.errors import UserError, plainly
from core.files import expanded, refuse_text, replacing, sha256_file, write_atomic
from core.images import through_model_range
from core.rng import permutation
from core.schema import RunConfig
from core.specs import DataSource
from core.weights import released
from core.weights.pickles import load_pickle
from core.weights.released import helper
from evaluation.chunks import OWN, Work
from evaluation.distances import Moments
from evaluation.networks import WEIGHTS_FILE, FeatureNet, features_of
from evaluation.pictures import ArrayPictures, Pictures, SourcePictures, check_pictures, in_short, pieces
from evaluation.protocols import Protocol

# Feature tap -> array names in a file: ADM's for FID's network, our own for the offline stand-in.
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "block4": ("mu_block4", "sigma_block4")}
_TORCH_FLOATS = (np.float16, np.float32, np.float64)
SUFFIXES = (".npz", ".pt", ".pth", ".safetensors")


Side = int | list[int]  # pixels: of a square, or [height, width]


def side_of(pictures: Pictures) -> Side:
    """The side of square pictures, else [H, W]: the size that references are compared by."""
    height, width = pictures.size
    return height if height == width else [height, width]


@dataclass(frozen=True)
class Facts:
    """What decides whether a reference may be compared with. None: the file does not say."""

    purpose: str | None = None  # "generation" (training set) or "reconstruction" (the originals themselves)
    network: str | None = None  # name of the feature network
    preprocess: str | None = None  # how pictures were resized and scaled for it
    image_size: Side | None = None  # of `side_of`
    count: int | None = None  # pictures behind the moments
    source: str | None = None  # fingerprint of the pictures, for references of ours
    sizes: str | None = None  # DataSource.file_sizes of theirs
    transform: str | None = None
    rounding: str | None = None  # Protocol.original_rounding that they went through; of references of ours
    made_by: str | None = None


_ADM_TRAIN = {"purpose": "generation", "network": "inception", "preprocess": "tf1", "count": 1_281_167}
KNOWN: dict[str, Facts] = {
    "VIRTUAL_imagenet256_labeled.npz": Facts(**_ADM_TRAIN, image_size=256, made_by="guided-diffusion"),
    "VIRTUAL_imagenet512.npz": Facts(**_ADM_TRAIN, image_size=512, made_by="guided-diffusion"),
    "adm_in256_stats.npz": Facts(**_ADM_TRAIN, image_size=256, made_by="MAR, from guided-diffusion's file"),
    **{
        f"val_fid_statistics_file_{size}.npz": Facts(
            "reconstruction", "inception", "tf1", size, 50_000, made_by="DeTok"
        )
        for size in (256, 512)
    },
}


@dataclass
class Statistics:
    """Moments by tap, float64 on the CPU, with where they come from."""

    moments: dict[str, tuple[Tensor, Tensor]]  # tap -> (mean (D,), covariance (D, D))
    facts: Facts
    name: str  # of the file, for records
    sha256: str | None = None
    pictures: ArrayPictures | None = field(default=None, repr=False)  # ADM's 10,000, for precision and recall

    def check(
        self,
        *,
        purpose: str,
        network: str,
        preprocess: str,
        image_size: Side | None,
        originals: Pictures | None = None,
        rounding: str | None = None,
    ) -> None:
        """UserError with one sentence if it must not be compared with. Unknown facts pass.

        Args:
            originals: of reconstructions.
            rounding: Protocol.original_rounding.
        """
        facts = self.facts
        if facts.purpose not in (None, purpose):
            other = {
                "generation": "whole training set, so reconstructions score 1.8 to 4 instead of 0.5 to 2 against it. "
                "Compare them with the originals: leave eval.reference out, or give statistics of the validation set",
                "reconstruction": "validation pictures that a tokenizer reconstructs. Generated pictures are compared "
                "with the training set, for example adm_in256_stats.npz or VIRTUAL_imagenet256_labeled.npz",
            }
            raise UserError(f"{self.name} is a reference for {facts.purpose}: it describes the {other[facts.purpose]}.")
        if facts.network not in (None, network):
            advice = "Make a reference with run_make_reference.sh, or choose the network of the file."
            if facts.network == "inception" and helper(WEIGHTS_FILE).found() is None:
                advice = f"FID's network is not here: {helper(WEIGHTS_FILE).command} fetches it."
            raise UserError(
                f'{self.name} was made with the feature network "{facts.network}", the pictures are measured with '
                f'"{network}". {advice}'
            )
        if facts.preprocess not in (None, preprocess):
            raise UserError(
                f'{self.name} was made with the input "{facts.preprocess}", the protocol uses "{preprocess}": '
                "distances would mix the two. Choose a protocol that fits the file, or make another reference."
            )
        if None not in (facts.image_size, image_size) and facts.image_size != image_size:
            theirs, ours = (
                " x ".join(map(str, size)) if isinstance(size, list) else size
                for size in (facts.image_size, image_size)
            )
            raise UserError(f"{self.name} describes pictures of {theirs} px, these have {ours} px.")
        if purpose == "reconstruction" and facts.source is not None and facts.rounding != rounding:
            theirs, ours = (f'rounded by "{name}"' if name else "as they are" for name in (facts.rounding, rounding))
            raise UserError(
                f"{self.name} describes originals {theirs}, and the protocol compares with originals {ours}. Leave "
                "eval.reference out, or make it again: run_make_reference.sh --for reconstruction --protocol NAME."
            )
        if purpose == "reconstruction" and originals is not None and facts.source is not None:
            source, sizes = originals.fingerprint(), originals.file_sizes()
            if facts.source != source:
                raise UserError(
                    f"{self.name} describes other pictures ({facts.source}) than the originals ({source}). rFID "
                    "compares reconstructions with their own originals."
                )
            if None not in (facts.sizes, sizes) and facts.sizes != sizes:
                raise UserError(
                    f"{self.name} describes pictures of these names of which some have other sizes now. Make it again from "
                    "the originals (run_make_reference.sh)."
                )

    def moment(self, tap: str, width: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of a tap; UserError when absent or of another width."""
        if tap not in self.moments:
            raise UserError(
                f"{self.name} has no moments of {tap} features ({', '.join(MOMENTS.get(tap, (tap,)))}); it holds "
                f"those of {', '.join(self.moments)}."
            )
        mean, covariance = self.moments[tap]
        if len(mean) != width:
            raise UserError(
                f"{self.name}: {tap} features have {len(mean)} dimensions there and {width} here. It was made with "
                "another feature network."
            )
        return mean, covariance


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
def load(path: str | Path) -> Statistics:
    """Statistics, pictures or both from one of the files listed above."""
    path = expanded(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a reference is a file that ends in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file. It is the reference that the protocol names; docs/evaluation.md says "
            "where to get it, and run_make_reference.sh makes one from pictures."
        )
    pictures = None
    if path.suffix == ".npz":
        arrays, facts, pictures, held = _read_npz(path)
    elif path.suffix == ".safetensors":
        arrays, facts = held, _ = _read_safetensors(path)
    else:
        arrays, facts = held, _ = _read_cache(path)
    facts = KNOWN.get(path.name, facts)
    if pictures is not None and facts.image_size is None:
        facts = replace(facts, image_size=side_of(pictures))
    moments = {tap: _moments(path, arrays, *names) for tap, names in MOMENTS.items() if names[0] in arrays}
    if not moments and pictures is None:
        raise UserError(
            f"{path}: neither statistics (mu, sigma) nor pictures (arr_0); it holds {in_short(list(held)) or 'nothing'}."
        )
    if not moments and len(pictures) < 2:
        raise UserError(f"{path} holds 1 picture and no statistics; a covariance needs at least 2.")
    return Statistics(moments, facts, path.name, sha256_file(path), pictures)


def _plain(value: Any) -> Any:
    """Arrays of floats, of any width and byte order, as tensors; everything else as it is."""
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value
    return torch.from_numpy(value.astype(value.dtype if value.dtype in _TORCH_FLOATS else np.float64))


def _read_npz(path: Path) -> tuple[dict[str, Any], Facts, ArrayPictures | None, list[str]]:
    """(statistics, facts, pictures, names of all that it holds)"""
    with NpzFile(path) as file:
        arrays = {name: _plain(file.load(name)) for pair in MOMENTS.values() for name in pair if name in file.names}
        facts, pictures = Facts(), None
        if "facts" in file.names:
            facts = _parse_facts(path, bytes(file.load("facts")).decode("utf-8", "replace"))
        if "arr_0" in file.names:
            array = file.map("arr_0")
            check_pictures(array, str(path))
            pictures = ArrayPictures(array, str(path))
        return arrays, facts, pictures, file.names


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Facts]:
    refuse_text(path)
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, _parse_facts(path, meta.get("facts", "{}"))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:  # as core.train.checkpoint.read_tensors
        raise UserError(f"{path}: not a whole .safetensors file ({error}). Copy or make it again.") from error


def _read_cache(path: Path) -> tuple[dict[str, Any], Facts]:
    """A .pt file: torch-fidelity's cached statistics, or its cached features. Its name tells the feature network."""
    match = re.search(r"-(inception-v3-compat|vgg16|clip-[\w-]+?|dinov2-[\w-]+?)-(stat-fid|features)-", path.name)
    network = match and {"inception-v3-compat": "inception"}.get(match[1], match[1])
    facts = Facts(
        network=network,
        preprocess="tf1" if network == "inception" else None,
        made_by="torch-fidelity" if match else None,
    )
    content = load_pickle(path, (dict, Tensor))
    if isinstance(content, dict):
        return {k: _plain(v) for k, v in content.items()}, facts
    if content.ndim != 2 or len(content) < 2 or not content.is_floating_point():
        raise UserError(
            f"{path}: neither statistics (mu, sigma) nor features of pictures; it holds {content.dtype} "
            f"{tuple(content.shape)}."
        )
    gathered = Moments.of(content)
    return {"mu": gathered.mean, "sigma": gathered.covariance}, replace(facts, count=len(content))


def _parse_facts(path: Path, text: str) -> Facts:
    try:
        record = json.loads(text)
        return Facts(**{k: record[k] for k in Facts.__dataclass_fields__ if k in record})
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its record of how it was made is damaged ({plainly(error)}).") from error


def _moments(path: Path, arrays: dict[str, Any], mean_name: str, covariance_name: str) -> tuple[Tensor, Tensor]:
    mean, covariance = arrays[mean_name], arrays.get(covariance_name)
    for name, value, dims in ((mean_name, mean, 1), (covariance_name, covariance, 2)):
        if not isinstance(value, Tensor) or value.ndim != dims or not value.is_floating_point():
            kind = f"{getattr(value, 'dtype', type(value).__name__)} {tuple(getattr(value, 'shape', ()))}"
            kind = "nothing" if value is None else kind
            raise UserError(f"{path}: {name} should be {dims}-dimensional and of floats, found {kind}.")
    if covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path}: {covariance_name} is {tuple(covariance.shape)} for {len(mean)} dimensions of {mean_name}."
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"{path}: {mean_name} or {covariance_name} is not finite.")
    if wrong := _no_covariance(covariance):
        raise UserError(
            f"{path}: {covariance_name} {wrong}, so it is no covariance and no distance from it means "
            "anything. Download the file again, or make one with run_make_reference.sh."
        )
    return mean.double(), covariance.double()


def _no_covariance(matrix: Tensor) -> str:
    """What forbids that a (D, D) matrix is a covariance, beyond the rounding of its type; "" where nothing does."""
    eps = max(torch.finfo(t).eps for t in (matrix.dtype, torch.float32))  # float64 files often were float32 once
    matrix = matrix.double()
    slack = 4 * eps * float(matrix.norm()) * len(matrix) ** 0.5
    if float((matrix - matrix.T).abs().max()) > slack:
        return "is not symmetric"
    shifted = (matrix + matrix.T) / 2
    shifted.diagonal().add_(slack + torch.finfo(torch.float64).tiny)  # a matrix of zeros has a root too
    return "has negative eigenvalues" if int(torch.linalg.cholesky_ex(shifted).info) else ""


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
DTYPES = {"torch-fidelity": ("float32", "float64"), "float32": ("float32",) * 2, "float64": ("float64",) * 2}


def save(
    path: str | Path, statistics: Statistics, pictures: np.ndarray | None = None, dtype: str = "torch-fidelity"
) -> None:
    """Write atomically, .npz (that ADM, pytorch-fid and RecTok read as well) or .safetensors by the suffix.

    Args:
        pictures: (n, H, W, 3) uint8 to keep as arr_0, for precision and recall; .npz only.
        dtype: key of DTYPES, of means and covariances in an .npz. torch-fidelity, and with it RecTok's evaluation,
            asserts means in float32 and covariances in float64; the others take any. .safetensors hold float64.
    """
    path = Path(path)
    named = {name: value for tap, pair in statistics.moments.items() for name, value in zip(MOMENTS[tap], pair)}
    facts = json.dumps({k: v for k, v in vars(statistics.facts).items() if v is not None}, sort_keys=True)
    if path.suffix == ".safetensors":
        if pictures is not None:
            raise UserError(f"{path}: pictures are kept in .npz files only. Choose a name that ends in .npz.")
        write_atomic(path, to_safetensors({k: v.contiguous() for k, v in named.items()}, metadata={"facts": facts}))
        return
    if path.suffix != ".npz":
        raise UserError(f"{path}: choose a name that ends in .npz or .safetensors.")
    arrays = {name: value.numpy().astype(DTYPES[dtype][value.ndim - 1]) for name, value in named.items()}
    arrays["facts"] = np.frombuffer(facts.encode(), dtype=np.uint8)
    if pictures is not None:
        check_pictures(pictures, str(path))
        arrays["arr_0"] = pictures
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing
# ---------------------------------------------------------------------------------------------------------------------
FOLDERS = ("data/fid_stats", "pretrained_models")  # where references named by a protocol are looked for


def find_reference(name: str | None) -> Path | None:
    """A reference file by path, or by the name a protocol gives it, where such files are kept; else None."""
    if name is None:
        return None
    return next((p for p in (expanded(name), *(Path(f) / name for f in FOLDERS)) if p.is_file()), None)


def how_to_get(reference: str) -> str:
    """What brings a reference that is not here."""
    if (known := released.find(reference)) is not None:
        return f"{known.command} fetches it"
    return "docs/evaluation.md says where to get it; run_make_reference.sh makes one from pictures"


def choose_reference(
    asked: str | None, protocol: Protocol, net: FeatureNet | None, image_size: Side, purpose: str, published: bool
) -> Path | None:
    """The file to compare with; None: statistics of the pictures themselves are to be made. Reads nothing.

    Args:
        asked: what the user asked for; a UserError if it is absent.
        net: None: Inception, as the protocol feeds it, which has yet to be downloaded.
        published: whether numbers are to be like the published ones (ImageNet, 1000 classes), so that the protocol's
            own file is needed and statistics of whatever is at hand will not do.
    """
    if asked:
        path = find_reference(asked)
        if path is None and (expanded(asked).is_dir() or "://" in asked):
            raise UserError(
                f"eval.reference: {asked} stands for pictures, and a file is needed: make one of them with bash "
                f"run_make_reference.sh {asked} FILE.npz"
            )
        if path is None:
            raise UserError(
                f"eval.reference: there is no {asked}, neither as a path nor in {' or '.join(FOLDERS)}: {how_to_get(asked)}."
            )
        return path
    names = protocol.reference if purpose == "generation" else protocol.reconstruction_reference
    name = next((n for n in names if KNOWN[n].image_size == image_size), None)
    other_pictures = purpose == "generation" and not published
    facts = {"network": "inception", "preprocess": protocol.preprocess} if net is None else net.facts()
    if name is None or other_pictures or facts != {"network": "inception", "preprocess": "tf1"}:
        return None
    path = find_reference(name)
    if path is None and published:
        raise UserError(
            f'protocol "{protocol.name}" compares with {name}, which is not in {" or ".join(FOLDERS)}: '
            f"{how_to_get(name)}, or give eval.reference=FILE."
        )
    return path


def check_reference(
    reference: Statistics,
    net: FeatureNet,
    purpose: str,
    image_size: Side,
    originals: Pictures | None = None,
    rounding: str | None = None,
) -> None:
    """UserError if pictures seen through `net` must not be compared with it."""
    reference.check(purpose=purpose, image_size=image_size, originals=originals, rounding=rounding, **net.facts())
    fitting = [tap for tap in reference.moments if tap in net.dims]
    if reference.moments and not fitting:
        raise UserError(
            f"{reference.name} holds moments of {', '.join(reference.moments)} features and the network {net.name} makes "
            f"{', '.join(net.dims)}: it was made with another feature network."
        )
    for tap in fitting:
        reference.moment(tap, net.dims[tap])  # refuses other widths


def load_reference(
    path: Path,
    net: FeatureNet,
    purpose: str,
    image_size: Side,
    world: World,
    originals: Pictures | None = None,
    rounding: str | None = None,
) -> Statistics | None:
    """Read and check it on the main rank; if it is not fit, all ranks raise. Collective.

    Args:
        originals: what it must describe, of reconstructions.
        rounding: Protocol.original_rounding.
    """
    loaded: list[Statistics] = []

    def read() -> None:
        loaded.append(load(path))
        check_reference(loaded[0], net, purpose, image_size, originals, rounding)

    world.on_main(read)
    return loaded[0] if loaded else None


# ---------------------------------------------------------------------------------------------------------------------
# Making
# ---------------------------------------------------------------------------------------------------------------------
TRAINING_PICTURES = 50_000  # of a training set whose statistics are made on the fly


def make_statistics(
    pictures: Pictures,
    net: FeatureNet,
    world: World,
    batch: int,
    folder: Path | None = None,
    facts: Facts = Facts(),
    progress: Callable[[int], None] | None = None,
) -> Statistics | None:
    """Moments of a set of pictures, on the main rank, which went through `facts.rounding`. Collective; with `folder` a
    killed pass continues.

    Every rank gathers whole chunks of pictures into one file of moments per chunk, merged in order at the end, so
    neither the number of ranks nor a restart changes a digit.
    """
    taps = [tap for tap in MOMENTS if tap in net.dims]
    chunk = max(2048, -(-len(pictures) // 64))  # a covariance is as large as the features of 2,000 pictures
    sizes = world.on_main(pictures.file_sizes)
    job = {"pictures": pictures.fingerprint(), "network": net.name, **({"pictures_sizes": sizes} if sizes else {})}
    job |= {"rounding": facts.rounding} if facts.rounding else {}
    work = Work(len(pictures), world, folder, job, chunk)

    pictures.expect([piece for c in work.mine() for piece in pieces(work.indices(c))])

    def compute(indices: range) -> dict[str, Tensor]:
        gathered = {tap: Moments(net.dims[tap], world.device) for tap in taps}
        for piece in pieces(indices):
            images = pictures.read(piece.start, piece.stop)
            features = features_of(
                net, through_model_range(images, facts.rounding) if facts.rounding else images, batch
            )
            for tap in taps:
                gathered[tap].update(features[tap])
        return {
            f"{OWN}{tap}/{key}": value for tap, moments in gathered.items() for key, value in moments.state().items()
        }

    with work:
        work.compute(compute, progress)
    whole = {tap: Moments(net.dims[tap]) for tap in taps}
    for result in work.chunks():
        for tap, moments in whole.items():
            prefix = f"{OWN}{tap}/"
            state = {key.removeprefix(prefix): value for key, value in result.items() if key.startswith(prefix)}
            moments.merge(Moments.restored(state))
    if not world.is_main:
        return None
    facts = replace(
        facts,
        **net.facts(),
        image_size=side_of(pictures),
        count=len(pictures),
        source=pictures.fingerprint(),
        sizes=sizes,
        made_by="tessera",
    )
    work.forget()
    return Statistics({tap: (m.mean, m.covariance) for tap, m in whole.items()}, facts, pictures.name)


def training_statistics(
    config: RunConfig, source: DataSource, image_size: int, net: FeatureNet, world: World
) -> Statistics | None:
    """Of (at most TRAINING_PICTURES of) the training set, made once and kept in the cache folder. Collective."""
    count = min(len(source), TRAINING_PICTURES)
    rows = range(count) if count == len(source) else sorted(permutation(len(source), "real pictures")[:count].tolist())
    pictures = SourcePictures(
        source, image_size, config.data.workers, rows, f"{count:,} training pictures", config.data.on_corrupt
    )
    sizes = world.on_main(source.file_sizes)
    key = pictures.fingerprint() + (f"_{sizes[:8]}" if sizes else "")
    path = Path(config.data.cache_dir) / f"statistics_{net.name}_{key}.safetensors"
    if not world.on_main(path.is_file):
        batch = pictures_at_once(config.eval.batch, world.device)
        statistics = make_statistics(pictures, net, world, batch, facts=Facts("generation"))
        world.on_main(lambda: save(path, statistics))
    return replace(load(path), name=pictures.name) if world.is_main else None
