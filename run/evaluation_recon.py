"""The steps of run_eval_tokenizer.sh: reconstructions by a tokenizer, or two sets of pictures that are there."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import images as image_tools
from core.config import EvalConfig
from core.dist import World
from core.errors import UserError
from core.train.checkpoint import Checkpoint
from core.weights import released
from evaluation import measure, protocols, references, runner
from evaluation.images import Perturbation
from evaluation.networks import FeatureNet
from evaluation.pictures import Pictures, first_pictures, open_any, same_pictures
from evaluation.protocols import Protocol
from evaluation.references import Statistics
from evaluation.runner import Rebuilt
from evaluation.work import Work
from run import evaluation_run as run
from run.load import load_config, load_tokenizer, read_weights

BEST_AND_WORST = 6
CLASSES_SHOWN = 30
Pairs = Callable[[int], tuple[Tensor, Tensor]]  # index -> (original, reconstruction), (3, H, W) uint8


def check(options: argparse.Namespace, overrides: list[str]) -> None:
    """Find mistakes without loading a network."""
    settings = run.eval_settings(overrides)
    if options.original:
        sides = [open_any(p, options.size) for p in (options.original, options.reconstructed)]
        same_pictures(*sides)
        run.enough(min(settings.num_images or len(sides[0]), len(sides[0])), options.original, options)
    else:
        if options.perturb:
            Perturbation.parse(options.perturb)
        together(lambda: tokenizer_section(options.weights), lambda: originals(options, settings, None))
        settings = run.eval_settings(with_protocol(options.weights, overrides, options.tokenizer))
    protocol = protocols.get(settings.protocol, "reconstruction")
    if settings.reference:
        measure.choose_reference(settings.reference, protocol, None, 0, "reconstruction", False)


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


def originals(options: argparse.Namespace, settings: EvalConfig, size: int | None) -> Pictures:
    """The pictures to reconstruct, cropped to `size`: a data URL, a folder, or an .npz of pictures of that size."""
    pictures = open_any(options.url, size, options.workers)
    run.enough(min(settings.num_images or len(pictures), len(pictures)), options.url, options)
    return first_pictures(pictures, settings.num_images)


def tokenizer_section(target: str) -> dict[str, Any]:
    """Where a tokenizer comes from: a run, a file, or the run of a config."""
    if target.endswith((".yaml", ".yml")):
        config = load_config(target, [])
        target = config.tokenizer.get("weights") if config.task == "generator" else str(config.run_dir)
    released.resolve(target)
    return {"weights": target}


def with_protocol(target: str, overrides: list[str], known: dict[str, Any] | None = None) -> list[str]:
    """`overrides` with a protocol: the one they name, that of a run or config, or that of the tokenizer's authors."""
    if any(o.startswith("eval.protocol=") for o in overrides):
        return overrides
    if target.endswith((".yaml", ".yml")):
        name = load_config(target, []).eval.protocol
    else:
        path = released.resolve(target)
        name = (
            Checkpoint(path).state["config"]["eval"]["protocol"]
            if path.is_dir()
            else protocols.of_tokenizer(read_weights("tokenizer", target, known).settings["name"])
        )
    return [f"eval.protocol={name}", *overrides]


def asked_for(options: argparse.Namespace) -> dict[str, Any]:
    """Facts of a job that it has only where they were asked for."""
    return {
        name: getattr(options, name)
        for name in ("bootstrap", "infinity", "write", "tokenizer")
        if getattr(options, name)
    }


def reference_for(
    settings: EvalConfig, protocol: Protocol, net: FeatureNet, pictures: Pictures, world: World
) -> tuple[str, Statistics | None]:
    """(what reconstructions are compared with, its statistics on the main rank or None for the originals)."""
    size = pictures.size[0]
    path = measure.choose_reference(settings.reference, protocol, net, size, "reconstruction", False)
    known = references.KNOWN.get(path.name) if path else None
    if path and not settings.reference and known and known.count != len(pictures):
        path = None  # the protocol's file is about the whole validation set; this is a part of it or another set
    if path is None:
        return "originals", None
    return str(path), measure.load_reference(path, net, "reconstruction", size, world, pictures.fingerprint())


def by_tokenizer(options: argparse.Namespace, overrides: list[str], world: World) -> int:
    """Reconstruct and measure."""
    check(options, overrides)  # before a network is loaded
    settings = run.eval_settings(with_protocol(options.weights, overrides, options.tokenizer))
    protocol = protocols.get(settings.protocol, "reconstruction")
    tokenizer, fingerprint = load_tokenizer(
        {**options.tokenizer, **tokenizer_section(options.weights), "use_ema": not options.raw}
    )
    tokenizer.to(world.device)
    pictures = originals(options, settings, tokenizer.image_size)
    count = len(pictures)
    net = measure.feature_net(world.device, settings.network, protocol)
    against, reference = reference_for(settings, protocol, net, pictures, world)
    bf16 = options.precision == "bf16"
    perturb = Perturbation.parse(options.perturb) if options.perturb else None
    job = {
        "weights": options.weights,
        "weights_fingerprint": fingerprint,
        "use_ema": not options.raw,
        "pictures": options.url,
        "pictures_fingerprint": pictures.fingerprint(),
        "count": count,
        "protocol": protocol.name,
        "network": net.name,
        "reference": against,
        "precision": options.precision,
        "seed": 0,
    }
    if perturb:
        job["perturbation"] = asdict(perturb)
    job |= asked_for(options)
    folder, known = run.open_folder(options.out, Path(options.weights.rstrip("/")).stem, job, options.again, world)
    if known:
        return run.print_stored(folder) if world.is_main else 0
    with run.progress_line(world, count, "reconstructions") as progress:
        result = measure.reconstruction_result(
            tokenizer,
            pictures,
            protocol,
            net if "fid" in protocol.reconstruction else None,
            world,
            batch=settings.batch,
            reference=reference,
            bf16=bf16,
            folder=folder / "work",
            job=job,
            progress=progress,
            replicates=options.bootstrap,
            infinity=options.infinity,
            perturb=perturb,
            open_writer=lambda work: run.open_writer(
                options.write, "reconstructions", folder, work, tokenizer.image_size, options.again
            ),
        )
    if result is None:
        return 0
    grid = folder / "work" / "reconstructions.png"
    image_tools.save_png(measure.reconstruction_grid(tokenizer, pictures, world.device), grid)

    rebuild = measure.rebuilder(tokenizer, pictures, protocol, settings.batch, world.device, bf16=bf16)

    def pair(index: int) -> tuple[Tensor, Tensor]:
        found = next(rebuild(range(index, index + 1)))
        return found.original[0], found.recon[0]

    source = getattr(pictures, "source", None)  # of an .npz there is none
    tables = (
        per_class(result, torch.tensor(measure.source_labels(source)[:count]), source.class_names) if source else []
    )
    return finish(
        folder,
        f"Reconstructions by {options.weights}",
        result,
        job,
        protocol,
        net,
        reference,
        pair,
        world,
        tables,
        [("Reconstructions", grid, "Originals; below each row its reconstructions.")],
    )


def by_folders(options: argparse.Namespace, overrides: list[str], world: World) -> int:
    """Compare two sets of pictures, paired in order."""
    settings = run.eval_settings(overrides)
    protocol = protocols.get(settings.protocol, "reconstruction")
    original, recon = (open_any(p, options.size, options.workers) for p in (options.original, options.reconstructed))
    same_pictures(original, recon)
    count = run.enough(min(settings.num_images or len(original), len(original)), options.original, options)
    net = measure.feature_net(world.device, settings.network, protocol)
    against, reference = reference_for(settings, protocol, net, original, world)
    job = {
        "original": options.original,
        "reconstructed": options.reconstructed,
        "count": count,
        "protocol": protocol.name,
        "original_fingerprint": original.fingerprint(),
        "reconstructed_fingerprint": recon.fingerprint(),
        "network": net.name,
        "reference": against,
        "size": options.size,
    }
    job |= asked_for(options)
    folder, known = run.open_folder(
        options.out, Path(options.reconstructed.rstrip("/")).stem, job, options.again, world
    )
    if known:
        return run.print_stored(folder) if world.is_main else 0
    metrics, left_out = measure.per_picture(protocol, world.device)

    def rebuild(indices: range) -> Iterator[Rebuilt]:
        pair = [p.read(indices.start, indices.stop) for p in (original, recon)]
        for first, second in zip(*(p.split(settings.batch) for p in pair)):
            first, second = first.to(world.device), second.to(world.device)
            yield Rebuilt(first, second, second.float() / 255.0)

    work = Work(count, world, folder / "work", job)
    runner.expect(work, original, recon)
    with work, run.progress_line(world, count, "pictures") as progress:
        result = runner.evaluate_reconstruction(
            rebuild,
            work,
            net if "fid" in protocol.reconstruction else None,
            protocol,
            metrics,
            batch=settings.batch,
            reference=reference,
            progress=progress,
            replicates=options.bootstrap,
            infinity=options.infinity,
        )
    if result is None:
        return 0
    result.left_out |= left_out
    if "codebook" in protocol.reconstruction:
        result.left_out["codebook"] = "pictures alone do not show codes"

    def pair(index: int) -> tuple[Tensor, Tensor]:
        return original.read(index, index + 1)[0], recon.read(index, index + 1)[0]

    return finish(
        folder,
        f"{options.reconstructed} against {options.original}",
        result,
        job,
        protocol,
        net,
        reference,
        pair,
        world,
        [],
        [],
    )


def per_class(result: runner.Result, labels: Tensor, names: list[str]) -> list[tuple[str, list[str], list[list[Any]]]]:
    """A table of means by class, worst PSNR first, where there are classes."""
    if len(names) < 2 or not result.per_picture:
        return []
    columns = list(result.per_picture)
    rows = []
    for label in torch.unique(labels).tolist():
        chosen = labels == label
        rows.append(
            [names[label], int(chosen.sum()), *(f"{float(result.per_picture[c][chosen].mean()):.4f}" for c in columns)]
        )
    rows.sort(key=lambda row: float(row[2]))
    title = "By class" if len(rows) <= CLASSES_SHOWN else f"The {CLASSES_SHOWN} classes with the lowest {columns[0]}"
    return [(title, ["class", "pictures", *columns], rows[:CLASSES_SHOWN])]


def extremes(result: runner.Result, pair: Pairs, folder: Path) -> list[tuple[str, Path, str]]:
    """Write the worst and the best reconstructions; originals above."""
    if "psnr" not in result.per_picture:
        return []
    order = result.per_picture["psnr"].argsort()
    shown = []
    for name, chosen in (("worst", order[:BEST_AND_WORST]), ("best", order.flip(0)[:BEST_AND_WORST])):
        rows = [torch.stack([side.cpu() for side in sides]) for sides in zip(*(pair(int(i)) for i in chosen))]
        image_tools.save_png(image_tools.grid(torch.cat(rows), columns=len(chosen)), folder / f"{name}.png")
        values = ", ".join(f"{float(result.per_picture['psnr'][i]):.1f}" for i in chosen)
        shown.append((f"The {name} by PSNR", folder / f"{name}.png", f"Originals above; {values} dB."))
    return shown


def finish(
    folder: Path,
    title: str,
    result: runner.Result,
    job: dict[str, Any],
    protocol: Protocol,
    net: FeatureNet,
    reference: Statistics | None,
    pair: Pairs,
    world: World,
    tables: list,
    shown: list[tuple[str, Path, str]],
) -> int:
    context = {
        **job,
        "job": job,
        "net": net.name,
        "protocol_settings": asdict(protocol),
        "rounding": protocol.reconstruction_rounding,
        "original_rounding": protocol.original_rounding,
        "preprocess": measure.preprocess_of(net),
        "inception_sha256": getattr(net, "weights_sha256", None),
        "feature_dtype": protocol.dtype,
        "reference_fingerprint": job.get("pictures_fingerprint"),
    }
    if reference is not None:
        context |= {
            "reference": reference.name,
            "reference_sha256": reference.sha256,
            "reference_facts": asdict(reference.facts),
        }
    run.finish(folder, title, result, context, world, [*shown, *extremes(result, pair, folder / "work")], tables)
    shutil.rmtree(folder / "work", ignore_errors=True)
    return 0
