"""Pictures -> features and per-picture numbers -> scores, in chunks that are shared between ranks and survive a kill.

The same few functions serve the commands and the evaluations while training. They know uint8 pictures and a feature
network; who makes the pictures (a generator, a tokenizer, a file) is a function that is handed in.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from core.dist import World
from core.errors import UserError
from evaluation.images import PictureMetric
from evaluation.networks import FeatureNet
from evaluation.pictures import Pictures
from evaluation.protocols import Protocol
from evaluation.references import Statistics
from evaluation.scores import Comparison, Score, score
from evaluation.work import SUM, Chunk, Work

Produce = Callable[[range], Tensor]  # indices -> (n, 3, H, W) uint8 on the network's device


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
    sums: dict[str, Tensor] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        return {s.name: s.value for s in self.scores}


def features_of(net: FeatureNet, images: Tensor, batch: int) -> dict[str, Tensor]:
    """Features of (N, 3, H, W) uint8 pictures, `batch` at a time, on the network's device."""
    device = next(net.parameters()).device
    parts = [net(piece.to(device, non_blocking=True)) for piece in images.split(batch)]
    return {tap: torch.cat([p[tap] for p in parts]) for tap in parts[0]}


def picture_features(
    pictures: Pictures, net: FeatureNet, world: World, batch: int, progress: Callable[[int], None] | None = None
) -> dict[str, Tensor] | None:
    """Features of a set, on the main rank. Collective."""
    work = Work(len(pictures), world)
    expect(work, pictures)
    work.compute(lambda indices: features_of(net, pictures.read(indices.start, indices.stop), batch), progress)
    return work.gather()


def expect(work: Work, *sets: Pictures) -> None:
    """Tell the sets which pictures this rank will read."""
    for pictures in sets:
        pictures.expect([work.indices(c) for c in work.mine()])


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate_generation(
    produce: Produce,
    work: Work,
    net: FeatureNet,
    protocol: Protocol,
    *,
    batch: int,
    reference: Statistics | None,
    real: dict[str, Tensor] | None = None,
    writers: tuple = (),
    progress: Callable[[int], None] | None = None,
    labels: Tensor | None = None,
    replicates: int = 0,
    infinity: bool = False,
) -> Result | None:
    """Sample (or read), take features, compare. Returns the result on the main rank. Collective.

    Args:
        produce: indices -> pictures, a function of the indices alone.
        reference: moments of real pictures; None: those of `real`.
        real: features of real pictures, on the main rank.
        writers: each is handed (first index, pictures) of every chunk before the chunk counts as done.
        labels: (N,) the classes asked for, to warn where their order would spoil an Inception Score.
        replicates: of the bootstrap behind confidence intervals; 0: none.
        infinity: also extrapolate to infinitely many pictures.
    """
    watch = Stopwatch(work.world.device)

    def compute(indices: range) -> Chunk:
        with watch("pictures"):
            images = produce(indices)
        with watch("features"):
            features = features_of(net, images, batch)
        with watch("writing"):
            for writer in writers:
                writer.write(indices.start, images)
                writer.flush()
        return features

    work.compute(compute, progress)
    features = work.gather()
    if features is None:
        return None
    with watch("metrics"):
        compared = Comparison(
            protocol, net, features, reference, real, "generation", work.world.device, labels, replicates, infinity
        )
        scores, left_out = score(compared)
    return Result(_some(scores, left_out, protocol), left_out, dict(watch.seconds), features=features)


def _some(scores: list[Score], left_out: dict[str, str], protocol: Protocol) -> list[Score]:
    """The scores; UserError when there are none."""
    if not scores:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"nothing of protocol {protocol.name} can be measured: {reasons}")
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Reconstructions
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Rebuilt:
    """Some originals and their reconstructions, on the evaluation's device."""

    original: Tensor  # (B, 3, H, W) uint8
    recon: Tensor  # (B, 3, H, W) uint8
    unit: Tensor  # (B, 3, H, W) fp32 in [0, 1], the reconstruction before rounding, clamped
    sums: dict[str, Tensor] = field(default_factory=dict)  # counts to add over all pictures (codes)
    perturbed: Tensor | None = None  # (B, 3, H, W) uint8, from disturbed codes


@torch.no_grad()
def evaluate_reconstruction(
    rebuild: Callable[[range], Iterator[Rebuilt]],
    work: Work,
    net: FeatureNet | None,
    protocol: Protocol,
    per_picture: list[PictureMetric],
    *,
    batch: int,
    reference: Statistics | None = None,
    writers: tuple = (),
    progress: Callable[[int], None] | None = None,
    noise: str = "",
    replicates: int = 0,
    infinity: bool = False,
) -> Result | None:
    """Compare reconstructions with their originals. Returns the result on the main rank. Collective.

    Args:
        rebuild: indices -> pairs, batch by batch.
        net: for rFID; None measures pictures only.
        per_picture: what compares an original with its reconstruction.
        writers: each is handed (first index, reconstructions) before their chunk counts as done.
        reference: moments of the originals; None: they go through the network too.
        replicates, infinity: as above, of rFID.
        noise: what the codes of Rebuilt.perturbed went through, for the record of pFID.
    """
    watch = Stopwatch(work.world.device)

    def compute(indices: range) -> Chunk:
        parts: dict[str, list[Tensor]] = defaultdict(list)
        sums: Chunk = {}
        pairs, first = rebuild(indices), indices.start
        while True:
            with watch("pictures"):
                pair = next(pairs, None)
            if pair is None:
                break
            if net is not None:
                with watch("features"):
                    sides = {"samples": pair.recon, "perturbed": pair.perturbed}
                    if reference is None:
                        sides["real"] = pair.original
                    for side, images in sides.items():
                        if images is not None:
                            for tap, values in features_of(net, images, batch).items():
                                parts[f"{side}/{tap}"].append(values.cpu())
            with watch("pixels"), torch.autocast(pair.recon.device.type, enabled=False):
                original = pair.original.float() / 255.0
                compared = pair.recon.float() / 255.0 if protocol.psnr_of == "uint8" else pair.unit
                for metric in per_picture:
                    parts[f"picture/{metric.name}"].append(metric.function(original, compared).double().cpu())
            for name, counts in pair.sums.items():
                sums[SUM + name] = sums[SUM + name] + counts if SUM + name in sums else counts
            with watch("writing"):
                for writer in writers:
                    writer.write(first, pair.recon)
            first += len(pair.recon)
        for writer in writers:
            writer.flush()
        return {**{name: torch.cat(values) for name, values in parts.items()}, **sums}

    work.compute(compute, progress)
    found = work.gather()
    if found is None:
        return None

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}

    values = part("picture/")
    scores = []
    for metric in per_picture:
        metric.load({"rows": values[metric.name]})
        scores += [
            Score(
                name, value, work.count, protocol.name, "originals", metric.interval() if name == metric.name else None
            )
            for name, value in metric.compute().items()
        ]
    left_out: dict[str, str] = {}
    if net is not None:
        with watch("metrics"):
            real = part("real/") or None
            more = dict(device=work.world.device, replicates=replicates, infinity=infinity)
            compared = Comparison(protocol, net, part("samples/"), reference, real, "reconstruction", **more)
            feature_scores, left_out = score(compared)
            if perturbed := part("perturbed/"):
                only_fid = replace(protocol, reconstruction=("fid",))
                compared = Comparison(only_fid, net, perturbed, reference, real, "perturbed", **more)
                numbers, why = score(compared)
                feature_scores += [replace(s, note=" ".join((f"{noise}.", s.note)).strip()) for s in numbers]
                left_out |= {f"p{name}" if name == "fid" else name: reason for name, reason in why.items()}
        scores = feature_scores + scores
    scores = _some(scores, left_out, protocol)
    return Result(scores, left_out, dict(watch.seconds), values, part("samples/"), part(SUM))
