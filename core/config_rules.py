"""Which settings of a run do not go together, each one being right by itself; core/config.py asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from core.schema import Duration, NetworkConfig, RunConfig, ScheduleConfig, TrainConfig


def _recipe_problems(where: str, recipe: TrainConfig | NetworkConfig) -> Iterator[str]:
    optimizer, schedule = recipe.optimizer, recipe.schedule
    if (optimizer.lr is None) == (optimizer.base_lr is None):
        yield f"{where}.optimizer: give exactly one of lr and base_lr."
    if len(optimizer.betas) != 2 or not all(0 <= b < 1 for b in optimizer.betas):
        yield f"{where}.optimizer.betas: expected two numbers in [0, 1), got {optimizer.betas}."
    if schedule.kind in ("exponential", "bent") and schedule.min_lr <= 0:
        yield f"{where}.schedule.min_lr: must be more than 0 for kind: {schedule.kind}."


def schedule_problems(train: TrainConfig, overrides: list[str]) -> Iterator[str]:
    """Parts of schedules that end before they begin, or after the run, however many pictures an epoch has.

    A duration that only the command line gives makes a short trial of a recipe: what the recipe says stays then, and the
    run notes it (run.check.schedule_notes).
    """
    stated = [word.partition("=")[0] for word in overrides]

    def is_stated(key: str) -> bool:
        return any(f"{key}.".startswith(f"{name}.") for name in stated)

    recipes = {"train": train, "train.discriminator": train.discriminator}
    for where, recipe in recipes.items():
        for keys, problem in _wrong_lengths(recipe.schedule, train) if recipe is not None else ():
            full = [f"{where}.schedule.{key}" for key in keys]
            if not is_stated("train.duration") or any(map(is_stated, full)):
                yield f"{full[0]}: {problem}"


def _wrong_lengths(schedule: ScheduleConfig, train: TrainConfig) -> Iterator[tuple[list[str], str]]:
    """(keys of the schedule, what is wrong with them)"""

    def surely(compare: Callable[[Callable[[Duration], int]], bool]) -> bool:
        """Whether it holds for the shortest and the longest epoch, and so for all between."""
        sizes = (train.global_batch, 10**12)
        return all(compare(lambda d, size=size: d.images(size, train.global_batch)) for size in sizes)

    start, end, whole = schedule.warmup_from, schedule.decay_end, train.duration
    risen = f"the warm-up of {schedule.warmup}" + (f" from {start} on" if surely(lambda n: n(start) > 0) else "")
    if surely(lambda n: 0 < n(whole) < n(start) + n(schedule.warmup) and n(schedule.warmup) > 0):
        yield (
            ["warmup", "warmup_from"],
            f"{risen} ends after the run, whose train.duration is {whole}; shorten the one or lengthen the other.",
        )
    elif surely(lambda n: 0 < n(whole) <= n(start)):
        yield (
            ["warmup_from"],
            f"{start} is not before the end of the run, whose train.duration is {whole}, so the rate would stay at "
            f"warmup_lr={schedule.warmup_lr}.",
        )
    if schedule.kind == "constant":
        return
    if end is not None and surely(lambda n: n(end) <= n(start) + n(schedule.warmup)):
        yield ["decay_end", "warmup", "warmup_from"], f"the decay would end at {end}, before {risen} does."
    begin = schedule.decay_start
    if begin is not None and end is not None and surely(lambda n: n(end) <= n(begin)):
        yield ["decay_end", "decay_start"], f"the decay would end at {end} and start at decay_start={begin}."


def run_problems(config: RunConfig) -> Iterator[str]:
    """A sentence for each that can be told without the length of an epoch."""
    yield from _task_problems(config)
    yield from _other_problems(config)


def _task_problems(config: RunConfig) -> Iterator[str]:
    yield from _recipe_problems("train", config.train)
    if config.train.discriminator is not None:
        yield from _recipe_problems("train.discriminator", config.train.discriminator)
        if config.discriminator is None:
            yield "train.discriminator: there is no discriminator to train; configure one, or leave this out."
    if any(not 0 <= d < 1 for d in config.train.ema):
        yield f"train.ema: decays lie in [0, 1), got {config.train.ema}."
    if config.task == "generator" and config.generator is None:
        yield 'generator: is missing, and task is "generator".'
    if config.task == "tokenizer" and config.objective is None:
        yield 'objective: is missing, and task is "tokenizer".'
    if config.task == "tokenizer" and ("name" not in config.tokenizer or config.tokenizer.get("weights")):
        yield (
            "tokenizer: one that is trained is described by name and settings; give weights to start from as "
            "train.init_from, not as tokenizer.weights."
        )
    if config.task == "tokenizer" and config.train.parallel == "fsdp":
        yield "train.parallel: fsdp is for generators; a tokenizer and its discriminator train with ddp."
    for key, is_set in (
        ("new_classes", config.train.new_classes is not None),
        ("trunk_lr", config.train.trunk_lr != 1),
    ):
        if is_set and config.task == "tokenizer":
            yield f"train.{key}: a tokenizer knows no classes; this is for generators."
    if config.train.lora is not None:
        if config.task == "tokenizer":
            yield "train.lora: is for generators; ImageFolder's tokenizer has tokenizer.enc_tuning=lora and dec_tuning=lora."
        elif not config.train.init_from:
            yield "train.lora: changes weights that are there; name them: train.init_from."
        if config.train.parallel == "fsdp":
            yield "train.lora: needs whole weights on every GPU; use train.parallel=ddp."
    if config.train.new_classes is not None and not config.train.init_from:
        yield "train.new_classes: says how the classes of train.init_from become new ones; name its weights."


def _other_problems(config: RunConfig) -> Iterator[str]:
    sample = config.sample
    if isinstance(sample.scale, str):
        yield f'sample.scale: a text is two numbers, first and last scale, such as "1.2,8.0", not {sample.scale!r}.'
    elif isinstance(sample.scale, list):
        if sample.guidance == "auto":
            yield "sample.scale: autoguidance takes one number."
    elif sample.guidance == "auto" and sample.scale > 1 and not sample.guide:
        yield "sample.guide: autoguidance needs the weights of a weaker model."
    for name, pair in (("data.scale", config.data.scale), ("sample.interval", sample.interval)):
        if len(pair) != 2 or pair[0] > pair[1]:
            yield f"{name}: expected [low, high], got {pair}."
    if not config.name or "/" in config.name or config.name.startswith("."):
        yield f'name: becomes a folder name, so "{config.name}" will not do.'
