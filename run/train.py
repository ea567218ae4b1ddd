"""The training program: a config's task, data and caches are put together and handed to core.train.trainer.Trainer."""

from __future__ import annotations

import shlex
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from core import dist
from core.devices import peak_flops
from core.errors import UserError
from core.schema import RunConfig
from core.specs import DataSource
from core.train.run import RunFolder, shared_settings
from core.train.trainer import PREVIEW_IMAGES, Trainer
from core.weights import hub
from core.weights.encoding import encoding_fingerprint
from data.base import ListedSource, spread
from data.checks import say_left_out
from data.loader import Loader, read_or_replace, split
from data.tokens import TokenStore
from data.transforms import Transform
from evaluation import measure, protocols
from evaluation.report import environment
from generator.task import GeneratorTask
from run import adapt, page
from run.check import Inputs, check_inputs, data_notes, schedule_notes
from run.data import IMAGENET_VAL, make_transform, open_moments, open_pictures, open_val, precomputed
from run.estimate import of_one_picture
from run.latent_stats import measure_once
from run.load import REGISTRIES, Loaded, build_pair, build_tokenizer_task
from run.sharing import about_run, readable
from run.weights import Source, commits_of
from tokenizer.task import TokenizerTask

SAME_RUN = "Start all machines with the same command, on the same files; only where these lie may differ."
SMALL_SET = 50_000  # pictures; the published recipes are made for 1.28 million


def train(config: RunConfig, recipe: str | None = None) -> int:
    """Run a training to its end, or until it is asked to stop. Returns the exit code.

    Args:
        recipe: file that `config` was made from, with which the run's page compares it.
    """
    about = page.changes(config, recipe)
    inputs = check_inputs(config)
    with dist.start(config.train.device, config.train.rank_timeout) as world:
        return _train(config, inputs, world, about)


def _train(config: RunConfig, inputs: Inputs, world: dist.World, about: dict[str, Any]) -> int:
    started = time.perf_counter()
    source, val, sources = inputs.data, inputs.val, inputs.weights
    world.require_same(shared_settings(config) | {"the pictures": source.fingerprint()}, SAME_RUN)
    for weights in sources.values():
        weights.follow(world)
    pictures = open_pictures(config) if isinstance(source, TokenStore) else source
    provenance: dict[str, Any] = {}
    if config.task == "tokenizer":
        task = _tokenizer_task(config, val or source)
    else:
        task, provenance = _generator_task(config, sources, source, world)
        world.require_same({"the tokenizer": provenance["tokenizer_fingerprint"]}, SAME_RUN)
    if isinstance(source, ListedSource):
        provenance["data_contents"] = world.on_main(source.contents)
    if (sizes := world.on_main(source.file_sizes)) is not None:
        provenance["data_sizes"] = sizes
    if commits := commits_of(sources):
        provenance["commits"] = commits
    initial_ema, begun = _start(config, task, sources)
    for weights in sources.values():
        weights.close()
    loader = _loader(config, source, task, provenance, world)
    evaluate = None
    if config.train.eval_every != "never":
        shown = pictures or val
        assert shown is not None  # run.data.needed_val asks for the latter where a run has tokens alone
        evaluate = measure.Online(config, shown, val, task.tokenizer.image_size, world)
    run = RunFolder(config, world.is_main)
    writer = page.PageWriter(run.path, run.log)
    flops = _flops(config, source.num_classes, sources, run, world)
    trainer = Trainer(
        task,
        config,
        batches=loader.batches,
        split=split,
        images_per_epoch=len(source),
        data_fingerprint=source.fingerprint(),
        run=run,
        world=world,
        evaluate=evaluate,
        rising=lambda name: protocols.meaning_of(name).better == "higher",
        initial_ema=initial_ema,
        provenance=provenance,
        sinks=[writer],
        flops=flops,
    )
    world.on_main(lambda: run.open(environment()))
    tell = loader.tell = run.log if world.is_main else (lambda note: print(f"rank {world.rank}: {note}", flush=True))
    summary = (
        f"{config.task}: {sum(p.numel() for p in trainer.networks[task.primary].parameters()):,} parameters, "
        f"{len(source):,} pictures, {trainer.total_steps:,} steps of {config.train.global_batch} on {world.size} x "
        f"{world.device.type}, in {trainer.accumulation} part(s) each"
    )
    run.log(f"{summary}; ready after {time.perf_counter() - started:.1f} s")
    names = source.class_names if len(source.class_names) == source.num_classes else []
    about |= {"summary": summary, "total_images": trainer.total_images, "flops": flops, "class_names": names}
    run.describe({**about, **page.facts(task)})
    if begun:
        parts = sorted({".".join(name.split(".")[:2]) for name in begun})
        run.log(f"train.init_from holds no {', '.join(parts)}, which only training needs: new at the start")
    for note in data_notes(config, source) if world.is_main else ():
        run.log(f"data {note}")
    if val is not source:
        say_left_out(run.log, val, f"data.val_url={config.data.val_url}")
    for note in schedule_notes(config, len(source)):
        run.log(f"warning: {note}")
    if hint := hint_for_small_sets(config, len(source)):
        run.log(hint)
    if world.is_main:
        writer.begin()
    try:
        code = trainer.fit()
    finally:
        run.close()
    if count := len(loader.replaced):
        run.log(f"unreadable pictures, for which the next one was taken: {count} ({loader.replaced.names()})")
    if unread := loader.left_out():
        tell(f"not read: {'; '.join(unread)}")
    if not code:
        run.log(f"look at {run.path / page.PAGE}; next: {next_command(config, source.num_classes)}")
    return code


def next_command(config: RunConfig, num_classes: int) -> str:
    """What to do with a finished run, as it can be pasted."""
    run = shlex.quote(str(config.run_dir))
    if config.task == "generator":
        pictures = shlex.quote(str(config.run_dir / "pictures"))
        return f"bash run_sample.sh {run} --labels 0-{min(num_classes, 8) - 1} --out {pictures}"
    pictures = config.data.val_url or config.data.url
    return f"bash run_eval_tokenizer.sh {run}" + ("" if pictures == IMAGENET_VAL else f" {shlex.quote(pictures)}")


def _flops(
    config: RunConfig, num_classes: int, sources: dict[str, Source], run: RunFolder, world: dist.World
) -> float | None:
    """Of one picture, forward and backward through all networks; None where no peak is known to compare them with.

    It takes seconds, and once: a resumed run finds it in its folder.
    """
    if not world.is_main or peak_flops(world.device, config.train.precision) is None:
        return None
    if known := about_run(run.path).get("flops"):
        return known
    try:
        with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
            return of_one_picture(config, sources, num_classes).step.flops
    except Exception as error:  # of networks that cannot be laid out without weights; the run does without
        world.say(f"no MFU is logged: a step could not be counted ({type(error).__name__}: {error})")
        return None
    finally:
        for weights in sources.values():
            weights.close()


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------
def _tokenizer_task(config: RunConfig, source: DataSource) -> TokenizerTask:
    """With the pictures that previews show: of the validation set where it is on this machine, else of `source`."""
    task = build_tokenizer_task(config)
    try:
        shown = open_val(config) or source
    except UserError:
        shown = source
    centre, places = Transform(image_size=task.tokenizer.image_size), spread(len(shown), PREVIEW_IMAGES)
    pictures = [read_or_replace(shown, i, config.data.on_corrupt)[0].image for i in places]
    task.preview_images = torch.stack([centre.apply_view(picture, 0) for picture in pictures])
    return task


def _generator_task(
    config: RunConfig, sources: dict[str, Source], source: DataSource, world: dist.World
) -> tuple[GeneratorTask, dict[str, Any]]:
    """(task, what is noted of the tokenizer in checkpoints)"""
    assert config.generator is not None
    pair = build_pair(config, sources=sources, num_classes=source.num_classes)
    config.generator |= pair.generator.settings  # so that the run folder says it all
    tokenizer, encoding = pair.tokenizer, encoding_fingerprint(pair.tokenizer.module)
    if isinstance(source, TokenStore):
        source.check_tokenizer(tokenizer.module.spec, tokenizer.fingerprint, tokenizer.image_size, encoding)
    if pair.lacks_statistics:
        pictures = source if config.data.stats_split == "train" else open_val(config)
        assert pictures is not None  # see run.data.needed_val
        measure_once(config, tokenizer, pictures, world)
    task = pair.task(source.num_classes, config.sample)
    task.class_names = readable(source.class_names)
    return task, {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "tokenizer_encoding": encoding,
        "tokenizer": config.tokenizer,
    }


def _start(
    config: RunConfig, task: TokenizerTask | GeneratorTask, sources: dict[str, Source]
) -> tuple[dict[str, Tensor] | None, list[str]]:
    """Load train.init_from, if given, and choose what is trained: raw weights go into the network, averaged ones where it
    is frozen by the config, since those are what made the codes of others; returns the averaged ones for the EMA, and
    the parameters that the file has not (those that only training needs may be missing)."""
    frozen = adapt.choose_trained(config, task)
    if "train.init_from" not in sources:
        return None, []
    network = task.networks()[task.primary]
    raw, averaged = adapt.states(config, task, sources["train.init_from"])
    begun = [name for name, p in network.named_parameters() if raw[name].data_ptr() == p.data_ptr()]
    network.load_state_dict(raw | {name: averaged[name] for name in frozen})
    return averaged, begun


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def _loader(
    config: RunConfig,
    source: DataSource,
    task: TokenizerTask | GeneratorTask,
    provenance: dict[str, Any],
    world: dist.World,
) -> Loader:
    """Pictures, with teachers' features that are kept of them, or in their place what is stored: latents and codes.

    Args:
        provenance: what is noted of a generator's tokenizer.
    """
    data, tokenizer, features, stored = config.data, task.tokenizer, None, None
    transform = make_transform(config, tokenizer.image_size)
    if isinstance(source, TokenStore):
        stored, transform = source, source.transform
    if isinstance(task, TokenizerTask) and data.cache_features and task.teachers:
        teachers = nn.ModuleDict(task.teachers)
        network = Loaded(teachers, {}, hub.fingerprint(teachers.state_dict()))

        def look(images: Tensor) -> dict[str, Tensor]:
            return {name: teacher(images) for name, teacher in teachers.items()}

        features = precomputed(config, "features", source, transform, network, look, world)
    elif config.task == "generator" and data.moments:
        stored = open_moments(config, source, tokenizer)
    elif config.task == "generator" and data.cache_latents and stored is None:
        network, encoding = Loaded(tokenizer, {}, provenance["tokenizer_fingerprint"]), provenance["tokenizer_encoding"]
        stored = precomputed(config, "latents", source, transform, network, tokenizer.precompute, world, encoding)
    return Loader(
        None if source is stored else source,
        transform,
        config.seed,
        config.train.global_batch,
        rank=world.rank,
        world=world.size,
        workers=data.workers,
        on_corrupt=data.on_corrupt,
        max_corrupt=data.max_corrupt,
        pin=world.device.type == "cuda",
        features=features,
        stored=stored,
    )


def hint_for_small_sets(config: RunConfig, count: int) -> str | None:
    """What to change in a recipe for a training set of `count` pictures; None where there is nothing to tell."""
    if count >= SMALL_SET or config.data.url.startswith(("embedded://", "synthetic://")):
        return None
    hints = []
    if not config.train.init_from:
        rows = " train.new_classes=mean" if config.task == "generator" else ""
        hints.append(f"start from released or own weights (train.init_from=FILE{rows}, docs/adapt.md)")
    section = getattr(config, config.task)
    accepted = REGISTRIES[config.task].signature(section["name"])
    if "enc_tuning" in accepted and section.get("enc_tuning", "full") == "full":
        hints.append("train adapters only (tokenizer.enc_tuning=lora tokenizer.dec_tuning=lora, or frozen)")
    if config.train.global_batch > 128:
        hints.append("make train.global_batch smaller (128) and the learning rate with it")
    if not config.data.flip and not config.data.url.startswith("tokens://"):
        hints.append("mirror half of the pictures (data.flip=true)")
    if not hints:
        return None
    return f"{count:,} pictures are few for this recipe. What helps: " + "; ".join(hints) + ". See docs/data.md."
