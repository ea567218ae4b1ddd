"""The last stage of a quickstart: reconstruct unseen pictures, sample, measure, and put it all on one page."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import dist
from core import images as image_tools
from core.config import EvalConfig, RunConfig, to_yaml
from core.rng import Draws, hash64
from core.specs import DataSource
from core.train.log import ProgressLine
from core.train.run import read_metrics
from data.transforms import Transform
from evaluation import measure
from evaluation.classifier import LinearClassifier, fit
from evaluation.environment import environment
from evaluation.generation import evaluate_samples
from evaluation.metrics_json import write_metrics
from evaluation.neighbours import nearest_neighbours
from evaluation.pictures import SourcePictures
from evaluation.reference import Features, Reference, extract
from evaluation.report import Report
from generator.task import GeneratorTask
from run import assemble, streaming

SHOWN_PER_CLASS = 8
SHOWN_STAGES = 8  # pictures whose stages are shown, as many unseen ones as samples


def make(
    plan: dict, configs: dict[str, RunConfig], smoke: bool, folder: Path, seconds: dict[str, float], begun: float
) -> Path:
    """Write report.html, metrics.json and PNGs into `folder`; returns the path of the report."""
    device = dist.pick_device("auto")
    settings = {**plan["report"], **(plan["smoke"].get("report", {}) if smoke else {})}
    generator_config = configs[plan["generator"]]
    source, val = assemble.open_train(generator_config), assemble.open_val(generator_config)
    tokenizer, _ = assemble.load_tokenizer({"weights": str(folder / plan["tokenizer"])})
    tokenizer.to(device)
    size = tokenizer.image_size
    net = measure.feature_net(device)
    train_features = measure.real_features(generator_config, source, size, net)
    val_features = measure.real_features(generator_config, val, size, net)
    classifier = fit(train_features.taps["penultimate"], train_features.labels, source.num_classes)

    rebuilt = measure.reconstruction(tokenizer, val, size, EvalConfig(), device, net)
    pairs = measure.reconstruction_grid(tokenizer, SourcePictures(val, tokenizer.image_size), device)
    image_tools.save_png(pairs, folder / "reconstructions.png")

    generator, _ = assemble.load_generator(str(folder / plan["generator"]), tokenizer)
    generator.to(device)
    headline = settings["headline"]
    variants, pictures, features, stages = {}, {}, {}, None
    for variant in settings["variants"]:
        name = variant["label"]
        task = _task(variant, plan, generator, tokenizer, source, generator_config, folder, device)
        pictures[name], features[name] = _sample(name, task, settings, generator_config, net, device)
        variants[name] = evaluate_samples(
            features[name], net, train_features, val_features, classifier, source.class_names
        )
        if name == headline and hasattr(tokenizer, "previews"):
            stages = _stages(task, val, generator_config.seed, device)
            image_tools.save_png(stages, folder / "stages.png")
    for name, images in pictures.items():
        chosen = _by_class(features[name].labels, source.num_classes, SHOWN_PER_CLASS)
        grid = image_tools.grid(images[torch.cat(chosen)], columns=SHOWN_PER_CLASS)
        image_tools.save_png(grid, folder / f"samples_{name.replace(' ', '_')}.png")

    seconds = {**seconds, "samples, metrics, report": time.perf_counter() - begun}
    metrics = {
        **rebuilt,
        **{f"{key} ({name})": value for name, result in variants.items() for key, value in result.items()},
        **{f"seconds ({stage})": value for stage, value in seconds.items()},
    }
    context = {
        "count": len(features[headline]),
        "net": net.name,
        "reference_fingerprint": train_features.fingerprint,
        "seed": generator_config.seed,
    }
    write_metrics(folder / "metrics.json", metrics, context)
    for name, result in variants.items():
        print(
            f"  {name:<14} class accuracy {result['class_accuracy']:.1%} (real pictures "
            f"{result['real_class_accuracy']:.1%}, chance {1 / source.num_classes:.1%})",
            flush=True,
        )
    print(f"  reconstruction of unseen pictures: PSNR {rebuilt['psnr']:.2f} dB", flush=True)

    report = _write(
        plan,
        configs,
        source,
        folder,
        settings,
        rebuilt,
        pairs,
        stages,
        variants,
        pictures[headline],
        features[headline],
        train_features,
        classifier,
        seconds,
        size,
    )
    return report


def _task(
    variant: dict,
    plan: dict,
    generator: nn.Module,
    tokenizer: nn.Module,
    source: DataSource,
    config: RunConfig,
    folder: Path,
    device: torch.device,
) -> GeneratorTask:
    """One way to sample: the config's, with the variant's changes."""
    sampling = dataclasses.replace(config.sample, **{key: value for key, value in variant.items() if key != "label"})
    guide = None
    if sampling.guidance == "auto":
        guide = assemble.load_generator(str(folder / plan["guide"]), tokenizer)[0].to(device)
    return GeneratorTask(
        generator,
        tokenizer,
        source.num_classes,
        assemble.make_guidance(sampling, guide),
        assemble.sample_options(sampling, generator),
    )


def _sample(
    name: str, task: GeneratorTask, settings: dict, config: RunConfig, net: Any, device: torch.device
) -> tuple[Tensor, Features]:
    """(uint8 pictures on the CPU, their features)."""
    labels = measure.labels_for(settings["samples_per_class"] * task.num_classes, task.num_classes)
    line = ProgressLine(len(labels), label=f"samples, {name}")
    batches = list(
        measure.samples(
            lambda part, draws: task.sample(task.generator, part, draws),
            labels,
            config.seed,
            config.eval.batch,
            device,
            line.update,
        )
    )
    line.close()
    return torch.cat([images.cpu() for images, _ in batches]), extract(net, batches)


@torch.no_grad()
def _stages(task: GeneratorTask, source: DataSource, seed: int, device: torch.device) -> Tensor:
    """What each part of the latents adds: a row per picture, first unseen ones, last in their row the pictures
    themselves, then samples, (3, H, W) uint8."""
    transform, count = Transform(image_size=task.tokenizer.image_size), min(SHOWN_STAGES, len(source))
    originals = torch.stack([transform.apply_view(source[i * len(source) // count].image, 0) for i in range(count)])
    draws = Draws(hash64(seed, "stages"), torch.arange(count, device=device))
    labels = torch.arange(count, device=device) % task.num_classes
    sampled = task.generator.sample(labels, draws, task.guidance, **task.sample_options)
    encoded = task.tokenizer.encode(image_tools.to_model_range(originals.to(device)))
    strips = [
        streaming.filmstrip(task.tokenizer.previews(latents, draws), last)
        for latents, last in ((encoded, originals), (sampled, torch.full_like(originals, 255)))
    ]
    return torch.cat(strips, dim=1)


def _by_class(labels: Tensor, num_classes: int, count: int) -> list[Tensor]:
    """Indices of the first `count` samples of each class."""
    return [(labels == c).nonzero().flatten()[:count] for c in range(num_classes)]


def _write(
    plan: dict,
    configs: dict[str, RunConfig],
    source: DataSource,
    folder: Path,
    settings: dict,
    rebuilt: dict[str, float],
    pairs: Tensor,
    stages: Tensor | None,
    variants: dict[str, dict],
    pictures: Tensor,
    features: Features,
    train_features: Reference,
    classifier: LinearClassifier,
    seconds: dict[str, float],
    size: int,
) -> Path:
    headline = settings["headline"]
    best = variants[headline]
    frechet = next(name for name in best if name.startswith("fd_"))
    report = Report(
        plan["title"],
        f"{len(source):,} training pictures of {source.num_classes} classes at {size} px, trained "
        f"in {sum(seconds.values()) / 60:.1f} minutes. A toy: nothing here says how the method does at scale.",
    )
    report.add_tile(
        "class accuracy",
        f"{best['class_accuracy']:.0%}",
        f"samples ({headline}) recognised as the class asked for; chance is {1 / source.num_classes:.0%}, "
        f"real unseen pictures reach {best['real_class_accuracy']:.0%}",
    )
    report.add_tile("PSNR", f"{rebuilt['psnr']:.1f} dB", "of reconstructed pictures that were not trained on")
    report.add_tile("SSIM", f"{rebuilt['ssim']:.3f}", "of the same")
    usage = _usage(rebuilt)
    used = {name: row[""] for name, row in usage.items()}
    if used:
        report.add_tile(
            "codebook use",
            f"{min(used.values()):.0%}",
            "share of codes that reconstructing unseen pictures uses"
            + (f"; the smallest of {len(used)} codebooks" if len(used) > 1 else ""),
        )
    report.add_tile(
        "Fréchet (Lite0)",
        f"{best[frechet]:.2f}",
        f"samples against the training set; unseen real pictures: {best['real_' + frechet]:.2f}. Not FID",
    )
    report.add_tile(
        "nearest training picture",
        f"{best['neighbour_similarity']:.2f}",
        f"mean cosine similarity; unseen real pictures: {best['real_neighbour_similarity']:.2f}",
    )

    indices, similarity = nearest_neighbours(features.taps["penultimate"], train_features.taps["penultimate"])
    predicted = classifier.predict(features.taps["penultimate"])
    transform = Transform(image_size=size)
    rows = []
    for label, chosen in enumerate(_by_class(features.labels, source.num_classes, SHOWN_PER_CLASS)):
        rows.append(
            (
                source.class_names[label],
                [
                    (
                        pictures[i],
                        transform.apply_view(source[int(indices[i])].image, 0),
                        float(similarity[i]),
                        bool(predicted[i] == label),
                    )
                    for i in chosen.tolist()
                ],
            )
        )
    report.add_grid_with_neighbours(f"Samples, {headline}", rows)
    report.add_image("Reconstructions", pairs, "Pictures that were not trained on; below each row its reconstruction.")
    if stages is not None:
        report.add_image(
            "After each stage",
            stages,
            "A row per picture: what it looks like after each part of its codes. "
            f"First pictures that were not trained on, themselves at the end; then samples ({headline}).",
        )
    parts = [scale for row in usage.values() for scale in row if scale]
    if parts:
        scales = list(dict.fromkeys(parts))
        report.add_table(
            "Codebook use of each branch and scale",
            ["codebook", "all", *scales],
            [
                [name or "the only one", *(f"{row[scale]:.0%}" for scale in ("", *scales))]
                for name, row in usage.items()
            ],
        )
    report.add_table(
        "Ways to sample",
        ["variant", "class accuracy", "Fréchet (Lite0)", "nearest training picture"],
        [
            [name, f"{r['class_accuracy']:.1%}", f"{r[frechet]:.3f}", f"{r['neighbour_similarity']:.3f}"]
            for name, r in variants.items()
        ],
    )
    for stage, config in configs.items():
        _add_curves(report, stage, config)
    report.add_table("Time", ["stage", "seconds"], [[name, f"{value:.0f}"] for name, value in seconds.items()])
    for warning in sorted({r["warning"] for r in variants.values() if r["warning"]}):
        report.add_text(
            "How to read these numbers",
            warning + " Fréchet distances and accuracies here come from "
            "EfficientNet-Lite0 at toy sample sizes; they compare runs of this quickstart with one another.",
        )
    for stage, config in configs.items():
        report.add_config(f"# {stage}\n{to_yaml(config)}")
    report.add_environment(environment())
    report.write(folder / "report.html")
    return folder / "report.html"


def _usage(rebuilt: dict[str, float]) -> dict[str, dict[str, float]]:
    """Branch -> scale -> share of its codes that are used; scale "" is all scales together."""
    found: dict[str, dict[str, float]] = {}
    for name, value in rebuilt.items():
        if match := re.fullmatch(r"codebook_usage_?(.*?)_?(scale\d+)?", name):
            found.setdefault(match[1], {})[match[2] or ""] = value
    return found


def _add_curves(report: Report, stage: str, config: RunConfig) -> None:
    """The logged losses of one stage, smoothed to about a hundred points."""
    records = [r for r in read_metrics(config.run_dir / "metrics.jsonl") if "lr" in r]
    bundle = max(1, len(records) // 100)

    def series(name: str) -> list[tuple[float, float]]:
        points = [(r["images_seen"], r[name]) for r in records if r.get(name) is not None]
        groups = [points[i : i + bundle] for i in range(0, len(points), bundle)]
        return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]

    for title, names in (
        ("loss", ("flow", "total")),
        ("terms", ("reconstruction", "perceptual", "semantic")),
        ("PSNR of the training batch", ("psnr",)),
        ("discriminator logits", ("logits_real", "logits_fake")),
    ):
        curves = {name: points for name in names if (points := series(name))}
        if curves:
            report.add_curves(f"{stage}: {title}", curves, log=title == "terms", xlabel="images")
