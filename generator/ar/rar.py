"""RAR and reAR: one causal transformer with adaptive norms per class and position, over one code per position.

RAR (Yu et al. 2024, arXiv 2411.00776) trains on randomly permuted orders that are annealed to raster order; every slot
also knows the position it is to predict. reAR keeps raster order and adds the regularisers of generator/ar/rear.py.
Without either it is plain autoregression. Sampling is in raster order for all. Parameter names are those of the
official checkpoints.

A sequence has N + 2 slots: a learned token, the class, then the N codes. Slot 1 + p predicts code p.

Shape letters: B batch, N codes, S slots, V codebook size, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import sizes
from core.errors import UserError
from core.limits import Count, Layers, Limits, Rate, Share, Width
from core.nn.attention import Attention
from core.nn.cuda_graph import weak_method
from core.nn.decode_attention import fuses
from core.nn.dropout import dropout
from core.nn.embed import resize_rows
from core.nn.gated_norm import gated_norm
from core.nn.kvcache import KVCache, LayerCache
from core.nn.linear import Linear
from core.nn.mlp import MLP
from core.nn.norms import modulate
from core.nn.precision import no_autocast
from core.rng import Draws
from core.specs import Codes, Guidance, Kept, LatentSpec, Loss, Progress
from core.weights.names import State
from generator.ar import rear as rear_module
from generator.ar.decode import Recordings, decode, uncompiled
from generator.ar.llama import run_blocks
from generator.ar.rear import Regularised, annealed
from generator.engine import Weights, attend, mismatches
from generator.sampling import USUAL_HEED, CodeSampler, filters, with_streams

EXTRA_POSITIONS, EXTRA_SLOTS = 1024, 100  # rows that the official tables have beyond the codes
MODULATION_BYTES = 1 << 30  # how much of the adaptive norms is computed ahead while sampling


@dataclass(frozen=True)
class Size:
    """Shape of the trunk; `hidden` is the width inside the feed-forward layers."""

    width: Width
    layers: Layers
    heads: Width
    hidden: Width


SIZES = {
    "s": Size(768, 20, 16, 3072),
    "b": Size(768, 24, 16, 3072),
    "l": Size(1024, 24, 16, 4096),
    "xl": Size(1280, 32, 16, 5120),
    "xxl": Size(1408, 40, 16, 6144),
}


class Block(nn.Module):
    """Pre-norm block whose shift, scale and gate (B, S, 6 D) follow from the condition of each slot."""

    def __init__(self, size: Size, dropout: float, attention_dropout: float):
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(size.width, eps=1e-6)
        self.attn = Attention(size.width, size.heads, "layer", causal=True, dropout=attention_dropout)
        self.norm2 = nn.LayerNorm(size.width, eps=1e-6)
        self.mlp = MLP(size.width, size.hidden, dropout=dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(size.width, 6 * size.width))

    def forward(self, x: Tensor, condition: Tensor, keys: Tensor | None = None) -> Tensor:
        """x and `condition` (B, S, D)."""
        modulation = self.adaLN_modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        branch = self.attn(modulate(self.norm1(x), shift1, scale1), keys=keys)
        x = x + gate1 * dropout(branch, self.dropout, keys, salt=1)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2), keys)


class FinalNorm(nn.Module):
    """Adaptive norm before the logits."""

    def __init__(self, width: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.adaLN_modulation(condition).chunk(
            2, dim=-1
        )  # parity: scale first here, shift first in the blocks
        return modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale)


class RAR(Regularised):
    """core.specs.Generator of one code per position.

    Args:
        size: a name in SIZES or {width, layers, heads, hidden}.
        length, branches, vocab, code_dim: of the codes; one branch. `code_dim` is the width of a code vector, for rear.
        label_drop: how often the class is hidden in training, for classifier-free guidance.
        dropout, attention_dropout: in training. The latter keeps attention from using its fused kernel, see
            core.nn.attention.
        permute: [start, end] as shares of the run: before `start` every sample is trained in a random order, from `end`
            on all in raster order, in between fewer and fewer. null: always raster order.
        rear: reAR's regularisers, see generator.ar.rear.Settings; {} for the published ones, null for none.
        spare_rows: rows of both tables of positions beyond those of the codes: two are the class's and the first code's, the
            others are never looked at. 1024 in the released files.
    """

    models = Codes
    usual_heed = USUAL_HEED

    def __init__(
        self,
        *,
        size: str | Annotated[dict, Size] = "b",
        length: Count = 256,
        branches: Count = 1,
        vocab: Count = 1024,
        code_dim: Width = 256,
        num_classes: Count = 1000,
        label_drop: Share = 0.1,
        dropout: Rate = 0.1,
        attention_dropout: Rate = 0.1,
        permute: list[Share] | None = None,
        rear: Annotated[dict, rear_module.Settings] | None = None,
        spare_rows: Annotated[int, Limits(low=2)] = EXTRA_POSITIONS,
    ):
        super().__init__()
        self.size = sizes.pick(size, Size, SIZES)
        self.length, self.vocab, self.num_classes, self.label_drop = length, vocab, num_classes, label_drop
        self.drops = max(dropout, attention_dropout) > 0
        if branches != 1:
            raise UserError(
                f"generator.branches is {branches}: RAR models one code per position. FAR takes any number, and "
                "reAR's regularisers too (generator.rear)."
            )
        if permute is not None and (len(permute) != 2 or not 0 <= permute[0] <= permute[1]):
            raise UserError(f"generator.permute: expected [start, end] as shares of the run, got {permute}.")
        self.permute, self.spare_rows = permute, spare_rows
        self.rear = rear_module.settings(rear, self.size.layers)

        width = self.size.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # Rows: codes, the mask code, classes, no class.
        self.embeddings = nn.Embedding(vocab + 1 + num_classes + 1, width)
        self.pos_embed = nn.Parameter(torch.empty(1, length + spare_rows, width))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, length + spare_rows, width))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, length + EXTRA_SLOTS, width))
        self.blocks = nn.ModuleList(Block(self.size, dropout, attention_dropout) for _ in range(self.size.layers))
        self.adaln_before_head = FinalNorm(width)
        self.lm_head = Linear(width, vocab)
        self.alignment = self.make_alignment(width, code_dim, 1)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.trunc_normal_(table, std=0.02)
        for module in (*self.blocks, self.adaln_before_head):
            nn.init.zeros_(module.adaLN_modulation[1].weight)

    def no_weight_decay(self) -> set[str]:
        """By the official rule on names. It spares adaln_before_head, whose name contains "ln", but not the blocks'
        adaLN_modulation and not cls_token."""
        words = ("ln", "bias", "embedding", "norm", "embed")
        return {name for name, p in self.named_parameters() if p.ndim < 2 or any(word in name for word in words)}

    def class_rows(self) -> tuple[str, int]:
        return "embeddings.weight", self.vocab + 1

    def resized(self, state: State, settings: Mapping[str, Any], spec: LatentSpec) -> State:
        """Both tables of positions like pictures (two rows before the codes', spare ones after them); the one of steps,
        which run through the sequence, along its line."""
        before = state["timesteps_embeddings"].shape[1] - EXTRA_SLOTS
        if before == self.length:
            return state
        if not spec.grid:
            raise UserError(
                f"RAR learnt the places of {before} codes and the tokenizer gives {self.length} that lie on no grid: these "
                "cannot be resized. Train a new generator, or take a tokenizer with as many codes."
            )
        state = dict(state)
        for name in ("pos_embed", "target_aware_pos_embed"):
            spare = state[name].shape[1] - before - 2
            state[name] = resize_rows(state[name], spec.grid, 2, spare)
        steps = state["timesteps_embeddings"]
        first, codes, spare = steps.split((2, before, EXTRA_SLOTS - 2), dim=1)
        line = F.interpolate(codes.float().transpose(1, 2), self.length, mode="linear", align_corners=True)
        state["timesteps_embeddings"] = torch.cat((first, line.transpose(1, 2).to(steps.dtype), spare), dim=1)
        return state

    def fits(self, spec: LatentSpec) -> list[str]:
        if not isinstance(spec, self.models):
            return [f"RAR models sequences of codes, the tokenizer gives {spec}"]
        if spec.branches != 1:
            return [f"RAR models one code per position, the tokenizer gives {spec.branches}: use FAR"]
        return mismatches(self, spec, "vocab", "length")

    # -- the network --------------------------------------------------------------------------------------------------
    def condition_ids(self, labels: Tensor) -> Tensor:
        """Rows of `embeddings` for labels; label `num_classes` means no class."""
        return labels + self.vocab + 1

    def slots(self, codes: Tensor, labels: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Input and condition of every slot, (B, n + 2, D) each, from the first n codes (B, n) in `order`.

        Args:
            order: (B, N) place of the p-th code; None for raster order.
        """
        batch, known = codes.shape
        class_token = self.embeddings(self.condition_ids(labels))[:, None]  # (B, 1, D)
        x = torch.cat((self.cls_token.expand(batch, -1, -1), class_token, self.embeddings(codes)), dim=1)
        targets = min(known + 1, self.length)  # slots 1 ... targets predict something
        if order is None:
            x = x + self.pos_embed[:, : known + 2]
            target = self.target_aware_pos_embed[:, 2 : 2 + targets]
        else:
            x = x + torch.cat(
                (self.pos_embed[:, :2].expand(batch, -1, -1), self.pos_embed[0, 2 + order[:, :known]]), dim=1
            )
            target = self.target_aware_pos_embed[0, 2 + order[:, :targets]]
        x = x + F.pad(target, (0, 0, 1, known + 1 - targets))
        return x, class_token + self.timesteps_embeddings[:, : known + 2]

    def logits(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V) fp32."""
        return self.lm_head(self.adaln_before_head(x, condition)).float()

    # -- training -----------------------------------------------------------------------------------------------------
    def drop_labels(self, labels: Tensor, draws: Draws) -> Tensor:
        return torch.where(draws.uniform("label_drop") < self.label_drop, self.num_classes, labels)

    def orders(self, batch: int, draws: Draws, ratio: float) -> Tensor | None:
        """(B, N) orders of which a share `ratio` is random and the rest raster; None when all are raster."""
        if ratio == 0:
            return None
        permuted = draws.uniform("order") < ratio  # (B,)
        raster = torch.arange(self.length, device=permuted.device).expand(batch, -1)
        return torch.where(permuted[:, None], draws.uniform("permutation", (self.length,)).argsort(-1), raster)

    def forward(self, latents: Tensor, labels: Tensor, draws: Draws, progress: Progress | None = None) -> Loss:
        """Cross-entropy of every code, plus reAR's alignment; the share of codes that are the likeliest is logged."""
        codes, selected, order = latents, None, None  # (B, N, 1)
        if self.permute is not None:
            order = self.orders(len(labels), draws, annealed(progress, *self.permute))
            codes = codes if order is None else codes.gather(1, order[..., None])
        context, selected = self.context(codes, draws, progress, mask_code=self.vocab)
        keys = draws.keys("dropout") if self.training and self.drops else None
        taps = self.taps()
        x, condition = self.slots(context[..., 0], self.drop_labels(labels, draws), order)
        x = run_blocks(self.blocks, x, condition, keys, taps)
        logits = self.logits(x[:, 1:-1], condition[:, 1:-1])  # (B, N, V)
        ce = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        accuracy = (logits.argmax(-1) == codes[..., 0]).float().mean()
        return self.training_loss(ce, {"accuracy": accuracy}, taps, 1, codes, selected)

    # -- sampling -----------------------------------------------------------------------------------------------------
    @uncompiled
    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        draws: Draws,
        guidance: Guidance = Guidance(),
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        *,
        kept: Kept | None = None,
        on_codes: Callable[[Tensor], None] | None = None,
        cached: bool = True,
        static: bool | None = None,
        trace: list | None = None,
    ) -> Tensor:
        """Codes (B, N, 1), in raster order.

        Args:
            guidance: parity: a scale between 0 and 1 mixes; 0 is none.
            temperature, top_k, top_p: 1, 0 and 0 (or 1) do nothing, temperature 0 is greedy.
            kept: see core.specs.Kept. A network trained in all orders (`permute`) takes what all samples keep first, so
                that every other code is drawn by all of it; otherwise the order stays raster.
            on_codes: called with the codes so far, (B, t, 1), when t of them are there, in raster order alone.
            cached: False computes the whole sequence anew for every code, as a reference.
            static: fixed shapes, so that a step is one CUDA graph; default on a GPU.
            trace: see CodeSampler.
        """
        device, length = labels.device, self.length
        chosen = filters(1, temperature, top_k, top_p)
        order = None
        if kept is not None and self.permute is not None:
            order = (~kept.mask.all(0)).to(device).int().argsort(stable=True)  # (N,) place of the p-th code
            kept = Kept(kept.values.to(device)[:, order], kept.mask.to(device)[:, order], kept.heed)
        batch = len(labels)
        labels, draws, kept = with_streams(labels, draws, kept)
        sampler = CodeSampler(labels, length, chosen, draws, guidance.mixing(), trace, kept)
        both = sampler.labels(labels, torch.full_like(labels, self.num_classes))
        codes = torch.zeros(len(labels), length, dtype=torch.int64, device=device)
        if not cached:
            for index in range(length):
                places = None if order is None else order.expand(len(both), -1)
                x, condition = self.slots(sampler.double(codes[:, :index]), both, places)
                x = run_blocks(self.blocks, x, condition)[:, -1:]
                logits = self.logits(x, condition[:, -1:])[:, 0]
                codes[:, index] = sampler(logits, torch.full((1,), index, device=device))
            return sampler.mark(raster(codes, order)[..., None])[:batch]
        static = device.type == "cuda" if static is None else static
        weights = self.weights(self.lm_head.weight)
        classes, rows = distinct(labels, self.num_classes)  # adaptive norms depend on class and slot alone
        if sampler.guided:
            rows = torch.cat((rows, torch.full_like(rows, len(classes))))
            classes = torch.cat((classes, classes.new_full((1,), self.num_classes)))
        with no_autocast(labels):
            decoding = self.kept(
                (sampler.settings(), len(classes), order is None, static, device),
                lambda: Decoding(self, weights, sampler, len(classes), static, order),
            )
            if order is not None:
                decoding.positions.copy_(decoding.positions_of(self, order))
            slots = decoding.slots[: len(labels)]
            arrived = on_codes if order is None else None
            decoding.run(both, classes, rows, sampler, arrived and (lambda end: arrived(slots[:, 2 : end + 1, None])))
            return decoding.sampler.mark(raster(decoding.slots[: len(labels), 2:], order)[..., None])[:batch]

    def heeds(self) -> str:
        if self.permute is not None:
            return "The kept codes come first, an order that the network knows from the earlier part of its training."
        return (
            "The network knows one order, row by row: what is kept below a masked place, or to the right of it in its row, "
            "is not yet seen when that place is drawn."
        )


def raster(codes: Tensor, order: Tensor | None) -> Tensor:
    """Codes (B, N) of the places `order` (N,), put at their places."""
    return codes if order is None else codes[:, order.argsort()]


def distinct(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """(U,) different labels, and which of them each one is.

    On a CPU, where looking at labels costs nothing; elsewhere all count as different, so that U depends on the size of
    the batch alone and nothing waits for the device.
    """
    if labels.device.type != "cpu":
        return labels, torch.arange(len(labels), device=labels.device)
    classes, rows = labels.unique(return_inverse=True)
    if int(classes[0]) < 0 or int(classes[-1]) > num_classes:
        raise UserError(f"labels lie in 0..{num_classes - 1} ({num_classes} is no class), got {labels.tolist()}")
    return classes, rows


class Decoding:
    """What RAR keeps between calls of `sample` with as many samples and the same settings.

    The stream is fp32 (that of the embeddings), as under autocast; what products read is in their precision.

    Args:
        weights: the network's, in the precision of the products.
        sampler: whose tensors are refilled by `run`.
        classes: U, how many different ones a batch has.
        order: (N,) the place of the p-th code; None: raster. With one `positions` is written anew for every batch.
    """

    def __init__(
        self,
        model: RAR,
        weights: Weights,
        sampler: CodeSampler,
        classes: int,
        static: bool,
        order: Tensor | None = None,
    ):
        self.sampler = sampler
        self.blocks, self.lm_head = weights.copy(model.blocks), weights.copy(model.lm_head)
        last = nn.LayerNorm(model.size.width, eps=1e-6, elementwise_affine=False)
        self.norms = [*(block.norm1 for block in self.blocks), last]  # the last one is that of the head
        self.first_class, self.length = model.vocab + 1, model.length
        device, rows = sampler.noise.device, sampler.noise.shape[0] * (2 if sampler.guided else 1)
        # The learned token is one more row of the table.
        self.embeddings = weights.derive("embeddings", lambda: torch.cat((model.embeddings.weight, model.cls_token[0])))
        if order is None:
            self.positions = weights.derive("positions", lambda: Decoding.positions_of(model))
        else:
            self.positions = self.positions_of(model, order)
        self.affine = [
            weights.derive(f"affine {index}", functools.partial(self._affine, block.attn))
            for index, block in enumerate(model.blocks)
        ]
        self.ahead = Modulations(model, weights, classes, rows)
        size = model.size
        self.cache = KVCache(
            size.layers,
            rows,
            size.heads,
            model.length + 1,
            size.width // size.heads,
            device=device,
            dtype=weights.dtype,
            static=static,
            masked=not fuses(device),
        )
        # What lies in slot 0, slot 1 and so on, as rows of `embeddings`; code p is in slot p + 2.
        self.slots = torch.zeros(rows, model.length + 2, dtype=torch.int64, device=device)
        self.step = Recordings(weak_method(self, Decoding._step), self.cache)

    @staticmethod
    def positions_of(model: RAR, order: Tensor | None = None) -> Tensor:
        """(N + 1, D): what is added to the input of every slot that predicts or comes before."""
        if order is None:
            target, places = slice(2, 2 + model.length), slice(0, model.length + 1)
        else:
            target, places = 2 + order, F.pad(2 + order[:-1], (2, 0))
            places[1] = 1
        return model.pos_embed[0, places] + F.pad(model.target_aware_pos_embed[0, target], (0, 0, 1, 0))

    @staticmethod
    def _affine(attention: Attention) -> Tensor:
        """(2, 2 heads, d): weight and bias of the norms of queries and keys."""
        pairs = [torch.stack((norm.weight, norm.bias)) for norm in (attention.q_norm, attention.k_norm)]
        return torch.stack(pairs, dim=1).repeat_interleave(attention.heads, dim=1)

    def run(
        self,
        labels: Tensor,
        classes: Tensor,
        rows: Tensor,
        sampler: CodeSampler,
        after: Callable[[int], None] | None = None,
    ) -> None:
        """A whole batch: labels (2B,) or (B,), and their `distinct` classes. `after`: see generator.ar.decode.decode."""
        if sampler is not self.sampler:
            self.sampler.refill(sampler)
        self.slots[:, 0] = len(self.embeddings) - 1
        self.slots[:, 1] = labels + self.first_class
        self.ahead.begin(F.embedding(classes + self.first_class, self.embeddings), rows)
        for first in range(0, self.length + 1, self.ahead.capacity):
            last = min(first + self.ahead.capacity, self.length + 1)
            self.ahead.fill(first, last)
            if first == 0:  # the learned token predicts nothing
                self.cache.seek(0)
                self._advance()
            decode(self.step, max(first, 1), last, after)

    def _advance(self) -> Tensor:
        """The slot at the cache's position through all blocks: (2B, D), normalised and modulated for the head."""
        slot = self.cache.position
        known = self.slots.index_select(1, slot)[:, 0]  # (2B,)
        x = F.embedding(known, self.embeddings) + self.positions.index_select(0, slot)
        modulations = [rows.chunk(6, dim=-1) for rows in self.ahead(slot)]  # of every block and the head, (2B, D) each
        shift, factor = modulations[0][:2]
        h = gated_norm(x, shift, factor, self.norms[0])
        layers = self.cache.open()
        for block, affine, layer, modulation, after, norm in zip(
            self.blocks, self.affine, layers, modulations, modulations[1:], self.norms[1:]
        ):
            gate1, shift2, factor2, gate2 = modulation[2:]
            h = gated_norm(x, shift2, factor2, block.norm2, gate1, decode_attention(block.attn, h, affine, layer))
            h = gated_norm(x, after[0], after[1], norm, gate2, block.mlp(h))
        return h

    def _step(self) -> None:
        logits = self.lm_head(self._advance()).float()
        slot = self.cache.position
        chosen = self.sampler(logits, slot - 1)
        self.slots.index_copy_(1, slot + 1, self.sampler.double(chosen)[:, None])


def decode_attention(attention: Attention, x: Tensor, affine: Tensor, layer: LayerCache) -> Tensor:
    """Attention from one new slot, in few kernels: x (R, D) in the precision of the products."""
    heads = attention.qkv(x).unflatten(-1, (-1, attention.head_dim))
    return attention.proj(attend(heads, layer, attention.scale, affine, attention.q_norm.eps))


class Modulations:
    """Shifts, scales and gates of all blocks for a range of slots, computed ahead: large matrix products instead of one
    small one per step, once per class instead of once per sample. The tables stay where they are: what reads them can be
    recorded.

    Args:
        classes: U, how many different labels there are.
        rows: 2B, of the batch.
    """

    def __init__(self, model: RAR, weights: Weights, classes: int, rows: int):
        self.layers = [weights.copy(block.adaLN_modulation[1]) for block in model.blocks]
        self.last = weights.copy(model.adaln_before_head.adaLN_modulation[1])
        self.steps, width, device = model.timesteps_embeddings, model.size.width, model.lm_head.weight.device
        per_slot = classes * 6 * width * (len(self.layers) + 1) * weights.dtype.itemsize
        self.capacity = max(1, min(model.length + 1, MODULATION_BYTES // per_slot))  # slots
        self.classes, self.dtype = classes, weights.dtype
        self.tables = torch.empty(
            len(self.layers) + 1, self.capacity * classes, 6 * width, dtype=weights.dtype, device=device
        )
        self.rows = torch.zeros(rows, dtype=torch.int64, device=device)
        self.places = torch.zeros(model.length + 1, rows, dtype=torch.int64, device=device)  # in a table, of every slot
        self.slots = torch.arange(model.length + 1, device=device)[:, None]
        self.plus_one = torch.zeros(6, width, device=device)
        self.plus_one[1::3] = 1  # shift, scale, gate, twice

    def begin(self, embedded: Tensor, rows: Tensor) -> None:
        """The batch's classes, (U, D) embedded, and which of them (2B,) each row has."""
        self.condition = embedded
        self.rows.copy_(rows)

    def fill(self, first: int, last: int) -> None:
        """Slots first ... last - 1."""
        count = (last - first) * self.classes
        torch.add(self.rows, self.slots - first, alpha=self.classes, out=self.places)
        x = self.steps[0, first:last, None] + self.condition  # (n, U, D)
        x = F.silu(x).flatten(0, 1).to(self.dtype)
        for table, layer in zip(self.tables, self.layers):
            torch.add(layer(x), self.plus_one.flatten(), out=table[:count])
        # parity: the head's scale comes first, in the blocks the shift; in the table always the shift.
        factor, shift = (self.last(x) + self.plus_one[:2].flip(0).flatten()).chunk(2, dim=-1)
        torch.cat((shift, factor), dim=-1, out=self.tables[-1, :count, : shift.shape[-1] * 2])

    def __call__(self, slot: Tensor) -> Tensor:
        """(layers + 1, 2B, 6 D): of every block, and of the head in the first 2 D of the last; `slot` (1,) int64."""
        return self.tables.index_select(1, self.places.index_select(0, slot)[0])
