"""Measuring: pictures go in, scores come out, in chunks that are shared between ranks and survive a kill.

    how = Evaluation(protocols.get("adm"), feature_net(device), world, batch=64, reference=statistics)
    result = how.of_samples(producer(sample, labels, seed, 64, device), Work(len(labels), world))
    result = how.of_reconstructions(ByTokenizer(tokenizer, pictures, how.protocol, 64, device), Work(count, world))

Commands, evaluations while training and the quickstart all measure so. Who makes the pictures (a generator, a
tokenizer, files) is handed in and depends on their numbers alone.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol as Interface

import torch
from torch import Tensor, nn

from core.devices import pictures_at_once
from core.dist import World
from core.errors import UserError
from core.images import finite_uint8, grid, through_model_range, to_model_range, to_uint8, to_unit_range
from core.nn.lpips import lpips_vgg
from core.rng import Draws, hash64
from core.schema import EvalConfig, RunConfig
from core.specs import DataSource, codebook_rows
from core.weights.hub import is_offline
from core.weights.released import helper, needed
from data.base import spread
from data.checks import require_labels, require_order, require_same_classes
from evaluation import networks, protocols
from evaluation.chunks import SUM, Chunk, Work
from evaluation.images import Codebooks, Perturbation, PictureMetric, interval_of, mean_of, picture_metrics
from evaluation.networks import WEIGHTS_FILE, FeatureNet, features_of
from evaluation.pictures import Pictures, SourcePictures
from evaluation.protocols import Protocol
from evaluation.references import Statistics, choose_reference, load_reference, training_statistics
from evaluation.scores import Comparison, Score, score

Produce = Callable[[range], Tensor]  # indices -> (n, 3, H, W) uint8 on the network's device
Sampler = Callable[[Tensor, Draws], Tensor]  # (labels (B,), draws) -> (B, 3, H, W) in [-1, 1]
Progress = Callable[[int], None] | None  # is told how many pictures are done over all ranks


class Stopwatch:
    """Seconds by what they were spent on, on this rank."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] += time.perf_counter() - started


@dataclass
class Result:
    """What an evaluation found, on the main rank."""

    scores: list[Score]
    left_out: dict[str, str] = field(default_factory=dict)  # metric -> why
    seconds: dict[str, float] = field(default_factory=dict)
    per_picture: dict[str, Tensor] = field(default_factory=dict)  # name -> (N,)
    features: dict[str, Tensor] = field(default_factory=dict)  # tap -> (N, D) of the evaluated pictures
    code_counts: Tensor | None = None  # (scales, K, V) int64 over all pictures

    def values(self) -> dict[str, float]:
        return {s.name: s.value for s in self.scores}


@dataclass
class Rebuilt:
    """Some originals and their reconstructions, on the evaluation's device."""

    original: Tensor  # (B, 3, H, W) uint8
    recon: Tensor  # (B, 3, H, W) uint8
    unit: Tensor  # (B, 3, H, W) fp32 in [0, 1], the reconstruction before rounding, clamped
    code_counts: Tensor | None = None  # (scales, K, V) int64, to add over all pictures
    perturbed: Tensor | None = None  # (B, 3, H, W) uint8, from disturbed codes
    rounded: Tensor | None = None  # (B, 3, H, W) uint8, the originals as rFID sees them, where the protocol rounds them


class Rebuild(Interface):
    """What makes reconstructions. A function of the pictures' numbers alone."""

    codebooks: Codebooks | None  # whose codes it counts
    perturb: Perturbation | None  # what the codes of Rebuilt.perturbed went through

    def expect(self, ranges: list[range]) -> None:
        """What will be asked for, in this order."""

    def __call__(self, indices: range) -> Iterator[Rebuilt]:
        """Batch by batch."""


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Evaluation:
    """How pictures are measured. Methods are collective and return what they found on the main rank.

    Args:
        protocol: what is measured.
        net: what features are taken with; None: reconstructions are compared picture by picture only.
        batch: pictures that go through a network at a time; changes no number.
        reference: moments of the other side, on the main rank; None: those of `real`, or of the originals.
        real: features of the reference's pictures, on the main rank, for samples.
        metrics: what compares an original with its reconstruction, by name.
        labels: the classes of the pictures, N or more, to warn where their order would spoil an Inception Score.
        replicates: of the bootstrap behind confidence intervals; 0: none.
        infinity: also extrapolate to infinitely many pictures.
    """

    protocol: Protocol
    net: FeatureNet | None
    world: World
    batch: int
    reference: Statistics | None = None
    real: dict[str, Tensor] | None = None
    metrics: dict[str, PictureMetric] = field(default_factory=dict)
    labels: Tensor | None = None
    replicates: int = 0
    infinity: bool = False

    @property
    def feature_net(self) -> FeatureNet:
        """`net` where there has to be one: all commands have it."""
        assert self.net is not None
        return self.net

    def compare(
        self, samples: dict[str, Tensor], real: dict[str, Tensor] | None, purpose: str, protocol: Protocol | None = None
    ) -> tuple[list[Score], dict[str, str]]:
        """(scores, metric -> why it is left out) of features."""
        return score(
            Comparison(
                protocol or self.protocol,
                self.net,
                samples,
                self.reference,
                real,
                purpose,
                self.world.device,
                self.labels,
                self.replicates,
                self.infinity,
            )
        )

    def finished(self, scores: list[Score], left_out: dict[str, str], **more) -> Result:
        """The result; UserError when nothing was measured."""
        if not scores:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            raise UserError(f"nothing of protocol {self.protocol.name} can be measured: {reasons}")
        return Result(scores, left_out, **more)

    @torch.no_grad()
    def features_of_samples(
        self,
        produce: Produce,
        work: Work,
        writers: tuple = (),
        progress: Progress = None,
        watch: Stopwatch | None = None,
    ) -> Chunk | None:
        """Sample (or read) and take features, tap -> (N, D) on the main rank.

        Args:
            writers: each is handed (first index, pictures) of every chunk before the chunk counts as done.
        """
        watch = watch or Stopwatch(self.world.device)

        def compute(indices: range) -> Chunk:
            with watch("pictures"):
                images = produce(indices)
            with watch("features"):
                features = features_of(self.net, images, self.batch)
            with watch("writing"):
                for writer in writers:
                    writer.write(indices.start, images)
                    writer.flush()
            return features

        work.compute(compute, progress)
        return work.gather()

    def of_samples(self, produce: Produce, work: Work, writers: tuple = (), progress: Progress = None) -> Result | None:
        """`features_of_samples`, compared."""
        watch = Stopwatch(self.world.device)
        features = self.features_of_samples(produce, work, writers, progress, watch)
        if features is None:
            return None
        with watch("metrics"):
            scores, left_out = self.compare(features, self.real, "generation")
        return self.finished(scores, left_out, seconds=dict(watch.seconds), features=features)

    @torch.no_grad()
    def of_reconstructions(
        self, rebuild: Rebuild, work: Work, writers: tuple = (), progress: Progress = None
    ) -> Result | None:
        """Compare reconstructions with their originals; `writers` as above."""
        watch = Stopwatch(self.world.device)
        rebuild.expect([work.indices(chunk) for chunk in work.mine()])

        def compute(indices: range) -> Chunk:
            parts: dict[str, list[Tensor]] = defaultdict(list)
            counts: list[Tensor] = []
            pairs, first = rebuild(indices), indices.start
            while True:
                with watch("pictures"):
                    pair = next(pairs, None)
                if pair is None:
                    break
                with watch("features"):
                    for name, values in self._pair_features(pair).items():
                        parts[name].append(values)
                with watch("pixels"), torch.autocast(pair.recon.device.type, enabled=False):
                    original = pair.original.float() / 255.0
                    compared = pair.recon.float() / 255.0 if self.protocol.psnr_of == "uint8" else pair.unit
                    for name, metric in self.metrics.items():
                        parts[f"picture/{name}"].append(metric(original, compared).double().cpu())
                if pair.code_counts is not None:
                    counts.append(pair.code_counts)
                with watch("writing"):
                    for writer in writers:
                        writer.write(first, pair.recon)
                first += len(pair.recon)
            for writer in writers:
                writer.flush()
            chunk = {name: torch.cat(values) for name, values in parts.items()}
            return chunk | ({f"{SUM}codes": torch.stack(counts).sum(0)} if counts else {})

        work.compute(compute, progress)
        gathered = work.gather()
        return None if gathered is None else self._judge(gathered, rebuild, work.count, watch)

    def _pair_features(self, pair: Rebuilt) -> dict[str, Tensor]:
        """Of reconstructions, and of originals where there is no other reference; "<side>/<tap>" -> (B, D), on the CPU."""
        if self.net is None:
            return {}
        sides = {"samples": pair.recon, "perturbed": pair.perturbed}
        if self.reference is None:
            sides["real"] = pair.original if pair.rounded is None else pair.rounded
        return {
            f"{side}/{tap}": values.cpu()
            for side, images in sides.items()
            if images is not None
            for tap, values in features_of(self.net, images, self.batch).items()
        }

    def _judge(self, gathered: Chunk, rebuild: Rebuild, count: int, watch: Stopwatch) -> Result:
        """From what all chunks gave to scores."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in gathered.items() if k.startswith(prefix)}

        values = part("picture/")
        scores: list[Score] = []
        left_out: dict[str, str] = {}
        if self.net is not None:
            with watch("metrics"):
                real = part("real/") or None
                scores, left_out = self.compare(part("samples/"), real, "reconstruction")
                if perturbed := part("perturbed/"):
                    only_fid = replace(self.protocol, reconstruction=("fid",))
                    distances, reasons = self.compare(perturbed, real, "perturbed", only_fid)
                    scores += [replace(s, note=f"{rebuild.perturb}. {s.note}".strip()) for s in distances]
                    left_out |= {f"p{name}" if name == "fid" else name: reason for name, reason in reasons.items()}
        for metric in self.metrics:
            for name, value in mean_of(metric, values[metric]).items():
                interval = interval_of(values[metric]) if name == metric else None
                scores.append(Score(name, value, count, self.protocol.name, "originals", interval))
        result = self.finished(
            scores, left_out, seconds=dict(watch.seconds), per_picture=values, features=part("samples/")
        )
        if f"{SUM}codes" in gathered:
            result.code_counts = gathered[f"{SUM}codes"]
            usage = rebuild.codebooks.usage(gathered[f"{SUM}codes"])
            result.scores += [Score(name, value, count, self.protocol.name, "") for name, value in usage.items()]
        return result


def picture_features(
    pictures: Pictures, net: FeatureNet, world: World, batch: int, progress: Progress = None
) -> dict[str, Tensor] | None:
    """Features of a set, on the main rank. Collective."""
    work = Work(len(pictures), world)
    pictures.expect([work.indices(chunk) for chunk in work.mine()])
    work.compute(lambda indices: features_of(net, pictures.read(indices.start, indices.stop), batch), progress)
    return work.gather()


def alone(device: torch.device) -> World:
    return World(0, 1, 0, device)


def pixel_dtype(protocol: Protocol, bf16: bool) -> torch.dtype:
    """In what the product with 255 is taken."""
    return torch.bfloat16 if bf16 and protocol.bf16_pixels else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Who makes reconstructions
# ---------------------------------------------------------------------------------------------------------------------
class ByTokenizer:
    """Reconstructions of `pictures` by a tokenizer, rounded as the protocol says.

    Args:
        seed: of decoders that draw (D-AR's); picture i depends on (seed, i).
        bf16: matrix products in bfloat16; the protocol then says whether rounding happens in it too.
        perturb: also decode codes that went through this; tokenizers with codes only.
    """

    def __init__(
        self,
        tokenizer: nn.Module,
        pictures: Pictures,
        protocol: Protocol,
        batch: int,
        device: torch.device,
        seed: int = 0,
        bf16: bool = False,
        perturb: Perturbation | None = None,
    ):
        self.tokenizer, self.pictures, self.protocol, self.batch = tokenizer, pictures, protocol, batch
        self.device, self.seed, self.bf16, self.perturb = device, seed, bf16, perturb
        self.codebooks = Codebooks.of(tokenizer.spec) if "codebook" in protocol.reconstruction else None
        if perturb and Codebooks.of(tokenizer.spec) is None:
            raise UserError("--perturb disturbs codes (pFID), and this tokenizer has continuous latents. Leave it out.")
        self.vectors = codebook_rows(tokenizer, device) if perturb else None
        self.expect = pictures.expect

    def __call__(self, indices: range) -> Iterator[Rebuilt]:
        images = self.pictures.read(indices.start, indices.stop)
        for start in range(0, len(images), self.batch):
            original = images[start : start + self.batch].to(self.device, non_blocking=True)
            first = indices.start + start
            draws = Draws(hash64(self.seed, "decode"), torch.arange(first, first + len(original), device=self.device))
            disturbed = None
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                latents = self.tokenizer.encode(to_model_range(original))
                decoded = self.tokenizer.decode(latents, draws)
                if self.perturb:
                    noise = Draws(hash64(self.seed, "perturb"), draws.positions)
                    disturbed = self.tokenizer.decode(self.perturb(latents, self.vectors, noise), draws)
            yield Rebuilt(
                original,
                self._rounded(decoded, first),
                to_unit_range(decoded.to(self.dtype), clamp=True).float(),
                self.codebooks.count(latents) if self.codebooks else None,
                None if disturbed is None else self._rounded(disturbed, first),
                through_model_range(original, lossy) if (lossy := self.protocol.original_rounding) else None,
            )

    @property
    def dtype(self) -> torch.dtype:
        """In what pixels are scaled."""
        return pixel_dtype(self.protocol, self.bf16)

    def _rounded(self, pixels: Tensor, first: int) -> Tensor:
        pixels = pixels.to(self.dtype)
        return finite_uint8(pixels, self.protocol.reconstruction_rounding, range(first, first + len(pixels)))


@dataclass
class ByPairs:
    """Reconstructions that are there, paired with their originals in order.

    Args:
        rounding: Protocol.original_rounding.
    """

    originals: Pictures
    reconstructions: Pictures
    batch: int
    device: torch.device
    rounding: str | None = None
    codebooks: Codebooks | None = None
    perturb: Perturbation | None = None

    def expect(self, ranges: list[range]) -> None:
        self.originals.expect(ranges)
        self.reconstructions.expect(ranges)

    def __call__(self, indices: range) -> Iterator[Rebuilt]:
        sides = [side.read(indices.start, indices.stop) for side in (self.originals, self.reconstructions)]
        for original, recon in zip(*(side.split(self.batch) for side in sides)):
            original, recon = original.to(self.device), recon.to(self.device)
            rounded = through_model_range(original, self.rounding) if self.rounding else None
            yield Rebuilt(original, recon, recon.float() / 255.0, rounded=rounded)


def reconstruction(
    tokenizer: nn.Module,
    source: DataSource,
    image_size: int,
    settings: EvalConfig,
    device: torch.device,
    net: FeatureNet | None = None,
) -> dict[str, float]:
    """Plain numbers of the first settings.num_images pictures, on this rank alone: what the quickstart shows."""
    protocol = protocols.get(settings.protocol, "reconstruction", settings.rounding)
    batch = pictures_at_once(settings.batch, device, image_size)
    how = Evaluation(protocol, net, alone(device), batch, metrics=offline_metrics(protocol, device))
    return reconstruct_first(how, tokenizer, source, image_size, settings.num_images)


def reconstruct_first(
    how: Evaluation,
    tokenizer: nn.Module,
    source: DataSource,
    image_size: int,
    count: int | None,
    on_corrupt: str = "raise",
) -> dict[str, float]:
    """Plain numbers of the first `count` pictures (0, None: all), on the main rank. Collective."""
    rows = range(min(count or len(source), len(source)))
    pictures = SourcePictures(source, image_size, rows=rows, on_corrupt=on_corrupt)
    rebuild = ByTokenizer(tokenizer, pictures, how.protocol, how.batch, how.world.device)
    with Work(len(pictures), how.world) as work:
        result = how.of_reconstructions(rebuild, work)
    return result.values() if result else {}


def lacking(settings: EvalConfig, protocol: Protocol, purpose: str) -> list[str]:
    """A line for each network of others that an evaluation would download or do without, with what brings it."""
    lines, inception = [], helper(WEIGHTS_FILE)
    without = {
        "auto": "until it is here, evaluation uses a stand-in and calls nothing FID",
        "inception": "evaluation needs it" if is_offline() else "evaluation will download it",
    }
    if settings.network in without and inception.found() is None:
        lines.append(f"{inception.about} ({inception.command}); {without[settings.network]}")
    if purpose == "reconstruction" and "lpips" in protocol.reconstruction:
        what = "LPIPS is left out without it" if is_offline() else "evaluation will download it"
        missing = (file for file in needed(lpips_vgg, {}) if file.found() is None)
        lines += [f"{file.about} ({file.command}); {what}" for file in missing]
    return lines


def offline_metrics(protocol: Protocol, device: torch.device) -> dict[str, PictureMetric]:
    """Those of the protocol that need no download: LPIPS only where its network is here."""
    if "lpips" in protocol.reconstruction and helper("vgg16-397923af.pth").found() is None:
        protocol = replace(protocol, reconstruction=tuple(m for m in protocol.reconstruction if m != "lpips"))
    return picture_metrics(protocol, device)[0]


SHOWN = 24


@torch.no_grad()
def reconstruction_grid(tokenizer: nn.Module, pictures: Pictures, device: torch.device) -> Tensor:
    """Pictures spread over a set, twelve a row, below each row its reconstructions: (3, H, W) uint8."""
    chosen = torch.cat([pictures.read(i, i + 1) for i in spread(len(pictures), SHOWN)]).to(device)
    rebuilt = to_uint8(tokenizer.decode(tokenizer.encode(to_model_range(chosen))).float(), "nearest")
    rows = [torch.cat(pair) for pair in zip(chosen.split(12), rebuilt.split(12))]
    return grid(torch.cat(rows), columns=12)


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------
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
            parts.append(finite_uint8(drawn.to(dtype), rounding, positions))
        return torch.cat(parts)

    return produce


def source_labels(source: DataSource) -> list[int]:
    """Labels of all pictures, without decoding them where the source lists them."""
    require_labels(source)
    if source.labels is not None:
        return source.labels.tolist()
    return [source[i].label for i in range(len(source))]


def val_labels(val: DataSource, num_classes: int, names: list[str]) -> list[int]:
    """Labels of the validation pictures as the classes to ask a generator for.

    Args:
        names: of the classes that it was trained on; [] where they are not known.
    """
    if val.num_classes != num_classes:
        raise UserError(
            f"labels of data.val_url: its pictures have {val.num_classes} classes and the generator knows {num_classes}, "
            "so their numbers may mean others. Name all classes with ?classes=FILE, or set eval.labels=balanced."
        )
    if names:
        require_same_classes(names, val.class_names, "data.val_url")
    return source_labels(val)


# ---------------------------------------------------------------------------------------------------------------------
# While training
# ---------------------------------------------------------------------------------------------------------------------
SAMPLES_ONLINE = 512  # where eval.num_images is 0


class Online:
    """What a trainer calls every train.eval_every: the commands' measurements, of config.eval.num_images pictures.

    Everything that can be missing is found when this is made, before the first step. All ranks call it and share the
    pictures; numbers come back on the main rank.
    """

    def __init__(self, config: RunConfig, train: DataSource, val: DataSource | None, image_size: int, world: World):
        self.config, self.settings, self.train, self.val = config, config.eval, train, val
        self.image_size = image_size
        self.purpose = {"tokenizer": "reconstruction", "generator": "generation"}[config.task]
        protocol = protocols.get(self.settings.protocol, self.purpose, self.settings.rounding)
        net = networks.feature_net(world.device, self.settings.network, protocol)
        metrics = offline_metrics(protocol, world.device) if self.purpose == "reconstruction" else {}
        self.how = Evaluation(protocol, net, world, self.settings.batch, metrics=metrics)  # its batch: see __call__
        path = self._reference_file()
        if path is not None:
            lossy = protocol.original_rounding
            self.how.reference = load_reference(path, net, self.purpose, image_size, world, rounding=lossy)
        self.has_reference = path is not None
        if self.purpose == "reconstruction":
            require_order(val, "reconstructions of them cannot be measured (train.eval_every)")
        else:
            if path is None:
                require_order(train, "they are no reference: give eval.reference=FILE")
            self.how.labels = self._labels()
        if self.settings.num_images == 1:
            raise UserError(
                "eval.num_images=1: a covariance needs at least 2 pictures. 0 leaves the number to the program."
            )

    def _labels(self) -> Tensor:
        kind = self.settings.labels or self.how.protocol.labels
        val = val_labels(self.val, self.train.num_classes, self.train.class_names) if kind == "val" else None
        count = self.settings.num_images or SAMPLES_ONLINE
        return protocols.make_labels(kind, count, self.train.num_classes, self.config.seed, val)

    def _reference_file(self) -> Path | None:
        """What was asked for; for samples of ImageNet's classes else the protocol's own file, where it is here."""
        asked, published = self.settings.reference, self.purpose == "generation" and self.train.num_classes == 1000
        if not (asked or published):
            return None
        try:
            return choose_reference(asked, self.how.protocol, self.how.net, self.image_size, self.purpose, published)
        except UserError:
            if asked:
                raise
            return None  # statistics of the training pictures are made instead

    def __call__(self, task, network: nn.Module) -> dict[str, float]:
        # Now, when the training has the memory that it needs.
        self.how.batch = pictures_at_once(self.settings.batch, self.how.world.device, self.image_size)
        if self.purpose == "reconstruction":
            count, on_corrupt = self.settings.num_images, self.config.data.on_corrupt
            return reconstruct_first(self.how, network, self.val, self.image_size, count, on_corrupt)
        return self.generation(task, network)

    def generation(self, task, network: nn.Module) -> dict[str, float]:
        """Of samples by the network, compared with the reference, which is made here where there is none yet."""
        how, world = self.how, self.how.world
        if not self.has_reference:
            how.reference = training_statistics(self.config, self.train, self.image_size, how.net, world)
            self.has_reference = True
        produce = producer(
            lambda labels, draws: task.sample(network, labels, draws),
            how.labels,
            self.config.seed,
            how.batch,
            world.device,
            how.protocol.rounding,
            pixel_dtype(how.protocol, self.config.train.precision == "bf16"),
        )
        result = how.of_samples(produce, Work(len(how.labels), world))
        return result.values() if result else {}
