"""What a config needs from elsewhere: weights and helper networks that are missing here, before a GPU is touched.

lacking(config)    what training would fail for, each as a sentence with the command that fetches it
later(config)      what only the documented evaluation will ask for
"""

from __future__ import annotations

from pathlib import Path

from core.config import RunConfig
from core.errors import UserError
from core.weights import hub, released
from core.weights.released import Released, find_local_file, helper, needed
from evaluation import protocols, references
from evaluation.networks import WEIGHTS_FILE
from run.load import REGISTRIES


def helpers_of(config: RunConfig) -> list[Released]:
    """The helper networks that training with `config` will load, each once, here or not."""
    sections = [("objective", config.objective), ("discriminator", config.discriminator)]
    if config.task == "tokenizer":
        sections += [("teacher", settings) for settings in config.teachers.values()]
    for kind in ("tokenizer", "generator"):
        section = getattr(config, kind) or {}
        if "name" in section and not section.get("weights"):  # else what it would start from is replaced by them
            sections.append((kind, section))
    found = [
        file for kind, section in sections if section for file in needed(REGISTRIES[kind].get(section["name"]), section)
    ]
    if config.train.eval_every != "never" and config.eval.network == "inception":
        found.append(helper(WEIGHTS_FILE))
    return list(dict.fromkeys(found))


def lacking(config: RunConfig) -> list[str]:
    """One line for each thing that is missing, with what to do."""
    lines = []
    for setting, reference in weights_of(config).items():
        if setting.startswith("teachers.") and (Path(reference).exists() or find_local_file(reference)):
            continue  # a teacher takes folders, too
        try:
            hub.resolve(reference)
        except UserError as error:
            known = None if "://" in reference else released.find(reference)
            lines.append(f"{setting}={reference}: {f'fetch it with {known.command}' if known else error}")
    for file in helpers_of(config):
        if file.found() is None:
            licence = f" ({file.licence})" if file.gated else ""
            lines.append(f"{file.about}, {file.place}: fetch it with {file.command}{licence}")
    reference = config.eval.reference if config.train.eval_every != "never" else None
    if reference and references.find_reference(reference) is None:
        lines.append(f"eval.reference={reference}: {_how_to_get(reference)}")
    return lines


def weights_of(config: RunConfig) -> dict[str, str]:
    """Setting -> reference of every file of weights that a config names."""
    named = {
        "tokenizer.weights": config.tokenizer.get("weights"),
        "train.init_from": config.train.init_from,
        "sample.guide": config.sample.guide,
    }
    named |= {f"teachers.{name}.weights": settings.get("weights") for name, settings in config.teachers.items()}
    if config.train.eval_every != "never" and config.eval.network not in ("auto", "inception", "lite0"):
        named["eval.network"] = config.eval.network
    return {setting: reference for setting, reference in named.items() if reference}


def later(config: RunConfig) -> list[str]:
    """What run_eval_*.sh will need for the numbers of the config's protocol."""
    purpose = {"tokenizer": "reconstruction", "generator": "generation"}[config.task]
    protocol = protocols.get(config.eval.protocol, purpose)
    lines = []
    inception = helper(WEIGHTS_FILE)
    if inception.found() is None and config.eval.network in ("auto", "inception"):
        lines.append(
            f"{inception.about} ({inception.command}); until it is here, evaluation uses a stand-in and calls "
            "nothing FID"
        )
    size = config.tokenizer.get("image_size") or 256
    names = protocol.reference if purpose == "generation" else protocol.reconstruction_reference
    reference = next((n for n in names if references.KNOWN[n].image_size == size), None)
    if reference and references.find_reference(reference) is None:
        lines.append(f"reference statistics {reference} of protocol {protocol.name}: {_how_to_get(reference)}")
    return lines


def refuse(config: RunConfig, lines: list[str]) -> None:
    """UserError that lists what is missing, if anything."""
    if len(lines) == 1:
        raise UserError(f"missing: {lines[0]}")
    if lines:
        raise UserError(
            f"{config.name} needs {len(lines)} things that are missing:\n" + "\n".join(f"  - {line}" for line in lines)
        )


def report(config: RunConfig) -> str:
    """For --check and --dry-run: what is missing, now and later."""
    lines = [f"missing        {line}" for line in lacking(config)] or ["files          all that training needs is here"]
    return "\n".join(lines + [f"for evaluation {line}" for line in later(config)])


def _how_to_get(reference: str) -> str:
    known = released.find(reference)
    return (
        known.command
        if known
        else ("docs/evaluation.md says where to get it; run_make_reference.sh makes one from pictures")
    )
