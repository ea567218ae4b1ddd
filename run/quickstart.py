"""The quickstart: train a toy tokenizer and a toy generator, then sample, measure, and put it all on one page.

configs/quickstart/<SYSTEM>/quickstart.yaml lists the stages. Every stage is an ordinary training run, so the same
command continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save as to_bytes
from torch import Tensor

from core import dist
from core import images as image_tools
from core.config import to_yaml
from core.devices import pictures_at_once
from core.errors import UserError, nearest
from core.files import read_json, write_atomic, write_json
from core.rng import Draws, hash64
from core.schema import EvalConfig, RunConfig
from core.specs import DataSource, Generator, Previews, Tokenizer
from core.train.checkpoint import read_tensors
from core.train.log import ProgressLine
from evaluation import measure, networks, toy
from evaluation.chunks import Work
from evaluation.measure import Evaluation
from evaluation.networks import FeatureNet
from evaluation.pictures import SourcePictures
from evaluation.protocols import make_labels
from evaluation.report import Report, environment, write_metrics
from generator.sampling import draw_latents
from generator.task import GeneratorTask
from run import streaming
from run.data import open_train, open_val
from run.load import Loaded, Pair, load_config, read_generator, read_tokenizer
from run.page import SPEED, read_run
from run.train import train

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
SHOWN_PER_CLASS = 8
SHOWN_STAGES = 8  # pictures whose stages are shown, as many unseen ones as samples
LAST_STAGE = "samples, metrics, report"


def read_plan(system: str) -> dict[str, Any]:
    """quickstart.yaml of a system; UserError for one that has none."""
    systems = sorted(p.parent.name for p in FOLDER.glob("*/quickstart.yaml"))
    if system not in systems:
        raise UserError(f'there is no quickstart for "{system}".{nearest(system, systems)}')
    return yaml.safe_load((FOLDER / system / "quickstart.yaml").read_text())


def overrides_for(plan: dict[str, Any], stage: str, modes: list[str], work_dir: str) -> list[str]:
    """Overrides of one stage; sections of the plan named by `modes` ("cpu", "cpu_bf16", "gpu", "smoke") add up."""
    overrides = [f"work_dir={work_dir}"]
    for mode in modes:
        settings = plan.get(mode) or {}
        overrides += [*(settings.get("all") or []), *(settings.get(stage) or [])]
    return overrides


def run(system: str, smoke: bool) -> int:
    """All stages of a system; returns an exit code. `smoke` shows in a minute that everything runs, from nothing."""
    plan, started = read_plan(system), time.perf_counter()
    gpu = torch.cuda.is_available()
    modes = ["gpu"] if gpu else ["cpu", "cpu_bf16"] if dist.cpu_multiplies_bf16() else ["cpu"]
    folder = Path("work_dirs") / f"quickstart_{system}"
    if smoke:  # on a GPU too: it is the same small thing everywhere
        modes, folder = ["smoke"], folder.with_name(f"{folder.name}_smoke")
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"Quickstart of {system} on {'a GPU' if gpu else f'{torch.get_num_threads()} CPU threads'}, "
        f"into {folder}. Ctrl-C any time; the same command continues.",
        flush=True,
    )
    clock = folder / "seconds.json"  # spent on each stage, interrupted attempts included
    seconds = read_json(clock) if clock.is_file() else {}
    stages, configs = [*plan["stages"], LAST_STAGE], {}
    for number, stage in enumerate(stages, 1):
        print(f"\n== stage {number} of {len(stages)}: {stage} ==", flush=True)
        if stage == LAST_STAGE:
            break
        begun = time.perf_counter()
        recipe = str(FOLDER / system / f"{stage}.yaml")
        config = load_config(recipe, overrides_for(plan, stage, modes, str(folder)))
        try:
            code = train(config, recipe)
        finally:
            seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begun
            if folder.is_dir():
                write_json(clock, seconds)
        if code:
            return code
        configs[stage] = config
    page = report(plan, configs, smoke, folder, seconds)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Open {page}", flush=True)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The last stage
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Variant:
    """Samples drawn in one way."""

    task: GeneratorTask
    pictures: Tensor  # (N, 3, H, W) uint8, on the CPU
    samples: toy.Labelled
    metrics: dict[str, Any]


class Finished:
    """The trained toys with all that they are measured against; networks are on the device."""

    def __init__(self, plan: dict[str, Any], configs: dict[str, RunConfig], smoke: bool, folder: Path):
        self.plan, self.configs, self.folder = plan, configs, folder
        self.settings = {**plan["report"], **(plan["smoke"].get("report", {}) if smoke else {})}
        self.config = configs[plan["generator"]]
        self.device = dist.pick_device("auto")
        val = open_val(self.config)
        assert val is not None  # the pictures of all quickstarts come with such ones
        self.source, self.val = open_train(self.config), val
        tokenizer = read_tokenizer({"weights": str(folder / plan["tokenizer"])})
        self.tokenizer = tokenizer.module.to(self.device)
        self.pair = Pair(tokenizer, self._generator("generator", tokenizer))
        self.size = self.tokenizer.image_size
        self.net = networks.feature_net(self.device)
        self.train = real_features(self.pictures(self.source), self.net, self.config)
        self.unseen = real_features(self.pictures(self.val), self.net, self.config)
        self.classifier = toy.fit(self.train.features[toy.CLASS_TAP], self.train.labels, self.source.num_classes)

    def _generator(self, role: str, tokenizer: Loaded[Tokenizer]) -> Loaded[Generator]:
        generator = read_generator(str(self.folder / self.plan[role]), tokenizer)
        generator.module.to(self.device)
        return generator

    def pictures(self, source: DataSource) -> SourcePictures:
        return SourcePictures(source, self.size, self.config.data.workers)

    def task(self, changes: dict[str, Any]) -> GeneratorTask:
        """One way to sample: the config's, with some settings changed."""
        sampling = dataclasses.replace(self.config.sample, **changes)
        guide = self._generator("guide", self.pair.tokenizer) if sampling.guidance == "auto" else None
        return dataclasses.replace(self.pair, guide=guide).task(self.source.num_classes, sampling)

    def sample(self, label: str, **changes: Any) -> Variant:
        """Draw and measure the pictures of one way to sample, called `label`."""
        task, batch = self.task(changes), pictures_at_once(self.config.eval.batch, self.device)
        labels = make_labels("balanced", self.settings["samples_per_class"] * task.num_classes, task.num_classes)
        line, kept = ProgressLine(len(labels), label=f"samples, {label}"), Kept([])
        produce = measure.producer(
            lambda part, draws: task.sample(task.generator, part, draws), labels, self.config.seed, batch, self.device
        )
        how = Evaluation(toy.FRECHET, self.net, measure.alone(self.device), batch, real=self.train.features)
        result = how.of_samples(produce, Work(len(labels), how.world, chunk=batch), (kept,), line.update)
        line.close()
        assert result is not None  # on one rank
        samples = toy.Labelled(result.features, labels)
        metrics = toy.compare(samples, self.train, self.unseen, self.net, self.classifier, self.source.class_names)
        return Variant(task, torch.cat(kept.pictures), samples, metrics)

    def by_class(self, labels: Tensor) -> list[Tensor]:
        """Indices of the samples that are shown of each class: its first ones."""
        return [(labels == c).nonzero().flatten()[:SHOWN_PER_CLASS] for c in range(self.source.num_classes)]

    @torch.no_grad()
    def stages(self, task: GeneratorTask) -> Tensor:
        """What each part of the codes adds, (3, H, W) uint8: a row per picture, first unseen ones, last in their row the
        pictures themselves, then samples."""
        assert isinstance(self.tokenizer, Previews)
        count = min(SHOWN_STAGES, len(self.val))
        pictures = self.pictures(self.val)
        places = [i * len(pictures) // count for i in range(count)]
        originals = torch.cat([pictures.read(place, place + 1) for place in places])
        draws = Draws(hash64(self.config.seed, "stages"), torch.arange(count, device=self.device))
        labels = torch.arange(count, device=self.device) % task.num_classes
        sampled = draw_latents(task.generator, labels, draws, task.guidance, **task.sample_options)
        encoded = self.tokenizer.encode(image_tools.to_model_range(originals.to(self.device)))
        strips = [
            streaming.filmstrip(self.tokenizer.previews(latents, draws), last)
            for latents, last in ((encoded, originals), (sampled, torch.full_like(originals, 255)))
        ]
        return torch.cat(strips, dim=1)


def real_features(pictures: SourcePictures, net: FeatureNet, config: RunConfig) -> toy.Labelled:
    """Features of real pictures, computed once and kept in the cache folder of `config`."""
    path = Path(config.data.cache_dir) / f"real_{net.name}_{pictures.fingerprint()}.safetensors"
    if not path.is_file():
        device = next(net.parameters()).device
        features = measure.picture_features(
            pictures, net, measure.alone(device), pictures_at_once(config.eval.batch, device)
        )
        assert features is not None  # on one rank
        labels = torch.tensor(measure.source_labels(pictures.source))
        write_atomic(path, to_bytes({**features, "labels": labels}))
    features = read_tensors(path)
    return toy.Labelled(features, features.pop("labels"))


@dataclass
class Kept:
    """A writer that keeps pictures in memory."""

    pictures: list[Tensor]

    def write(self, start: int, images: Tensor) -> None:
        self.pictures.append(images.cpu())

    def flush(self) -> None:
        """Nothing waits."""


def report(
    plan: dict[str, Any], configs: dict[str, RunConfig], smoke: bool, folder: Path, seconds: dict[str, float]
) -> Path:
    """Write report.html, metrics.json and PNGs into `folder`; returns the path of the page.

    Args:
        configs: of the trained stages, by name.
        seconds: that each of them took.
    """
    begun = time.perf_counter()
    toys = Finished(plan, configs, smoke, folder)
    rebuilt = measure.reconstruction(toys.tokenizer, toys.val, toys.size, EvalConfig(), toys.device, toys.net)
    shown = {"reconstructions": measure.reconstruction_grid(toys.tokenizer, toys.pictures(toys.val), toys.device)}
    variants = {settings["label"]: toys.sample(**settings) for settings in toys.settings["variants"]}
    if isinstance(toys.tokenizer, Previews):
        shown["stages"] = toys.stages(variants[toys.settings["headline"]].task)
    for name, variant in variants.items():
        chosen = torch.cat(toys.by_class(variant.samples.labels))
        grid = image_tools.grid(variant.pictures[chosen], columns=SHOWN_PER_CLASS)
        shown[f"samples_{name.replace(' ', '_')}"] = grid
    for name, picture in shown.items():
        image_tools.save_png(picture, folder / f"{name}.png")

    seconds = {**seconds, LAST_STAGE: time.perf_counter() - begun}
    metrics = {
        **rebuilt,
        **{f"{key} ({name})": value for name, variant in variants.items() for key, value in variant.metrics.items()},
        **{f"seconds ({stage})": value for stage, value in seconds.items()},
    }
    context = {
        "count": len(variants[toys.settings["headline"]].pictures),
        "net": toys.net.name,
        "reference_fingerprint": toys.pictures(toys.source).fingerprint(),
        "seed": toys.config.seed,
    }
    write_metrics(folder / "metrics.json", metrics, context)
    for name, variant in variants.items():
        print(
            f"  {name:<14} class accuracy {variant.metrics['class_accuracy']:.1%} (real pictures "
            f"{variant.metrics['real_class_accuracy']:.1%}, chance {1 / toys.source.num_classes:.1%})",
            flush=True,
        )
    print(f"  reconstruction of unseen pictures: PSNR {rebuilt['psnr']:.2f} dB", flush=True)
    page = Report(
        plan["title"],
        f"{len(toys.source):,} training pictures of {toys.source.num_classes} classes at {toys.size} px, trained "
        f"in {sum(seconds.values()) / 60:.1f} minutes. A toy: nothing here says how the method does at scale.",
    )
    add_tiles(page, toys, rebuilt, variants)
    add_pictures(page, toys, shown, variants)
    add_tables(page, toys, rebuilt, variants, seconds)
    page.write(folder / "report.html")
    return folder / "report.html"


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------
def add_tiles(page: Report, toys: Finished, rebuilt: dict[str, float], variants: dict[str, Variant]) -> None:
    """The numbers on top, of the variant that the plan puts first."""
    headline = toys.settings["headline"]
    best, frechet = variants[headline].metrics, toys.net.distance_name("block4")
    page.add_tile(
        "class accuracy",
        f"{best['class_accuracy']:.0%}",
        f"samples ({headline}) recognised as the class asked for; chance is {1 / toys.source.num_classes:.0%}, "
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
        f"mean cosine similarity; unseen real pictures: {best['real_neighbour_similarity']:.2f}",
    )


def add_pictures(page: Report, toys: Finished, shown: dict[str, Tensor], variants: dict[str, Variant]) -> None:
    """Samples by class above their nearest training pictures, reconstructions, stages."""
    headline = toys.settings["headline"]
    best = variants[headline]
    features = best.samples.features[toy.CLASS_TAP]
    indices, similarity = toy.nearest_neighbours(features, toys.train.features[toy.CLASS_TAP])
    predicted, training = toys.classifier.predict(features), toys.pictures(toys.source)

    def pair(i: int) -> tuple[Tensor, Tensor, float, bool]:
        nearest_picture = training.read(int(indices[i]), int(indices[i]) + 1)[0]
        return best.pictures[i], nearest_picture, float(similarity[i]), bool(predicted[i] == best.samples.labels[i])

    chosen = toys.by_class(best.samples.labels)
    rows = [(name, [pair(i) for i in indices.tolist()]) for name, indices in zip(toys.source.class_names, chosen)]
    page.add_grid_with_neighbours(f"Samples, {headline}", rows)
    page.add_image(
        "Reconstructions",
        shown["reconstructions"],
        "Pictures that were not trained on; below each row its reconstruction.",
    )
    if "stages" in shown:
        page.add_image(
            "After each stage",
            shown["stages"],
            "A row per picture: what it looks like after each part of its codes. "
            f"First pictures that were not trained on, themselves at the end; then samples ({headline}).",
        )


def add_tables(
    page: Report, toys: Finished, rebuilt: dict[str, float], variants: dict[str, Variant], seconds: dict[str, float]
) -> None:
    """Codebooks, ways to sample, curves, time, and what the numbers depend on."""
    frechet = toys.net.distance_name("block4")
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
    measured = {name: variant.metrics for name, variant in variants.items()}
    page.add_table(
        "Ways to sample",
        ["variant", "class accuracy", "Fréchet (Lite0)", "nearest training picture"],
        [
            [name, f"{m['class_accuracy']:.1%}", f"{m[frechet]:.3f}", f"{m['neighbour_similarity']:.3f}"]
            for name, m in measured.items()
        ],
    )
    for stage, config in toys.configs.items():
        stage_run = read_run(config.run_dir)
        for chart in stage_run.charts:
            if chart not in SPEED and (lines := stage_run.curves(chart)):
                page.add_curves(f"{stage}: {chart.title}", lines, log=None, xlabel="images")
    page.add_table("Time", ["stage", "seconds"], [[name, f"{value:.0f}"] for name, value in seconds.items()])
    for warning in sorted({m["warning"] for m in measured.values() if m["warning"]}):
        page.add_text(
            "How to read these numbers",
            warning + " Fréchet distances and accuracies here come from "
            "EfficientNet-Lite0 at toy sample sizes; they compare runs of this quickstart with one another.",
        )
    for stage, config in toys.configs.items():
        page.add_config(f"# {stage}\n{to_yaml(config)}")
    page.add_environment(environment())


def codebook_use(rebuilt: dict[str, float]) -> dict[str, dict[str, float]]:
    """Branch -> scale -> share of its codes that are used; scale "" is all scales together."""
    usage: dict[str, dict[str, float]] = {}
    for name, value in rebuilt.items():
        if match := re.fullmatch(r"codebook_usage_?(.*?)_?(scale\d+)?", name):
            usage.setdefault(match[1], {})[match[2] or ""] = value
    return usage
