"""What run_compare.sh does: tokenizers, or generators, under one protocol on one page.

Each of them is measured as run_eval_tokenizer.sh and run_eval_generator.sh measure, in a folder of its own that a killed
comparison goes on with. What is put together from those folders is rates, paired differences, speeds and pictures.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from core.chunks import changed_facts
from core.dist import World
from core.errors import UserError
from core.files import read_json, write_atomic
from core.images import grid
from core.lock import locked
from core.nn.lpips import lpips_squeeze
from core.specs import Tokenizer
from evaluation import protocols
from evaluation.comparison import (
    SAMPLE_BITS,
    Difference,
    bits_per_pixel,
    distance_difference,
    entropy_coded_bits_per_pixel,
    most_disputed,
    paired_difference,
    region,
)
from evaluation.images import lpips_metric
from evaluation.probe import features_fingerprint
from evaluation.report import NOTHING, Report, environment, tabular, with_interval, write_csv, write_metrics
from run import instances
from run.benchmark import device_name
from run.evaluate import PER_PICTURE, Reconstructions, by_tokenizer, check_reconstructions, tokenizer_section
from run.evaluate_generator import check_samples, generated_samples
from run.linear_probe import job_of, linear_probe, open_sources
from run.load import load_config
from run.measurement import eval_settings
from run.speeds import noted_speeds, speed_rows
from run.unseen import LEFT_OUT, choose, training_data, unseen
from run.weights import kinds_of

REGIONS, CANDIDATES = 8, 32  # shown; pictures in which they are looked for
CODES, USE = "codebook_", ("usage", "entropy_bits", "perplexity")
PROBE = "probe_top1_"

Value = tuple[float, float | None, float | None]  # a number and its interval, where it has one
Numbers = dict[str, dict[str, Value]]  # name -> metric -> value


@dataclass
class Side:
    """One tokenizer of a comparison, measured."""

    name: str
    folder: Path
    measurement: Reconstructions
    scores: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    per_picture: dict[str, Tensor]
    code_counts: Tensor | None
    trained_on: str
    speeds: dict[str, Any]
    instances: instances.Instances | None

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.measurement.tokenizer
        assert isinstance(tokenizer, Tokenizer)
        return tokenizer

    def rates(self) -> dict[str, float]:
        """Bits per pixel."""
        size, spec = self.tokenizer.image_size, self.tokenizer.spec
        bits = {"bpp": bits_per_pixel(spec, size)}
        if self.code_counts is not None:
            bits["entropy_coded_bpp"] = entropy_coded_bits_per_pixel(self.code_counts, self.measurement.count, size)
        return bits

    def numbers(self) -> dict[str, Value]:
        """metric -> (value, low, high)."""
        values = numbers_of(self.scores)
        more = {**self.rates(), **{name: value for name, value in self.speeds.items() if isinstance(value, float)}}
        return values | {name: (value, None, None) for name, value in more.items()}


def numbers_of(scores: dict[str, dict[str, Any]]) -> dict[str, Value]:
    """From what a metrics.json says of its scores."""
    values: dict[str, Value] = {}
    for name, score in scores.items():
        low, high = score.get("interval") or (None, None)
        values[name] = (score["value"], low, high)
    return values


def names_of(targets: list[str]) -> list[str]:
    """The shortest ends of the targets' paths that tell them apart."""
    parts = [[p for p in target.rstrip("/").split("/") if p] for target in targets]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len({*names}) == len(names):
            return names
    raise UserError(f"{' '.join(targets)}: the same one is named twice. Name each once.")


def kind_of(targets: list[str]) -> str:
    """ "tokenizer" or "generator", whichever all of them are; the former where they are both."""
    kinds = [{load_config(t, []).task} if t.endswith((".yaml", ".yml")) else kinds_of(t) for t in targets]
    common = set.intersection(*kinds)
    if not common:
        named = "; ".join(f"{t} is a {' and a '.join(sorted(k))}" for t, k in zip(targets, kinds))
        raise UserError(f"tokenizers are compared with tokenizers and generators with generators: {named}.")
    return max(common)


def prepare(options: argparse.Namespace, overrides: list[str]) -> str:
    """Find mistakes without loading a network; what is compared, "tokenizer" or "generator"."""
    if len(options.targets) < 2:
        raise UserError("name two or more tokenizers, or two or more generators, to compare.")
    names = names_of(options.targets)
    kind = kind_of(options.targets)
    settings = with_one_protocol(overrides)
    if kind == "tokenizer" and options.data is None:
        options.data = pictures_for(options.targets)
    for target, name in zip(options.targets, names):
        each = options_for(options, target, name, Path("unused"))
        if kind == "tokenizer":
            check_reconstructions(each, settings)
        else:
            check_samples(each, settings, existing=False)
    if options.probe:
        open_sources(options.probe)
    instances.check(options, kind)
    return kind


def pictures_for(targets: list[str]) -> str:
    """Those that the training of all of them left out; UserError where these are not the same."""
    data = {target: training_data(tokenizer_section(target)["weights"]) for target in targets}
    words = "bash run_compare.sh " + " ".join(targets)
    urls = {target: unseen(each) for target, each in data.items()}
    if len({*urls.values()}) > 1:
        listed = "; ".join(f"{t}: {url if data[t] else 'not told by its file'}" for t, url in urls.items())
        raise UserError(
            f"these tokenizers were not trained on the same pictures, so none are common to what training left out ({listed}). "
            f"Name the pictures to compare them on: {words} --data {urls[targets[0]]}"
        )
    return choose(urls[targets[0]], LEFT_OUT, f"{words} --data")


def with_one_protocol(overrides: list[str]) -> list[str]:
    """One protocol for all: ADM's, which measures most, unless another is named."""
    named = any(word.startswith("eval.protocol=") for word in overrides)
    return overrides if named else ["eval.protocol=adm", *overrides]


def options_for(options: argparse.Namespace, target: str, name: str, folder: Path) -> argparse.Namespace:
    """What run_eval_tokenizer.sh or run_eval_generator.sh would be told."""
    each = copy.copy(options)
    each.weights = each.target = target
    each.out, each.keep, each.infinity, each.write = str(folder / name.replace("/", "-")), True, False, None
    each.original = each.reconstructed = each.perturb = each.size = None
    each.url, each.raw, each.tokenizer = options.data, False, {}
    return each


def compare(options: argparse.Namespace, overrides: list[str], world: World) -> int:
    """Measure all and put them together. Collective; returns the exit code."""
    kind = prepare(options, overrides)
    folder = Path(
        options.out or "work_dirs/compare/" + "-".join(n.replace("/", "_") for n in names_of(options.targets))[:150]
    )
    with locked(folder, world):
        together = compare_tokenizers if kind == "tokenizer" else compare_generators
        together(options, with_one_protocol(overrides), folder, world)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------
def compare_tokenizers(options: argparse.Namespace, overrides: list[str], folder: Path, world: World) -> None:
    sides = []
    for target, name in zip(options.targets, names_of(options.targets)):
        world.say(f"--- {name}")
        each = options_for(options, target, name, folder)
        measurement = by_tokenizer(each, overrides, world)
        with_some_lpips(measurement, world.device)
        measurement.run()
        if options.probe:
            assert isinstance(measurement.tokenizer, Tokenizer)
            probe(each, Path(each.out) / "probe", features_fingerprint(measurement.tokenizer), world)
        found, missing = instances.measure(each, measurement, Path(each.out), world)
        if world.is_main:
            side = measured(name, Path(each.out), measurement, options, world.device)
            side.instances, side.left_out = found, side.left_out | missing
            side.scores |= found.scores() if found else {}
            sides.append(side)
    if world.is_main:
        write_tokenizers(options, overrides, folder, sides, world.device)


def with_some_lpips(measurement: Reconstructions, device: torch.device) -> None:
    """Where the weights of the published LPIPS are not here, the one that comes with the code, under its own name."""
    if "lpips" in measurement.left_out:
        name, metric = lpips_metric(lpips_squeeze().to(device))
        measurement.how.metrics[name] = metric
        measurement.job["lpips"] = name


def probe(options: argparse.Namespace, folder: Path, encoding: str, world: World) -> None:
    """Accuracies of a linear classifier on the latents, where they are not there yet. Collective.

    Args:
        encoding: evaluation.probe.features_fingerprint.
    """
    each = copy.copy(options)
    each.url, each.out, each.features, each.encode_batch = options.probe, str(folder), None, 64
    each.again = True
    each.epochs, each.batch, each.lr, each.weight_decay, each.schedule, each.seed = None, 256, 1e-3, 1e-4, "cosine", 0
    train, val = open_sources(options.probe)

    def is_there() -> bool:
        if options.again or not (record := folder / "metrics.json").is_file():
            return False
        return not changed_facts(read_json(record)["context"]["job"], job_of(each, encoding, train, val))

    if not world.on_main(is_there):
        linear_probe(each, train, val, world)


def measured(
    name: str, folder: Path, measurement: Reconstructions, options: argparse.Namespace, device: torch.device
) -> Side:
    """What is in the folder of one tokenizer, and its speed."""
    record = read_json(folder / "metrics.json")["context"]
    tensors = load_file(folder / PER_PICTURE)
    scores = record["scores"]
    if (accuracies := folder / "probe" / "metrics.json").is_file():
        probed = read_json(accuracies)["context"]["scores"]
        scores |= {key: score for key, score in probed.items() if not key.endswith("best_epoch")}
    assert isinstance(measurement.tokenizer, Tokenizer)
    return Side(
        name,
        folder,
        measurement,
        scores,
        record["left_out"],
        {key.removeprefix("picture/"): t for key, t in tensors.items() if key.startswith("picture/")},
        tensors.get("codes"),
        trained_on(measurement.job["weights"]),
        noted_speeds(folder / "speeds.json", measurement.tokenizer, device, options),
        None,
    )


def trained_on(target: str) -> str:
    """The pictures that a tokenizer has seen, as far as its weights tell."""
    return training_data(tokenizer_section(target)["weights"]).get("url") or "not told by its file"


@dataclass(frozen=True)
class Pair:
    """How `name` differs from `base` in a metric, over the same pictures."""

    name: str
    base: str
    metric: str
    difference: Difference
    sizes: tuple[int, int]  # of the pictures of both, in pixels

    def row(self) -> list[str]:
        """For people."""
        d, (size, base_size) = self.difference, self.sizes
        verdict = d.verdict if size == base_size else f"not the same scale: {size} px, {base_size} px"
        return [f"{self.name} - {self.base}", self.metric, f"{d.mean:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}", verdict]


def differences(sides: list[Side]) -> list[Pair]:
    """Of each tokenizer after the first against the first: means of pictures, and distances that have replicates."""
    first, pairs = sides[0], []
    for other in sides[1:]:
        metrics = {
            metric: paired_difference(other.per_picture[metric], first.per_picture[metric])
            for metric in other.per_picture.keys() & first.per_picture.keys()
        }
        for metric in other.scores.keys() & first.scores.keys():
            ours, theirs = other.scores[metric], first.scores[metric]
            drawn = len(ours.get("replicates") or ()), len(theirs.get("replicates") or ())
            if drawn[0] == drawn[1] > 1:
                values = (ours["value"], ours["replicates"], theirs["value"], theirs["replicates"])
                metrics[metric] = distance_difference(*values)
        sizes = other.tokenizer.image_size, first.tokenizer.image_size
        if other.instances and first.instances:
            metrics |= dict(instances.differences(other.instances, first.instances))
        pairs += [Pair(other.name, first.name, metric, metrics[metric], sizes) for metric in sorted(metrics)]
    return pairs


def about_differences(sides: list[Side]) -> str:
    """How certain those of Frechet distances are, or why there are none."""
    drawn = {len(score["replicates"]) for side in sides for score in side.scores.values() if score.get("replicates")}
    if not drawn:
        return "Of rFID there is no paired difference without replicates: --bootstrap 20, with --again if it was measured without."
    return (
        f"Of Fréchet distances: 1.96 deviations of {max(drawn)} replicates, in each of which both tokenizers are measured on the "
        "same pictures, drawn again. Few pictures make both distances too large by about the same; what does not cancel of "
        "that is in the difference, so compare differences of equal numbers of pictures only."
    )


def fairness(side: Side) -> list[Any]:
    """What has to be alike for numbers to be comparable."""
    tokenizer, how, job = side.tokenizer, side.measurement.how, side.measurement.job
    parameters = sum(p.numel() for p in tokenizer.parameters())
    rounding = how.protocol.reconstruction_rounding
    size = tokenizer.image_size
    return [
        side.name,
        side.trained_on,
        f"{size} px, centre crop",
        f"{job['count']:,}",
        rounding,
        f"{parameters / 1e6:.1f} M",
        str(tokenizer.spec),
        f"{tokenizer.spec.length:,}",
    ]


@torch.no_grad()
def disputed(sides: list[Side]) -> Tensor | None:
    """A row per region: the original, then every tokenizer; (3, H, W) uint8."""
    if "psnr" not in sides[0].per_picture:
        return None
    spread = torch.stack([side.per_picture["psnr"] for side in sides]).std(0)
    candidates = []
    for i in spread.topk(min(CANDIDATES, len(spread))).indices.tolist():
        pairs = [next(iter(side.measurement.rebuild(range(i, i + 1)))) for side in sides]
        recons = [pair.recon[0].cpu() for pair in pairs]
        place = most_disputed(recons)
        original = max((pair.original[0].cpu() for pair in pairs), key=lambda picture: picture.shape[-1])
        crops = [region(picture, place) for picture in (original, *recons)]
        worth = float(torch.stack(crops[1:]).float().var(0, unbiased=False).mean())
        candidates.append((worth, i, crops))
    candidates.sort(key=lambda entry: (-entry[0], entry[1]))
    return grid(torch.stack([crop for _, _, crops in candidates[:REGIONS] for crop in crops]), columns=1 + len(sides))


def write_tokenizers(
    options: argparse.Namespace, overrides: list[str], folder: Path, sides: list[Side], device: torch.device
) -> None:
    """compare.csv, compare.tex, metrics.json, report.html."""
    protocol = protocols.get(eval_settings(overrides, "--data").protocol, "reconstruction")
    net = sides[0].measurement.how.feature_net
    report = Report(
        "Tokenizers compared", f"protocol {protocol.name}, features of {net.name}, pictures of {options.data}"
    )
    headers = ["tokenizer", "trained on", "resolution, crop", "pictures", "rounding", "parameters", "latents", "tokens"]
    report.add_table("What is being compared", headers, [fairness(side) for side in sides])
    if len({side.tokenizer.image_size for side in sides}) > 1:
        report.add_text(
            "",
            "The tokenizers work at different resolutions: each is compared with its own crops, and PSNR, SSIM and LPIPS of different resolutions are not the same scale.",
        )
    quality = [name for name in dict.fromkeys(n for side in sides for n in side.scores) if not name.startswith(CODES)]
    numbers = {side.name: side.numbers() for side in sides}
    shown = [name for name in quality if not name.startswith((PROBE, *instances.METRICS))]
    report.add_table("Quality, with 95 % intervals", ["tokenizer", *shown], rows_of(numbers, shown))
    pairs = differences(sides)
    report.add_table(
        "Paired differences", ["", "metric", "difference", "95 % interval", "says"], [pair.row() for pair in pairs]
    )
    report.add_text("", about_differences(sides))
    report.add_table("Rate", ["tokenizer", "bpp", "entropy_coded_bpp"], rows_of(numbers, ["bpp", "entropy_coded_bpp"]))
    report.add_text(
        "",
        f"bpp: log2 V of each code, or {SAMPLE_BITS} bits for each number of continuous latents, divided by the pixels. entropy_coded_bpp: an ideal coder that knows how often each code of a branch and scale occurs in these pictures.",
    )
    for metric in ("psnr", *(name for name in quality if name.startswith(("rfid", "rfd")))):
        points = {
            side.name: [(side.rates()["bpp"], side.scores[metric]["value"])] for side in sides if metric in side.scores
        }
        bars = {
            s.name: [(s.rates()["bpp"], *s.scores[metric]["interval"])]
            for s in sides
            if s.scores.get(metric, {}).get("interval")
        }
        report.add_curves(f"{metric} over bits per pixel", points, None, "bits per pixel", bars)
    if options.probe:
        report.add_table("Linear probe, top-1", ["tokenizer", "features", "accuracy"], probe_rows_of(sides))
    found = {side.name: side.instances for side in sides if side.instances is not None}
    instances.show(report, found, [side.measurement for side in sides])
    if rows := speed_rows({side.name: side.speeds for side in sides}):
        report.add_table(
            f"Speed on {device_name(device)}, fp32, eager",
            ["tokenizer", "", "batch", "img/s", "latency, ms", "memory, GB"],
            rows,
        )
    if (picture := disputed(sides)) is not None:
        report.add_image(
            "Where they disagree most",
            picture,
            "A row per region: the original, then " + ", ".join(s.name for s in sides) + ".",
        )
    headers = ["tokenizer", "branch, scale", *USE]
    report.add_table(
        "Codebooks, by branch and scale", headers, [row for side in sides for row in codebook_rows_of(side)]
    )
    left_out = left_out_of({side.name: side.left_out for side in sides})
    report.add_table("Left out", ["what", "why"], [[name, why] for name, why in left_out.items()])
    report.add_environment(environment()).write(folder / "report.html")
    write_tables(
        folder,
        numbers,
        [*(name for name in quality if not name.endswith(instances.BY_SIZE)), "bpp", "entropy_coded_bpp"],
    )
    write_differences(folder, pairs)
    context = {
        "count": sides[0].measurement.count,
        "net": net.name,
        "protocol": protocol.name,
        "left_out": left_out,
        "targets": options.targets,
    }
    write_values(folder, numbers, context)
    print(f"written to {folder}: report.html, compare.csv, compare.tex, differences.csv, differences.tex, metrics.json")


def left_out_of(reasons: dict[str, dict[str, str]]) -> dict[str, str]:
    """What is missing -> why: once where nobody has it for the same reason, else with the names of those.

    Args:
        reasons: name of a tokenizer or generator -> what is missing -> why.
    """
    lacking: dict[tuple[str, str], list[str]] = {}
    for name, of in reasons.items():
        for what, why in of.items():
            lacking.setdefault((what, why), []).append(name)
    return {
        what if len(names) == len(reasons) else f"{', '.join(names)}: {what}": why
        for (what, why), names in lacking.items()
    }


def probe_rows_of(sides: list[Side]) -> list[list[str]]:
    """A row per tokenizer and feature; tokenizers have different ones."""
    return [
        [side.name, name.removeprefix(PROBE), f"{score['value']:.1%}"]
        for side in sides
        for name, score in side.scores.items()
        if name.startswith(PROBE)
    ]


def codebook_rows_of(side: Side) -> list[list[Any]]:
    """A row per branch and scale; "" is the only codebook, a branch without a scale is all of its scales."""
    places = [name.removeprefix(CODES + USE[0]) for name in side.scores if name.startswith(CODES + USE[0])]
    values = [[f"{side.scores[f'{CODES}{use}{place}']['value']:.4g}" for use in USE] for place in places]
    return [[side.name, place.strip("_").replace("_", ", ") or "all", *row] for place, row in zip(places, values)]


def rows_of(numbers: Numbers, metrics: list[str]) -> list[list[str]]:
    """A row per name."""

    def cell(name: str, metric: str) -> str:
        if metric not in numbers[name]:
            return NOTHING
        value, low, high = numbers[name][metric]
        return with_interval(value, None if low is None or high is None else (low, high))

    return [[name, *(cell(name, metric) for metric in metrics)] for name in numbers]


def write_tables(folder: Path, numbers: Numbers, metrics: list[str]) -> None:
    """compare.csv with everything, a line a number; compare.tex with `metrics`, a row a name."""
    rows = [(name, metric, *value) for name, of in numbers.items() for metric, value in of.items()]
    write_csv(folder / "compare.csv", ["name", "metric", "value", "low", "high"], rows)
    write_atomic(folder / "compare.tex", tabular(["", *metrics], rows_of(numbers, metrics)))


def write_values(folder: Path, numbers: Numbers, context: dict[str, Any]) -> None:
    """metrics.json."""
    values = {name: {metric: value for metric, (value, _, _) in of.items()} for name, of in numbers.items()}
    write_metrics(folder / "metrics.json", values, context)


def write_differences(folder: Path, pairs: list[Pair]) -> None:
    """differences.csv and differences.tex, a line a difference."""
    rows = [(p.name, p.base, p.metric, p.difference.mean, p.difference.low, p.difference.high) for p in pairs]
    write_csv(folder / "differences.csv", ["name", "minus", "metric", "value", "low", "high"], rows)
    headers = ["", "metric", "difference", "95 % interval", ""]
    write_atomic(folder / "differences.tex", tabular(headers, [pair.row() for pair in pairs], 2))


# ---------------------------------------------------------------------------------------------------------------------
# Generators
# ---------------------------------------------------------------------------------------------------------------------
def compare_generators(options: argparse.Namespace, overrides: list[str], folder: Path, world: World) -> None:
    """Samples of each under one protocol."""
    numbers: Numbers = {}
    facts, reasons, net = [], {}, ""
    report = Report(
        "Generators compared", f"protocol {eval_settings([o for o in overrides if o.startswith('eval.')]).protocol}"
    )
    for target, name in zip(options.targets, names_of(options.targets)):
        world.say(f"--- {name}")
        each = options_for(options, target, name, folder)
        generated_samples(each, overrides, world).run()
        if not world.is_main:
            continue
        context = read_json(Path(each.out) / "metrics.json")["context"]
        numbers[name] = numbers_of(context["scores"])
        reasons[name] = context["left_out"]
        net = context["net"]
        sampling = ", ".join(f"{key} {value}" for key, value in context["sample"].items())
        facts.append(
            [
                name,
                f"{context['count']:,}",
                context["labels"],
                context["rounding"],
                context["reference"],
                context["precision"]["features"],
                sampling,
            ]
        )
    if not world.is_main:
        return
    metrics = list(dict.fromkeys(metric for of in numbers.values() for metric in of))
    report.add_table(
        "What is being compared",
        ["generator", "samples", "labels", "rounding", "reference", "features in", "sampling"],
        facts,
    )
    report.add_table(
        f"Quality, with 95 % intervals (features of {net})", ["generator", *metrics], rows_of(numbers, metrics)
    )
    for name in names_of(options.targets):
        path = folder / name.replace("/", "-") / "samples.png"
        if path.is_file():
            report.add_image(name, Image.open(path), "The first samples.")
    left_out = left_out_of(reasons)
    report.add_table("Left out", ["what", "why"], [[what, why] for what, why in left_out.items()])
    report.add_environment(environment()).write(folder / "report.html")
    write_tables(folder, numbers, metrics)
    write_values(folder, numbers, {"net": net, "left_out": left_out, "targets": options.targets})
    print(f"written to {folder}: report.html, compare.csv, compare.tex, metrics.json")
