"""The page of a quickstart: pictures, metrics, curves and configuration of the models it shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core.config import to_yaml
from core.schema import RunConfig
from evaluation import toy
from evaluation.report import Report, environment
from run.page import SPEED, read_run
from run.quickstart.shown import Shown, Standard, Variant

RECONSTRUCTIONS = "Pictures that were not trained on; below each row its reconstruction."


def add_tiles(page: Report, standard: Standard, rebuilt: dict[str, float], variant: Variant) -> None:
    """The numbers on top: of the tokenizer and of one variant."""
    best, frechet = variant.metrics, standard.net.distance_name("block4")
    page.add_tile(
        "class accuracy",
        f"{best['class_accuracy']:.0%}",
        f"samples ({variant.name}) recognised as the class asked for; chance is {1 / standard.source.num_classes:.0%}, "
        f"real unseen pictures reach {best['real_class_accuracy']:.0%}",
    )
    page.add_tile("PSNR", f"{rebuilt['psnr']:.1f} dB", "of reconstructed pictures that were not trained on")
    page.add_tile("SSIM", f"{rebuilt['ssim']:.3f}", "of the same")
    if usage := codebook_use(rebuilt):
        page.add_tile(
            "codebook use",
            f"{min(shares[''] for shares in usage.values()):.0%}",
            "share of codes that reconstructing unseen pictures uses"
            + (f"; the smallest of {len(usage)} codebooks" if len(usage) > 1 else ""),
        )
    page.add_tile(
        "Fréchet (Lite0)",
        f"{best[frechet]:.2f}",
        f"samples against the training set; unseen real pictures: {best['real_' + frechet]:.2f}. Not FID",
    )
    page.add_tile(
        "nearest training picture",
        f"{best['neighbour_similarity']:.2f}",
        f"mean cosine similarity; unseen real pictures: {best['real_neighbour_similarity']:.2f}. "
        f"{near_copies(variant, standard):.0%} of the samples are closer than all but one in a hundred of those",
    )


def near_copies(variant: Variant, standard: Standard) -> float:
    """Share of samples that are closer to a training picture than 99 of 100 unseen real pictures are."""
    sampled, unseen = (
        toy.nearest_neighbours(some.features[toy.CLASS_TAP], standard.train.features[toy.CLASS_TAP])[1]
        for some in (variant.samples, standard.unseen)
    )
    return float((sampled > unseen.quantile(0.99)).float().mean())


def add_samples(page: Report, shown: Shown, variant: Variant) -> None:
    """Samples by class above their nearest training pictures."""
    standard = shown.standard
    features = variant.samples.features[toy.CLASS_TAP]
    indices, similarity = toy.nearest_neighbours(features, standard.train.features[toy.CLASS_TAP])
    predicted, training = standard.classifier.predict(features), standard.pictures(standard.source)

    def pair(i: int) -> tuple[Tensor, Tensor, float, bool]:
        nearest_picture = training.read(int(indices[i]), int(indices[i]) + 1)[0]
        recognised = bool(predicted[i] == variant.samples.labels[i])
        return variant.pictures[i], nearest_picture, float(similarity[i]), recognised

    chosen = shown.by_class(variant.samples.labels)
    rows = [(name, [pair(i) for i in rows.tolist()]) for name, rows in zip(standard.source.class_names, chosen)]
    page.add_grid_with_neighbours(f"Samples, {variant.name}", rows)


def add_pictures(page: Report, pictures: Mapping[str, Tensor], headline: Variant) -> None:
    """Reconstructions, and what each part of the codes adds."""
    page.add_image("Reconstructions", pictures["reconstructions"], RECONSTRUCTIONS)
    if "stages" in pictures:
        page.add_image(
            "After each stage",
            pictures["stages"],
            "A row per picture: what it looks like after each part of its codes. "
            f"First pictures that were not trained on, themselves at the end; then samples ({headline.name}).",
        )


def add_tables(
    page: Report, standard: Standard, rebuilt: dict[str, float], variants: Sequence[Variant], seconds: dict[str, float]
) -> None:
    """Codebooks, ways to sample, time."""
    frechet = standard.net.distance_name("block4")
    usage = codebook_use(rebuilt)
    if scales := list(dict.fromkeys(scale for shares in usage.values() for scale in shares if scale)):
        page.add_table(
            "Codebook use of each branch and scale",
            ["codebook", "all", *scales],
            [
                [name or "the only one", *(f"{shares[scale]:.0%}" for scale in ("", *scales))]
                for name, shares in usage.items()
            ],
        )
    page.add_table(
        "Ways to sample",
        ["variant", "class accuracy", "Fréchet (Lite0)", "nearest training picture", "near-copies"],
        [
            [
                variant.name,
                f"{variant.metrics['class_accuracy']:.1%}",
                f"{variant.metrics[frechet]:.3f}",
                f"{variant.metrics['neighbour_similarity']:.3f}",
                f"{near_copies(variant, standard):.1%}",
            ]
            for variant in variants
        ],
    )
    page.add_table("Time", ["stage", "seconds"], [[name, f"{value:.0f}"] for name, value in seconds.items()])


def add_training(page: Report, configs: Mapping[str, RunConfig]) -> None:
    """Curves of each stage that was trained here."""
    for stage, config in configs.items():
        stage_run = read_run(config.run_dir)
        for chart in stage_run.charts:
            if chart not in SPEED and (lines := stage_run.curves(chart)):
                page.add_curves(f"{stage}: {chart.title}", lines, log=None, xlabel="images")


def add_context(page: Report, variants: Sequence[Variant], configs: Mapping[str, RunConfig]) -> None:
    """How to read the numbers, configuration, environment."""
    for warning in sorted({v.metrics["warning"] for v in variants if v.metrics["warning"]}):
        page.add_text(
            "How to read these numbers",
            warning + " Fréchet distances and accuracies here come from "
            "EfficientNet-Lite0 at toy sample sizes; they compare runs of this quickstart with one another.",
        )
    for stage, config in configs.items():
        page.add_config(f"# {stage}\n{to_yaml(config)}")
    page.add_environment(environment())


def codebook_use(rebuilt: dict[str, float]) -> dict[str, dict[str, float]]:
    """Branch -> scale -> share of its codes that are used; scale "" is all scales together."""
    usage: dict[str, dict[str, float]] = {}
    for name, value in rebuilt.items():
        if match := re.fullmatch(r"codebook_usage_?(.*?)_?(scale\d+)?", name):
            usage.setdefault(match[1], {})[match[2] or ""] = value
    return usage


def beside(grids: Sequence[Tensor], gap: int = 16) -> Tensor:
    """Grids (3, H, W) uint8 of one height side by side, with white between them."""
    white = torch.full((3, grids[0].shape[1], gap), 255, dtype=torch.uint8)
    parts = [part for grid in grids for part in (white, grid)]
    return torch.cat(parts[1:], dim=2)
