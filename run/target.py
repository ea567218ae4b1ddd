"""From what a user names to a finished generator with its tokenizer, latent statistics, guidance and sampling options.

    read_target("work_dirs/my_run", ["sample.scale=1.5"])
    read_target("reAR-L.safetensors", [])                       a released file, as its number was published
    read_target("configs/rear/rear_l.yaml", [])                 the run that this config trained
    read_target("my_file.pt", ["tokenizer.weights=pretrained_models/RecTok_decft.pth"])

Overrides are keys of the config, and win. A run brings its own config. A released file, told by its name, has the recipe
and the settings that core/weights/released.toml lists; for other files tokenizer.weights is needed, and sample.*, eval.*,
seed, data.* start from their defaults. A config whose run is not there stands for the released file that belongs to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import config as config_module
from core.config import to_plain
from core.dist import World
from core.errors import UserError
from core.files import ROOT
from core.nn.gated_norm import triton_works
from core.nn.precision import bf16_products
from core.rng import Draws
from core.schema import RunConfig, SampleConfig
from core.specs import Continuous, DataSource, Generator, Tokenizer
from core.train.checkpoint import Checkpoint
from core.train.parallel import compile_blocks
from core.weights import released
from core.weights.adapter import recognise
from core.weights.files import WeightFile
from data.sources import open_source
from generator.engine import Sampled
from generator.settings import guide_of
from generator.task import GeneratorTask
from run import streaming
from run.latent_stats import measure_once
from run.load import IMAGENET_CLASSES, REGISTRIES, Pair, build_pair, lay_out_pair, load_config, statistics_file
from run.sharing import names_of_classes, paired_tokenizer
from run.weights import ADAPTERS, Source, commits_of, read_weights

Log = Callable[[str], None]
COMPILED_BATCHES = 16  # from so many on compiling costs less than it saves on a GPU


@dataclass
class Target:
    """What is to be sampled, before any network is loaded.

    Attributes:
        named: the generator's weights by the config, "" where the target itself is weights.
        sources: "generator.weights", "tokenizer.weights" and, where one is used, "sample.guide".
    """

    config: RunConfig
    named: str
    sources: dict[str, Source]

    @property
    def weights(self) -> str:
        """Of the generator, as they are named in records."""
        return self.named or str(self.sources["generator.weights"].path)


@dataclass
class Sampler:
    """A finished generator, ready to sample. `facts` name the weights, for records; `class_names` are [] where unknown."""

    config: RunConfig
    task: GeneratorTask
    facts: dict[str, Any]
    class_names: list[str] = field(default_factory=list)

    @property
    def generator(self) -> Generator:
        return self.task.generator

    @property
    def tokenizer(self) -> Tokenizer:
        return self.task.tokenizer

    @property
    def image_size(self) -> int:
        return self.tokenizer.image_size

    @property
    def num_classes(self) -> int:
        return self.task.num_classes

    @property
    def bf16(self) -> bool:
        return self.config.train.precision == "bf16"

    def tuned(self, changes: list[str], source: str = "sampling settings") -> Sampler:
        """The same networks with other keys of the config's `sample` section, which are checked as those of a config are.

        Args:
            changes: "sample.scale=2" ...; sample.guide and sample.guidance would need other networks.
        """
        config = config_module.override(lambda: to_plain(self.config), changes, REGISTRIES, source)
        return replace(self, config=config, task=self.task.tuned(config.sample))

    def prepare(self, batches: int, device: torch.device) -> bool:
        """Compile what runs so often, if `sample.compile` wants it: whether it does. The first batch then takes a minute
        longer."""
        wanted = self.config.sample.compile
        if wanted == "auto":
            wanted = device.type == "cuda" and batches >= COMPILED_BATCHES and triton_works(device)
        if not wanted:
            return False
        for generator in (self.generator, self.task.guidance.guide):
            if isinstance(generator, Sampled):
                generator.compiled = True
        compile_blocks(self.tokenizer)
        return True

    @torch.no_grad()
    def sample(self, labels: Tensor, draws: Draws) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of the classes `labels`, in the precision of the config."""
        with bf16_products(labels.device, self.bf16):
            return self.task.sample(self.generator, labels, draws)

    def stream(
        self, labels: Tensor, draws: Draws, show: Callable[[int, Tensor], None] | None = None
    ) -> streaming.Streamed:
        """The same pictures, with what can be seen of them while their codes are being made."""
        with bf16_products(labels.device, self.bf16):
            return streaming.stream(self.task, labels, draws, show)

    def watch(self, labels: Tensor, draws: Draws, show: Callable[[Tensor], None]) -> Tensor:
        """The same pictures, with looks at them on their way, whatever tokenizer and generator are: streaming.watch."""
        with bf16_products(labels.device, self.bf16):
            return streaming.watch(self.task, labels, draws, show)


# ---------------------------------------------------------------------------------------------------------------------
# The config
# ---------------------------------------------------------------------------------------------------------------------
def read_target(
    target: str, overrides: list[str], log: Log = lambda _: None, find: Callable[[str, str], Source] = Source
) -> Target:
    """The config of a target and where its weights are. No network is loaded.

    Args:
        target: a config file, a run folder, a checkpoint, a released file, or hf://owner/repository/file.
        overrides: config keys; `generator.weights=` names other weights than the target's own.
        log: is told what was chosen for the user.
        find: functools.cache(Source) for several targets that must share weights, where a living run may have newer ones.
    """
    sources: dict[str, Source] = {}
    if target.endswith((".yaml", ".yml")):
        config = load_config(target, overrides)
        named = (config.generator or {}).get("weights") or _run_of(target, config, overrides, log)
    else:
        itself = find(target, "generator")
        config = _config_of(itself, overrides, sources, log, find)
        named = (config.generator or {}).get("weights") or ""
        if not named:
            sources["generator.weights"] = itself
    if config.task != "generator":
        raise UserError(
            f"{target} is about a {config.task}; a generator was asked for. "
            "Tokenizers are measured with run_eval_tokenizer.sh."
        )
    if not config.tokenizer.get("weights"):
        raise UserError(f"{target}: say which tokenizer decodes its latents: tokenizer.weights=work_dirs/RUN")
    references = {
        "generator.weights": named,
        "tokenizer.weights": config.tokenizer["weights"],
        "sample.guide": guide_of(config.sample),
    }
    for setting, reference in references.items():
        if reference and setting not in sources:
            sources[setting] = find(reference, "tokenizer" if setting == "tokenizer.weights" else "generator")
    return Target(config, named, sources)


def _run_of(target: str, config: RunConfig, overrides: list[str], log: Log) -> str:
    """The run of a config, or, where it was never trained, the newest released file of that recipe that is here."""
    if config.run_dir.exists() or any(o.startswith(("name=", "work_dir=")) for o in overrides):
        return str(config.run_dir)
    files = [
        file
        for file in released.table()
        if file.recipe and (ROOT / file.recipe).resolve() == Path(target).resolve() and config.task == "generator"
    ]
    here = [file for file in files if file.place.is_file()]
    if here:
        log(f"there is no run {config.run_dir}: using {here[-1].place}, released for this config")
        return str(here[-1].place)
    advice = f"fetch released weights (bash run_download.sh {files[-1].name}), " if files else ""
    raise UserError(f"there is no run {config.run_dir} yet. Train it, {advice}or give --weights FILE_OR_RUN.")


def _config_of(
    source: Source, overrides: list[str], sources: dict[str, Source], log: Log, find: Callable[[str, str], Source]
) -> RunConfig:
    """The config that belongs to a checkpoint or a file of generator weights; adds to `sources` what it has to open."""
    path = source.path
    if path.is_dir():
        assert isinstance(source.content, Checkpoint)
        trained = copy.deepcopy(source.content.state["config"])
        return config_module.override(lambda: trained, overrides, REGISTRIES, source=source.reference)
    file = released.find(path)
    if file is None or not file.recipe:
        smallest = _smallest_config(source, overrides, sources, find)
        return config_module.override(lambda: smallest, overrides, REGISTRIES, source=source.reference)
    config = load_config(str(ROOT / file.recipe), [f"name={path.stem}", *file.settings, *overrides])
    config.tokenizer["weights"] = _beside(config.tokenizer.get("weights"), path)
    config.sample.guide = _beside(config.sample.guide, path)
    if config.task == "generator":
        plain, sample = asdict(SampleConfig()), asdict(config.sample)
        log(
            f"{path.name} as {file.recipe} says: tokenizer {config.tokenizer.get('weights')}, protocol "
            f"{config.eval.protocol}, "
            + ", ".join(f"{key} {value}" for key, value in sample.items() if value != plain[key])
            + (f". Published: {file.published}." if file.published else ".")
        )
    return config


def _beside(reference: str | None, path: Path) -> str | None:
    """`reference`, or the file of that name in the folder of `path` where there is no such file otherwise."""
    if not reference or "://" in reference or Path(reference).exists():
        return reference
    beside = path.parent / Path(reference).name
    return str(beside) if beside.is_file() else reference


def _smallest_config(
    source: Source, overrides: list[str], sources: dict[str, Source], find: Callable[[str, str], Source]
) -> dict[str, Any]:
    """The smallest config around a file; what training would need is filled in and never used."""
    stated = config_module.read_overrides([o for o in overrides if o.startswith(("generator.", "tokenizer."))])
    tokenizer, generator = stated.get("tokenizer", {}), stated.get("generator", {})
    about = source.content.about if isinstance(source.content, WeightFile) else {}
    beside = {}
    if tokenizer.get("weights"):
        sources["tokenizer.weights"] = find(tokenizer["weights"], "tokenizer")
    elif about.get("tokenizer"):
        beside = {**about["tokenizer"]["section"], "weights": paired_tokenizer(source.path, about["tokenizer"])}
        sources["tokenizer.weights"] = find(beside["weights"], "tokenizer")
    elif isinstance(source.content, dict) and recognise(ADAPTERS["tokenizer"], source.content):
        beside = {"weights": str(source.path)}  # VAR's trainer keeps its tokenizer beside it
        sources["tokenizer.weights"] = source
    else:
        raise UserError(
            f"{source.reference} is a file of generator weights, and no released one by its name. Say which tokenizer "
            "decodes its latents: tokenizer.weights=pretrained_models/FILE"
        )
    noted = about.get("config", {})
    codes = read_weights("tokenizer", sources["tokenizer.weights"], tokenizer).settings
    sizes = {key: codes[key] for key in ("branches", "scales") if key in codes}  # no VAR tells them itself
    return {
        "name": source.path.stem,
        "task": "generator",
        "tokenizer": beside,
        "generator": read_weights("generator", source, {**sizes, **generator}).settings,
        "data": noted.get("data") or {"url": "folder://data/imagenet/train", "val_url": "folder://data/imagenet/val"},
        "sample": noted.get("sample") or {},
        "eval": noted.get("eval") or {},
        "train": {
            "duration": "0ep",
            "global_batch": 1,
            "optimizer": {"lr": 0.0},
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# The networks
# ---------------------------------------------------------------------------------------------------------------------
def open_generator(target: Target, world: World, keep: bool = False) -> Sampler:
    """Load it, on the world's device. Collective.

    Args:
        keep: leave its files open, for another target that shares them.
    """
    config, sources = target.config, target.sources
    assert config.generator is not None
    for source in sources.values():
        source.follow(world)
    pair = build_pair(config, sources=sources)
    facts = {
        "weights": target.weights,  # what was really opened
        "use_ema": config.generator.get("use_ema", True),
        "tokenizer": config.tokenizer["weights"],
        "tokenizer_fingerprint": pair.tokenizer.fingerprint,
    }
    if pair.lacks_statistics:
        # parity: no released generator carries the statistics of its latents
        source = _pictures_for_statistics(config, target.weights)
        measure_once(config, pair.tokenizer, source, world)
        facts["latent_statistics"] = f"measured on {config.data.url}"
    facts["weights_fingerprint"] = pair.generator.fingerprint
    if commits := commits_of(sources):
        facts["commits"] = commits
    if pair.guide:
        facts |= {"guide": config.sample.guide, "guide_fingerprint": pair.guide.fingerprint}
    pair.to(world.device)
    sampler = _sampler(target, pair, facts)
    for source in () if keep else sources.values():
        source.close()
    return sampler


def _sampler(target: Target, pair: Pair, facts: dict[str, Any]) -> Sampler:
    """The classes are those of the generator, or of the pictures where it does not say."""
    config = target.config
    num_classes = pair.generator.settings.get("num_classes")
    num_classes = num_classes or open_source(config.data.url, config.data.split).num_classes
    names = names_of_classes(config, target.sources["generator.weights"], num_classes)
    return Sampler(config, pair.task(num_classes, config.sample), facts, names)


def lay_out(target: Target) -> Sampler:
    """What `open_generator` gives, on the meta device: for --check. UserError for what it would refuse, but for the values
    of weights, which are not read."""
    config, sources = target.config, target.sources
    sampler = _sampler(target, lay_out_pair(config, sources), {})
    if isinstance(sampler.tokenizer.spec, Continuous):
        constants = read_weights("generator", sources["generator.weights"], config.generator).constants
        section = config.tokenizer
        if not constants and not statistics_file(
            section, read_weights("tokenizer", sources["tokenizer.weights"], section)
        ):
            _pictures_for_statistics(config, target.weights)
    return sampler


def list_labels(target: Target) -> str:
    """A line for each class: its number and its name."""
    source = target.sources["generator.weights"]
    num_classes = read_weights("generator", source, target.config.generator).settings.get(
        "num_classes", IMAGENET_CLASSES
    )
    names = names_of_classes(target.config, source, num_classes)
    if not names:
        return f"classes 0 to {num_classes - 1}; their names are not known: give data.url of the pictures"
    return "\n".join(f"{i:5d}  {name}" for i, name in enumerate(names))


def _pictures_for_statistics(config: RunConfig, reference: str) -> DataSource:
    try:
        return open_source(config.data.url, config.data.split, config.data.exif)
    except UserError as error:
        raise UserError(
            f"{reference} comes without the statistics of the latents it models, and the pictures to measure them on are "
            f"not here ({error}) Measure them once on any pictures like ImageNet's: python -m scripts.latent_stats "
            f"{config.tokenizer['weights']} folder://data/imagenet/val --split val, or give data.url=URL."
        ) from None
