#!/usr/bin/env python3
"""Convert, check and describe weight files.

  convert.py --describe FILE ...                        what it is: system, settings, sizes, parameters, what is unused
  convert.py --check-layout LAYOUT.json ...             does our model take exactly these tensors? (nothing is loaded)
  convert.py RecTok.pth RecTok.safetensors              released file -> our safetensors, one file that says what it is
  convert.py work_dirs/my_run my_run.safetensors        the newest checkpoint of a run -> the same
  convert.py work_dirs/my_run mine.pth --to official    a run or file -> the layout that the official code loads
  convert.py RecTok.safetensors again.pth --to official
  convert.py my_far.pt my_far.safetensors --set size.heads=16    what the file itself does not say, once for all

FILE and the input are run folders, checkpoints, files, names in pretrained_models/ or hf://owner/repo/file. Averaged
(EMA) and raw weights are both kept where the target has room for both; --weights ema or raw keeps one.
Exit codes: 0 all is well, 1 some file does not fit, 2 a mistake in the command.
"""

import argparse
from collections import Counter
from pathlib import Path

from core import cli
from core.weights import released
from scripts import command_line


def found_in(loaded: dict) -> list:
    """(kind, name, adapter) of every component that a file holds; a training file of VAR holds two."""
    from core.weights.adapter import recognise
    from run.load import ADAPTERS

    named = [(kind, recognise(adapters, loaded)) for kind, adapters in ADAPTERS.items()]
    return [(kind, name, ADAPTERS[kind][name]) for kind, name in named if name]


def parameter_count(model) -> str:
    total = sum(p.numel() for p in model.parameters())
    fixed = total - sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{total:,} parameters" + (f", {fixed:,} of them fixed" if fixed else "")


def unused_lines(result, outside: int) -> list[str]:
    """What of a file our model does not take, grouped by the reason."""
    lines = [f"unused  {count} tensors: {reason}" for reason, count in Counter(result.ignored.values()).items()]
    if result.unused:
        named = ", ".join(result.unused[:8]) + (" ..." if len(result.unused) > 8 else "")
        lines.append(f"unused  {len(result.unused)} tensors that this model has no place for: {named}")
    if outside:
        lines.append(f"unused  {outside} tensors outside of the weights (optimiser and the like)")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# --check-layout
# ---------------------------------------------------------------------------------------------------------------------
def check_layout(path: str) -> bool:
    """Print one verdict; whether the layout is ours."""
    from core.errors import UserError
    from core.files import read_json
    from core.weights.layouts import compare, read_layout
    from core.weights.pickles import tensors_in

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
            f"{path}: not a recorded layout ({error}); tensors are recorded as name: [shape, dtype]."
        ) from error
    found = found_in(loaded)
    if not found:
        first = ", ".join(list(layout["tensors"])[:4])
        print(f"FAIL {path}: no adapter knows weights of this kind (first tensors: {first})")
        return False
    results, taken = [], set()
    for kind, name, adapter in found:
        taken |= {id(t) for part in adapter.parts(loaded) for t in part.values()}
        results.append((kind, name, adapter, compare(adapter, loaded, exact=True)))
    outside = sum(id(t) not in taken for t in tensors_in(loaded))
    good = True
    for kind, name, adapter, result in results:
        if result.differences:
            good = False
            print(f"FAIL {path}: {adapter.title} ({name}): {'; '.join(result.differences)}")
        else:
            print(
                f"PASS {path}: {adapter.title} ({name}), {len(result.model.state_dict())} tensors, "
                f"{parameter_count(result.model)}"
            )
        for line in unused_lines(result, outside if kind == results[-1][0] else 0):
            print(f"     {line}")
    return good


# ---------------------------------------------------------------------------------------------------------------------
# --describe
# ---------------------------------------------------------------------------------------------------------------------
def plain(value: object) -> str:
    return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def describe(reference: str) -> bool:
    """Print what a file or run holds; whether it fits our model."""
    from core.errors import UserError
    from core.files import human_bytes
    from core.train.checkpoint import Checkpoint
    from core.weights import files as weight_files
    from core.weights.layouts import build_on_meta
    from run.load import REGISTRIES, read_weights

    path = released.resolve(reference)
    if path.is_dir():
        checkpoint = Checkpoint(path)
        state = checkpoint.state
        kind = state["primary"]
        settings = read_weights(kind, str(path)).settings
        decays = ", ".join(map(str, state["ema"])) or "none"
        facts = [
            f"checkpoint of a run of ours, step {checkpoint.step:,}, EMA decays: {decays}",
            f"files {', '.join(checkpoint.files)}",
        ]
    elif ours := weight_files.read(path):
        kind, settings = ours.kind, ours.settings
        sets = "averaged (EMA) and raw weights" if ours.raw else "one set of weights"
        constants = f", constants {', '.join(ours.constants)}" if ours.constants else ""
        facts = [f"weight file of ours: {sets}{constants}"]
    else:
        return describe_released(path)
    described = read_weights(kind, str(path))
    model = build_on_meta(lambda **s: REGISTRIES[kind].build(s), settings)
    print(f'{path}: the {kind} "{settings["name"]}"')
    size = human_bytes(sum(t.nbytes for t in model.state_dict().values()))
    lines = [
        f"settings  {plain({k: v for k, v in settings.items() if k != 'name'})}",
        f"{parameter_count(model)}, {size}",
        *facts,
    ]
    if described.provenance.get("tokenizer_fingerprint"):
        lines.append(f"trained on the latents of tokenizer weights {described.provenance['tokenizer_fingerprint']}")
    good = True
    for averaged in (True, False):
        try:
            described.read(model, averaged)
        except UserError as error:
            good = False
            lines.append(f"does not fit: {error}")
    print("\n".join(f"  {line}" for line in dict.fromkeys(lines)))
    return good


def describe_released(path: Path) -> bool:
    from core.files import human_bytes
    from core.weights import hub
    from core.weights.adapter import merged, nested, unusable
    from core.weights.layouts import compare
    from core.weights.pickles import tensors_in

    loaded = hub.load_tensors(path)
    found = found_in(loaded)
    if not found:
        names = ", ".join(map(str, list(loaded)[:8]))
        print(f"{path}: no tokenizer or generator that is known. It holds: {names}{' ...' if len(loaded) > 8 else ''}")
        return False
    good = True
    for kind, name, adapter in found:
        raw, averaged = adapter.parts(loaded)
        result = compare(adapter, loaded)
        shown = result.settings
        for key in result.asked:
            shown = merged(shown, nested(key, "?"))
        settings = ", ".join(f"{key} {plain(value)}" for key, value in shown.items())
        sets = " and ".join(
            text for text, state in (("raw weights", raw), ("averaged (EMA) weights", averaged)) if state
        )
        dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in (raw or averaged).values())
        size = human_bytes(sum(t.nbytes for t in (raw or averaged).values()))
        inside = {id(t) for state in (raw, averaged) for t in state.values()}
        others = [key for key, value in loaded.items() if not any(id(t) in inside for t in tensors_in(value))]
        print(f'{path}: {adapter.title} ({kind} "{name}")')
        kinds = ", ".join(f"{n} x {d}" for d, n in dtypes.items())
        lines = [f"settings  {settings}", f"holds {sets}, {kinds}, {size} a set"]
        if result.model is not None:
            lines.append(parameter_count(result.model))
        if others and len(others) < 20:
            lines.append(f"unused  beside the weights: {', '.join(map(str, others))}")
        beside = {id(t) for key in others for t in tensors_in(loaded[key])}
        lines += unused_lines(result, sum(id(t) not in inside | beside for t in tensors_in(loaded)))
        broken = [text for state in (raw, averaged) if (text := unusable(adapter.names.weights(state)))]
        lines += [f"does not fit: {difference}" for difference in result.differences + broken] or [
            "every tensor of our model is there"
        ]
        if result.questions:
            lines.append(f"not in the file: {result.questions}")
        print("\n".join(f"  {line}" for line in lines))
        good &= not result.differences and not broken
    return good


# ---------------------------------------------------------------------------------------------------------------------
# Conversion
# ---------------------------------------------------------------------------------------------------------------------
def unrecorded(adapter, settings: dict, official: dict, accepted: dict) -> list[str]:
    """Settings that cannot be told from an exported file and are not what a reader would take them for.

    Args:
        settings: the model's own.
        official: exported tensors.
        accepted: parameters of the model's constructor.
    """
    from core.weights.adapter import Facts, entry

    facts = Facts()
    adapter.settings(official, facts)
    told = adapter.settings(official, Facts(given=settings))  # with the answers, on which other settings depend
    lost = []
    for key in dict.fromkeys(question.partition(".")[2] for question, _ in facts.open):
        lost.append(f"{key} {plain(entry(settings, key))}" if entry(settings, key) is not None else key)
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(told.get(key), dict):
            lost += [
                f"{key}.{part} {item}" for part, item in value.items() if part in told[key] and told[key][part] != item
            ]
        elif key in accepted and key not in told and value != accepted[key].default:
            lost.append(f"{key} {plain(value)}")
    return lost


def sets_in(path: Path) -> dict[str, tuple[bool, ...]]:
    """Kind of network -> which sets of its weights are there: averaged ones (True), raw ones (False)."""
    from core.train.checkpoint import Checkpoint
    from core.weights import files as weight_files
    from core.weights import hub

    if path.is_dir():
        state = Checkpoint(path).state
        return {state["primary"]: (True, False) if state["ema"] else (False,)}
    if ours := weight_files.read(path):
        return {ours.kind: (True, False) if ours.raw else (ours.provenance.get("holds") != "raw",)}
    loaded, held = hub.load_tensors(path), {}
    for kind, _, adapter in found_in(loaded):
        raw, averaged = adapter.parts(loaded)
        held[kind] = ((True,) if averaged else ()) + ((False,) if raw else ())
    return held


def choose(path: Path, source: str, kind: str | None, keep: str) -> tuple[str, tuple[bool, ...]]:
    """(kind, sets) that are asked for; UserError for what is not there."""
    from core.errors import UserError

    held = sets_in(path)
    if not held:
        raise UserError(f"{path}: no tokenizer or generator that is known; see convert.py --describe {source}")
    if kind is None and len(held) > 1:
        raise UserError(
            f"{path} holds a tokenizer and a generator: say which one with --kind tokenizer or --kind generator."
        )
    if kind is not None and kind not in held:
        raise UserError(f"{path} holds a {next(iter(held))}, not a {kind}.")
    kind = kind or next(iter(held))
    sets = held[kind]
    if keep == "ema" and True not in sets:
        raise UserError(f"{path} holds no averaged (EMA) weights; use --weights raw.")
    if keep == "raw" and False not in sets:
        raise UserError(f"{path} holds averaged (EMA) weights only; use --weights ema.")
    return kind, sets if keep == "both" else (keep == "ema",)


def official_tokenizer(reference: str, given: dict) -> dict:
    """The averaged weights of a tokenizer under official names, for a generator's file that holds one too."""
    from core.weights import files as weight_files
    from run.load import ADAPTERS, REGISTRIES, read_weights

    weights = read_weights("tokenizer", reference, given)
    network = REGISTRIES["tokenizer"].build(weights.settings)
    weights.load(network)
    return weight_files.own(ADAPTERS["tokenizer"][weights.settings["name"]].restore(network))


def write_official(out: Path, adapter, official: dict[bool, dict], overwrite: bool, tokenizer: dict | None) -> None:
    """Write what the official program reads.

    Args:
        official: averaged (True), raw (False) or both, under official names.
        tokenizer: of a generator whose file holds that too.
    """
    import torch

    from core.errors import UserError
    from core.weights import files as weight_files
    from core.weights.adapter import merged, nested

    if out.suffix != ".safetensors":
        packed = adapter.container.pack(official.get(False) or {}, official.get(True))
        if tokenizer is not None:
            packed = merged(packed, nested(adapter.container.beside, tokenizer))
        weight_files.replace_with(out, lambda place: torch.save(packed, place), overwrite)
        return
    if len(official) > 1 and adapter.container.holds_both:
        raise UserError(f"{out}: a safetensors file has room for one set of weights; say --weights ema or raw.")
    from safetensors.torch import save_file

    bare = official.get(True) or official[False]
    weight_files.replace_with(out, lambda place: save_file(bare, place), overwrite)


def export_notes(adapter, weights, official: dict, accepted: dict, tokenizer: dict | None) -> str:
    """What a user of the official program has to know of an exported file, as sentences with a space in front."""
    note = f" Constants ({', '.join(weights.constants)}) have no place in official files." if weights.constants else ""
    if lost := unrecorded(adapter, weights.settings, official, accepted):
        note += f" What such a file does not say: {', '.join(lost)}."
    for pattern, reason in adapter.names.ignored.items():
        if "teacher" in reason:
            note += f" Not in it: {pattern}, {reason}."
    if adapter.container.beside and tokenizer is None:
        note += (
            f" The official program reads its tokenizer from {adapter.container.beside} where no other file is named: add it "
            "with --tokenizer FILE."
        )
    return note


def convert(source: str, target: str, options: argparse.Namespace) -> str:
    """Write `target`; returns a sentence about it."""
    from core.config import read_overrides
    from core.errors import UserError
    from core.weights import files as weight_files
    from core.weights.adapter import merged
    from run.load import ADAPTERS, REGISTRIES, read_weights

    path, out, ours = released.resolve(source), Path(target), options.to == "tessera"
    if out.exists() and not options.force:
        raise UserError(f"{out} exists already. Choose another name, or say --force to replace it.")
    if out.suffix not in ((".safetensors",) if ours else (".safetensors", ".pth", ".pt", ".bin")):
        wanted = (
            "our files end in .safetensors; say --to official for the layout of the official code."
            if ours
            else "official files end in .pth, .pt, .bin or .safetensors."
        )
        raise UserError(f"{out}: {wanted}")
    kind, sets = choose(path, source, options.kind, options.weights)
    given = read_overrides([word.removeprefix(f"{kind}.") for word in options.set])
    weights = read_weights(kind, str(path), given)
    network = REGISTRIES[kind].build(merged(weights.settings, given))
    adapter = ADAPTERS[kind].get(weights.settings["name"])
    if adapter is None and not ours:
        raise UserError(
            f'{source}: there is no official layout of "{weights.settings["name"]}"; leave --to official out.'
        )
    found: dict[bool, dict] = {}
    for averaged in sets:
        weights.load(network, averaged)
        found[averaged] = weight_files.own(network.state_dict() if ours else adapter.restore(network))
    names = " and ".join({True: "averaged", False: "raw"}[averaged] for averaged in sets)
    if ours:
        provenance = {**weights.provenance, "converted_from": path.name, "holds": names}
        content = weight_files.WeightFile(
            kind,
            merged(weights.settings, given),
            found[sets[0]],
            found[False] if len(sets) > 1 else {},
            weights.constants,
            provenance,
        )
        weight_files.save(out, content, options.force)
        return f'written to {out}: {kind} "{weights.settings["name"]}", {names} weights'
    tokenizer = official_tokenizer(options.tokenizer, {}) if options.tokenizer else None
    if tokenizer is not None and adapter.container.beside is None:
        raise UserError(f"--tokenizer: official files of {adapter.title} hold no tokenizer.")
    write_official(out, adapter, found, options.force, tokenizer)
    if len(sets) > 1 and not adapter.container.holds_both:
        names = "averaged"
    accepted = REGISTRIES[kind].signature(weights.settings["name"])
    return f"written to {out}: {adapter.title} in the official layout, {names} weights." + export_notes(
        adapter, weights, found[sets[0]], accepted, tokenizer
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="convert.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("paths", nargs="+", metavar="PATH")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--describe", action="store_true")
    mode.add_argument("--check-layout", action="store_true")
    parser.add_argument("--to", choices=("tessera", "official"), default="tessera")
    parser.add_argument("--weights", choices=("both", "ema", "raw"), default="both")
    parser.add_argument("--kind", choices=("tokenizer", "generator"), help="of a file that holds both")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="what the file does not say, size.heads=16 and the like",
    )
    parser.add_argument("--tokenizer", help="to be held by an official file of VAR beside the generator")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    options = command_line.parse(parser, "convert", arguments)

    from core.errors import UserError

    if options.describe or options.check_layout:
        good = True
        for path in options.paths:
            try:
                good &= check_layout(path) if options.check_layout else describe(path)
            except UserError as error:
                good = False
                print(f"FAIL {error}")
        return 0 if good else 1
    if len(options.paths) != 2:
        raise UserError(
            "give IN and OUT, or --describe FILE ..., or --check-layout LAYOUT.json ...; see convert.py --help"
        )
    print(convert(*options.paths, options))
    return 0


if __name__ == "__main__":
    cli.run(main)
