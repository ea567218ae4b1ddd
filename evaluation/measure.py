"""Measurements on live networks: pictures from data, tokenizer and generator, handed to the evaluation package."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.config import EvalConfig, RunConfig
from core.dist import World
from core.errors import UserError
from core.images import grid, to_model_range, to_uint8, to_unit_range
from core.rng import Draws, hash64, permutation
from core.specs import Codes, DataSource, MultiScale, codebook_rows
from core.weights.released import helper
from data.base import require_labels, require_order
from evaluation import protocols, references, runner
from evaluation.distances import Moments
from evaluation.images import PSNR, SSIM, CodebookUsage, LPIPSMetric, Perturbation, PictureMetric, count_codes
from evaluation.networks import WEIGHTS_FILE, EfficientNetLite0, FeatureNet, Inception
from evaluation.pictures import Pictures, SourcePictures
from evaluation.protocols import Protocol
from evaluation.references import Facts, Statistics
from evaluation.runner import Rebuilt
from evaluation.scores import Score
from evaluation.work import OWN, Work

FEATURE_SIZE = 128  # pixels the offline feature network sees; nearly four times quicker than its own 224
REAL_PICTURES = 50_000  # of a training set whose statistics are made on the fly
READ = 256  # pictures decoded at a time
FOLDERS = ("data/fid_stats", "pretrained_models")  # where references named by a protocol are looked for


# ---------------------------------------------------------------------------------------------------------------------
# Feature networks and references
# ---------------------------------------------------------------------------------------------------------------------
def feature_net(
    device: torch.device, name: str = "lite0", protocol: Protocol = protocols.PROTOCOLS["adm"]
) -> FeatureNet:
    """The network that metrics see pictures through.

    Args:
        name: "inception" (FID's own), "lite0" (the offline stand-in, whose distances are never called FID), "auto"
            (Inception if its weights are here, else the stand-in) or a file of Inception weights.
        protocol: says how pictures become the network's input.
    """
    if name == "auto":
        name = "inception" if inception_is_here() else "lite0"
    if name == "lite0":
        return EfficientNetLite0(FEATURE_SIZE).to(device)
    dtype = torch.float64 if protocol.dtype == "float64" else torch.float32
    weights = None if name == "inception" else name
    return Inception(weights, preprocess=protocol.preprocess, dtype=dtype).to(device)


def inception_is_here() -> bool:
    """Whether FID's network can be loaded without a download."""
    return helper(WEIGHTS_FILE).found() is not None


def vgg_is_here() -> bool:
    """The same for LPIPS."""
    return helper("vgg16-397923af.pth").found() is not None


def find_reference(name: str | None) -> Path | None:
    """A reference file by path, or by the name a protocol gives it, where such files are kept; else None."""
    if name is None:
        return None
    return next((p for p in (Path(name).expanduser(), *(Path(f) / name for f in FOLDERS)) if p.is_file()), None)


def preprocess_of(net: FeatureNet) -> str:
    """How `net` turns pictures into its input, as reference files record it."""
    return getattr(net, "preprocess", net.name)


def network_of(net: FeatureNet) -> str:
    """What reference files call the network: the same weights with another input are the same network."""
    return "inception" if getattr(net, "is_published", False) else net.name


def check_reference(
    reference: Statistics, net: FeatureNet, purpose: str, image_size: int, source: str | None = None
) -> None:
    reference.check(
        purpose=purpose, network=network_of(net), preprocess=preprocess_of(net), image_size=image_size, source=source
    )
    fitting = [tap for tap in reference.moments if tap in net.dims]
    if reference.moments and not fitting:
        raise UserError(
            f"{reference.name} holds moments of {', '.join(reference.moments)} features and the network {net.name} makes "
            f"{', '.join(net.dims)}: it was made with another feature network."
        )
    for tap in fitting:
        reference.moment(tap, net.dims[tap])  # refuses other widths


def pieces(indices: range) -> list[range]:
    """`indices` in parts that fit into memory as pictures."""
    return [range(i, min(i + READ, indices.stop)) for i in range(indices.start, indices.stop, READ)]


def make_statistics(
    pictures: Pictures,
    net: FeatureNet,
    world: World,
    batch: int,
    folder: Path | None = None,
    facts: Facts = Facts(),
    progress: Callable[[int], None] | None = None,
    name: str = "",
) -> Statistics | None:
    """Moments of a set of pictures, on the main rank. Collective; with `folder` a killed pass continues.

    Every rank gathers whole chunks of pictures into one file of moments per chunk, merged in order at the end, so
    neither the number of ranks nor a restart changes a digit.
    """
    taps = [tap for tap in references.MOMENTS if tap in net.dims]
    chunk = max(2048, -(-len(pictures) // 64))  # a covariance is as large as the features of 2,000 pictures
    work = Work(len(pictures), world, folder, {"pictures": pictures.fingerprint(), "network": net.name}, chunk)

    pictures.expect([piece for c in work.mine() for piece in pieces(work.indices(c))])

    def compute(indices: range) -> dict[str, Tensor]:
        gathered = {tap: Moments(net.dims[tap], world.device) for tap in taps}
        for piece in pieces(indices):
            found = runner.features_of(net, pictures.read(piece.start, piece.stop), batch)
            for tap in taps:
                gathered[tap].update(found[tap])
        return {
            f"{OWN}{tap}/{key}": value for tap, moments in gathered.items() for key, value in moments.state().items()
        }

    with work:
        work.compute(compute, progress)
    whole = {tap: Moments(net.dims[tap]) for tap in taps}
    for result in work.chunks():
        for tap, moments in whole.items():
            state = {key: result[f"{OWN}{tap}/{key}"] for key in moments.state()}
            moments.merge(Moments(net.dims[tap]).load(state))
    if not world.is_main:
        return None
    facts = replace(
        facts,
        network=network_of(net),
        preprocess=preprocess_of(net),
        image_size=pictures.size[0],
        count=len(pictures),
        source=pictures.fingerprint(),
        made_by="tessera",
    )
    work.forget()
    return Statistics({tap: (m.mean, m.covariance) for tap, m in whole.items()}, facts, name or pictures.name)


def training_statistics(
    config: RunConfig, source: DataSource, image_size: int, net: FeatureNet, world: World
) -> Statistics | None:
    """Of (at most REAL_PICTURES of) the training set, made once and kept in the cache folder. Collective."""
    count = min(len(source), REAL_PICTURES)
    rows = range(count) if count == len(source) else sorted(permutation(len(source), "real pictures")[:count].tolist())
    pictures = SourcePictures(source, image_size, config.data.workers, rows, f"{count:,} training pictures")
    path = Path(config.data.cache_dir) / f"statistics_{net.name}_{pictures.fingerprint()}.safetensors"
    if not world.on_main(path.is_file):
        made = make_statistics(pictures, net, world, config.eval.batch, facts=Facts("generation"))
        world.on_main(lambda: references.save(path, made))
    found = references.load(path) if world.is_main else None
    return found and replace(found, name=pictures.name)


# ---------------------------------------------------------------------------------------------------------------------
# Reconstruction
# ---------------------------------------------------------------------------------------------------------------------
def code_usage(tokenizer: nn.Module) -> CodebookUsage | None:
    """An empty count of a tokenizer's codes, per branch and scale; None for continuous latents."""
    spec = tokenizer.spec
    if not isinstance(spec, (Codes, MultiScale)):
        return None
    scales = tuple(s * s for s in spec.scales) if isinstance(spec, MultiScale) else None
    return CodebookUsage(spec.vocab, spec.branches, scales, getattr(spec, "names", ()) or None)


def rebuilder(
    tokenizer: nn.Module,
    pictures: Pictures,
    protocol: Protocol,
    batch: int,
    device: torch.device,
    seed: int = 0,
    bf16: bool = False,
    perturb: Perturbation | None = None,
) -> Callable[[range], Iterator[Rebuilt]]:
    """Reconstructions of `pictures` by a tokenizer, rounded as the protocol says.

    Args:
        seed: of decoders that draw (D-AR's); picture i depends on (seed, i).
        bf16: matrix products in bfloat16; the protocol then says whether rounding happens in it too.
        perturb: also decode codes that went through this; tokenizers with codes only.
    """
    if perturb and code_usage(tokenizer) is None:
        raise UserError("--perturb disturbs codes (pFID), and this tokenizer has continuous latents. Leave it out.")
    codebooks = codebook_rows(tokenizer, device) if perturb else None
    usage = code_usage(tokenizer) if "codebook" in protocol.reconstruction else None

    def rebuild(indices: range) -> Iterator[Rebuilt]:
        images = pictures.read(indices.start, indices.stop)
        for start in range(0, len(images), batch):
            original = images[start : start + batch].to(device, non_blocking=True)
            first = indices.start + start
            draws = Draws(hash64(seed, "decode"), torch.arange(first, first + len(original), device=device))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                latents = tokenizer.encode(to_model_range(original))
                decoded = tokenizer.decode(latents, draws)
                disturbed = None
                if perturb:
                    noise = Draws(hash64(seed, "perturb"), draws.positions)
                    disturbed = tokenizer.decode(perturb(latents, codebooks, noise), draws)
            if protocol.original_rounding:
                original = to_uint8(original.float() / 255.0 * 2.0 - 1.0, protocol.original_rounding)

            def rounded(pixels: Tensor) -> Tensor:
                return finite_uint8(pixels.to(pixel_dtype(protocol, bf16)), protocol.reconstruction_rounding, first)

            yield Rebuilt(
                original,
                rounded(decoded),
                to_unit_range(decoded.float(), clamp=True),
                {"codes": count_codes(latents, usage.vocab, usage.scales)} if usage else {},
                None if disturbed is None else rounded(disturbed),
            )

    return rebuild


def finite_uint8(pixels: Tensor, rounding: str, first: int | Tensor) -> Tensor:
    """core.images.to_uint8, which would make an inconspicuous black or white of NaN."""
    if not pixels.isfinite().all():
        raise UserError(
            f"a picture between {int(first)} and {int(first) + len(pixels) - 1} has pixels that are not finite. The "
            "weights or the precision are at fault; nothing was kept of these pictures."
        )
    return to_uint8(pixels, rounding)


def pixel_dtype(protocol: Protocol, bf16: bool) -> torch.dtype:
    """In what the product with 255 is taken."""
    return torch.bfloat16 if bf16 and protocol.bf16_pixels else torch.float32


def per_picture(protocol: Protocol, device: torch.device) -> tuple[list[PictureMetric], dict[str, str]]:
    """(metrics that compare two pictures, metric -> why it is left out) of a protocol."""
    metrics: list[PictureMetric] = []
    left_out: dict[str, str] = {}
    if "psnr" in protocol.reconstruction:
        metrics.append(PSNR())
    if "ssim" in protocol.reconstruction:
        metrics += [SSIM(variant) for variant in protocol.ssim]
    if "lpips" in protocol.reconstruction:
        try:
            metrics.append(LPIPSMetric(device=device))
        except UserError as error:
            left_out["lpips"] = str(error)
    return metrics, left_out


def alone(device: torch.device) -> World:
    return World(0, 1, 0, device)


def reconstruction_result(
    tokenizer: nn.Module,
    pictures: Pictures,
    protocol: Protocol,
    net: FeatureNet | None,
    world: World,
    *,
    batch: int,
    reference: Statistics | None = None,
    seed: int = 0,
    bf16: bool = False,
    folder: Path | None = None,
    job: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    metrics: list[PictureMetric] | None = None,
    perturb: Perturbation | None = None,
    replicates: int = 0,
    infinity: bool = False,
    open_writer: Callable[[Work], Any] | None = None,
) -> runner.Result | None:
    """Everything that `protocol` measures on reconstructions of `pictures`; on the main rank. Collective.

    Args:
        open_writer: makes what the reconstructions are also written with; called once the chunks are known.
    """
    metrics, left_out = per_picture(protocol, world.device) if metrics is None else (metrics, {})
    rebuild = rebuilder(tokenizer, pictures, protocol, batch, world.device, seed, bf16, perturb)
    with Work(len(pictures), world, folder, job) as work:
        writer = open_writer(work) if open_writer else None
        runner.expect(work, pictures)
        with writer or contextlib.nullcontext():
            result = runner.evaluate_reconstruction(
                rebuild,
                work,
                net,
                protocol,
                metrics,
                batch=batch,
                reference=reference,
                writers=(writer,) if writer else (),
                progress=progress,
                noise=str(perturb),
                replicates=replicates,
                infinity=infinity,
            )
        if writer:
            world.on_main(writer.finish)
    if result is not None:
        result.left_out |= left_out
        if usage := result.sums.get("codes") is not None and code_usage(tokenizer):
            found = usage.load({"sums": result.sums["codes"]}).compute()
            result.scores += [Score(name, value, len(pictures), protocol.name, "") for name, value in found.items()]
    return result


def reconstruction(
    tokenizer: nn.Module,
    source: DataSource,
    image_size: int,
    settings: EvalConfig,
    device: torch.device,
    net: FeatureNet | None = None,
    world: World | None = None,
    metrics: list[PictureMetric] | None = None,
    reference: Statistics | None = None,
) -> dict[str, float]:
    """The same as plain numbers, of the first settings.num_images pictures: what trainings and the quickstart show."""
    count = min(settings.num_images or len(source), len(source))
    pictures = SourcePictures(source, image_size, rows=range(count))
    protocol = protocols.get(settings.protocol, "reconstruction")
    result = reconstruction_result(
        tokenizer,
        pictures,
        protocol,
        net,
        world or alone(device),
        batch=settings.batch,
        reference=reference,
        metrics=offline_metrics(protocol, device) if metrics is None else metrics,
    )
    return result.values() if result else {}


def offline_metrics(protocol: Protocol, device: torch.device) -> list[PictureMetric]:
    """Those of the protocol that need no download: LPIPS only where its network is here."""
    if "lpips" in protocol.reconstruction and not vgg_is_here():
        protocol = replace(protocol, reconstruction=tuple(m for m in protocol.reconstruction if m != "lpips"))
    return per_picture(protocol, device)[0]


SHOWN = 24


@torch.no_grad()
def reconstruction_grid(tokenizer: nn.Module, pictures: Pictures, device: torch.device) -> Tensor:
    """Pictures spread over a set, twelve a row, below each row its reconstructions: (3, H, W) uint8."""
    count = min(SHOWN, len(pictures))
    places = [i * len(pictures) // count for i in range(count)]
    chosen = torch.cat([pictures.read(i, i + 1) for i in places]).to(device)
    rebuilt = to_uint8(tokenizer.decode(tokenizer.encode(to_model_range(chosen))).float(), "nearest")
    rows = [torch.cat(pair) for pair in zip(chosen.split(12), rebuilt.split(12))]
    return grid(torch.cat(rows), columns=12)


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------
Sampler = Callable[[Tensor, Draws], Tensor]  # (labels (B,), draws) -> (B, 3, H, W) in [-1, 1]


def producer(
    sample: Sampler,
    labels: Tensor,
    seed: int,
    batch: int,
    device: torch.device,
    rounding: str = "nearest",
    dtype: torch.dtype = torch.float32,
) -> Callable[[range], Tensor]:
    """indices -> their pictures, (n, 3, H, W) uint8. Picture i depends on (seed, labels[i], i) alone."""

    @torch.no_grad()
    def produce(indices: range) -> Tensor:
        parts = []
        for start in range(indices.start, indices.stop, batch):
            positions = torch.arange(start, min(start + batch, indices.stop), device=device)
            drawn = sample(labels[start : start + len(positions)].to(device), Draws(hash64(seed, "samples"), positions))
            parts.append(finite_uint8(drawn.to(dtype), rounding, positions[0]))
        return torch.cat(parts)

    return produce


def choose_reference(
    given: str | None, protocol: Protocol, net: FeatureNet, image_size: int, purpose: str, published: bool
) -> Path | None:
    """The file to compare with; None: statistics of the pictures themselves are to be made. Reads nothing.

    Args:
        given: what the user asked for; a UserError if it is absent.
        published: whether numbers are to be like the published ones (ImageNet, 1000 classes), so that the protocol's
            own file is needed and statistics of whatever is at hand will not do.
    """
    if given:
        if (path := find_reference(given)) is None and (Path(given).expanduser().is_dir() or "://" in given):
            raise UserError(
                f"eval.reference: {given} stands for pictures, and a file is needed: make one of them with bash "
                f"run_make_reference.sh {given} FILE.npz"
            )
        if path is None:
            raise UserError(
                f"eval.reference: there is no {given}, neither as a path nor in {' or '.join(FOLDERS)}. "
                "docs/evaluation.md says where to get it; run_make_reference.sh makes one from pictures."
            )
        return path
    names = protocol.reference if purpose == "generation" else protocol.reconstruction_reference
    name = next((n for n in names if references.KNOWN[n].image_size == image_size), None)
    other_pictures = purpose == "generation" and not published
    if name is None or other_pictures or network_of(net) != "inception" or preprocess_of(net) != "tf1":
        return None
    path = find_reference(name)
    if path is None and published:
        raise UserError(
            f'protocol "{protocol.name}" compares with {name}, which is not in {" or ".join(FOLDERS)}. Put it there '
            "(docs/evaluation.md says where to get it), or give eval.reference=FILE."
        )
    return path


def load_reference(
    path: Path, net: FeatureNet, purpose: str, image_size: int, world: World, source: str | None = None
) -> Statistics | None:
    """Read and check it on the main rank; if it is not fit, all ranks raise. Collective."""
    found: list[Statistics] = []

    def read() -> None:
        found.append(references.load(path))
        check_reference(found[0], net, purpose, image_size, source)

    world.on_main(read)
    return found[0] if found else None


def source_labels(source: DataSource) -> list[int]:
    """Labels of all pictures, without decoding them where the source lists them."""
    require_labels(source)
    if source.labels is not None:
        return source.labels.tolist()
    return [source[i].label for i in range(len(source))]


def val_labels(val: DataSource, num_classes: int) -> list[int]:
    """Labels of the validation pictures as the classes to ask a generator for."""
    if val.num_classes != num_classes:
        raise UserError(
            f"labels of data.val_url: its pictures have {val.num_classes} classes and the generator knows {num_classes}, "
            "so their numbers may mean others. Name all classes with ?classes=FILE, or set eval.labels=balanced."
        )
    return source_labels(val)


# ---------------------------------------------------------------------------------------------------------------------
# While training
# ---------------------------------------------------------------------------------------------------------------------
class Online:
    """What a trainer calls every train.eval_every: the commands' measurements, of config.eval.num_images pictures.

    Everything that can be missing is found when this is made, before the first step. All ranks call it and share the
    pictures; numbers come back on the main rank.
    """

    def __init__(self, config: RunConfig, train: DataSource, val: DataSource, image_size: int, world: World):
        self.config, self.settings, self.train, self.val = config, config.eval, train, val
        self.image_size, self.world = image_size, world
        self.purpose = {"tokenizer": "reconstruction", "generator": "generation"}[config.task]
        self.protocol = protocols.get(self.settings.protocol, self.purpose)
        self.net = feature_net(world.device, self.settings.network, self.protocol)
        self.metrics = offline_metrics(self.protocol, world.device)
        self.reference: Statistics | None = None  # on the main rank
        self.has_reference = (path := self._reference_file(train)) is not None
        if path is not None:
            self.reference = load_reference(path, self.net, self.purpose, image_size, world)
        if self.purpose == "reconstruction":
            require_order(val, "reconstructions of them cannot be measured (train.eval_every)")
        elif path is None:
            require_order(train, "they are no reference: give eval.reference=FILE")

    def _reference_file(self, train: DataSource) -> Path | None:
        """What was asked for; for samples of ImageNet's classes else the protocol's own file, where it is here."""
        given, published = self.settings.reference, self.purpose == "generation" and train.num_classes == 1000
        if not (given or published):
            return None
        try:
            return choose_reference(given, self.protocol, self.net, self.image_size, self.purpose, published)
        except UserError:
            if given:
                raise
            return None  # statistics of the training pictures are made instead

    def __call__(self, task, network: nn.Module) -> dict[str, float]:
        if self.purpose == "reconstruction":
            return reconstruction(
                network,
                self.val,
                self.image_size,
                self.settings,
                self.world.device,
                self.net,
                self.world,
                self.metrics,
                self.reference,
            )
        return self.generation(task, network)

    def generation(self, task, network: nn.Module) -> dict[str, float]:
        if not self.has_reference:
            self.reference = training_statistics(self.config, self.train, self.image_size, self.net, self.world)
            self.has_reference = True
        settings, seed = self.settings, self.config.seed
        kind = settings.labels or self.protocol.labels
        labels = protocols.make_labels(
            kind,
            settings.num_images or 512,
            task.num_classes,
            seed,
            val_labels(self.val, task.num_classes) if kind == "val" else None,
        )
        produce = producer(
            lambda part, draws: task.sample(network, part, draws),
            labels,
            seed,
            settings.batch,
            self.world.device,
            settings.rounding or self.protocol.rounding,
            pixel_dtype(self.protocol, self.config.train.precision == "bf16"),
        )
        result = runner.evaluate_generation(
            produce,
            Work(len(labels), self.world),
            self.net,
            self.protocol,
            batch=settings.batch,
            reference=self.reference,
            labels=labels,
        )
        return result.values() if result else {}
