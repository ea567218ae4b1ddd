"""reAR's regularisers for autoregressive generators of codes: noisy context and codebook-embedding alignment.

Two things happen in training only (reAR, "Rethinking visual autoregressive models via generator-tokenizer consistency
regularization"). Some input codes are replaced, while the codes to be predicted stay clean, so that the network learns
to go on after its own mistakes. And two small MLPs recover code vectors from hidden states: on an early layer that of
the code just read, on a late layer that of the code to be predicted. Works for any trunk whose hidden states can be
tapped, and for every tokenizer of codes, K codebooks included.

Shape letters: B batch, N positions, K codebooks, V codebook size, Z width of a code vector, D width of the trunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import parse_section
from core.errors import UserError
from core.limits import Factor, Width
from core.nn.linear import Linear
from core.rng import Draws
from core.specs import Chart, Loss, Progress, Tokenizer, codebook_rows
from generator.engine import Sampled

Noise = Literal["none", "switch", "mask"]


def annealed(progress: Progress | None, start: float, end: float) -> float:
    """1 until the share `start` of the run, then linearly down to 0 at `end`. Without progress: 1."""
    if progress is None or progress.fraction < start:
        return 1.0
    return 0.0 if progress.fraction >= end else 1.0 - (progress.fraction - start) / (end - start)


@dataclass(frozen=True)
class Settings:
    """The `rear` section of a generator.

    Attributes:
        noise: "switch" replaces input codes by uniformly random ones, "mask" by the mask code where there is one. Per
            sample a share of codes, uniform between 0 and the annealed ratio, is replaced.
        anneal: shares of the run between which the ratio falls from 1 to 0.
        encode_layer, decode_layer: blocks whose output the MLPs read; null for no such MLP. By default the first block
            and the one three quarters up.
        weight: of the alignment loss.
        projection: hidden width of the MLPs.
        count_once: with one MLP, count it once. The official code counts it twice, see CodeAlignment.
    """

    noise: Noise = "switch"
    anneal: tuple[float, float] = (0.0, 0.75)
    encode_layer: int | None = 0
    decode_layer: int | None = -1  # -1: three quarters up
    weight: Factor = 1.0
    projection: Width = 2048
    count_once: bool = False


def settings(section: dict | None, layers: int) -> Settings | None:
    """Checked settings for a trunk of `layers` blocks; UserError naming a layer that does not exist."""
    if section is None:
        return None
    checked = parse_section("generator.rear", section, Settings)
    if len(checked.anneal) != 2 or not 0 <= checked.anneal[0] <= checked.anneal[1]:
        raise UserError(f"generator.rear.anneal: expected [start, end] as shares of the run, got {checked.anneal}.")
    chosen = {}
    for name in ("encode_layer", "decode_layer"):
        layer = getattr(checked, name)
        if name == "decode_layer" and layer == -1:
            layer = 3 * layers // 4
        if layer is not None and not 0 <= layer < layers:
            raise UserError(f"generator.rear.{name} is {layer}, but the network has the layers 0 to {layers - 1}.")
        chosen[name] = layer
    return Settings(**{**vars(checked), **chosen})


class Regularised(Sampled):
    """A generator of codes on whose training reAR's regularisers may act.

    Subclasses set `rear`, the checked settings or None for none, and `alignment`, what `make_alignment` gives.
    """

    rear: Settings | None
    alignment: CodeAlignment | None
    vocab: int
    charts = (
        Chart("loss", ("loss", "ce"), live=True),
        Chart("cross-entropy of each codebook", ("ce_*",)),
        Chart("reAR's alignment", ("alignment",)),
        Chart("share of codes that were likeliest", ("accuracy",)),
    )

    def make_alignment(self, width: int, code_dim: int, branches: int) -> CodeAlignment | None:
        """The MLPs on a trunk of this width, where a layer is to be read."""
        if self.rear is None or (self.rear.encode_layer is None and self.rear.decode_layer is None):
            return None
        return CodeAlignment(width, code_dim, branches, self.rear)

    def bind(self, tokenizer: Tokenizer) -> None:
        if self.alignment is not None:
            self.alignment.bind(tokenizer)

    def context(
        self, codes: Tensor, draws: Draws, progress: Progress | None, mask_code: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The codes (B, N, K) that the trunk reads in training, and which of them are noise; None: none are."""
        if self.rear is None or self.rear.noise == "none":
            return codes, None
        mask_code = mask_code if self.rear.noise == "mask" else None
        return perturb(codes, draws, annealed(progress, *self.rear.anneal), self.vocab, mask_code)

    def taps(self) -> dict[int, Tensor | None]:
        """The blocks whose output is wanted in training."""
        return {} if self.alignment is None else self.alignment.taps()

    def training_loss(
        self,
        ce: Tensor,
        logs: dict[str, Tensor],
        taps: dict[int, Tensor | None],
        first: int,
        codes: Tensor,
        selected: Tensor | None,
    ) -> Loss:
        """Cross-entropy plus alignment.

        Args:
            taps: filled.
            first: the slot that predicts the first code; the next one holds it.
            codes, selected: (B, N, K), clean, and which of them were given as noise.
        """
        logs = {"ce": ce, **logs}
        if self.alignment is None:
            total = ce
        else:
            reading, predicting = taps.get(self.rear.encode_layer), taps.get(self.rear.decode_layer)
            logs["alignment"] = self.alignment(
                None if reading is None else reading[:, first + 1 :],
                None if predicting is None else predicting[:, first : first + codes.shape[1]],
                codes,
                selected,
            )
            total = ce + self.rear.weight * logs["alignment"]
        return Loss(total, {name: value.detach() for name, value in {"loss": total, **logs}.items()})


def perturb(
    codes: Tensor, draws: Draws, ratio: float, vocab: int, mask_code: int | None = None
) -> tuple[Tensor, Tensor]:
    """Input codes with noise, and which were selected, both (B, N, K).

    Args:
        ratio: upper bound of the share that is replaced in a sample.
        mask_code: what to put in place; None for uniformly random codes.
    """
    share = draws.uniform("noise_ratio")[:, None, None] * ratio  # (B, 1, 1)
    selected = draws.uniform("noise_select", codes.shape[1:]) < share
    if mask_code is not None:
        return torch.where(selected, mask_code, codes), selected
    random = (draws.uniform("noise_code", codes.shape[1:]) * vocab).long().clamp_max(vocab - 1)
    return torch.where(selected, random, codes), selected


class CodeAlignment(nn.Module):
    """MLPs from hidden states to code vectors, and their loss: minus the mean cosine, per code.

    Args:
        width: of the trunk.
        code_dim, branches: Z and K.
        settings: see Settings; at least one layer is given.
    """

    def __init__(self, width: int, code_dim: int, branches: int, settings: Settings):
        super().__init__()
        self.settings, self.shape = settings, (branches, code_dim)

        def mlp() -> nn.Sequential:
            p = settings.projection
            return nn.Sequential(Linear(width, p), nn.SiLU(), Linear(p, p), nn.SiLU(), Linear(p, branches * code_dim))

        self.encode = mlp() if settings.encode_layer is not None else None
        self.decode = mlp() if settings.decode_layer is not None else None
        self.register_buffer("codebook", None, persistent=False)  # the tokenizer's, so in no file of ours

    def taps(self) -> dict[int, Tensor | None]:
        """The blocks whose output is wanted."""
        layers = (self.settings.encode_layer, self.settings.decode_layer)
        return {layer: None for layer in layers if layer is not None}

    def bind(self, tokenizer: Tokenizer) -> None:
        """Read the code vectors of every code once, normalised."""
        vectors = codebook_rows(tokenizer, next(self.parameters()).device)  # (V, K, Z)
        if tuple(vectors.shape[1:]) != self.shape:
            raise UserError(
                f"generator.code_dim is {self.shape[1]}, the code vectors of the tokenizer are {vectors.shape[-1]} wide."
            )
        self.set_codebook(vectors)

    def set_codebook(self, vectors: Tensor) -> None:
        """(V, K, Z) code vectors."""
        self.codebook = F.normalize(vectors.detach().float(), dim=-1)

    def _cosine(self, predicted: Tensor, codes: Tensor) -> Tensor:
        """(B, N, K) cosine between predictions (B, N, K Z) and the vectors of (B, N, K) codes."""
        branch = torch.arange(self.shape[0], device=codes.device)
        wanted = self.codebook[codes, branch]  # (B, N, K, Z)
        return (F.normalize(predicted.float().unflatten(-1, self.shape), dim=-1) * wanted).sum(-1)

    def forward(
        self, reading: Tensor | None, predicting: Tensor | None, codes: Tensor, selected: Tensor | None
    ) -> Tensor:
        """
        Args:
            reading: (B, M, D) output of the encode layer at the slots that hold the first M <= N codes; None without one.
            predicting: (B, N, D) output of the decode layer at the slots that predict the N codes; None without one.
            codes: (B, N, K), clean.
            selected: (B, N, K) codes that were given as noise; their vectors cannot be recovered and do not count. The
                mean still divides by all.
        """
        if self.codebook is None:
            raise RuntimeError("bind(tokenizer) comes first: the alignment loss needs the code vectors")
        read = None if self.encode is None else self._cosine(self.encode(reading), codes[:, : reading.shape[1]])
        predicted = None if self.decode is None else self._cosine(self.decode(predicting), codes)
        if not self.settings.count_once:
            # parity: a missing MLP is stood in for by the other one, which then counts twice, once under the noise mask.
            read, predicted = (predicted if read is None else read), (read if predicted is None else predicted)
        loss = torch.zeros((), device=codes.device)
        if read is not None:
            loss = loss - (read if selected is None else read * ~selected[:, : read.shape[1]]).mean()
        return loss if predicted is None else loss - predicted.mean()
