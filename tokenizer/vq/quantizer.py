"""Vector quantisation: vectors to codebook indices and back, with the losses that train a codebook.

`VectorQuantizer` has a learnt table (VQ-VAE, van den Oord et al. 2017; unit vectors: ViT-VQGAN, Yu et al. 2022),
`LookupFreeQuantizer` the signs of its channels (MAGVIT-v2, Yu et al. 2024). Both take vectors in the last dimension,
report unweighted losses and keep nothing that changes in `forward`; usage is counted by a separate call.

Distances, softmax and losses are fp32 under any autocast: a bf16 search moves some 6 % of 16,384 codes to a neighbour.
Tables of distances (positions x V) exist for one chunk of positions at a time, also in backward.

Shape letters: B batch, N positions, D width of a code, V codebook size; (..., D) any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from core.devices import without_tf32
from core.dist import gather_over_ranks, mean_over_ranks
from core.errors import UserError
from core.nn.precision import no_autocast
from core.rng import Draws

CHUNK_ELEMENTS = 1 << 25  # fp32 values of one table of distances, 128 MiB


@dataclass
class Quantized:
    """`values` are the codes' vectors with the straight-through gradient of `inputs`.

    `terms` are fp32 scalars, unweighted: codebook, commitment, entropy (= per_sample_entropy - gamma * batch_entropy).
    """

    values: Tensor  # (..., D) fp32
    codes: Tensor  # (...) int64
    inputs: Tensor  # (..., D) fp32: what was compared with the codebook, unit length where the quantiser normalises
    terms: dict[str, Tensor] = field(default_factory=dict)
    logs: dict[str, Tensor] = field(default_factory=dict)  # detached


# ---------------------------------------------------------------------------------------------------------------------
# Functions of vectors and a table
# ---------------------------------------------------------------------------------------------------------------------
def unit(x: Tensor) -> Tensor:
    """Unit length along the last dimension, fp32."""
    return F.normalize(x.float(), dim=-1)


def _chunks(flat: Tensor, vocab: int) -> tuple[Tensor, ...]:
    return flat.split(max(1, CHUNK_ELEMENTS // vocab))


def squared_distances(z: Tensor, table: Tensor) -> Tensor:
    """|z - e|^2 of (M, D) vectors and (V, D) rows, (M, V). In the dtype of its arguments: give fp32."""
    return torch.addmm(z.square().sum(1, keepdim=True) + table.square().sum(1), z, table.t(), alpha=-2)


@torch.no_grad()
def nearest_codes(z: Tensor, table: Tensor) -> Tensor:
    """Index of the row of `table` (V, D) nearest to each vector of z (..., D), the first of equals. fp32, never TF32,
    which moves codes that lie between two rows."""
    with no_autocast(z), without_tf32():
        flat, table = z.float().reshape(-1, z.shape[-1]), table.float()
        norms = table.square().sum(1)  # |z|^2 is the same for all rows
        codes = [torch.addmm(norms, part, table.t(), alpha=-2).argmin(1) for part in _chunks(flat, len(table))]
        return torch.cat(codes).view(z.shape[:-1])


def entropy_terms(
    z: Tensor, affinity: Callable[[Tensor], Tensor], vocab: int, floor: str = "add", across_ranks: bool = True
) -> tuple[Tensor, Tensor]:
    """How undecided positions are, and how evenly the batch uses the codebook: two entropies in nats.

    Args:
        z: (M, D).
        affinity: (m, D) -> (m, V) logits of the choice of a code.
        floor: what keeps log p finite. "add": log(p + 1e-5) for the batch (exact log-softmax for positions);
            "clamp": log(max(p, 1e-5)) in both.
        across_ranks: take the batch of all ranks. parity: the official codes take each rank's own.

    Returns:
        mean over positions of H(p), and H(mean over positions of p).
    """

    def sums(part: Tensor) -> tuple[Tensor, Tensor]:
        logits = affinity(part)
        p = logits.softmax(1)
        log_p = logits.log_softmax(1) if floor == "add" else p.clamp(min=1e-5).log()
        return -(p * log_p).sum(), p.sum(0)

    per_sample, mass = z.new_zeros(()), z.new_zeros(vocab)
    for part in _chunks(z, vocab):
        h, p = checkpoint(sums, part, use_reentrant=False) if torch.is_grad_enabled() else sums(part)
        per_sample, mass = per_sample + h, mass + p
    mean = mass / len(z)
    if across_ranks:
        mean = mean_over_ranks(mean)
    log_mean = (mean + 1e-5).log() if floor == "add" else mean.clamp(min=1e-5).log()
    return per_sample / len(z), -(mean * log_mean).sum()


def _weighted_mean(error: Tensor, weight: Tensor | None, across_ranks: bool) -> Tensor:
    """Mean of (...) errors, weighted by (...) numbers whose mean is taken over all ranks."""
    if weight is None:
        return error.mean()
    total = weight.float().mean()
    if across_ranks:
        total = mean_over_ranks(total)
    return (error * weight).mean() / total


# ---------------------------------------------------------------------------------------------------------------------
# Quantisers
# ---------------------------------------------------------------------------------------------------------------------
class Quantizer(nn.Module):
    """What all quantisers have in common: the entropy term, and which codes were used lately.

    Args:
        vocab, dim: V and D.
        entropy: report the term "entropy".
        temperature, gamma, floor: of that term, see `entropy_terms`.
        across_ranks: means over the batch of all ranks, so that the rank count changes nothing.
            parity: False is what the official code trained with.
        usage_window: how many of the latest assignments `track` remembers; 0 for none.
    """

    losses: tuple[str, ...]  # the terms besides entropy

    def __init__(
        self,
        vocab: int,
        dim: int,
        *,
        entropy: bool = False,
        temperature: float = 0.01,
        gamma: float = 1.0,
        floor: str = "add",
        across_ranks: bool = True,
        usage_window: int = 0,
    ):
        super().__init__()
        if temperature <= 0:
            raise UserError(f"entropy temperature {temperature} must be more than 0")
        if floor not in ("add", "clamp"):
            raise UserError(f'entropy floor is "add" or "clamp", not "{floor}"')
        self.vocab, self.dim, self.entropy = vocab, dim, entropy
        self.temperature, self.gamma, self.floor, self.across_ranks = temperature, gamma, floor, across_ranks
        self.usage_window = usage_window
        if usage_window:
            # parity: files hold the ring as fp32, and its zeros count as code 0 until it is full.
            self.register_buffer("codebook_used", torch.zeros(usage_window))

    @property
    def term_names(self) -> tuple[str, ...]:
        return (*self.losses, "entropy") if self.entropy else self.losses

    def _entropy(self, z: Tensor, affinity: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(terms, logs)"""
        if not self.entropy:
            return {}, {}
        flat = z.reshape(-1, z.shape[-1])
        per_sample, batch = entropy_terms(flat, affinity, self.vocab, self.floor, self.across_ranks)
        return (
            {"entropy": per_sample - self.gamma * batch},
            {"per_sample_entropy": per_sample.detach(), "batch_entropy": batch.detach()},
        )

    @torch.no_grad()
    def track(self, codes: Tensor, sample: int = 0, draws: Draws | None = None) -> Tensor:
        """Remember the assignments of this batch (of all ranks) and return the share of codes in the window, ().

        Not part of `forward`, which activation checkpointing runs twice.

        Args:
            codes: (B, ...) of this rank.
            sample: remember only this many, picked by `draws`; 0 for all.
        """
        latest = gather_over_ranks(codes).flatten()
        if sample and sample < latest.numel():
            latest = latest[gather_over_ranks(draws.uniform("usage", codes.shape[1:])).flatten().topk(sample).indices]
        codes = latest[-self.usage_window :].to(self.codebook_used.dtype)
        self.codebook_used.copy_(torch.cat((self.codebook_used[len(codes) :], codes)))
        return self.usage()

    @torch.no_grad()
    def usage(self) -> Tensor:
        """Distinct codes in the window / V, ()."""
        seen = torch.zeros(self.vocab, device=self.codebook_used.device)
        # a file in half precision holds rounded codes, 511 of 512 as 512
        return seen.index_fill_(0, self.codebook_used.long().clamp(0, self.vocab - 1), 1.0).mean()

    def check_codes(self, codes: Tensor) -> None:
        """UserError where a code is not in [0, V). Waits for the device: for input from outside, not for the loop."""
        if codes.numel() and not (codes.min() >= 0 and codes.max() < self.vocab):
            raise UserError(
                f"codes run from {int(codes.min())} to {int(codes.max())}; this codebook has 0 to "
                f"{self.vocab - 1}. Were they made with another tokenizer?"
            )


class VectorQuantizer(Quantizer):
    """Nearest row of a learnt table.

    The terms "codebook" (mean (e - sg z)^2, moves rows to their vectors) and "commitment" (mean (sg e - z)^2, the
    reverse) are unweighted; conventions differ in which of them gets 0.25.

    Args:
        normalise: compare and return unit vectors; the stored rows have any length.
        others: see Quantizer.
    """

    losses = ("codebook", "commitment")

    def __init__(self, vocab: int, dim: int, *, normalise: bool = True, **others: Any):
        super().__init__(vocab, dim, **others)
        self.normalise = normalise
        self.embedding = nn.Embedding(vocab, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / vocab, 1.0 / vocab)
        if normalise:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)

    def table(self) -> Tensor:
        """(V, D) fp32, the rows as they are compared and returned."""
        return unit(self.embedding.weight) if self.normalise else self.embedding.weight.float()

    def prepare(self, z: Tensor) -> Tensor:
        """(..., D) vectors as they are compared, fp32."""
        return unit(z) if self.normalise else z.float()

    def encode(self, z: Tensor) -> Tensor:
        """(..., D) -> codes (...) int64."""
        return nearest_codes(self.prepare(z), self.table())

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (...) -> rows (..., D) fp32."""
        rows = F.embedding(codes, self.embedding.weight)
        return self.prepare(rows)

    def distances(self, z: Tensor) -> Tensor:
        """Squared distances (..., V) to every row."""
        with no_autocast(z):
            z, table = self.prepare(z), self.table()
            return squared_distances(z.reshape(-1, self.dim), table).view(*z.shape[:-1], self.vocab)

    def forward(self, z: Tensor, weight: Tensor | None = None) -> Quantized:
        """Quantise (..., D). `weight` (...): how much each position counts in codebook and commitment terms."""
        with no_autocast(z):
            z = self.prepare(z)
            codes = nearest_codes(z, self.table())
            rows = self.embed(codes)
            terms = {
                "codebook": _weighted_mean((rows - z.detach()).square().mean(-1), weight, self.across_ranks),
                "commitment": _weighted_mean((rows.detach() - z).square().mean(-1), weight, self.across_ranks),
            }
            entropy, logs = self._entropy(z, lambda part: squared_distances(part, self.table()) / -self.temperature)
            return Quantized(z + (rows - z).detach(), codes, z, {**terms, **entropy}, logs)


class LookupFreeQuantizer(Quantizer):
    """One bit per channel: code = sum over channels c of [z_c > 0] 2^c, vector = the signs.

    Args:
        bits: D; V = 2^bits.
        others: see Quantizer.
    """

    losses = ("commitment",)

    def __init__(self, bits: int, *, floor: str = "clamp", **others: Any):
        if not 1 <= bits <= 20:
            raise UserError(f"a look-up-free codebook of {bits} bits cannot be built: use 1 to 20")
        super().__init__(2**bits, bits, floor=floor, **others)
        # Constants, but in the files: real also under torch.device("meta").
        powers = 2 ** torch.arange(bits, dtype=torch.int32, device="cpu")
        self.register_buffer("bits_to_indices", powers)
        every = torch.arange(2**bits, dtype=torch.int32, device="cpu")[:, None] & powers
        self.register_buffer("codebook", (every > 0).float() * 2 - 1)

    def encode(self, z: Tensor) -> Tensor:
        """(..., D) -> codes (...) int64."""
        return ((z > 0).long() * self.bits_to_indices).sum(-1)

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (...) -> signs (..., D) fp32."""
        return F.embedding(codes, self.codebook)

    def forward(self, z: Tensor, weight: Tensor | None = None) -> Quantized:
        """Quantise (..., D). `weight` (...): how much each position counts in the commitment term."""
        with no_autocast(z):
            z = z.float()
            signs = torch.where(z > 0, 1.0, -1.0)
            terms = {"commitment": _weighted_mean((signs - z).square().mean(-1), weight, self.across_ranks)}
            entropy, logs = self._entropy(z, lambda part: part @ self.codebook.t() * (2.0 / self.temperature))
            return Quantized(z + (signs - z).detach(), self.encode(z), z, {**terms, **entropy}, logs)
