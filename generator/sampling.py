"""From logits to codes: temperature, top-k, top-p, and the draw. Everything in fp32, nothing waits for the device.

A draw is a function of the probabilities and of noise that the caller made beforehand, one number per sample, position
and codebook (`draws.categorical("codes", (T, K))`): so the result depends neither on the batch nor on the rank, and a
captured CUDA graph draws anew at every replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core.errors import UserError
from core.rng import Draws
from core.specs import NO_CODE, Generator, Guidance, Kept
from generator.guidance import guide_logits, per_branch, scales

# Kept.heed of an edit of codes that are drawn one by one: networks go on with what they have seen of a picture whatever the
# label says. docs/tools.md has the scores that this was chosen by.
USUAL_HEED = 0.3


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (..., V) with -inf where a code may not be drawn.

    Args:
        top_k: keep the k largest and whatever equals the k-th; 0 keeps all.
        top_p: among those, keep the likeliest until their probabilities exceed p, the one that crosses p included
            (nucleus sampling, Holtzman et al. 2019); 0 and 1 keep all. With top_k only k values are sorted.
    """
    vocab = logits.shape[-1]
    kept = min(top_k, vocab) if top_k > 0 else vocab
    if kept < vocab:
        best, places = logits.topk(kept, dim=-1)  # (..., k), descending
        logits = logits.masked_fill(logits < best[..., -1:], -torch.inf)
    if not 0.0 < top_p < 1.0:
        return logits
    if kept == vocab:
        best, places = logits.sort(dim=-1, descending=True)
    probabilities = (best - logits.logsumexp(-1, keepdim=True)).exp()
    before = probabilities.cumsum(-1) - probabilities  # of the likelier ones
    spared = before <= top_p
    spared[..., 0] = True
    # What equals the k-th value without being among the k is likeliest to follow it: it goes if the k exceed p.
    rest = torch.isneginf(logits) | (before[..., -1:] + probabilities[..., -1:] > top_p)
    return logits.masked_fill(~(~rest).scatter(-1, places, spared), -torch.inf)


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """(..., V) fp32 probabilities; all of them NaN where a logit is NaN or infinite. Temperature 0 gives the likeliest
    code probability 1."""
    logits = logits.float()
    if temperature == 0:
        nothing = logits.amax(-1, keepdim=True) * 0  # NaN where there is no largest number
        return nothing.expand_as(logits).scatter(-1, logits.argmax(-1, keepdim=True), nothing + 1)
    return filter_logits(logits if temperature == 1 else logits / temperature, top_k, top_p).softmax(-1)


def choose(probabilities: Tensor, noise: Tensor) -> Tensor:
    """One code per row, (B,) int64.

    Args:
        probabilities: (B, V).
        noise: (B,) uniform in (0, 1): inverts the cumulated probabilities, in fp64; or (B, V) exponential: the code with
            the largest probability / noise.
    """
    if noise.ndim == probabilities.ndim:
        return (probabilities / noise).argmax(-1)
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    wanted = noise.double()[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, wanted)[:, 0].clamp_max(probabilities.shape[-1] - 1)


@dataclass(frozen=True)
class Filter:
    """How the logits of one codebook become probabilities, see `probabilities`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        return probabilities(logits, self.temperature, self.top_k, self.top_p)


def filters(
    branches: int,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
) -> tuple[Filter, ...]:
    """One per codebook, from one number for all or a list."""
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    by_branch = [per_branch(value, branches, name) for name, value in options.items()]
    return tuple(Filter(*values) for values in zip(*by_branch))


class CodeSampler:
    """Turns the logits of every position and codebook into codes: guidance, filter, draw.

    Args:
        labels: (B,); what is made here lies on their device.
        length: T.
        filters: one per codebook.
        draws: one number per sample, position and codebook is taken from it, all at once.
        guidance: of kind "cfg". When active, logits come doubled: conditional rows, then unconditional ones.
        trace: receives (guided logits, probabilities), (B, V) fp32 each, of every call; for parity tests.
        kept: codes that take the place of what is drawn. Where `kept.heed` is below 1 the second half of the samples are the
            second streams of the first half, see `with_streams`.
        shared: the first so many positions take the codes of the first sample, whatever the labels.
    """

    def __init__(
        self,
        labels: Tensor,
        length: int,
        filters: tuple[Filter, ...],
        draws: Draws,
        guidance: Guidance,
        trace: list | None = None,
        kept: Kept | None = None,
        shared: int = 0,
    ):
        if guidance.kind != "cfg":
            raise UserError(f'sample.guidance: codes are guided by "cfg" only, not by "{guidance.kind}".')
        self.guided, self.filters, self.trace, self.shared = guidance.active, filters, trace, shared
        self.forced = None  # (B, T, K), NO_CODE where a code is drawn
        self.heed = 1.0 if kept is None else kept.heed
        if kept is not None:
            self.forced = kept.codes(len(labels), length, len(filters)).to(labels.device).contiguous()
        self.scales = scales(guidance, length, len(filters)).to(labels.device, non_blocking=True)  # (T, K)
        self.noise = draws.categorical("codes", (length, len(filters)))  # (B, T, K) or (B, T, K, V)
        self.sum = torch.zeros(
            len(labels), device=labels.device
        )  # of a probability of each step: NaN does not leave it

    def settings(self) -> tuple:
        """What a recording of a step depends on, beside the numbers that `refill` replaces."""
        changes = self.shared, self.forced is None, self.heed, self.trace is None
        return self.guided, self.filters, self.noise.shape, self.noise.dtype, *changes

    def refill(self, other: CodeSampler) -> None:
        """Scales, noise, kept codes and trace of another one with the same settings, at the addresses of this one."""
        self.scales.copy_(other.scales)
        self.noise.copy_(other.noise)
        self.sum.copy_(other.sum)
        if self.forced is not None:
            self.forced.copy_(other.forced)
        self.trace = other.trace

    def double(self, x: Tensor) -> Tensor:
        """The same rows for the conditional and the unconditional half."""
        return torch.cat((x, x)) if self.guided else x

    def labels(self, labels: Tensor, null: Tensor) -> Tensor:
        return torch.cat((labels, null)) if self.guided else labels

    def __call__(self, logits: Tensor, t: Tensor, branch: int = 0) -> Tensor:
        """Codes (B,) int64 of position t (a (1,) int64 tensor), from logits (B or 2B, V)."""
        if self.guided:
            logits = guide_logits(*logits.chunk(2), self.scales.index_select(0, t)[:, branch])
        if self.heed < 1 and self.forced is not None:
            heeding, free = logits.chunk(2)
            both = torch.lerp(free, heeding, self.heed).repeat(2, 1)
            drawn = self.forced.index_select(1, t)[: len(free), 0, branch] == NO_CODE
            logits = torch.where(drawn.repeat(2)[:, None], both, logits)
        p = self.filters[branch](logits)
        self.sum.add_(p[:, 0])
        if self.trace is not None:
            self.trace.append((logits.float(), p))
        chosen = choose(p, self.noise.index_select(1, t)[:, 0, branch])
        if self.shared:
            chosen = torch.where(t < self.shared, chosen[:1], chosen)
        return chosen if self.forced is None else keep(chosen, self.forced.index_select(1, t)[:, 0, branch])

    def mark(self, codes: Tensor) -> Tensor:
        """A copy of the codes (B, T, K) of a batch that is done, see `mark`."""
        return mark(codes, self.sum)


def with_streams(labels: Tensor, draws: Draws, kept: Kept | None) -> tuple[Tensor, Draws, Kept | None]:
    """The same with a second stream behind every sample (core.specs.Kept.heed) where there is to be one.

    Both draw with the same noise: where both draw by the same logits, they draw the same code.
    """
    if kept is None or kept.heed == 1:
        return labels, draws, kept
    batch = len(labels)
    mask = kept.mask.expand(batch, -1)
    values = kept.values.expand(batch, -1, -1).repeat(2, 1, 1)
    twice = Draws(draws.seed, draws.positions.repeat(2), draws.step)
    return labels.repeat(2), twice, replace(kept, values=values, mask=torch.cat((mask, torch.zeros_like(mask))))


def keep(chosen: Tensor, forced: Tensor) -> Tensor:
    """Codes as `forced` has them, and as they were drawn where that is NO_CODE; of equal shape."""
    return torch.where(forced == NO_CODE, chosen, forced)


# ---------------------------------------------------------------------------------------------------------------------
# Logits that were not finite: found on the device, told once per batch
# ---------------------------------------------------------------------------------------------------------------------
def mark(codes: Tensor, seen: Tensor) -> Tensor:
    """Codes (B, T, K), all NO_CODE in the samples of which `seen` (B,), a sum of their probabilities, is NaN."""
    return codes.masked_fill(seen.isnan()[:, None, None], NO_CODE)


def draw_latents(generator: Generator, labels: Tensor, draws: Draws, guidance: Guidance, **options: Any) -> Tensor:
    """generator.sample(...), or a UserError that names the generator where it met NaN or infinity.

    Waits for the device, once a batch: noise would be decoded to pictures that look like those of a bad model.
    """
    latents = generator.sample(labels, draws, guidance, **options)
    if latents.is_meta:  # operations are being counted
        return latents
    codes = not latents.is_floating_point()
    good = latents != NO_CODE if codes else latents.isfinite()
    if not good.all():
        broken = int((~good.flatten(1).all(1)).sum())
        what = "logits of a code" if codes else "latents after the last step"
        raise UserError(
            f"{type(generator).__name__}: the {what} are NaN or infinite in {broken} of {len(labels)} samples. The weights or "
            "the precision are at fault (train.precision=fp32 rules the latter out); nothing was kept of these pictures."
        )
    return latents
