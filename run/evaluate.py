"""What run_eval_tokenizer.sh does, one `Measurement` per command; what run_eval_generator.sh does is in evaluate_generator.py.

    by_tokenizer(options, overrides, world).run()        reconstructions by a tokenizer
    by_folders(options, overrides, world).run()          two sets of pictures that are there

Each of these functions reads what was asked for, loads the network and says what decides the result. The rest is the same
for all (run/measurement.py): a folder that is continued or refused, measuring in chunks, the table, the report and
metrics.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import nn

from core import images as image_tools
from core.devices import pictures_at_once
from core.dist import World
from core.errors import UserError
from core.files import write_atomic
from core.schema import EvalConfig
from core.train.parallel import compile_blocks
from core.weights import released
from data.checks import say_left_out
from evaluation import measure, networks, protocols, references
from evaluation.chunks import Work
from evaluation.images import Perturbation, picture_metrics
from evaluation.measure import ByPairs, ByTokenizer, Evaluation, Progress, Rebuild, Result
from evaluation.networks import FeatureNet
from evaluation.pairs import paired
from evaluation.pictures import Pictures, first_pictures, open_any
from evaluation.protocols import Protocol
from evaluation.references import Statistics
from run.load import IMAGENET_CLASSES, lay_out_tokenizer, load_config, read_tokenizer
from run.measurement import (
    NO_CLASSES,
    PICTURES_ARE_THERE,
    Measurement,
    Shown,
    Table,
    check_comparison,
    enough,
    eval_settings,
    evaluation_of,
    sizes_of,
)
from run.unseen import LEFT_OUT, choose, training_data, unseen
from run.weights import read_weights

ENOUGH_TO_COMPILE = 5_000  # reconstructions
BEST_AND_WORST = 6
CLASSES_SHOWN = 30
PER_PICTURE = "per_picture.safetensors"  # metric -> (N,), and (scales, K, V) counts of codes


def together(*checks: Callable[[], Any]) -> None:
    """Run them all; UserError with every mistake that they find."""
    problems = []
    for look in checks:
        try:
            look()
        except UserError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} mistakes:\n" + "\n".join(f"  - {problem}" for problem in problems))


def check_reconstructions(options: argparse.Namespace, overrides: list[str]) -> None:
    """Find mistakes without loading a tokenizer; with --check also those in the files of the comparison."""
    idle = PICTURES_ARE_THERE if options.original else NO_CLASSES
    settings = eval_settings(overrides, "" if options.original else "WEIGHTS", idle)
    if options.original:
        sides = [open_any(p, options.size) for p in (options.original, options.reconstructed)]
        paired(*sides)
        enough(settings.num_images, len(sides[0]), options.original, options)
        size = references.side_of(sides[0])
    else:
        if options.perturb:
            Perturbation.parse(options.perturb)
        together(lambda: tokenizer_section(options.weights), lambda: originals(options, settings, None))
        settings = eval_settings(with_protocol(options.weights, overrides, options.tokenizer))
        size = 0
        if options.check:
            size = lay_out_tokenizer({**options.tokenizer, **tokenizer_section(options.weights)}).image_size
            originals(options, settings, size)
    protocol = protocols.get(settings.protocol, "reconstruction")
    if options.check:
        check_comparison(settings, protocol, size, "reconstruction", False)
    elif settings.reference:
        references.choose_reference(settings.reference, protocol, None, 0, "reconstruction", False)


def originals(options: argparse.Namespace, settings: EvalConfig, size: int | None) -> Pictures:
    """The pictures to reconstruct, cropped to `size`: a data URL, a folder, or an .npz of pictures of that size."""
    if options.url is None:
        try:
            data = training_data(tokenizer_section(options.weights)["weights"], options.tokenizer)
        except UserError:  # which is said where the tokenizer is looked for
            data = {}
        options.url = choose(unseen(data), LEFT_OUT, f"bash run_eval_tokenizer.sh {options.weights}")
    pictures = open_any(options.url, size, options.workers)
    enough(settings.num_images, len(pictures), options.url, options)
    return first_pictures(pictures, settings.num_images)


def tokenizer_section(target: str) -> dict[str, Any]:
    """Where a tokenizer comes from: a run, a file, or the run of a config."""
    if target.endswith((".yaml", ".yml")):
        config = load_config(target, [])
        if config.task == "generator" and not config.tokenizer.get("weights"):
            raise UserError(f"{target} names no tokenizer.weights. Name the tokenizer's run or file itself.")
        target = config.tokenizer["weights"] if config.task == "generator" else str(config.run_dir)
    released.resolve(target, "tokenizer")
    return {"weights": target}


def with_protocol(target: str, overrides: list[str], known: dict[str, Any] | None = None) -> list[str]:
    """`overrides` with a protocol: the one they name, that of a run or config, or that of the tokenizer's authors."""
    if any(o.startswith("eval.protocol=") for o in overrides):
        return overrides
    if target.endswith((".yaml", ".yml")):
        name = load_config(target, []).eval.protocol
    else:
        weights = read_weights("tokenizer", target, known)
        trained = weights.trained
        name = trained["eval"]["protocol"] if trained else protocols.of_tokenizer(weights.settings["name"])
    return [f"eval.protocol={name}", *overrides]


@dataclass(kw_only=True)
class Reconstructions(Measurement):
    """Reconstructions against their originals.

    Args:
        rebuild: indices -> pairs, a function of the indices alone.
        pictures: the originals.
        left_out: metrics of pictures that cannot be had -> why.
        tokenizer: what reconstructs; None where the reconstructions are there.
    """

    rebuild: Rebuild
    pictures: Pictures
    left_out: dict[str, str]
    tokenizer: nn.Module | None = None

    noun = "reconstructions"

    def measure(self, work: Work, writers: tuple, progress: Progress) -> Result | None:
        result = self.how.of_reconstructions(self.rebuild, work, writers, progress)
        if result is not None:
            result.left_out |= self.left_out
        return result

    def shown(self, result: Result, folder: Path) -> list[Shown]:
        if self.tokenizer is None:
            return self.extremes(result, folder)
        path = folder / "reconstructions.png"
        image_tools.save_png(measure.reconstruction_grid(self.tokenizer, self.pictures, self.how.world.device), path)
        grid = ("Reconstructions", path, "Originals; below each row its reconstructions.")
        return [grid, *self.extremes(result, folder)]

    def write(self, result: Result, folder: Path, unfinished: Path) -> None:
        if getattr(self.options, "keep", False):
            counts = {} if result.code_counts is None else {"codes": result.code_counts}
            tensors = {f"picture/{name}": values for name, values in result.per_picture.items()} | counts
            write_atomic(folder / PER_PICTURE, to_bytes(tensors))
        super().write(result, folder, unfinished)

    @torch.no_grad()
    def extremes(self, result: Result, folder: Path) -> list[Shown]:
        """The worst and the best reconstructions; originals above."""
        if "psnr" not in result.per_picture:
            return []
        order = result.per_picture["psnr"].argsort()
        shown = []
        for name, chosen in (("worst", order[:BEST_AND_WORST]), ("best", order.flip(0)[:BEST_AND_WORST])):
            pairs = [next(self.rebuild(range(i, i + 1))) for i in chosen.tolist()]
            rows = torch.cat([pair.original for pair in pairs] + [pair.recon for pair in pairs]).cpu()
            image_tools.save_png(image_tools.grid(rows, columns=len(chosen)), folder / f"{name}.png")
            values = ", ".join(f"{float(result.per_picture['psnr'][i]):.1f}" for i in chosen)
            shown.append((f"The {name} by PSNR", folder / f"{name}.png", f"Originals above; {values} dB."))
        return shown

    def tables(self, result: Result) -> list[Table]:
        """Means by class, worst PSNR first, where there are classes."""
        source = self.pictures.source if self.tokenizer is not None else None
        if source is None or len(source.class_names) < 2 or not result.per_picture:
            return []
        labels = torch.tensor(measure.source_labels(source)[: self.count])
        columns = list(result.per_picture)
        rows = []
        for label in torch.unique(labels).tolist():
            chosen = labels == label
            means = [f"{float(result.per_picture[column][chosen].mean()):.4f}" for column in columns]
            rows.append([source.class_names[label], int(chosen.sum()), *means])
        rows.sort(key=lambda row: float(row[2]))
        title = (
            "By class" if len(rows) <= CLASSES_SHOWN else f"The {CLASSES_SHOWN} classes with the lowest {columns[0]}"
        )
        return [(title, ["class", "pictures", *columns], rows[:CLASSES_SHOWN])]


def reconstruction_evaluation(
    options: argparse.Namespace, settings: EvalConfig, pictures: Pictures, world: World
) -> tuple[Evaluation, str, dict[str, str]]:
    """(how reconstructions of `pictures` are measured, against what, metric of pictures -> why it is left out)."""
    protocol = protocols.get(settings.protocol, "reconstruction", settings.rounding)
    net = networks.feature_net(world.device, settings.network, protocol)
    against, reference = reference_for(settings, protocol, net, pictures, world)
    metrics, left_out = picture_metrics(protocol, world.device)
    labels = pictures.labels()
    how = evaluation_of(options, settings, protocol, net, world, reference=reference, metrics=metrics, labels=labels)
    return how, against, left_out


def reference_for(
    settings: EvalConfig, protocol: Protocol, net: FeatureNet, pictures: Pictures, world: World
) -> tuple[str, Statistics | None]:
    """(what reconstructions are compared with, its statistics on the main rank or None for the originals)."""
    size = references.side_of(pictures)
    path = references.choose_reference(settings.reference, protocol, net, size, "reconstruction", False)
    known = references.KNOWN.get(path.name) if path else None
    classes = 1 if pictures.source is None else pictures.source.num_classes  # 1: they have none
    imagenet = known is not None and known.count == len(pictures) and classes in (1, IMAGENET_CLASSES)
    if path and not settings.reference and known and not imagenet:
        path = None  # the protocol's file is about ImageNet's validation set; this is a part of it or another set
    if path is None:
        return "originals", None
    rounding = protocol.original_rounding
    return str(path), references.load_reference(path, net, "reconstruction", size, world, pictures, rounding)


def asked_for(options: argparse.Namespace) -> dict[str, Any]:
    """Facts of a job that it has only where they were asked for."""
    return {
        name: getattr(options, name)
        for name in ("bootstrap", "infinity", "write", "tokenizer")
        if getattr(options, name)
    }


def reconstruction_context(how: Evaluation, rounding: str | None, fingerprint: str | None) -> dict[str, Any]:
    """What metrics.json says beside the job. rounding: of the reconstructions; None: nobody knows."""
    return {
        "rounding": rounding,
        "original_rounding": how.protocol.original_rounding,
        "reference_fingerprint": fingerprint,
    }


def is_compiled(settings: EvalConfig, count: int, device: torch.device) -> bool:
    """Whether a tokenizer is compiled for this many reconstructions of a rank."""
    if settings.compile == "auto":  # it takes a minute or so
        return device.type == "cuda" and count >= ENOUGH_TO_COMPILE
    return settings.compile == "always"


def by_tokenizer(options: argparse.Namespace, overrides: list[str], world: World) -> Reconstructions:
    """Reconstructions by a tokenizer."""
    check_reconstructions(options, overrides)  # before a network is loaded
    settings = eval_settings(with_protocol(options.weights, overrides, options.tokenizer))
    section = {**options.tokenizer, **tokenizer_section(options.weights), "use_ema": not options.raw}
    loaded = read_tokenizer(section, world=world)
    tokenizer, fingerprint = loaded.module.to(world.device), loaded.fingerprint
    pictures = originals(options, settings, tokenizer.image_size)
    say_left_out(world.say, pictures.source, options.url)
    how, against, left_out = reconstruction_evaluation(options, settings, pictures, world)
    perturb = Perturbation.parse(options.perturb) if options.perturb else None
    job = {
        "weights": options.weights,
        "weights_fingerprint": fingerprint,
        "use_ema": not options.raw,
        "pictures": options.url,
        "pictures_fingerprint": pictures.fingerprint(),
        **sizes_of("pictures", pictures, world),
        "count": len(pictures),
        "protocol": how.protocol.name,
        "network": how.feature_net.name,
        "reference": against,
        "precision": options.precision,
        "seed": 0,
        **({"rounding": settings.rounding} if settings.rounding else {}),
        **({"perturbation": asdict(perturb)} if perturb else {}),
        **asked_for(options),
    }
    if is_compiled(settings, len(pictures) // world.size, world.device):
        compile_blocks(tokenizer)
    rebuild = ByTokenizer(
        tokenizer,
        pictures,
        how.protocol,
        pictures_at_once(settings.batch, world.device, tokenizer.image_size),
        world.device,
        bf16=options.precision == "bf16",
        perturb=perturb,
    )
    return Reconstructions(
        options=options,
        how=how,
        title=f"Reconstructions by {options.weights}",
        stem=Path(options.weights.rstrip("/")).stem,
        image_size=tokenizer.image_size,
        job=job,
        context=reconstruction_context(how, how.protocol.reconstruction_rounding, job["pictures_fingerprint"]),
        rebuild=rebuild,
        pictures=pictures,
        left_out=left_out,
        tokenizer=tokenizer,
    )


def by_folders(options: argparse.Namespace, overrides: list[str], world: World) -> Reconstructions:
    """Two sets of pictures, paired by name or in order (evaluation/pairs.py)."""
    settings = eval_settings(overrides, idle=PICTURES_ARE_THERE)
    original, recon = (open_any(p, options.size, options.workers) for p in (options.original, options.reconstructed))
    for pictures in (original, recon):
        say_left_out(world.say, pictures.source, pictures.name)
    recon = paired(original, recon)
    count = enough(settings.num_images, len(original), options.original, options)
    how, against, left_out = reconstruction_evaluation(options, settings, original, world)
    if "codebook" in how.protocol.reconstruction:
        left_out["codebook"] = "pictures alone do not show codes"
    job = {
        "original": options.original,
        "reconstructed": options.reconstructed,
        "count": count,
        "protocol": how.protocol.name,
        "original_fingerprint": original.fingerprint(),
        "reconstructed_fingerprint": recon.fingerprint(),
        **sizes_of("original", original, world),
        **sizes_of("reconstructed", recon, world),
        "network": how.feature_net.name,
        "reference": against,
        "size": options.size,
        **asked_for(options),
    }
    return Reconstructions(
        options=options,
        how=how,
        title=f"{options.reconstructed} against {options.original}",
        stem=Path(options.reconstructed.rstrip("/")).stem,
        image_size=original.size[0],
        job=job,
        context=reconstruction_context(how, None, None),
        rebuild=ByPairs(original, recon, how.batch, world.device, how.protocol.original_rounding),
        pictures=original,
        left_out=left_out,
    )
