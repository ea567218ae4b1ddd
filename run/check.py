"""--check: mistakes and missing files outside the config itself, found before a GPU is touched.

check_inputs       all that is missing, told together; training begins with it
check_networks     whether weights are of the networks that the config names
check_step         what only a step or an evaluation would stumble over
report             what is here, and what only the documented evaluation will ask for
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core import dist
from core.chunks import ALONE
from core.errors import UserError
from core.files import existing_part, require_place, require_space
from core.schema import RunConfig
from core.specs import DataSource
from core.train.log import sink_problems
from core.weights import released
from core.weights.released import Released, find_local_file, helper, needed
from data.checks import left_out, remarks, require_same_classes
from data.tokens import TokenStore
from evaluation import measure, protocols, references
from evaluation.networks import WEIGHTS_FILE
from run import adapt
from run.data import asks_val_labels, make_transform, needed_val, open_moments, open_pictures, open_train
from run.estimate import costs, explained
from run.load import REGISTRIES, build, read_tokenizer
from run.recipes import recipe_of
from run.weights import Source, read_weights
from tokenizer.continuous.stats import read_stats


@dataclass
class Inputs:
    """What a training reads: weights that its config names, by setting, its data, and its validation pictures if it
    needs them."""

    weights: dict[str, Source]
    data: DataSource
    val: DataSource | None


def check(config: RunConfig) -> str:
    """What --check prints; UserError for everything that can be wrong."""
    inputs = check_inputs(config)
    check_networks(config, inputs)
    check_step(config, inputs)
    notes = [f"data           {note}" for note in data_notes(config, inputs.data)]
    notes += [f"schedule       {note}" for note in schedule_notes(config, len(inputs.data))]
    return "\n".join([report(config, []), *notes])


def check_inputs(config: RunConfig) -> Inputs:
    """UserError that lists everything outside the config that training would fail for. No network is loaded."""
    dist.pick_device(config.train.device)
    # Checkpoints may lie on another disk, through a link; where it is not mounted a run would begin anew.
    places: list[str | Path] = [config.run_dir, config.run_dir / "checkpoints"]
    if config.data.cache_latents or config.data.cache_features:
        places.append(config.data.cache_dir)
    for place in places:
        require_place(place)
    weights, problems = find_weights(config)
    problems += [*missing_helpers(config), *sink_problems(config.log)]
    source, val, mistakes = _open_data(config)
    if len(mistakes) == 1 and not problems:
        raise mistakes[0]
    problems += [f"data: {mistake}" for mistake in mistakes]
    if len(problems) == 1:
        raise UserError(f"missing: {problems[0]}")
    if problems:
        listed = [
            f"{config.name} needs {len(problems)} things that are missing:",
            *(f"  - {line}" for line in problems),
        ]
        raise UserError("\n".join(listed + [f"  later, for evaluation: {line}" for line in missing_later(config)]))
    assert source is not None
    return Inputs(weights, source, val)


def _open_data(config: RunConfig) -> tuple[DataSource | None, DataSource | None, list[UserError]]:
    """(training pictures, validation pictures if they are needed, what is wrong with either or with both together)"""
    opened: list[DataSource | None] = []
    mistakes: list[UserError] = []
    for which in (open_train, needed_val):
        try:
            opened.append(which(config))
        except UserError as error:
            opened.append(None)
            mistakes.append(error)
    source, val = opened
    if source is not None and val is not None and asks_val_labels(config):
        try:
            require_same_classes(source.class_names, val.class_names, f"data.val_url={config.data.val_url}")
        except UserError as error:
            mistakes.append(error)
    return source, val, mistakes


def data_notes(config: RunConfig, source: DataSource) -> list[str]:
    """What a run says about its data: whether it is exact, what is not read of it, and what looks like a mistake."""
    notes = [f"{config.data.url}: {source.inexact or 'order and resume are exact'}"]
    if line := left_out(source):
        notes.append(line)
    return notes + (remarks(source) if config.task == "generator" else [])


def schedule_notes(config: RunConfig, images_per_epoch: int) -> list[str]:
    """Where a warm-up ends after the run: right for a short trial of a recipe, else a mistake."""
    recipes = {"train": config.train, "train.discriminator": config.train.discriminator}
    whole = config.train.duration.images(images_per_epoch, config.train.global_batch)
    notes = []
    for where, schedule in ((where, recipe.schedule) for where, recipe in recipes.items() if recipe is not None):
        parts = (schedule.warmup_from, schedule.warmup)
        begin, length = (part.images(images_per_epoch, config.train.global_batch) for part in parts)
        if length and begin + length > whole:
            notes.append(
                f"{where}.schedule.warmup={schedule.warmup} ends after the run of {config.train.duration}: the learning rate "
                f"comes to {100 * max(0, whole - begin) / length:.2g} % of its peak"
            )
    return notes


def check_networks(config: RunConfig, inputs: Inputs) -> None:
    """UserError where weights are of another network, of other classes, or of a tokenizer and not finite; and where latent
    statistics that are named are of another tokenizer. Only for these a network is filled with weights."""
    sources = inputs.weights
    if source := sources.get("tokenizer.weights"):
        weights = read_weights("tokenizer", source, config.tokenizer)
        network = build("tokenizer", config.tokenizer, weights, filled=False)
        weights.read(network, config.tokenizer.get("use_ema", True))
    if source := sources.get("train.init_from"):
        weights = read_weights(config.task, source, getattr(config, config.task))
        if config.task == "generator":
            adapt.new_rows(config, source, weights, inputs.data.num_classes)
    if (named := config.tokenizer.get("latent_stats")) and named != "none":
        read_stats(named)
        if source := sources.get("tokenizer.weights"):
            read_tokenizer(config.tokenizer, source)  # they have to be of these very weights


def check_step(config: RunConfig, inputs: Inputs) -> None:
    """UserError where tokenizer and generator do not fit, and for what only the first step or evaluation would refuse.

    All networks, losses and teachers are laid out without weights, one picture goes forward and backward through them on
    fake tensors, and the online evaluation is put together with its feature network, reference and labels.
    """
    with explained(config):
        tokenizer, networks = costs(config, inputs.weights)
        make_transform(config, tokenizer.image_size)
        if config.task == "generator" and config.data.moments:
            open_moments(config, inputs.data, tokenizer)
    if config.train.lora is None:  # a checkpoint's weights and two moments; averages come on top
        require_space(existing_part(config.run_dir), sum(4 * (n.parameters + 2 * n.trainable) for n in networks))
    if config.train.eval_every != "never":
        pictures = open_pictures(config) if isinstance(inputs.data, TokenStore) else inputs.data
        shown = pictures or inputs.val
        assert shown is not None  # needed_val asks for the latter where a run has tokens alone
        measure.Online(config, shown, inputs.val, tokenizer.image_size, ALONE)


def report(config: RunConfig, problems: list[str] | None = None) -> str:
    """What is missing, now and later.

    Args:
        problems: a line for each thing that training lacks; None: look for them.
    """
    if problems is None:
        problems = find_weights(config)[1] + missing_helpers(config)
    lines = [f"missing        {line}" for line in problems] or ["files          all that training needs is here"]
    return "\n".join(lines + [f"for evaluation {line}" for line in missing_later(config)])


def helpers_of(config: RunConfig) -> list[Released]:
    """The helper networks that training with `config` will load, each once, here or not."""
    sections = [("objective", config.objective), ("discriminator", config.discriminator)]
    if config.task == "tokenizer":
        sections += [("teacher", settings) for settings in config.teachers.values()]
    for kind in ("tokenizer", "generator"):
        section = getattr(config, kind) or {}
        if "name" in section and not section.get("weights"):  # else what it would start from is replaced by them
            sections.append((kind, section))
    files: list[Released] = []
    for kind, section in sections:
        if section:
            files += needed(REGISTRIES[kind].get(section["name"]), section)
    if config.train.eval_every != "never" and config.eval.network == "inception":
        files.append(helper(WEIGHTS_FILE))
    return list(dict.fromkeys(files))


def find_weights(config: RunConfig) -> tuple[dict[str, Source], list[str]]:
    """(by setting, the weights that a config names and that are here; a line for each that is not, with what to do)"""
    named = {
        "tokenizer.weights": config.tokenizer.get("weights"),
        "train.init_from": config.train.init_from,
        "sample.guide": config.sample.guide,
    }
    named |= {f"teachers.{name}.weights": settings.get("weights") for name, settings in config.teachers.items()}
    if config.train.eval_every != "never" and config.eval.network not in ("auto", "inception", "lite0"):
        named["eval.network"] = config.eval.network
    # of folders and repositories that hold both
    kinds = {"tokenizer.weights": "tokenizer", "train.init_from": config.task, "sample.guide": "generator"}
    sources, lines = {}, []
    for setting, reference in named.items():
        if not reference:
            continue
        if setting.startswith("teachers.") and (Path(reference).exists() or find_local_file(reference)):
            continue  # a teacher takes folders, too
        try:
            sources[setting] = Source(reference, kinds.get(setting))
        except UserError as error:
            known = None if "://" in reference else released.find(reference)
            advice = f"fetch it with {known.command}" if known else trained_by(reference) or str(error)
            lines.append(f"{setting}={reference}: {advice}")
    return sources, lines


def trained_by(reference: str) -> str:
    """How to make a run that is not here, by the recipe of that name; "" where none has it, and for what is here."""
    recipe = None if Path(reference).exists() else recipe_of(reference)
    return f"no such run yet. Train it: {recipe[1]}" if recipe else ""


def missing_helpers(config: RunConfig) -> list[str]:
    """A line for each network or table of others that training will load and that is not here, with what to do."""
    lines = []
    for file in helpers_of(config):
        if file.found() is None:
            licence = f" ({file.licence})" if file.gated else ""
            lines.append(f"{file.about}, {file.place}: fetch it with {file.command}{licence}")
    reference = config.eval.reference if config.train.eval_every != "never" else None
    if reference and references.find_reference(reference) is None:
        lines.append(f"eval.reference={reference}: {references.how_to_get(reference)}")
    return lines


def missing_later(config: RunConfig) -> list[str]:
    """What run_eval_*.sh will need for the numbers of the config's protocol."""
    purpose = {"tokenizer": "reconstruction", "generator": "generation"}[config.task]
    protocol = protocols.get(config.eval.protocol, purpose)
    lines = measure.lacking(config.eval, protocol, purpose)
    kept = config.train.keep_best if config.train.eval_every != "never" and config.eval.network == "auto" else None
    if kept in ("fid", "rfid", "sfid", "is") and helper(WEIGHTS_FILE).found() is None:
        lines.append(f"train.keep_best={kept}: no checkpoint is kept as the best before that network is here")
    size = config.tokenizer.get("image_size") or 256
    names = protocol.reference if purpose == "generation" else protocol.reconstruction_reference
    reference = next((n for n in names if references.KNOWN[n].image_size == size), None)
    if reference and references.find_reference(reference) is None:
        lines.append(
            f"reference statistics {reference} of protocol {protocol.name}: {references.how_to_get(reference)}"
        )
    return lines
