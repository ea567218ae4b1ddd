"""The objects through which tokenizers, generators, data and the trainer meet. Read this file first.

A tokenizer turns images into latents and back; a generator models latents; a task says what one training step of
either computes; a data source is a random-access list of samples. None of them imports another: `run/` builds
them and hands them over. Nothing here has layers or touches a file.

Shape letters: B batch, N tokens, C latent channels, K codebooks (branches), V codebook size, H x W pixels.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from core.errors import UserError
from core.rng import Draws


# ---------------------------------------------------------------------------------------------------------------------
# What a tokenizer produces
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Continuous:
    """A grid of real vectors: latents are (B, channels, grid[0], grid[1]) fp32, normalised to unit variance."""

    grid: tuple[int, int]
    channels: int

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]

    def sizes(self) -> dict[str, Any]:
        """Constructor arguments of a generator that follow from the latents; it takes those it has a name for."""
        return {"channels": self.channels, "grid": list(self.grid)}

    def __str__(self) -> str:
        return f"continuous {self.channels} channels on a {self.grid[0]}x{self.grid[1]} grid"


@dataclass(frozen=True)
class Codes:
    """K parallel sequences of codebook indices: latents are (B, length, branches) int64 in [0, vocab).

    `dim` is the width of a codebook row (what `Tokenizer.embed` returns per code), `grid` the (rows, columns) that a
    raster-ordered sequence lies on, None for any other. `names` of the branches, for logs. `places` are the cells, row-major
    on a square grid, of a sequence in another order; empty where its codes have none.
    """

    length: int
    branches: int
    vocab: int
    dim: int
    grid: tuple[int, int] | None = None
    names: tuple[str, ...] = ()
    places: tuple[int, ...] = ()

    def sizes(self) -> dict[str, Any]:
        """Constructor arguments of a generator that follow from the latents; it takes those it has a name for."""
        return {
            "length": self.length,
            "branches": self.branches,
            "vocab": self.vocab,
            "code_dim": self.dim,
            "grid": None if self.grid is None else list(self.grid),
        }

    def __str__(self) -> str:
        return f"{self.branches} x {self.length} codes from {self.vocab}"


@dataclass(frozen=True)
class MultiScale:
    """Codes at growing resolutions, K branches each: latents are (B, sum of scale^2, branches) int64 in [0, vocab)."""

    scales: tuple[int, ...]
    branches: int
    vocab: int
    dim: int

    @property
    def length(self) -> int:
        return sum(side * side for side in self.scales)

    def sizes(self) -> dict[str, Any]:
        """Constructor arguments of a generator that follow from the latents; it takes those it has a name for."""
        return {"scales": list(self.scales), "branches": self.branches, "vocab": self.vocab, "code_dim": self.dim}

    def flatten(self) -> Codes:
        """The same codes as one sequence, for generators that know nothing about scales."""
        return Codes(self.length, self.branches, self.vocab, self.dim)

    def __str__(self) -> str:
        return f"{self.branches} x codes from {self.vocab} at scales {list(self.scales)}"


LatentSpec = Continuous | Codes | MultiScale


# ---------------------------------------------------------------------------------------------------------------------
# What flows through a training step
# ---------------------------------------------------------------------------------------------------------------------
Kinds = dict[str, tuple[int, str]]  # of things in the data that are not read: kind -> (how many, the first)


@dataclass
class Batch:
    """Part of one global batch. Exactly one of `images` and `stored` is set."""

    labels: Tensor  # (B,) int64
    positions: Tensor  # (B,) int64: place of each sample in the whole run; keys every random draw made for it
    images: Tensor | None = None  # (B, 3, H, W) uint8
    stored: Tensor | None = None  # (B, ...) what Tokenizer.precompute returned for these samples (codes: any int dtype)
    features: dict[str, Tensor] = field(default_factory=dict)  # cached teacher features, name -> (B, N, D)
    replaced: dict[str, str] = field(default_factory=dict)  # key -> reason, of pictures that could not be read
    unread: dict[int, Kinds] = field(default_factory=dict)  # see DataSource.unread

    def __len__(self) -> int:
        return self.labels.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `change` applied to each of its tensors."""

        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return Batch(
            change(self.labels),
            change(self.positions),
            changed(self.images),
            changed(self.stored),
            {name: change(tensor) for name, tensor in self.features.items()},
            self.replaced,
            self.unread,
        )

    def to(self, device: torch.device) -> Batch:
        """Same batch with its tensors on `device` (asynchronous when they are pinned)."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Same batch in pinned memory; DataLoader calls this."""
        return self.map(Tensor.pin_memory)


@dataclass(frozen=True)
class Progress:
    """How far the run is. Schedules (learning rate, discriminator start, annealing) are functions of this alone."""

    images_seen: int
    total_images: int
    images_per_epoch: int
    step: int
    global_batch: int = 1  # pictures per step

    @property
    def epoch(self) -> float:
        """Fractional epochs seen."""
        return self.images_seen / self.images_per_epoch

    @property
    def fraction(self) -> float:
        """0 at the start, 1 at the end of the run."""
        return self.images_seen / self.total_images


@dataclass
class Loss:
    """`total` is the scalar to minimise (fp32, with graph); `logs` are detached scalars by name."""

    total: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """Numbers of `Loss.logs` that belong into one picture, for the page of a run.

    `names` may end with * for all that begin so. `live`: the first one is shown on the live line, too.
    """

    title: str
    names: tuple[str, ...]
    live: bool = False


@dataclass
class Phase:
    """One backward pass of a step: `loss` trains the network called `network` and no other."""

    network: str
    loss: Loss


@dataclass
class Recon:
    """A tokenizer's training-time forward.

    `terms` are the regularisers that only this tokenizer knows (KL, commitment, entropy ...): fp32 scalars, unweighted.
    `predictions` are its guesses of frozen teachers' features, teacher name -> (B, N, D).
    `masked` marks tokens hidden from the encoder, (B, N) bool, or None.
    `logs` are detached scalars to log beside the losses (codebook usage, one branch's share of a term).
    `last_layer` is the weight of the layer that paints the pixels, for adaptive GAN weights.
    `perceptual_weights` (B,) say how much each picture counts in the perceptual term; None for alike.
    """

    images: Tensor  # (B, 3, H, W), nominally in [-1, 1], not clamped
    terms: dict[str, Tensor] = field(default_factory=dict)
    predictions: dict[str, Tensor] = field(default_factory=dict)
    masked: Tensor | None = None
    details: dict[str, Any] = field(default_factory=dict)  # intermediate tensors, for parity tests and probes
    logs: dict[str, Tensor] = field(default_factory=dict)
    last_layer: Tensor | None = None
    perceptual_weights: Tensor | None = None


@dataclass(frozen=True)
class Guidance:
    """How to sharpen samples. Scale 1 means none, and so does one up to `floor`.

    kind "cfg": against the unconditional prediction; "auto": against a weaker model (`guide`).
    The guided prediction is used where t lies in `interval` (inclusive), elsewhere the plain conditional one; t is the
    time of a flow, or the share of the sequence that is known.

    `scale` may be one number per codebook, for generators of codes. `schedule` says how the scale runs from the first
    sampled token (or scale) to the last: "constant"; "linear" from `start` to `scale`; "cosine": 1 + (scale - 1)
    (1 - cos(pi t^power)) / 2. generator.guidance.scales turns it into a table.

    parity: the samplers of RecTok, FQGAN and D-AR guide with scales above 1 only; those of RAR and VAR mix the two
    predictions with any scale but 0. A generator says which of the two by `mixing`.
    """

    scale: float | tuple[float, ...] = 1.0
    kind: str = "cfg"
    interval: tuple[float, float] = (0.0, 1.0)
    guide: Any = None  # the weaker generator of kind "auto"
    schedule: str = "constant"
    start: float = 1.0
    power: float = 1.0
    floor: float = 1.0

    @property
    def active(self) -> bool:
        """Whether any step of any codebook is guided, so that a second prediction is needed at all."""
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if self.schedule == "linear":
            scales = (*scales, self.start)
        return any(scale > self.floor and scale != 1.0 for scale in scales)

    def mixing(self) -> Guidance:
        """The same, with scales between 0 and 1 taken at their word."""
        return dataclasses.replace(self, floor=0.0)


@dataclass(frozen=True)
class Kept:
    """Latents of a picture that sampling leaves as they are, for editing.

    Args:
        values: (B or 1, ...) as the tokenizer's `spec` says.
        mask: bool, True where they are kept; of codes (B or 1, L), of continuous latents (B or 1, 1, h, w).
        heed: from 0 to 1, how much the codes between them are drawn by them; for generators that draw codes one by one. Below
            1 there is a second stream of each sample, which has the same codes but where they are kept: those it draws
            itself. The codes between are drawn by both, logits weighted `heed` to 1 - `heed` (a geometric mean).
    """

    values: Tensor
    mask: Tensor
    heed: float = 1.0

    def codes(self, batch: int, length: int, branches: int) -> Tensor:
        """(B, length, K) codes, NO_CODE where they are free; UserError where the shapes do not go together."""
        shape, wanted = tuple(self.values.shape), (length, branches)
        if self.values.ndim != 3 or shape[1:] != wanted or self.mask.shape[1:] != (length,):
            raise UserError(
                f"kept codes of shape {list(shape)} with a mask of shape {list(self.mask.shape)} do not fit sequences of "
                f"{length} positions with {branches} codebook(s): give (B or 1, {length}, {branches}) and (B or 1, {length})."
            )
        return torch.where(self.mask[..., None], self.values, NO_CODE).expand(batch, -1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Who implements what
# ---------------------------------------------------------------------------------------------------------------------
NO_CODE = -1  # in place of codes that could not be drawn


class Tokenizer(nn.Module, ABC):
    """Base of all tokenizers: maps images (B, 3, H, W) in [-1, 1] to latents and back."""

    spec: LatentSpec
    image_size: int
    term_names: tuple[str, ...] = ()  # what Recon.terms will hold
    charts: tuple[Chart, ...] = ()  # of Recon.logs
    reads_features: bool = False  # whether `forward` also takes the teachers' features and the progress of the run
    latent_stats_known: bool = True  # False while `set_latent_stats` has to be called before latents are unit variance

    @abstractmethod
    def forward(self, images: Tensor, draws: Draws) -> Recon:
        """Training pass: reconstruct with every random draw taken from `draws`."""

    @abstractmethod
    def encode(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Latents as `spec` says. Without draws the most likely ones, with draws a posterior sample."""

    @abstractmethod
    def decode(self, latents: Tensor, draws: Draws | None = None) -> Tensor:
        """Images in [-1, 1], not clamped."""

    @abstractmethod
    def precompute(self, images: Tensor) -> Tensor:
        """What is worth storing of `encode`, (B, ...): moments for a Gaussian posterior, codes for a quantiser."""

    @abstractmethod
    def from_stored(self, stored: Tensor, draws: Draws | None = None) -> Tensor:
        """`encode` from what `precompute` returned: from_stored(precompute(x), d) == encode(x, d)."""

    def set_latent_stats(self, mean: Tensor, std: Tensor) -> None:
        """Only where spec is Continuous: statistics that make latents unit variance, per channel (C,) or scalars; they
        are kept in the buffers latent_mean and latent_std."""
        raise TypeError(f"{type(self).__name__} has no continuous latents")

    def moments(self, stored: Tensor) -> Tensor:
        """Only where spec is Continuous: (B, N, 2C), means and log variances on which those are measured."""
        raise TypeError(f"{type(self).__name__} has no continuous latents")

    def embed(self, codes: Tensor) -> Tensor:
        """Only where spec is Codes or MultiScale: (B, L, K) -> (B, L, K, dim) fp32, the codebook rows behind them."""
        raise TypeError(f"{type(self).__name__} has no codes")

    def resized(self, state: dict[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weights that such a tokenizer learnt at another picture size, brought to this one's by the rule of its family;
        what the size does not decide stays. UserError with the reason for a size that cannot be had.

        Args:
            settings: constructor arguments of the network that they are of.
        """
        return state

    def probe_features(self, images: Tensor) -> dict[str, Tensor]:
        """name -> (B, N, D) features for linear probing; {} for the latents or the embedded codes."""
        return {}


@runtime_checkable
class Previews(Protocol):
    """A tokenizer whose first latents are a picture already."""

    def previews(self, latents: Tensor, draws: Draws | None = None) -> list[Tensor]:
        """(B, 3, H, W) each: what every further part of the latents adds; the last is what `decode` gives."""
        ...


class Decoding(Protocol):
    """One batch of a tokenizer that `Streams`, on its way."""

    needed: int  # how many codes the next picture waits for, counted from the first

    def feed(self, codes: Tensor) -> Iterator[Tensor]:
        """The pictures (B, 3, H, W) that the next codes (B, n, K) make possible."""
        ...


@runtime_checkable
class Streams(Protocol):
    """A tokenizer that decodes while codes arrive."""

    groups: int  # parts of the codes, and so pictures

    def stream(self, batch: int, draws: Draws | None = None) -> Decoding: ...


def codebook_rows(tokenizer: Tokenizer, device: torch.device) -> Tensor:
    """Every row of every codebook of a tokenizer with codes, (vocab, branches, dim) fp32. `device`: the tokenizer's."""
    spec = tokenizer.spec
    assert not isinstance(spec, Continuous)
    every_code = torch.arange(spec.vocab, device=device)[None, :, None]
    return tokenizer.embed(every_code.expand(1, -1, spec.branches))[0]


@runtime_checkable
class ScaleOps(Protocol):
    """What a scale-by-scale generator needs of a tokenizer with MultiScale codes; it gets it through `bind`.

    An "input" of a scale of side p is what the codes of all coarser scales say, shrunk to that side, with the branches
    side by side: (B, p p, branches * dim) fp32. The first scale has none.
    """

    def scale_inputs(self, codes: Tensor) -> Tensor:
        """Codes (B, L, K) -> the inputs of all scales but the first, one after the other (teacher forcing)."""
        ...

    def next_scale(self, state: Any, codes: Tensor, scale: int) -> tuple[Any, Tensor]:
        """One step of sampling: take in the codes (B, p p, K) of scale number `scale`; `state` is None at first.

        Returns the new state and the input of the next scale; after the last scale the tokens of the whole map.
        """
        ...


class Generator(nn.Module, ABC):
    """Base of all generators: models the latents of any tokenizer it `fits`; `models` is the kind of spec these have.

    Constructor arguments named like an entry of `spec.sizes()`, and `num_classes`, are filled in from the tokenizer and
    the data. The keyword arguments that `sample` takes beyond the three below are the keys of the config's `sample`
    section that this generator understands (steps, temperature, top_k ...) and what it can do while it samples:
    `on_codes` is called with all codes so far, `on_latents` with continuous latents on their way, `prefix` are codes to
    go on from.

    A `sample` that takes `kept`, a `Kept`, can edit: those latents are in the result, bit for bit, and what is drawn beside
    them heeds them as far as the order of this generator allows. `heeds` says how far.
    """

    models: type
    charts: tuple[Chart, ...] = ()  # of what `forward` logs
    usual_heed: float | None = None  # Kept.heed of an edit; None: no other value than 1 is known

    @abstractmethod
    def fits(self, spec: LatentSpec) -> list[str]:
        """Sentences for the user that say what does not match; empty when the pair works."""

    def guides(self, guidance: Guidance) -> str:
        """What `sample` cannot do of a guidance, as the end of a sentence; "" where it can all. Here: what is true of
        generators of codes, guided by kind "cfg" alone."""
        return (
            ""
            if guidance.kind == "cfg"
            else f"is guided against no class (sample.guidance: cfg), not by {guidance.kind}"
        )

    def bind(self, tokenizer: Tokenizer) -> None:
        """Take what training or sampling needs of the tokenizer's frozen parts (codebook rows for reAR's regulariser,
        VAR's inputs), but not as a submodule: weights stay the tokenizer's."""

    @abstractmethod
    def forward(self, latents: Tensor, labels: Tensor, draws: Draws, progress: Progress | None = None) -> Loss:
        """Training loss of a batch."""

    def class_rows(self) -> tuple[str, int]:
        """(name of the parameter that ends with a row for each class and one for no class, its row of class 0)."""
        raise UserError(
            f"{type(self).__name__} does not say where the rows of its classes are: it cannot get new ones."
        )

    def resized(self, state: dict[str, Tensor], settings: Mapping[str, Any], spec: LatentSpec) -> dict[str, Tensor]:
        """Weights that such a generator learnt on another grid, brought to this one's by the rule of its family; what the
        grid does not decide stays. UserError with the reason for latents that cannot be had.

        Args:
            settings: constructor arguments of the network that they are of.
            spec: of the latents that are modelled now.
        """
        return state

    def heeds(self) -> str:
        """A sentence about which kept latents a new one is drawn by; "" for all of them."""
        return ""

    @abstractmethod
    def sample(self, labels: Tensor, draws: Draws, guidance: Guidance = Guidance(), **options) -> Tensor:
        """Latents for `labels` (B,), every random draw taken from `draws`.

        Where a logit was NaN or infinite, all codes of that sample are NO_CODE: nothing waits for the device to tell.
        """


class Discriminator(nn.Module, ABC):
    """Base of all discriminators."""

    fake_first: bool = False  # whether one that remembers earlier batches was published seeing false pictures first

    @abstractmethod
    def forward(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1], or [0, 1] where the objective says so -> logits of any shape, positive for real."""

    def frozen(self) -> dict[str, nn.Module]:
        """Networks that it looks through and that are no submodules: never trained, in no file."""
        return {}


@runtime_checkable
class SparesWeightDecay(Protocol):
    """A network that says itself which parameters do not decay; of others those with fewer than two dimensions."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters."""
        ...


@runtime_checkable
class Task(Protocol):
    """What one training step computes. The trainer owns backward, optimisers, EMA, checkpoints and schedules."""

    primary: str  # the network a user wants: gets an EMA, is previewed and evaluated

    def networks(self) -> dict[str, nn.Module]:
        """Trained networks by name, saved in every checkpoint."""
        ...

    def frozen(self) -> dict[str, nn.Module]:
        """Networks that only help (teachers, perceptual nets, the tokenizer of a generator): moved, never saved."""
        ...

    def constants(self) -> dict[str, Tensor]:
        """Tensors that are not trained but belong with the weights (latent statistics), themselves and not copies:
        a resumed run writes the saved values into them. {} for none."""
        ...

    def phases(self, nets: dict[str, Any], batch: Batch, draws: Draws, progress: Progress) -> Iterator[Phase]:
        """Yield one Phase per trained network. `nets` are the networks as wrapped by the trainer (DDP, compile).

        The trainer runs backward on a phase before it asks for the next one.
        """
        ...

    def looks_at_batches(self) -> bool:
        """Whether some term is no mean over pictures: then how many are seen at once counts."""
        ...

    def preview(self, network: nn.Module, draws: Draws, count: int) -> Tensor:
        """(M, 3, H, W) in [-1, 1]: pictures that show the state of the run, the same ones each time."""
        ...

    def preview_groups(self, count: int) -> list[tuple[str, list[int]]]:
        """What belongs together in `preview`: (caption, indices of pictures)."""
        ...

    def charts(self) -> list[Chart]:
        """How everything that `phases` logs is shown, what matters most first."""
        ...


@dataclass
class Sample:
    """One element of a data source, before batching."""

    image: Any  # PIL.Image in RGB
    label: int
    key: str  # names the sample in messages


class DataSource(ABC):
    """Base of all data sources: labelled pictures by index. What a source lacks of the optional is said by the default."""

    num_classes: int
    class_names: list[str]
    labels: np.ndarray | None = None  # (N,) integers, where they are known without reading a picture
    unlabelled: str | None = None  # a sentence about pictures without label where others have one; all count as 0 then
    left_out: tuple[str, ...] = ()  # what lies beside the pictures and is not read, counted and named
    upright: bool = False  # whether pictures are turned as their EXIF orientation says
    inexact: str | None = None  # of a stream: why its order is not a function of (seed, position)
    one_process: bool = False  # whether the loader's workers cannot read it
    start_method: str | None = None  # of those workers, where it matters

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the list of samples changes. Stored with checkpoints and caches."""

    def file_sizes(self) -> str | None:
        """A digest of the bytes of each file, where pictures are single files and their fingerprint does not hold it."""
        return None

    def unread(self) -> dict[int, Kinds]:
        """Of a stream: what is not read of the parts that this process has come to the end of since the last call, by their
        numbers."""
        return {}

    def start_at(self, seed: int, images_seen: int, rank: int, world: int) -> None:
        """Where the run is, told before its first batch; streams go on from there."""
