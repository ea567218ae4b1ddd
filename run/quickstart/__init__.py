"""The quickstart, in two acts: what the shipped models make, then a generator trained here beside the shipped one.

configs/quickstart/<SYSTEM>/quickstart.yaml says what is shown and, for --from-scratch, which stages are trained instead.
Every stage is an ordinary training run, so the same command continues where it stopped.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from core import dist
from core import images as image_tools
from core.errors import UserError, nearest
from core.files import ROOT, read_json, write_json
from core.schema import RunConfig
from core.weights import released
from evaluation.report import Report, write_metrics
from run.load import Pair, load_config, read_generator, read_tokenizer
from run.quickstart import page as pages
from run.quickstart.shown import SHOWN_PER_CLASS, Shown, Standard, real_features
from run.train import train

__all__ = ["SHOWN_PER_CLASS", "overrides_for", "read_plan", "real_features", "report", "run"]

FOLDER = ROOT / "configs" / "quickstart"
TINY = FOLDER.with_name("tiny")
LAST_STAGE = "samples, metrics, report"
SHIPPED, TRAINED = "shipped", "trained here"


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


def run(system: str, smoke: bool = False, from_scratch: bool = False) -> int:
    """Both acts of a system, or all stages of it; returns an exit code.

    Args:
        smoke: show in a minute that everything runs, from nothing.
        from_scratch: train every stage; also what is done for a system of which no models are shipped.
    """
    plan, gpu = read_plan(system), torch.cuda.is_available()
    if not from_scratch and not (SHIPPED in plan and is_shipped(system)):
        print(
            f"No tiny models of {system} are here (pretrained_models/tiny/{system}): training every stage.", flush=True
        )
        from_scratch = True
    modes = ["gpu"] if gpu else ["cpu", "cpu_bf16"] if dist.cpu_multiplies_bf16() else ["cpu"]
    folder = Path("work_dirs") / f"{'from_scratch' if from_scratch else 'quickstart'}_{system}"
    if smoke:  # on a GPU too: it is the same small thing everywhere
        modes, folder = ["smoke"], folder.with_name(f"{folder.name}_smoke")
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"Quickstart of {system} on {'a GPU' if gpu else f'{torch.get_num_threads()} CPU threads'}, "
        f"into {folder}. Ctrl-C any time; the same command continues.",
        flush=True,
    )
    act = Act(system, plan, modes, folder, smoke)
    return act.from_scratch() if from_scratch else act.with_shipped()


def is_shipped(system: str) -> bool:
    """Whether pretrained_models/tiny/ has a tokenizer and a generator of this system."""
    files = (released.find_local_file(f"tiny/{system}/{kind}.safetensors") for kind in ("tokenizer", "generator"))
    return all(files)


class Act:
    """One quickstart: what is trained, shown and written, into one folder."""

    def __init__(self, system: str, plan: dict[str, Any], modes: list[str], folder: Path, smoke: bool):
        self.system, self.plan, self.modes, self.folder, self.smoke = system, plan, modes, folder, smoke
        self.started = time.perf_counter()
        self.clock = folder / "seconds.json"  # spent on each stage, interrupted attempts included
        self.seconds: dict[str, float] = read_json(self.clock, {})

    def from_scratch(self) -> int:
        """Train every stage, then show what came of it."""
        stages, configs = [*self.plan["stages"], LAST_STAGE], {}
        for number, stage in enumerate(stages, 1):
            print(f"\n== stage {number} of {len(stages)}: {stage} ==", flush=True)
            if stage == LAST_STAGE:
                break
            recipe = FOLDER / self.system / f"{stage}.yaml"
            configs[stage] = load_config(str(recipe), self._overrides(self.plan, stage))
            if code := self._train(stage, configs[stage], recipe):
                return code
        begun = time.perf_counter()
        tokenizer = read_tokenizer({"weights": str(self.folder / self.plan["tokenizer"])})
        generator = read_generator(str(self.folder / self.plan["generator"]), tokenizer)
        guide = read_generator(str(self.folder / self.plan["guide"]), tokenizer) if "guide" in self.plan else None
        config, settings = configs[self.plan["generator"]], self._settings(self.plan)
        standard = Standard(config, tokenizer.module.image_size)
        shown = Shown("", Pair(tokenizer, generator, guide), config, standard, settings["samples_per_class"])
        shown.sample_all(headline_first(settings))
        self.seconds[LAST_STAGE] = time.perf_counter() - begun
        self._finish(report(self.plan["title"], [shown], configs, self.folder, self.seconds))
        return 0

    def with_shipped(self) -> int:
        """Show the shipped models; train a generator on the codes of the shipped tokenizer and show it beside."""
        plan, recipe, reference = self.plan[SHIPPED], TINY / self.system / "generator.yaml", f"tiny/{self.system}"
        config, settings = load_config(str(recipe), self._overrides(plan, "generator")), self._settings(plan)
        print(f"\n== act 1 of 2: the models in pretrained_models/{reference} ==", flush=True)
        tokenizer = read_tokenizer({"weights": reference})
        pair = Pair(tokenizer, read_generator(reference, tokenizer))
        standard = Standard(config, tokenizer.module.image_size)
        shipped = Shown(SHIPPED, pair, config, standard, settings["samples_per_class"])
        first = self._first_look(shipped, settings)
        print(f"\nAfter {time.perf_counter() - self.started:.0f} s: open {first.resolve()}\n", flush=True)
        shipped.sample_all(headline_first(settings))
        report(plan["title"], [shipped], {}, self.folder, {})
        print(f"\n== act 2 of 2: the same generator, trained here ({plan['takes']}) ==", flush=True)
        if code := self._train("generator", config, recipe):
            return code
        pair = Pair(tokenizer, read_generator(str(self.folder / config.name), tokenizer))
        trained = Shown(TRAINED, pair, config, standard, settings["samples_per_class"])
        trained.sample_all(headline_first(settings))
        self._finish(report(plan["title"], [shipped, trained], {"generator": config}, self.folder, self.seconds))
        return 0

    def _overrides(self, plan: dict[str, Any], stage: str) -> list[str]:
        return overrides_for(plan, stage, self.modes, str(self.folder))

    def _settings(self, plan: dict[str, Any]) -> dict[str, Any]:
        """How samples are drawn and what is shown of them."""
        return {**plan["report"], **(plan["smoke"].get("report", {}) if self.smoke else {})}

    def _train(self, stage: str, config: RunConfig, recipe: Path) -> int:
        begun = time.perf_counter()
        try:
            return train(config, str(recipe))
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun
            if self.folder.is_dir():
                write_json(self.clock, self.seconds)

    def _first_look(self, shown: Shown, settings: dict[str, Any]) -> Path:
        """A page with pictures alone, in seconds."""
        page = Report(self.plan[SHIPPED]["title"], subtitle(shown.standard, {}))
        page.add_image("Reconstructions", shown.reconstructions, pages.RECONSTRUCTIONS)
        variant = headline_first(settings)[0]
        page.add_image(f"Samples, {variant['label']}", shown.look(**variant), "A row for each class.")
        page.add_text("More", "The numbers are being measured; this page is written again when they are there.")
        self.folder.mkdir(parents=True, exist_ok=True)
        page.write(self.folder / "report.html")
        return self.folder / "report.html"

    def _finish(self, page: Path) -> None:
        print(f"\nDone in {time.perf_counter() - self.started:.0f} s. Open {page.resolve()}", flush=True)


def headline_first(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The ways to sample, each a label and changes to the generator's `sample` section."""
    return sorted(settings["variants"], key=lambda variant: variant["label"] != settings["headline"])


def report(
    title: str, models: list[Shown], configs: dict[str, RunConfig], folder: Path, seconds: dict[str, float]
) -> Path:
    """Write report.html, metrics.json and PNGs into `folder`; returns the path of the page.

    Args:
        title: of the page.
        models: with their variants drawn; they share a tokenizer. The first one is shown in full.
        configs: of the stages that were trained here, by name.
        seconds: that each of them took.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first, standard = models[0], models[0].standard
    variants = [variant for shown in models for variant in shown.variants]
    rebuilt, headline = first.rebuilt, first.variants[0]
    shown = {"reconstructions": first.reconstructions}
    if (stages := first.stages(headline.task)) is not None:
        shown["stages"] = stages
    grids = {variant.name: model.grid(variant) for model in models for variant in model.variants}
    pictures = {**shown, **{f"samples_{name.replace(',', '').replace(' ', '_')}": grid for name, grid in grids.items()}}
    for name, picture in pictures.items():
        image_tools.save_png(picture, folder / f"{name}.png")
    metrics = {
        **rebuilt,
        **{f"{key} ({variant.name})": value for variant in variants for key, value in variant.metrics.items()},
        **{f"seconds ({stage})": value for stage, value in seconds.items()},
    }
    context = {
        "count": len(headline.pictures),
        "net": standard.net.name,
        "reference_fingerprint": standard.pictures(standard.source).fingerprint(),
        "seed": first.config.seed,
    }
    write_metrics(folder / "metrics.json", metrics, context)
    for variant in variants:
        print(
            f"  {variant.name:<26} class accuracy {variant.metrics['class_accuracy']:.1%} (real pictures "
            f"{variant.metrics['real_class_accuracy']:.1%}, chance {1 / standard.source.num_classes:.1%})",
            flush=True,
        )
    print(f"  reconstruction of unseen pictures: PSNR {rebuilt['psnr']:.2f} dB", flush=True)
    page = Report(title, subtitle(standard, seconds))
    pages.add_tiles(page, standard, rebuilt, headline)
    if len(models) > 1:
        pairs = [grids[model.variants[0].name] for model in models]
        caption = " | ".join(model.variants[0].name for model in models)
        page.add_image("Side by side", pages.beside(pairs), caption, enlarged=max(1, 64 // standard.size))
    for model in models:
        pages.add_samples(page, model, model.variants[0])
    pages.add_pictures(page, shown, headline)
    pages.add_tables(page, standard, rebuilt, variants, seconds)
    pages.add_training(page, configs)
    pages.add_context(page, variants, configs)
    page.write(folder / "report.html")
    return folder / "report.html"


def subtitle(standard: Standard, seconds: dict[str, float]) -> str:
    """What one should know before looking."""
    trained = f", trained in {sum(seconds.values()) / 60:.1f} minutes here" if seconds else ""
    same = standard.source.fingerprint() == standard.val.fingerprint()  # as in --smoke
    says_nothing = " It is measured on the pictures it was trained on, to be quick: no number here means anything."
    return (
        f"{len(standard.source):,} training pictures of {standard.source.num_classes} classes at {standard.size} px"
        f"{trained}. A toy: nothing here says how the method does at scale.{says_nothing if same else ''}"
    )
