"""Weight files described, checked against our models, and written in our format or in the official one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.errors import UserError, plainly
from core.files import human_bytes, read_json
from core.train.checkpoint import Checkpoint
from core.weights import exports, hub
from core.weights import files as weight_files
from core.weights.adapter import Adapter, Facts, entry, merged, nested, recognise, unusable
from core.weights.layouts import Comparison, build_on_meta, compare, read_layout
from core.weights.pickles import tensors_in
from run.load import REGISTRIES, build, untrained
from run.sharing import about_weights
from run.weights import ADAPTERS, Source, Weights, read_weights

SETS = {True: "averaged", False: "raw"}


def components(loaded: Mapping[str, Any]) -> list[tuple[str, str, Adapter]]:
    """(kind, name, adapter) of every component that a file holds; a training file of VAR holds two."""
    named = [(kind, recognise(adapters, loaded)) for kind, adapters in ADAPTERS.items()]
    return [(kind, name, ADAPTERS[kind][name]) for kind, name in named if name]


def parameter_count(model: nn.Module) -> str:
    total = sum(p.numel() for p in model.parameters())
    fixed = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return f"{total:,} parameters" + (f", {fixed:,} of them fixed" if fixed else "")


def size_of(tensors: Mapping[str, Tensor]) -> str:
    return human_bytes(sum(t.nbytes for t in tensors.values()))


def unused_lines(result: Comparison, outside: int) -> list[str]:
    """What of a file our model does not take, grouped by the reason."""
    lines = [f"unused  {count} tensors: {reason}" for reason, count in Counter(result.ignored.values()).items()]
    if result.unused:
        named = ", ".join(result.unused[:8]) + (" ..." if len(result.unused) > 8 else "")
        lines.append(f"unused  {len(result.unused)} tensors that this model has no place for: {named}")
    if outside:
        lines.append(f"unused  {outside} tensors outside of the weights (optimiser and the like)")
    return lines


def plain(value: object) -> str:
    """Settings as one reads them, without braces and quotes."""
    return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) if isinstance(value, dict) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# --check-layout
# ---------------------------------------------------------------------------------------------------------------------
def check_layout(path: str) -> bool:
    """Print one verdict for each component of a recorded layout; whether it is ours."""
    layout = read_json(path)
    if not isinstance(layout, dict) or not isinstance(layout.get("tensors"), dict):
        raise UserError(f'{path}: not a recorded layout; it should hold {{"tensors": {{name: [shape, dtype]}}}}.')
    if not layout["tensors"]:
        print(f"SKIP {path}: records no tensors")
        return True
    try:
        loaded = read_layout(layout)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path}: not a recorded layout ({plainly(error)}); tensors are recorded as name: [shape, dtype]."
        ) from error
    parts = components(loaded)
    if not parts:
        first = ", ".join(list(layout["tensors"])[:4])
        print(f"FAIL {path}: no adapter knows weights of this kind (first tensors: {first})")
        return False
    results = [compare(adapter, loaded, exact=True) for _, _, adapter in parts]
    taken = {id(t) for _, _, adapter in parts for state in adapter.parts(loaded) for t in state.values()}
    outside = sum(id(t) not in taken for t in tensors_in(loaded))
    for (_, name, adapter), result in zip(parts, results):
        verdict = f"{path}: {adapter.title} ({name})"
        if result.differences:
            print(f"FAIL {verdict}: {'; '.join(result.differences)}")
        else:
            assert result.model is not None
            print(f"PASS {verdict}, {len(result.model.state_dict())} tensors, {parameter_count(result.model)}")
        for line in unused_lines(result, outside if result is results[-1] else 0):
            print(f"     {line}")
    return not any(result.differences for result in results)


# ---------------------------------------------------------------------------------------------------------------------
# --describe
# ---------------------------------------------------------------------------------------------------------------------
def describe(reference: str) -> bool:
    """Print what a file, a run, or a folder with a tokenizer and its generator holds; whether it fits our model."""
    verdicts = [_describe_one(source) for source in _sources(reference)]
    return all(verdicts)


def _sources(reference: str, kind: str | None = None) -> list[Source]:
    """The file or checkpoint that is named; both files where it stands for a tokenizer and its generator (tiny/rectok)."""
    sources = [Source(reference, each) for each in ([kind] if kind else ADAPTERS)]
    files = {source.path: source for source in sources if source.path.is_file()}
    return list(files.values()) or sources[:1]  # of a living run, the second may have found a newer checkpoint


def _describe_one(source: Source) -> bool:
    content = source.content
    path = source.path
    if isinstance(content, Checkpoint):
        kind, decays = content.state["primary"], ", ".join(map(str, content.state["ema"])) or "none"
        facts = [
            f"checkpoint of a run of ours, step {content.step:,}, EMA decays: {decays}",
            f"files {', '.join(content.files)}",
        ]
    elif isinstance(content, weight_files.WeightFile):
        kind, sets = content.kind, "averaged (EMA) and raw weights" if content.raw else "one set of weights"
        constants = f", constants {', '.join(content.constants)}" if content.constants else ""
        facts = [f"weight file of ours: {sets}{constants}"]
    else:
        return describe_released(path, content)
    weights = read_weights(kind, source)
    model = build_on_meta(lambda **settings: REGISTRIES[kind].build(settings), weights.settings)
    lines = [
        f"settings  {plain({key: value for key, value in weights.settings.items() if key != 'name'})}",
        f"{parameter_count(model)}, {size_of(model.state_dict())}",
        *facts,
    ]
    if names := weights.about.get("class_names"):
        lines.append(f"classes   {len(names)}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
    lines += [
        f"measured  {r['metric']} {r['value']:.5g}, protocol {r['protocol']}" for r in weights.about.get("results", ())
    ]
    if trained_on := weights.provenance.get("tokenizer_fingerprint"):
        lines.append(f"trained on the latents of tokenizer weights {trained_on}")
    problems = []
    for averaged in SETS:
        try:
            weights.read(model, averaged)
        except UserError as error:
            problems.append(f"does not fit: {error}")
    _print_found(f'{path}: the {kind} "{weights.settings["name"]}"', [*lines, *problems])
    return not problems


def describe_released(path: Path, loaded: Mapping[str, Any]) -> bool:
    """The same of a file in an official layout, and what it holds."""
    parts = components(loaded)
    if not parts:
        names = ", ".join(map(str, list(loaded)[:8]))
        print(f"{path}: no tokenizer or generator that is known. It holds: {names}{' ...' if len(loaded) > 8 else ''}")
        return False
    verdicts = [_describe_component(path, loaded, *part) for part in parts]
    return all(verdicts)


def _describe_component(path: Path, loaded: Mapping[str, Any], kind: str, name: str, adapter: Adapter) -> bool:
    raw, averaged = adapter.parts(loaded)
    first, result = raw or averaged, compare(adapter, loaded, **exports.settings_in(loaded, kind, name))
    settings = result.settings
    for key in result.asked:
        settings = merged(settings, nested(key, "?"))
    sets = " and ".join(text for text, state in (("raw weights", raw), ("averaged (EMA) weights", averaged)) if state)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in first.values())
    kinds = ", ".join(f"{count} x {dtype}" for dtype, count in dtypes.items())
    lines = [f"settings  {plain(settings)}", f"holds {sets}, {kinds}, {size_of(first)} a set"]
    if result.model is not None:
        lines.append(parameter_count(result.model))
    inside = {id(t) for state in (raw, averaged) for t in state.values()}
    others = [
        key
        for key, value in loaded.items()
        if key != exports.KEY and not any(id(t) in inside for t in tensors_in(value))
    ]
    if others and len(others) < 20:
        lines.append(f"unused  beside the weights: {', '.join(map(str, others))}")
    beside = {id(t) for key in others for t in tensors_in(loaded[key])}
    lines += unused_lines(result, sum(id(t) not in inside | beside for t in tensors_in(loaded)))
    broken = [text for state in (raw, averaged) if (text := unusable(adapter.names.weights(state)))]
    problems = [f"does not fit: {difference}" for difference in result.differences + broken]
    lines += problems or ["every tensor of our model is there"]
    if result.questions:
        lines.append(f"not in the file: {result.questions}")
    _print_found(f'{path}: {adapter.title} ({kind} "{name}")', lines)
    return not problems


def _print_found(title: str, lines: list[str]) -> None:
    print("\n  ".join([title, *dict.fromkeys(lines)]))


# ---------------------------------------------------------------------------------------------------------------------
# Conversion
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Conversion:
    """What is asked for; `run` does it."""

    source: str  # run folder, checkpoint, file, released file or hf:// address
    target: Path
    official: bool = False  # the layout of the official code instead of ours
    keep: str = "both"  # sets of weights: "ema", "raw" or "both", as far as they are there
    kind: str | None = None  # "tokenizer" or "generator", of a file that holds both
    answers: dict[str, Any] = field(default_factory=dict)  # settings that the file does not tell
    tokenizer: str | None = None  # to be held by an official file beside its generator
    overwrite: bool = False
    bf16: bool = False  # weights in half the room, rounded; constants stay fp32
    at_last: Callable[[], object] = lambda: None  # called just before `target` appears

    def run(self) -> str:
        """Write `target`; returns a sentence about it. UserError where the source has not what is asked for."""
        source, *others = _sources(self.source, self.kind)
        if others:
            raise self._either(self.source)
        self._check_target()
        if self.bf16 and self.official:
            raise UserError("--dtype bf16 is for files of ours; official programs read fp32.")
        kind, sets = self._choose(source)
        answers = {key: value for key, value in self.answers.items() if key != kind}
        answers = merged(answers, self.answers.get(kind, {}))  # with and without the kind in front
        weights = read_weights(kind, source, answers)
        settings = merged(weights.settings, answers)
        network = REGISTRIES[kind].build(untrained(REGISTRIES[kind], settings))
        adapter = ADAPTERS[kind].get(settings["name"]) if self.official else None
        if adapter is None and self.official:
            raise UserError(
                f'{self.source}: there is no official layout of "{settings["name"]}"; leave --to official out.'
            )
        states: dict[bool, dict[str, Tensor]] = {}
        for averaged in sets:
            weights.load(network, averaged)
            states[averaged] = weight_files.unshared(
                network.state_dict() if adapter is None else adapter.restore(network)
            )
        if adapter is not None:
            return self._write_official(kind, adapter, replace(weights, settings=settings), states)
        if self.bf16:
            states = {averaged: in_bf16(state) for averaged, state in states.items()}
        network.load_state_dict(states[sets[0]])  # the fingerprint is that of what readers will hold
        names = " and ".join(SETS[averaged] for averaged in sets)
        about = about_weights(weights, hub.fingerprint(network.state_dict()), network)
        content = weight_files.WeightFile(
            kind,
            settings,
            states[sets[0]],
            states[False] if len(sets) > 1 else {},
            weights.constants,
            {**weights.provenance, "converted_from": source.path.name, "holds": names},
            about,
        )
        weight_files.save(self.target, content, self.overwrite, self.at_last)
        return f'written to {self.target}: {kind} "{settings["name"]}", {names} weights'

    def _check_target(self) -> None:
        if self.target.exists() and not self.overwrite:
            raise UserError(f"{self.target} exists already. Choose another name, or say --force to replace it.")
        if self.official and self.target.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
            raise UserError(f"{self.target}: official files end in .pth, .pt, .bin or .safetensors.")
        if not self.official and self.target.suffix != ".safetensors":
            raise UserError(
                f"{self.target}: our files end in .safetensors; say --to official for the layout of the official code."
            )

    def _choose(self, source: Source) -> tuple[str, tuple[bool, ...]]:
        """(kind, sets) that are asked for; UserError for what is not there."""
        held, path = sets_in(source), source.path
        if not held:
            raise UserError(
                f"{path}: no tokenizer or generator that is known; see python -m scripts.convert --describe {self.source}"
            )
        if self.kind is None and len(held) > 1:
            raise self._either(path)
        kind = self.kind or next(iter(held))
        if kind not in held:
            raise UserError(f"{path} holds a {next(iter(held))}, not a {kind}.")
        sets = held[kind]
        if self.keep == "ema" and True not in sets:
            raise UserError(f"{path} holds no averaged (EMA) weights; use --weights raw.")
        if self.keep == "raw" and False not in sets:
            raise UserError(f"{path} holds averaged (EMA) weights only; use --weights ema.")
        return kind, sets if self.keep == "both" else (self.keep == "ema",)

    @staticmethod
    def _either(place: str | Path) -> UserError:
        return UserError(
            f"{place} holds a tokenizer and a generator: say which one with --kind tokenizer or --kind generator."
        )

    def _write_official(
        self, kind: str, adapter: Adapter, weights: Weights, states: dict[bool, dict[str, Tensor]]
    ) -> str:
        """What the official program reads, from averaged (True) and raw (False) states under official names."""
        container, settings = adapter.container, {kind: explained(kind, adapter, weights.settings, states)}
        if self.tokenizer and container.beside is None:
            raise UserError(f"--tokenizer: official files of {adapter.title} hold no tokenizer.")
        if self.target.suffix == ".safetensors":
            if len(states) > 1 and container.holds_both:
                raise UserError(
                    f"{self.target}: a safetensors file has room for one set of weights; say --weights ema or raw."
                )
            first, header = weight_files.unshared(next(iter(states.values()))), {exports.KEY: exports.written(settings)}
            weight_files.replace_with(
                self.target, lambda place: save_file(first, place, header), self.overwrite, self.at_last
            )
        else:
            packed = container.pack(states.get(False) or {}, states.get(True))
            if self.tokenizer and container.beside is not None:
                settings["tokenizer"], tensors = official_tokenizer(self.tokenizer)
                packed = merged(packed, nested(container.beside, tensors))
            packed = exports.with_text(packed, exports.written(settings), bare=container.written is None)
            weight_files.replace_with(
                self.target, lambda place: torch.save(packed, place), self.overwrite, self.at_last
            )
        written = list(states) if container.holds_both else list(states)[:1]
        names = " and ".join(SETS[averaged] for averaged in written)
        said = f"written to {self.target}: {adapter.title} in the official layout, {names} weights."
        return said + self._notes(kind, adapter, weights, next(iter(states.values())))

    def _notes(self, kind: str, adapter: Adapter, weights: Weights, official: dict[str, Tensor]) -> str:
        """What is lost in an official file."""
        notes = []
        if weights.constants:
            notes.append(f"Constants ({', '.join(weights.constants)}) have no place in official files.")
        accepted = REGISTRIES[kind].signature(weights.settings["name"])
        if lost := unrecorded(adapter, weights.settings, official, accepted):
            notes.append(f"What its tensors do not tell, so that only Tessera reads it there: {', '.join(lost)}.")
        left_out = {pattern: why for pattern, why in adapter.names.ignored.items() if "teacher" in why}
        notes += [f"Not in it: {pattern}, {why}." for pattern, why in left_out.items()]
        if adapter.container.beside and not self.tokenizer:
            notes.append(
                f"The official program reads its tokenizer from {adapter.container.beside} where no other file is named: "
                "add it with --tokenizer FILE."
            )
        return "".join(f" {note}" for note in notes)


def in_bf16(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with fractions rounded to bf16; whole numbers and truth values as they are, in fp32 too.

    A window of the codes used lately holds codes as fp32: in bf16 code 511 of 512 would read 512.
    """
    return {name: t.bfloat16() if t.is_floating_point() and not _is_counted(t) else t for name, t in state.items()}


def _is_counted(tensor: Tensor) -> bool:
    """Whole numbers, some of them larger than bf16 can tell apart."""
    return torch.equal(tensor, tensor.round()) and not torch.equal(tensor, tensor.bfloat16().to(tensor.dtype))


def sets_in(source: Source) -> dict[str, tuple[bool, ...]]:
    """Kind of network -> which sets of its weights are there: averaged ones (True), raw ones (False)."""
    content = source.content
    if isinstance(content, Checkpoint):
        return {content.state["primary"]: (True, False) if content.state["ema"] else (False,)}
    if isinstance(content, weight_files.WeightFile):
        return {content.kind: (True, False) if content.raw else (content.provenance.get("holds") != "raw",)}
    held = {}
    for kind, _, adapter in components(content):
        raw, averaged = adapter.parts(content)
        held[kind] = ((True,) if averaged else ()) + ((False,) if raw else ())
    return held


def official_tokenizer(reference: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, averaged weights under official names) of a tokenizer, for a generator's file that holds one too."""
    weights = read_weights("tokenizer", reference)
    network = build("tokenizer", {}, weights)
    return weights.settings, weight_files.unshared(ADAPTERS["tokenizer"][weights.settings["name"]].restore(network))


def explained(
    kind: str, adapter: Adapter, settings: dict[str, Any], states: dict[bool, dict[str, Tensor]]
) -> dict[str, Any]:
    """`settings` with the defaults that answer what a reader of these official tensors would ask."""
    facts, accepted = Facts(), REGISTRIES[kind].signature(settings["name"])
    adapter.settings(next(iter(states.values())), facts)
    asked = [question.partition(".")[2] for question, _ in facts.open]
    return {**{key: accepted[key].default for key in asked if key in accepted}, **settings}


def unrecorded(
    adapter: Adapter, settings: dict[str, Any], official: dict[str, Tensor], accepted: Mapping[str, Any]
) -> list[str]:
    """Settings that cannot be told from an exported file and are not what a reader would take them for.

    Args:
        settings: the model's own.
        official: exported tensors.
        accepted: parameters of the model's constructor.
    """
    facts = Facts()
    adapter.settings(official, facts)
    known = adapter.settings(official, Facts(answers=settings))  # with the answers, on which other settings depend
    asked = dict.fromkeys(question.partition(".")[2] for question, _ in facts.open)
    lost = [key if (value := entry(settings, key)) is None else f"{key} {plain(value)}" for key in asked]
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(known.get(key), dict):
            parts = {part: item for part, item in value.items() if known[key].get(part, item) != item}
            lost += [f"{key}.{part} {item}" for part, item in parts.items()]
        elif key in accepted and key not in known and value != accepted[key].default:
            lost.append(f"{key} {plain(value)}")
    return lost
