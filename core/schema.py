"""Every setting of a run: its type, its default, a line of help and the range it may have. A YAML's keys are these.

core/config.py reads files of them and reports what is wrong; `python -m scripts.train --help` prints them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from core.limits import Limits

if typing.TYPE_CHECKING:  # --help does without torch
    from core.specs import Progress


# ---------------------------------------------------------------------------------------------------------------------
# Durations: "200ep", "5000step", "1.5Mimg"
# ---------------------------------------------------------------------------------------------------------------------
class Duration(str):
    """A length of training with its unit: ep (epochs), step, img, kimg or Mimg. "0ep" and "never" are allowed."""

    PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(ep|step|img|kimg|Mimg)s?\s*$")

    def _parts(self) -> tuple[float, str]:
        """Number and unit."""
        number, unit = self.PATTERN.fullmatch(self).groups()  # pyright: ignore[reportOptionalMemberAccess] of `parse`
        return float(number), unit

    @classmethod
    def parse(cls, text: Any) -> Duration:
        if isinstance(text, str) and (text == "never" or cls.PATTERN.match(text)):
            return cls(text)
        raise ValueError('a duration such as "200ep", "5000step", "1.5Mimg" or "never"')

    def images(self, images_per_epoch: int, global_batch: int) -> int:
        """In images, rounded to the nearest whole step. "never" is 0."""
        if self == "never":
            return 0
        number, unit = self._parts()
        per_unit = {"ep": images_per_epoch, "step": global_batch, "img": 1, "kimg": 1_000, "Mimg": 1_000_000}[unit]
        return round(number * per_unit / global_batch) * global_batch

    def reached(self, progress: Progress) -> bool:
        """Whether a run has come this far. "never" is not reached."""
        if self == "never":
            return False
        number, unit = self._parts()
        per_unit = {"img": 1, "kimg": 1_000, "Mimg": 1_000_000}
        if unit in per_unit:
            return progress.images_seen >= number * per_unit[unit]
        return (progress.epoch if unit == "ep" else progress.step) >= number


def linear_scales(text: str) -> tuple[float, float]:
    """D-AR's notation "1.2,8.0" of a guidance that grows linearly: the first and the last scale; ValueError for others.

    parity: its sampler starts at 1.001 where 1 is asked for, since 1 would switch guidance off.
    """
    first, last = (float(part) for part in text.split(","))
    return (1.001 if first == 1 < last else first), last


def setting(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with a line of help and an allowed range. `...` as default makes it mandatory."""
    limits = None if low is None and high is None else Limits(low, high)
    metadata = {"help": help, "limits": limits, "required": default is ...}
    if dataclasses.is_dataclass(default):
        return field(default_factory=type(default), metadata=metadata)
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=None if default is ... else default, metadata=metadata)


# ---------------------------------------------------------------------------------------------------------------------
# The schema
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class DataConfig:
    url: str = setting(
        ..., "folder://DIR, list://FILE.txt?root=DIR, wds://SHARDS, embedded://emoji64, tokens://DIR (docs/data.md)"
    )
    split: str = setting("train", "split of sources that have several")
    val_url: str | None = setting(None, "pictures to evaluate on; embedded:// sources default to their own val split")
    pictures: str | None = setting(None, "the pictures behind a tokens:// url, for run_pretokenize.sh and references")
    crop: Literal["center", "random", "random_resized", "ten", "resize_center", "resize_random"] = setting(
        "center", "how pictures are brought to image_size; stored features and tokens: center, resize_center or ten"
    )
    flip: bool = setting(True, "mirror half of the pictures; crop: ten does so by itself")
    scale: list[float] = setting(
        [0.8, 1.0], "random: share of the short side kept; random_resized: of the area", low=0.001, high=1
    )
    crop_range: float = setting(1.1, "ten: how much larger than its crops the picture is", low=1, high=10)
    short_side: int | None = setting(
        None, "resize_center, resize_random: short side before the crop; null: image_size", low=1
    )
    resample: Literal["bicubic", "lanczos", "bilinear"] = setting("bicubic", "filter of resize_center, resize_random")
    workers: int = setting(4, "decoding processes per rank; 0 decodes in the main process", low=0)
    on_corrupt: Literal["replace", "raise"] = setting("replace", "what to do with a picture that cannot be read")
    max_corrupt: float = setting(
        0.05, "replace: share of the pictures that may be unreadable before the run stops", low=0, high=1
    )
    exif: bool = setting(False, "turn pictures as their EXIF orientation says; the original programs do not")
    cache_features: bool = setting(False, "compute teacher features once per picture and keep them on disk")
    cache_latents: bool = setting(False, "compute latents once per picture and train the generator on them")
    moments: str | None = setting(None, "folder of official pre-tokenised moments, <picture>.npz (RecTok)")
    cache_dir: str = setting("work_dirs/cache", "where those caches live; named by fingerprint, shared by runs")
    stats_images: int = setting(10_000, "pictures that latent statistics are measured on; 0: all", low=0)
    stats_split: Literal["train", "val"] = setting("train", "where those pictures come from")


@dataclass
class OptimizerConfig:
    base_lr: float | None = setting(None, "learning rate per 256 pictures: lr = base_lr * global_batch / 256", low=0)
    lr: float | None = setting(None, "learning rate as it is (give this or base_lr)", low=0)
    betas: list[float] = setting([0.9, 0.95], "AdamW moment decays")
    eps: float = setting(1e-8, "AdamW epsilon", low=1e-20)
    weight_decay: float = setting(
        0.0, "decoupled weight decay; networks name the parameters that are spared", low=0, high=1000
    )
    weight_decay_end: float | None = setting(
        None, "weight decay at the end of the run, reached along a cosine", low=0, high=1000
    )
    grad_clip: float = setting(1.0, "largest global gradient norm, per network; 0 turns clipping off", low=0)


@dataclass
class ScheduleConfig:
    kind: Literal["constant", "cosine", "linear", "exponential", "bent"] = setting(
        "constant", "shape of the decay to min_lr; bent: two lines that meet at `knee`"
    )
    warmup: Duration = setting(Duration("0ep"), "length of the linear rise from warmup_lr")
    min_lr: float = setting(0.0, "learning rate at the end of the decay", low=0)
    decay_start: Duration | None = setting(None, "start of the decay; default: end of the warm-up")
    decay_end: Duration | None = setting(None, "end of the decay; default: end of the run")
    warmup_lr: float = setting(0.0, "learning rate at the start of the warm-up", low=0)
    warmup_from: Duration = setting(Duration("0ep"), "when the warm-up starts; before it warmup_lr holds")
    inclusive: bool = setting(False, "the last step, not the one after it, has min_lr")
    hold: float = setting(0.0, "share of the decay during which the rate still stays at its peak", low=0, high=0.99)
    knee: float = setting(0.5, "where the two lines of kind bent meet, as a share of the decay", low=0.01, high=0.99)
    every: Duration | None = setting(None, "the rate changes only so often (1ep: once per epoch); default: each step")


@dataclass
class NetworkConfig:
    """How one network is trained when it differs from the others."""

    optimizer: OptimizerConfig = setting(OptimizerConfig(), "AdamW")
    schedule: ScheduleConfig = setting(ScheduleConfig(), "learning rate as a function of images seen")


@dataclass
class LoraConfig:
    """Low-rank changes of a generator's weights."""

    rank: int = setting(8, "of the change of each weight", low=1)
    alpha: float = setting(8.0, "the change is alpha / rank times its two factors", low=0.01)


@dataclass
class TrainConfig:
    duration: Duration = setting(..., "length of the run")
    global_batch: int = setting(..., "pictures per optimiser step over all ranks; the recipe, not the hardware", low=1)
    micro_batch: int = setting(0, "most pictures per rank and forward pass; gradients accumulate. 0: no limit", low=0)
    optimizer: OptimizerConfig = setting(OptimizerConfig(), "AdamW")
    schedule: ScheduleConfig = setting(ScheduleConfig(), "learning rate as a function of images seen")
    discriminator: NetworkConfig | None = setting(None, "optimizer and schedule of the discriminator; null: as above")
    ema: list[float] = setting([0.999], "decays of the moving averages of the weights; the first is evaluated")
    ema_warmup: bool = setting(False, "let the decays grow from 0, as n / (n + 9) of n steps")
    init_from: str | None = setting(None, "start from these weights: run folder, checkpoint, file or hf://")
    new_classes: str | None = setting(
        None,
        'rows of a generator\'s classes on new data: "mean" of those in init_from, or "from:NAME,..." one for each',
    )
    trunk_lr: float = setting(1.0, "learning rate of all but the class rows of a generator, as a share", low=0, high=1)
    lora: LoraConfig | None = setting(
        None, "of a generator's weights in init_from train the class rows and low-rank changes of its blocks alone"
    )
    freeze: list[str] = setting(
        [],
        "parameters that are not trained, by name or pattern: [encoder.*]; from init_from they are the averaged ones",
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes CUDA where there is one")
    precision: Literal["fp32", "bf16"] = setting("bf16", "of matrix products; losses, norms and weights stay fp32")
    tf32: bool | None = setting(
        None,
        "what stays fp32 may run in TF32 on a GPU, but for the search of codes; null: convolutions alone, torch's default",
    )
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "ddp: whole weights on every rank; fsdp: a part each (generators)"
    )
    compile: bool = setting(False, "torch.compile every block")
    activation_checkpointing: bool = setting(False, "recompute blocks in backward: less memory, a third slower")
    deterministic: bool = setting(False, "deterministic kernels: bit-equal reruns on a GPU too, slower")
    sync_batch_norm: bool = setting(True, "batch statistics over all ranks, so that the rank count changes nothing")
    log_every: Duration = setting(Duration("50step"), "metrics.jsonl and progress line")
    preview_every: Duration = setting(Duration("never"), "sample grid in samples/")
    eval_every: Duration = setting(Duration("never"), "online evaluation")
    checkpoint_every: Duration = setting(Duration("1ep"), "how much a crash may cost")
    keep_checkpoints: int = setting(3, "newest ones to keep", low=1)
    keep_best: str | None = setting(
        None, "keep the checkpoint where this metric of eval_every was best; its name or how it begins (rfid)"
    )
    milestone_every: Duration = setting(Duration("never"), "checkpoints that are never deleted")
    time_limit_minutes: float = setting(0.0, "save and exit with code 75 after this long; 0: no limit", low=0)
    rank_timeout: float = setting(5.0, "minutes for which a step waits for a rank that does not come", low=0.1)
    max_nonfinite_steps: int = setting(20, "give up after so many bad steps in a row", low=1)


@dataclass
class EvalConfig:
    num_images: int = setting(
        0,
        "pictures to measure; 0: the val split of a tokenizer, 512 samples while a generator trains, 50,000 by a command",
        low=0,
    )
    batch: int = setting(
        0, "pictures per forward pass; 0: as many as a GPU's free memory surely holds, 64 on a CPU", low=0
    )
    compile: Literal["auto", "always", "never"] = setting(
        "auto",
        "torch.compile a tokenizer whose reconstructions are measured; auto: on a GPU, for 5,000 of a rank or more",
    )
    network: str = setting("auto", "feature network: inception, lite0 (offline stand-in), auto, or a file of weights")
    protocol: str = setting(
        "adm", "what is measured and how, by the name of a published evaluation (docs/evaluation.md)"
    )
    reference: str | None = setting(
        None, "statistics of real pictures; default: of the training set, or the protocol's file"
    )
    labels: str | None = setting(None, "classes of samples: balanced, random, val or a file; default: the protocol's")
    rounding: Literal["nearest", "truncate", "plus128"] | None = setting(None, "to uint8; default: the protocol's")


@dataclass
class SampleConfig:
    """Guidance comes first; the keys after it go to the generator's `sample`, which names those it understands."""

    scale: float | list[float] | str = setting(
        1.0, "guidance scale, one per codebook, or from,to (linear); 1 is none", low=0
    )
    guidance: Literal["cfg", "auto"] = setting("cfg", "cfg: against no class; auto: against a weaker model (guide)")
    interval: list[float] = setting([0.0, 1.0], "guide only while t is inside", low=0, high=1)
    guide: str | None = setting(None, "weights of the weaker model of guidance: auto")
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", "of the scale, from first token to last")
    start: float = setting(1.0, "scale of the first token of schedule: linear", low=0)
    power: float = setting(1.0, "exponent of schedule: cosine", low=0)
    steps: int | None = setting(None, "points of a diffusion sampler's time grid", low=2)
    cuda_graph: bool | None = setting(
        None, "CUDA graphs of DiT^DH's steps (default: up to 16 labels), of VAR's scales (up to 64)"
    )
    compile: bool | Literal["auto"] = setting(
        "auto", "torch.compile the blocks of DiT^DH's steps and of decoding; auto: on a GPU, from 16 batches on"
    )
    temperature: float | list[float] | None = setting(None, "of the softmax over codes, or one per codebook", low=0)
    top_k: int | list[int] | None = setting(
        None, "sample among the k likeliest codes, or one per codebook; 0: all", low=0
    )
    shared: int | None = setting(None, "the first so many codes of all samples are those of the first one", low=0)
    top_p: float | list[float] | None = setting(
        None, "sample among the likeliest codes that make up p, or per codebook; 0: all", low=0, high=1
    )

    GUIDANCE: ClassVar[tuple[str, ...]] = ("scale", "guidance", "interval", "guide", "schedule", "start", "power")
    SPEED: ClassVar[tuple[str, ...]] = ("compile",)  # changes no picture

    def __post_init__(self):
        if isinstance(self.scale, str):  # D-AR's notation, turned into what the rest of the code knows
            with contextlib.suppress(ValueError):  # reported later, with everything else
                self.start, self.scale = linear_scales(self.scale)
                self.schedule = "linear"

    def options(self) -> dict[str, Any]:
        """What was set beyond guidance: keyword arguments of the generator's `sample`."""
        return {name: value for name, value in self.facts().items() if name not in self.GUIDANCE}

    def facts(self) -> dict[str, Any]:
        """What was set and what pictures depend on, for records."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.SPEED}
        return {name: value for name, value in settings.items() if value is not None}


@dataclass
class LogConfig:
    wandb: bool = setting(False, "also log to Weights & Biases (WANDB_MODE=offline works)")
    wandb_project: str = setting("tessera", "its project")
    wandb_entity: str | None = setting(None, "its entity")
    tensorboard: bool = setting(False, "also write tensorboard event files")
    trackio: bool = setting(False, "also log to trackio, on this machine or in TRACKIO_SPACE_ID")
    trackio_project: str = setting("tessera", "its project")


@dataclass
class RunConfig:
    name: str = setting(..., "of the run: its folder in work_dir")
    task: Literal["tokenizer", "generator"] = setting(..., "what is trained")
    work_dir: str = setting("work_dirs", "folder of all runs")
    seed: int = setting(0, "of every random draw", low=0)
    tokenizer: Annotated[dict, "tokenizer"] = setting(
        ..., "name and arguments, or only `weights`; `use_ema`, `latent_stats`"
    )
    generator: Annotated[dict, "generator"] | None = setting(None, "name and arguments")
    objective: Annotated[dict, "objective"] | None = setting(None, "losses of a tokenizer")
    discriminator: Annotated[dict, "discriminator"] | None = setting(None, "name and arguments")
    teachers: Annotated[dict, "teacher", "table"] = setting({}, "frozen feature networks: name -> arguments")
    data: DataConfig = setting(..., "pictures")
    train: TrainConfig = setting(..., "the loop")
    eval: EvalConfig = setting(EvalConfig(), "online and final evaluation")
    sample: SampleConfig = setting(SampleConfig(), "how previews and evaluations sample")
    log: LogConfig = setting(LogConfig(), "extra sinks")

    @property
    def run_dir(self) -> Path:
        return Path(self.work_dir) / self.name
