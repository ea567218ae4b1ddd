"""Start from weights that were made for other classes or another picture size: train.init_from.

    states(config, task, source)      raw and averaged weights for the network of a task, brought to its classes and sizes

The trunk and the row of no class are kept, the rows of new classes begin as train.new_classes says; what a size decides
(tables of positions, grids of latents) follows the rule of the family, `resized` of core.specs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.schema import RunConfig
from core.specs import Generator
from core.train.low_rank import keep_adapted
from core.train.optim import freeze
from generator.task import GeneratorTask
from run.sample import parse_labels
from run.sharing import classes_of_weights
from run.weights import Source, Weights, read_weights
from tokenizer.task import TokenizerTask

State = dict[str, Tensor]
MEAN = "mean"


def states(config: RunConfig, task: TokenizerTask | GeneratorTask, source: Source) -> tuple[State, State]:
    """(raw, averaged) weights of train.init_from, for the network that trains. UserError where they cannot be had."""
    weights = read_weights(config.task, source, getattr(config, config.task))
    change = _resizing(task, weights.settings)
    if isinstance(task, GeneratorTask):
        rows = new_rows(config, source, weights, task.num_classes)
        change = _both(change, lambda state: with_rows(state, task.generator, rows))
    network = task.networks()[task.primary]
    return weights.read(network, False, change), weights.read(network, True, change)


def choose_trained(config: RunConfig, task: TokenizerTask | GeneratorTask) -> list[str]:
    """Let train.lora and train.freeze say what is trained of the task's network; returns the names frozen by the latter."""
    if config.train.lora is not None and isinstance(task, GeneratorTask):
        keep_adapted(task.generator)
    return freeze(task.networks()[task.primary], config.train.freeze)


def _both(first: Callable[[State], State], then: Callable[[State], State]) -> Callable[[State], State]:
    return lambda state: then(first(state))


def _resizing(task: TokenizerTask | GeneratorTask, settings: Mapping[str, Any]) -> Callable[[State], State]:
    if isinstance(task, GeneratorTask):
        return lambda state: task.generator.resized(state, settings, task.tokenizer.spec)
    return lambda state: task.tokenizer.resized(state, settings)


# ---------------------------------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------------------------------
def new_rows(config: RunConfig, source: Source, weights: Weights, num_classes: int) -> list[int | None] | None:
    """For each of `num_classes` classes the old one whose row it starts from, None for the mean of all; None for the
    rows as they are. UserError for what train.new_classes cannot say."""
    text = config.train.new_classes
    known = weights.settings["num_classes"]
    if text is None:
        if known == num_classes:
            return None
        raise UserError(
            f"{weights.path} knows {known} classes and the data have {num_classes}: train.new_classes=mean keeps all but the "
            "rows of the classes and starts these from the mean of the old ones, train.new_classes=from:NAME,... from old classes."
        )
    if text == MEAN:
        means: list[int | None] = [None] * num_classes
        return means
    kind, colon, names = text.partition(":")
    if kind != "from" or not colon:
        raise UserError(
            f"train.new_classes={text}: give mean, or from: and an old class for each new one, as from:tabby,mean,golden retriever."
        )
    words = _split(names, classes_of_weights(source, known), known)
    if len(words) != num_classes:
        raise UserError(
            f"train.new_classes names {len(words)} old classes and the data have {num_classes}: give one for each, in the order "
            "of the folders; mean stands for the mean of all."
        )
    return words


def _split(names: str, old: list[str], known: int) -> list[int | None]:
    """Old classes by name or number; "mean" stands between them."""
    sources: list[int | None] = []
    for i, part in enumerate(re.split(rf"(?:^|,)\s*{MEAN}\s*(?=,|$)", names)):
        if i:
            sources.append(None)
        if part := part.strip(" ,"):
            sources += parse_labels(part, known, old, "train.new_classes")
    return sources


def with_rows(state: State, generator: Generator, rows: list[int | None] | None) -> State:
    """The weights with a row for each entry of `rows`: a copy of that old class's, or the mean of all. What comes before
    the classes and the last row, of no class, stay."""
    if rows is None:
        return state
    name, first = generator.class_rows()
    table = state[name]
    before, old, none = table.split((first, len(table) - first - 1, 1))
    mean = old.float().mean(0).to(old.dtype)
    new = torch.stack([mean if row is None else old[row] for row in rows])
    return {**state, name: torch.cat((before, new, none))}
